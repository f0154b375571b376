"""safetensors: what it reads, and every way in which a header can lie."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_folders import random, raw_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from vkllm.errors import FileFormatError
from vkllm.files.huggingface.safetensors import SafetensorsFile

A = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}


def entry(dtype: str = "F32", shape: Any = (8,), begin: Any = 0, end: Any = 32) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def header(**tensors: Any) -> dict[str, Any]:
    return tensors


DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "too short": (b"\x10\0\0", "too few"),
    "header bomb": (raw_safetensors(b"{}", 64, length=(1 << 64) - 1), "limit is 100000000"),
    "header over the limit": (raw_safetensors(b"{}", 64, length=100_000_001), "limit is 100000000"),
    "header over the file": (raw_safetensors(b"{}", 64, length=4096), "header of 4096 bytes in a file of 74: .*half-finished"),
    "no JSON": (raw_safetensors(b"hello"), "not JSON"),
    "not UTF-8": (raw_safetensors(b'{"\xff\xfe": 1}'), "not JSON"),
    "a list": (raw_safetensors([]), "JSON list"),
    "deep": (raw_safetensors(b"[" * 200_000), "nested too deeply"),
    "endless integer": (raw_safetensors(b'{"a": ' + b"9" * 10_000 + b"}"), "not JSON"),
    "name twice": (
        raw_safetensors(b'{"a": %s, "a": %s}' % ((b'{"dtype":"F32","shape":[8],"data_offsets":[0,32]}',) * 2), 32),
        "twice",
    ),
    "entry no object": (raw_safetensors(header(a=3)), "tensor a lacks"),
    "no dtype": (raw_safetensors(header(a={"shape": [8], "data_offsets": [0, 32]}), 32), "tensor a lacks"),
    "unknown dtype": (raw_safetensors(header(a=entry("F128")), 32), "unknown type 'F128'"),
    "dtype a list": (raw_safetensors(header(a=A | {"dtype": []}), 32), "unknown type"),
    "shape no list": (raw_safetensors(header(a=entry(shape=8)), 32), "impossible shape"),
    "negative shape": (raw_safetensors(header(a=entry(shape=(-2, -4))), 32), "impossible shape"),
    "fractional shape": (raw_safetensors(header(a=entry(shape=(8.0,))), 32), "impossible shape"),
    "boolean shape": (raw_safetensors(header(a=entry(shape=(True, 8))), 32), "impossible shape"),
    "shape overflow": (raw_safetensors(header(a=entry(shape=(1 << 32, 1 << 32, 1 << 32))), 32), "impossible shape"),
    "too many dimensions": (raw_safetensors(header(a=entry(shape=(1,) * 9, end=4)), 4), "impossible shape"),
    "offsets negative": (raw_safetensors(header(a=entry(begin=-32, end=0)), 32), "impossible data_offsets"),
    "offsets reversed": (raw_safetensors(header(a=entry(begin=32, end=0)), 32), "impossible data_offsets"),
    "three offsets": (raw_safetensors(header(a=A | {"data_offsets": [0, 16, 32]}), 32), "impossible data_offsets"),
    "wrong size": (raw_safetensors(header(a=entry("F16")), 32), "needs 16 bytes; its data_offsets give 32"),
    "half a byte": (raw_safetensors(header(a=entry("F4", (3,), 0, 1)), 1), "needs 2 bytes"),
    "past the end": (raw_safetensors(header(a=A), 31), "half-finished"),
    "far past the end": (raw_safetensors(header(a=entry("U8", (1 << 40,), 0, 1 << 40)), 32), "half-finished"),
    "overlap": (raw_safetensors(header(a=A, b=entry(begin=16, end=48)), 48), "a and b overlap"),
    "same place": (raw_safetensors(header(a=A, b=A), 32), "overlap"),
    "gap": (raw_safetensors(header(a=A, b=entry(begin=64, end=96)), 96), "a and b leave a gap"),
    "gap at the start": (raw_safetensors(header(a=entry(begin=32, end=64)), 64), "header and a leave a gap"),
    "bytes left": (raw_safetensors(header(a=A), 40), "8 bytes follow"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_a_typed_error(tmp_path: Path, name: str) -> None:
    data, message = DAMAGE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(FileFormatError, match=message) as error:
        SafetensorsFile.open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.name in error.value.message and error.value.hint and peak < 4 << 20


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {"a": random((3, 5), 1), "b": random((7,), 2, "float16"), "c": np.arange(6, dtype=np.uint8).reshape(1, 2, 3)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "np"})
    file = SafetensorsFile.open(tmp_path / "x.safetensors")
    assert set(file.tensors) == set(tensors)
    for name, values in tensors.items():
        stored, data = file.tensors[name], file.data(name)
        assert stored.shape == values.shape and data.tobytes() == values.tobytes() and not data.flags.writeable
    view = file.data("a")
    file.release("a")
    file.close()
    assert view.tobytes() == tensors["a"].tobytes()
    with pytest.raises(FileFormatError, match="closed"):
        file.data("a")


def test_every_truncation_is_a_typed_error(tmp_path: Path) -> None:
    save_file({"a": random((3, 5), 1)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for n in range(len(whole)):
        (tmp_path / "x.safetensors").write_bytes(whole[:n])
        with pytest.raises(FileFormatError):
            SafetensorsFile.open(tmp_path / "x.safetensors")


@settings(max_examples=200, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_fuzz_gives_only_typed_errors(tmp_path: Path, draw: st.DataObject) -> None:
    data = bytearray(raw_safetensors(header(a=A, b=entry("BF16", (2, 3), 32, 44), __metadata__={"format": "pt"}), 44))
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(data) - 1))
        data[at] = draw.draw(st.integers(0, 255))
    if draw.draw(st.booleans()):
        data[:8] = struct.pack("<Q", draw.draw(st.integers(0, 300)))
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    try:
        file = SafetensorsFile.open(path)
    except FileFormatError:
        return
    assert all(file.data(name).nbytes == t.nbytes for name, t in file.tensors.items())
    file.close()
