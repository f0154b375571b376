"""The GGUF reader: what it reads, and every way in which a file can lie. Hostile files are written byte by byte."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import ARRAY, STRING, U32, header, pair, tensor, text, with_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vkllm.errors import FileFormatError, UnsupportedQuantError, VkllmError
from vkllm.files import TYPES, GGUFFile, packaged_models, resolve_model


def sound(version: int = 3) -> bytes:
    """Two pairs and two tensors: F32 [4, 8] and F16 [16]."""
    head = header(2, 2, version) + pair("general.architecture", STRING, text("llama")) + pair("n", U32, struct.pack("<I", 7))
    return with_data(head + tensor("a", (8, 4), 0, 0) + tensor("b", (16,), 1, 128))


DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "short magic": (b"GG", "magic"),
    "wrong magic": (b"GGML" + sound()[4:], "expected b'GGUF'"),
    "version 1": (header(0, 0, 1), "version 1"),
    "version 99": (header(0, 0, 99), "version 99"),
    "big-endian": (header(0, 0, 3, order=">"), "big-endian"),
    "no counts": (b"GGUF" + struct.pack("<I", 3), "needs 8 bytes"),
    "absurd tensor count": (header(1 << 60, 0) + bytes(64), "tensor count"),
    "absurd pair count": (header(0, 1 << 63) + bytes(64), "metadata count"),
    "absurd key length": (header(0, 1) + struct.pack("<Q", 1 << 62) + bytes(64), "limit"),
    "absurd string": (header(0, 1) + pair("k", STRING, struct.pack("<Q", (1 << 64) - 1)) + bytes(32), "more"),
    "absurd array": (header(0, 1) + pair("k", ARRAY, struct.pack("<IQ", U32, 1 << 61)) + bytes(32), "can hold"),
    "absurd string array": (header(0, 1) + pair("k", ARRAY, struct.pack("<IQ", STRING, 1 << 61)) + bytes(32), "can hold"),
    "string in array past the end": (
        header(0, 1) + pair("k", ARRAY, struct.pack("<IQ", STRING, 1) + struct.pack("<Q", 1 << 40)) + bytes(32),
        "past the end",
    ),
    "nested array": (header(0, 1) + pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1)) + bytes(32), "array of arrays"),
    "unknown element type": (header(0, 1) + pair("k", ARRAY, struct.pack("<IQ", 77, 1)) + bytes(32), "unknown type 77"),
    "unknown value type": (header(0, 1) + pair("k", 13, bytes(32)), "value type 13"),
    "key not UTF-8": (header(0, 1) + pair(b"\xff\xfe", U32, bytes(4)), "not UTF-8"),
    "empty key": (header(0, 1) + pair("", U32, bytes(4)), "empty"),
    "key twice": (header(0, 2) + pair("k", U32, bytes(4)) * 2, "twice"),
    "alignment 0": (header(0, 1) + pair("general.alignment", U32, bytes(4)), "power of two"),
    "alignment 48": (header(0, 1) + pair("general.alignment", U32, struct.pack("<I", 48)), "power of two"),
    "alignment a string": (header(0, 1) + pair("general.alignment", STRING, text("32")), "power of two"),
    "tensor twice": (with_data(header(2, 0) + tensor("a", (8,), 0, 0) + tensor("a", (8,), 0, 32)), "twice"),
    "tensor name not UTF-8": (with_data(header(1, 0) + text(b"\xc3") + struct.pack("<IQIQ", 1, 8, 0, 0)), "not UTF-8"),
    "tensor name too long": (with_data(header(1, 0) + tensor("x" * 65, (8,), 0, 0)), "limit is 64"),
    "no dimension": (with_data(header(1, 0) + tensor("a", (), 0, 0)), "0 dimensions"),
    "five dimensions": (with_data(header(1, 0) + tensor("a", (1,) * 5, 0, 0)), "5 dimensions"),
    "dimension 0": (with_data(header(1, 0) + tensor("a", (8, 0), 0, 0)), "impossible shape"),
    "size overflow": (with_data(header(1, 0) + tensor("a", (1 << 32, 1 << 32, 1 << 32), 0, 0)), "impossible shape"),
    "too large": (with_data(header(1, 0) + tensor("a", (1 << 40,), 0, 0)), "the file has"),
    "ragged blocks": (with_data(header(1, 0) + tensor("a", (33,), 8, 0)), "multiples of 32"),
    "misaligned": (with_data(header(1, 0) + tensor("a", (8,), 0, 8)), "alignment"),
    "offset past the end": (with_data(header(1, 0) + tensor("a", (8,), 0, 1 << 20)), "the file has"),
    "offset overflow": (with_data(header(1, 0) + tensor("a", (8,), 0, (1 << 64) - 32)), "the file has"),
    "overlap": (with_data(header(2, 0) + tensor("a", (16,), 0, 0) + tensor("b", (8,), 0, 32)), "overlap"),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def save(data: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return path

    return save


@pytest.mark.parametrize("version", [2, 3])
def test_reads_what_is_written(write: Callable[[bytes], Path], version: int) -> None:
    with GGUFFile.open(write(sound(version))) as file:
        assert file.version == version
        assert dict(file.metadata) == {"general.architecture": "llama", "n": 7}
        a, b = file.tensors.values()
        assert (a.name, a.shape, a.type, a.nbytes) == ("a", (4, 8), "F32", 128)
        assert b.offset - a.offset == 128 and a.offset % 32 == 0
        rows = file.data("a")
        assert rows.shape == (4, 32) and not rows.flags.writeable
        assert rows.reshape(-1).tolist() == list(range(128))
        file.release("a")
        assert rows[3, 31] == 127
        assert file.data("b").shape == (1, 32)


def test_views_outlive_the_file(write: Callable[[bytes], Path]) -> None:
    file = GGUFFile.open(write(sound()))
    rows = file.data("a")
    file.close()
    assert rows[0, 5] == 5
    with pytest.raises(FileFormatError, match="closed"):
        file.data("a")


def test_a_missing_tensor_is_named(write: Callable[[bytes], Path]) -> None:
    with GGUFFile.open(write(sound())) as file, pytest.raises(FileFormatError, match=r"blk\.0"):
        file.data("blk.0.attn_q.weight")


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_a_typed_error(write: Callable[[bytes], Path], name: str) -> None:
    data, message = DAMAGE[name]
    path = write(data)
    tracemalloc.start()
    with pytest.raises(FileFormatError, match=message):
        GGUFFile.open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_every_truncation_is_a_typed_error(write: Callable[[bytes], Path]) -> None:
    whole = sound()
    need = len(whole) - 256 + 160  # to the end of the second tensor
    for n in range(need):
        with pytest.raises(FileFormatError):
            GGUFFile.open(write(whole[:n]))
    GGUFFile.open(write(whole[:need])).close()


@pytest.mark.parametrize("kind", [4, 5, 36, 1000])
def test_an_unknown_tensor_type_is_named(write: Callable[[bytes], Path], kind: int) -> None:
    with pytest.raises(UnsupportedQuantError, match=rf"odd\.weight has the unknown type {kind}"):
        GGUFFile.open(write(with_data(header(1, 0) + tensor("odd.weight", (8,), kind, 0))))


def test_no_file_is_a_typed_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(FileFormatError):
            GGUFFile.open(path)


def test_type_table_agrees_with_the_gguf_package() -> None:
    sizes = {t.name: size for t, size in gguf.GGML_QUANT_SIZES.items()}
    for t in TYPES.values():
        assert gguf.GGMLQuantizationType[t.name].value == t.id
        assert sizes[t.name] == (t.block_size, t.block_bytes)


def written_by_the_package(path: Path) -> bytes:
    """A file of the `gguf` package's writer: every kind of value, and quantized tensors."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int64("i64", -(1 << 40))
    writer.add_float32("f32", 0.5)
    writer.add_bool("flag", True)
    writer.add_string("text", "héllo")
    writer.add_array("words", ["a", "", "ĠĠ", "長い"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("floats", [0.5, -1.5])
    writer.add_tensor("w.f32", rng.standard_normal((3, 32), np.float32))
    for kind in ("Q8_0", "Q4_0", "BF16"):
        t = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"w.{kind}", gguf.quants.quantize(rng.standard_normal((2, 64), np.float32), t), raw_dtype=t)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_agrees_with_the_package(tmp_path: Path) -> None:
    path = tmp_path / "w.gguf"
    written_by_the_package(path)
    theirs = gguf.GGUFReader(path)
    with GGUFFile.open(path) as ours:
        m = ours.metadata
        assert (m["u8"], m["i64"], m["f32"], m["flag"], m["text"]) == (200, -(1 << 40), 0.5, True, "héllo")
        assert m["words"] == ["a", "", "ĠĠ", "長い"]
        assert np.asarray(m["numbers"]).tolist() == [1, 2, 3] and np.asarray(m["floats"]).tolist() == [0.5, -1.5]
        assert set(ours.tensors) == {t.name for t in theirs.tensors}
        for t in theirs.tensors:
            info = ours.tensors[t.name]
            assert info.shape == tuple(reversed(t.shape.tolist())) and info.type == t.tensor_type.name
            assert info.offset == t.data_offset and ours.data(t.name).tobytes() == t.data.tobytes()


INTERESTING = [0, 1, 2, 31, 32, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 63), (1 << 64) - 1]


