"""Compiled kernels on disk: read back as they were, never believed when damaged, never in the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vkllm import kernel_cache
from vkllm.kernel_cache import CompiledKernel, KernelCache, Recipe, write_archive
from vkllm_shaders.sample import SampleSpec, argmax


def get(folder: Path) -> CompiledKernel:
    return KernelCache(folder, folder / "kernels.zip").get(argmax, SampleSpec(lanes=8))


def test_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = get(tmp_path)
    monkeypatch.setattr(kernel_cache, "compiled", lambda kernel: pytest.fail("it was compiled again"))
    again = get(tmp_path)
    assert (again.name, again.push, again.features, again.code) == (first.name, first.push, first.features, first.code)
    assert [(b.name, b.kind, b.dtype, b.access) for b in again.bindings] == [
        (b.name, b.kind, b.dtype, b.access) for b in first.bindings
    ]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-4],
    "a bit of the code": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "a push constant elsewhere": lambda data: data.replace(b'"u32", 0]', b'"u32", 4]'),
    "another binding": lambda data: data.replace(b'"storage"', b'"texel"'),
    "other data": lambda data: b"null\nnull\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_replaced(tmp_path: Path, damage: str) -> None:
    right = get(tmp_path)
    (file,) = tmp_path.rglob("*.kernel")
    data = file.read_bytes()
    file.write_bytes(DAMAGES[damage](data))
    assert file.read_bytes() != data
    found = get(tmp_path)
    assert (found.push, found.code) == (right.push, right.code)
    assert [b.kind for b in found.bindings] == [b.kind for b in right.bindings]
    assert file.read_bytes() == data


def ship(folder: Path, kernel: CompiledKernel) -> Path:
    """An archive of several members: its kernel under its own key, and under others."""
    keys = [repr(Recipe(argmax, (SampleSpec(lanes=8),))), *map(str, range(20))]
    write_archive(folder / "kernels.zip", dict.fromkeys(keys, kernel))
    return folder / "kernels.zip"


def test_a_shipped_kernel_is_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = get(tmp_path / "first")
    archive = ship(tmp_path, kernel)
    again = ship(tmp_path / "first", kernel)
    assert archive.read_bytes() == again.read_bytes()
    monkeypatch.setattr(kernel_cache, "compiled", lambda kernel: pytest.fail("it was compiled again"))
    found = get(tmp_path)
    assert (found.name, found.push, found.features, found.code) == (kernel.name, kernel.push, kernel.features, kernel.code)
    archive.unlink()
    assert get(tmp_path).code == kernel.code, "it is in the user's cache now"


ARCHIVES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "of other sources": lambda data: data[:-64] + b"0" * 64,
    "cut": lambda data: data[:-100],
    "without members": lambda data: bytes(len(data) - 700) + data[-700:],
    "damaged directory": lambda data: data[:-120] + bytes(20) + data[-100:],
}


@pytest.mark.parametrize("damage", ARCHIVES)
def test_a_damaged_or_foreign_archive_is_left_alone(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = get(tmp_path / "first")
    archive = ship(tmp_path, kernel)
    archive.write_bytes(ARCHIVES[damage](archive.read_bytes()))
    compiled = []
    monkeypatch.setattr(kernel_cache, "compiled", lambda _: compiled.append(kernel) or kernel)
    assert get(tmp_path).code == kernel.code
    assert compiled == [kernel]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert get(tmp_path / "file").code


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    assert get(tmp_path).code
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
