"""Packed weights on disk: the same logits, never believed when damaged or stale, never in the way."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vkllm import packed_cache, packing
from vkllm.config import RuntimeConfig
from vkllm.engine import LLMEngine
from vkllm.files import resolve_model
from vkllm.packed_cache import DATA_START, MAGIC, SYNCED, PackedMap
from vkllm.vk import Device, device

IDS = [1, 5, 9, 2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of our own, in which small models are kept too."""
    monkeypatch.setattr(packed_cache, "LEAST_BYTES", 1)
    monkeypatch.setattr(packed_cache, "LEAST_FREE", 0.0)
    monkeypatch.setenv("VKLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("VKLLM_WEIGHT_CACHE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copy(resolve_model("tiny"), tmp_path / "model.gguf"))


def logits(model: Path, **options: bool) -> NDArray[np.float32]:
    with LLMEngine.init_model(model, RuntimeConfig(**options)) as engine:  # type: ignore[arg-type]
        found = engine.logits(IDS)
    for thread in threading.enumerate():
        if "packed weights" in thread.name:
            thread.join()
    return found


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("weights-*.bin"))


def refuse_to_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_pack_all", lambda *_, **__: pytest.fail("the weights were packed"))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every load that packs."""
    packed: list[int] = []
    real = packing._pack_all

    def count(*args: object, **options: object) -> object:
        packed.append(1)
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(packing, "_pack_all", count)
    return packed


def test_the_second_load_maps_what_the_first_packed(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = logits(model)
    (file,) = kept(folder)
    refuse_to_pack(monkeypatch)
    assert np.array_equal(logits(model), first)
    assert kept(folder) == [file]
    assert list(folder.glob(".weights-*")) == []


def test_nothing_is_copied_where_the_device_imports(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    if not (device.limits.import_alignment and device.limits.unified_memory):
        pytest.skip("the device imports no host memory")
    first = logits(model)
    monkeypatch.setattr(PackedMap, "slabs", lambda *_: pytest.fail("the weights were copied"))
    assert np.array_equal(logits(model), first)


@pytest.mark.parametrize("unmapped", [False, True], ids=["mapped", "staged"])
def test_devices_that_import_nothing(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, unmapped: bool) -> None:
    expected = logits(model, weight_cache=False)
    monkeypatch.setattr(Device, "import_buffer", lambda *_: None)
    monkeypatch.setattr(packed_cache, "SLAB_BYTES", 1 << 16)
    if unmapped:
        real = device.Device.__init__
        monkeypatch.setattr(device.Device, "__init__", lambda self, info, **o: real(self, info, **o | {"force_unmapped": True}))
    assert np.array_equal(logits(model), expected)  # written while it is packed, where it cannot be read back
    refuse_to_pack(monkeypatch)
    assert np.array_equal(logits(model), expected)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:100],
    "cut in the data": lambda data: data[:-4096],
    "longer": lambda data: data + bytes(4096),
    "another format": lambda data: data.replace(MAGIC, b"vkllm weights 0\n"),
    "another digest": lambda data: data.replace(b'"digest": "', b'"digest": "0', 1)[: len(data)],
    "foreign bytes": lambda data: os.urandom(len(data)),
    "not known to be on the disk": lambda data: (
        data[: DATA_START - len(SYNCED)] + b"an earlier boot".ljust(len(SYNCED)) + data[DATA_START:]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_replaced(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    expected, packed = logits(model), counted(monkeypatch)
    (file,) = kept(folder)
    data = DAMAGES[damage](file.read_bytes())
    file.unlink()
    file.write_bytes(data)
    assert np.array_equal(logits(model), expected)
    assert packed == [1]
    assert np.array_equal(logits(model), expected)
    assert packed == [1]


def test_a_changed_model_is_packed_again(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits(model)
    data = bytearray(model.read_bytes())
    data[-64:] = bytes(64)
    model.write_bytes(data)
    os.utime(model, ns=(0, model.stat().st_mtime_ns + 1))
    packed = counted(monkeypatch)
    logits(model)
    assert packed == [1]
    assert len(kept(folder)) == 1


def test_changed_code_packs_again(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits(model)
    monkeypatch.setattr(packed_cache, "_code", lambda: "of another version")
    packed = counted(monkeypatch)
    logits(model)
    assert packed == [1]


@pytest.mark.parametrize("off", ["config", "variable", "small"])
def test_can_be_turned_off(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, off: str) -> None:
    if off == "variable":
        monkeypatch.setenv("VKLLM_WEIGHT_CACHE", "0")
    if off == "small":
        monkeypatch.setattr(packed_cache, "LEAST_BYTES", 64 << 20)
    logits(model, weight_cache=off != "config")
    assert kept(folder) == []


def test_the_least_recently_used_goes_first(folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [Path(shutil.copy(model, tmp_path / f"{name}.gguf")) for name in "ab"]
    logits(model)
    (first,) = kept(folder)
    monkeypatch.setenv("VKLLM_WEIGHT_CACHE", str(2.5 * first.stat().st_size / 2**30))
    logits(others[0])
    (second,) = set(kept(folder)) - {first}
    os.utime(first, (1, 1))
    logits(model)  # used again
    os.utime(second, (2, 2))
    logits(others[1])
    assert first in kept(folder)
    assert second not in kept(folder)
    assert len(kept(folder)) == 2


def test_the_cache_of_a_removed_model_goes(folder: Path, model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(model, tmp_path / "other.gguf"))
    logits(other)
    (stale,) = kept(folder)
    (folder / "weights-foreign.bin").write_bytes(b"\xff" * 100)
    other.unlink()
    logits(model)
    assert len(kept(folder)) == 1
    assert not stale.exists()


@pytest.mark.parametrize("failing", ["pwrite", "replace", "truncate"])
def test_a_failed_write_leaves_nothing_behind(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    expected = logits(model, weight_cache=False)

    def fail(*_: object) -> None:
        raise OSError(28, "disk full")

    monkeypatch.setattr(os, failing, fail)
    assert np.array_equal(logits(model), expected)
    assert list(folder.glob("*weights-*")) == []


def test_a_full_disk_is_left_alone(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cache, "LEAST_FREE", 1.0)
    logits(model)
    assert kept(folder) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path, folder: Path, model: Path) -> None:
    expected = logits(model, weight_cache=False)
    shutil.rmtree(folder)
    folder.write_text("in the way")
    assert np.array_equal(logits(model), expected)