@pytest.fixture(scope="module")
def seed_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("fuzz")
    return folder / "mutant.gguf", written_by_the_package(folder / "seed.gguf")


def mutate(draw: st.DataObject, data: bytearray) -> None:
    at = draw.draw(st.integers(0, len(data) - 1))
    match draw.draw(st.sampled_from(["byte", "word", "long", "cut", "drop", "insert"])):
        case "byte":
            data[at] = draw.draw(st.integers(0, 255))
        case "word":
            data[at : at + 4] = struct.pack("<I", draw.draw(st.sampled_from(INTERESTING)) & 0xFFFFFFFF)
        case "long":
            data[at : at + 8] = struct.pack("<Q", draw.draw(st.sampled_from(INTERESTING)))
        case "cut":
            del data[max(at, 1) :]
        case "drop":
            del data[at : at + draw.draw(st.integers(1, 16))]
        case _:
            data[at:at] = draw.draw(st.binary(min_size=1, max_size=16))


@settings(max_examples=500, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data(), n=st.integers(1, 4))
def test_fuzz_gives_only_typed_errors(seed_file: tuple[Path, bytes], draw: st.DataObject, n: int) -> None:
    path, seed = seed_file
    data = bytearray(seed)
    for _ in range(n):
        if data:
            mutate(draw, data)
    path.write_bytes(data)
    try:
        file = GGUFFile.open(path)
    except VkllmError:
        return
    with file:
        for t in file.tensors.values():
            assert file.data(t.name).nbytes == t.nbytes <= len(data)
            file.release(t.name)


def test_opens_a_large_vocabulary_quickly(shared_data: Path) -> None:
    """0.15 s on a quiet machine; ten times that is allowed on a busy one."""
    import time

    started = time.perf_counter()
    with GGUFFile.open(shared_data / "vocab" / "ggml-vocab-qwen2.gguf") as file:
        assert len(file.metadata["tokenizer.ggml.tokens"]) == 151936  # type: ignore[arg-type]
    assert time.perf_counter() - started < 1.5


def test_resolve_model(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(sound())
    assert resolve_model(path) == path and resolve_model(str(path)) == path
    for name, packaged in packaged_models().items():
        assert resolve_model(name) == packaged
    with pytest.raises(FileFormatError, match=r"nothing\.gguf"):
        resolve_model("nothing.gguf")
