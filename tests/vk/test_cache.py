"""The pipeline cache on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from glsl import DOUBLE, spirv

from vkllm.vk import Device, cache, open_device


def test_saved_at_close_and_loaded(device: Device, tmp_path: Path) -> None:
    for _ in range(2):
        with open_device(device.info.index, cache_dir=tmp_path) as d:
            d.pipeline("double", spirv(DOUBLE), ("storage",), 4)
    files = list(tmp_path.iterdir())
    assert [f.name for f in files] == [cache.path(device.info, tmp_path).name]
    assert cache.load(files[0])


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "folder"])
def test_damaged_files_are_ignored(device: Device, tmp_path: Path, damage: str) -> None:
    file = cache.path(device.info, tmp_path)
    cache.save(file, b"x" * 1000)
    blob = file.read_bytes()
    changed = {"cut": blob[:-1], "flipped": blob[:-1] + b"y", "empty": b"", "foreign": b"other" * 100}
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(changed[damage])
    assert cache.load(file) == b""
    with open_device(device.info.index, cache_dir=tmp_path) as d:
        d.pipeline("double", spirv(DOUBLE), ("storage",), 4)


def test_sound_file_with_data_that_the_driver_does_not_know(device: Device, tmp_path: Path) -> None:
    cache.save(cache.path(device.info, tmp_path), b"\x20\0\0\0\1\0\0\0" + bytes(24) + b"junk" * 10)
    with open_device(device.info.index, cache_dir=tmp_path) as d:
        d.pipeline("double", spirv(DOUBLE), ("storage",), 4)


def test_named_by_device_and_driver(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = device.info
    others = [
        replace(a, vendor_id=1), replace(a, device_id=1), replace(a, driver_version=99),
        replace(a, cache_uuid=bytes(16)), replace(a, driver_info="newer"),
    ]  # fmt: skip
    assert len({cache.path(i, tmp_path) for i in [a, *others]}) == 6
    monkeypatch.setenv("VKLLM_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert cache.path(a).parent == tmp_path / "elsewhere"


def test_unwritable_folder_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache.save(tmp_path / "file" / "cache.bin", b"data")
    assert (tmp_path / "file").read_text() == ""
