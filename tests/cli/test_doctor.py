"""Every check of `vkllm doctor` fails when what it looks at fails, and then says what to do next."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import vkllm

from vkllm import doctor, vk
from vkllm.doctor import Check
from vkllm.errors import DeviceError, DeviceLostError
from vkllm.vk import Device, NullDevice


def raises(error: Exception) -> Callable[..., Any]:
    """A function that fails."""

    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def outcome(*args: str) -> tuple[int, dict[str, Check]]:
    """Exit status and the checks by name, from the command itself."""
    result = vkllm("doctor", *args, "--json")
    report = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert report["ok"] is (result.code == 0) is all(c["ok"] for c in report["checks"])
    return result.code, {c["name"]: Check(**c) for c in report["checks"]}


def failed(name: str, *args: str) -> Check:
    """The one failed check, which must be `name`; shown to people with its next step."""
    code, checks = outcome(*args)
    assert code == 1
    assert [c.name for c in checks.values() if not c.ok] == [name]
    assert checks[name].next_step
    shown = vkllm("doctor", *args)
    assert shown.code == 1
    assert f"FAIL {name}: {checks[name].found}\n     next: {checks[name].next_step}\n" in shown.stdout
    return checks[name]


def test_all_is_well(device: Device) -> None:
    code, checks = outcome()
    assert code == 0
    assert list(checks) == ["Vulkan loader", "drivers", "permissions", "cache", "device", "memory", "kernel"]
    assert "FAIL" not in vkllm("doctor").stdout


def test_no_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", raises(OSError("libvulkan.so.1: cannot open shared object file")))
    check = failed("Vulkan loader")
    assert "libvulkan1" in check.next_step
    assert "device" not in outcome()[1]


def test_no_loader_at_all_is_no_crash(tmp_path: Path) -> None:
    """The native module links to the loader: where it cannot be imported, doctor must still run."""
    program = "import sys; sys.modules['vkllm.vk._native'] = None; from vkllm.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "doctor", "--json"], capture_output=True, timeout=60)
    checks = {c["name"]: c for c in json.loads(done.stdout)["checks"]}
    assert done.returncode == 1
    assert not checks["drivers"]["ok"]
    assert "libvulkan1" in checks["drivers"]["next_step"]


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vk, "list_devices", list, raising=False)
    for name in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):
        monkeypatch.delenv(name, raising=False)
    check = failed("drivers")
    assert (check.found, "mesa-vulkan-drivers" in check.next_step) == ("no Vulkan device", True)
    monkeypatch.setenv("VK_ICD_FILENAMES", "/nowhere/[x].json")
    assert failed("drivers").next_step == "unset VK_ICD_FILENAMES, which is /nowhere/[x].json"


def test_a_driver_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vk, "list_devices", raises(DeviceError("listing devices: broken", "mend it")), raising=False)
    assert failed("drivers") == Check("drivers", False, "listing devices: broken", "mend it")
    monkeypatch.setattr(vk, "list_devices", raises(DeviceError("listing devices: broken")), raising=False)
    assert failed("drivers").next_step == doctor.INSTALL_DRIVERS


def test_render_nodes_without_permission(device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "renderD128").touch()
    (tmp_path / "renderD129").touch()
    monkeypatch.setattr(doctor, "RENDER_NODES", tmp_path)
    assert outcome()[0] == 0
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p).name != "renderD129" and access(p, mode))
    check = failed("permissions")
    assert "renderD129" in check.found and "renderD128" not in check.found
    assert "usermod -aG render" in check.next_step
    monkeypatch.setattr(doctor, "RENDER_NODES", tmp_path / "nowhere")  # no GPU: nothing to complain about
    assert doctor.permissions().ok


def test_a_cache_that_cannot_be_written(device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VKLLM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    check = failed("cache")
    assert str(tmp_path) in check.found
    assert "VKLLM_CACHE_DIR" in check.next_step


def test_an_unknown_device(device: Device) -> None:
    check = failed("device", "--device", "no such device")
    assert "no such device" in check.found
    assert device.info.name in check.next_step


def test_too_little_memory(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "memory_budget", lambda self: (100 << 20, 8 << 30))
    check = failed("memory")
    assert check.found == "0.1 of 8.0 GiB free"
    assert "--device" in check.next_step


def test_a_kernel_with_wrong_results() -> None:
    """The null device runs nothing: all results are zero."""
    check = doctor.kernel_result(NullDevice())  # type: ignore[arg-type]
    assert not check.ok
    assert "999 of 1000 results are wrong" in check.found or "1000 of 1000" in check.found
    assert "driver" in check.next_step


def test_a_device_that_fails_the_kernel(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_scale_and_add", raises(DeviceLostError("the device was lost", "start it again")))
    assert failed("kernel") == Check("kernel", False, "the device was lost", "start it again")
