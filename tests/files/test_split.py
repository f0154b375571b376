"""Split GGUF files: any part opens the whole; parts that do not belong together are refused by name."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import I32, STRING, U16, header, pair, tensor, text, with_data

from vkllm.errors import FileFormatError
from vkllm.files import GGUFFile, SplitGGUF, open_model

NAMES = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")


def part(no: int, name: str, count: int = 2, n_tensor: int = 2, pairs: bytes = b"", n_pair: int = 0) -> bytes:
    """One part with one F32 [8, 8] tensor; its values are those of `with_data`, plus `no`."""
    head = (
        header(1, 3 + n_pair) + pair("split.no", U16, struct.pack("<H", no)) + pair("split.count", U16, struct.pack("<H", count))
    )
    head += pair("split.tensors.count", I32, struct.pack("<i", n_tensor)) + pairs
    return with_data(head + tensor(name, (8, 8), 0, 0))


def arch(name: str) -> dict[str, object]:
    return {"pairs": pair("general.architecture", STRING, text(name)), "n_pair": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / NAMES[0]).write_bytes(part(0, "a", **arch("llama")))  # type: ignore[arg-type]
    (tmp_path / NAMES[1]).write_bytes(part(1, "b"))
    return tmp_path


@pytest.mark.parametrize("name", [*NAMES, ""])
def test_any_part_opens_the_whole(folder: Path, name: str) -> None:
    with open_model(folder / name) as file:
        assert isinstance(file, SplitGGUF) and file.format == "GGUF v3, 2 files"
        assert dict(file.metadata) == {"general.architecture": "llama"}  # as if it had never been split
        assert list(file.tensors) == ["a", "b"] and file.nbytes == sum(p.stat().st_size for p in folder.iterdir())
        assert file.data("a").shape == (8, 32) and not file.data("b").flags.writeable
        file.release("b")
        assert file.data("b")[7, 31] == 255
        with pytest.raises(FileFormatError, match="no tensor c"):
            file.data("c")
    with pytest.raises(FileFormatError, match="closed"):
        file.data("b")


def test_a_single_file_is_not_split(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "single.gguf"
    path.write_bytes(part(0, "a", count=1, n_tensor=1))
    with open_model(path) as file:
        assert isinstance(file, GGUFFile)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing part": (lambda f: (f / NAMES[1]).unlink(), r"m-00002-of-00002\.gguf is missing: part 2 of 2"),
    "other count": (lambda f: _write(f, 1, part(1, "b", count=3)), r"m-00002-of-00002\.gguf: split.count is 3; its name says 2"),
    "no split keys": (lambda f: _write(f, 1, with_data(header(1, 0) + tensor("b", (8, 8), 0, 0))), "split.count is None"),
    "order": (lambda f: _write(f, 1, part(0, "b")), r"m-00002.*split.no is 0; expected 1"),
    "another model's tensors": (lambda f: _write(f, 1, part(1, "b", n_tensor=9)), "m-00002.*split.tensors.count is 9, but 2"),
    "another architecture": (lambda f: _write(f, 1, part(1, "b", **arch("qwen2"))), r"m-00002.*'qwen2', unlike m-00001"),  # type: ignore[arg-type]
    "tensor in two parts": (lambda f: _write(f, 1, part(1, "a")), "tensor a is in m-00001-of-00002.gguf and in m-00002"),
    "tensors missing": (lambda f: [_write(f, i, part(i, "ab"[i], n_tensor=3)) for i in (0, 1)] and None, "promises 3 .* hold 2"),
    "damaged part": (lambda f: _write(f, 1, b"GGUF"), "version"),
}


def _write(folder: Path, index: int, data: bytes) -> None:
    (folder / NAMES[index]).write_bytes(data)


@pytest.mark.parametrize("name", DAMAGE)
def test_parts_that_do_not_fit_are_refused(folder: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(FileFormatError, match=message) as error:
        open_model(folder / NAMES[0])
    assert error.value.hint


def test_a_renamed_part_is_refused(folder: Path) -> None:
    with pytest.raises(FileFormatError, match="does not say which"):
        open_model((folder / NAMES[0]).rename(folder / "renamed.gguf"))
    with pytest.raises(FileFormatError, match="part 3 of 2"):
        open_model((folder / NAMES[1]).rename(folder / "m-00003-of-00002.gguf"))


def test_agrees_with_the_package(tmp_path: Path) -> None:
    """A model that gguf-py splits is the one that it writes in one file."""
    rng = np.random.default_rng(2)
    tensors = {f"t{i}": rng.standard_normal((4, 8), np.float32) for i in range(5)}
    for split in (0, 2):
        writer = gguf.GGUFWriter(tmp_path / f"m{split}.gguf", "llama", split_max_tensors=split)
        writer.add_name("a model")
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with open_model(tmp_path / "m0.gguf") as whole, open_model(tmp_path / "m2-00002-of-00003.gguf") as parts:
        assert parts.metadata["general.name"] == whole.metadata["general.name"] and set(parts.tensors) == set(whole.tensors)
        assert all(np.array_equal(parts.data(name), whole.data(name)) for name in tensors)
