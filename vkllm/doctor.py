"""`vkllm doctor`: is everything there that vkllm needs? Each check says what it found and, if it failed, what to do next."""

from __future__ import annotations

import ctypes.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vkllm.errors import HintedError
from vkllm.vk import Binding, Device, list_devices, open_device
from vkllm.vk.cache import directory

INSTALL_DRIVERS = "install a Vulkan driver: `apt install mesa-vulkan-drivers` (AMD, Intel, CPU) or NVIDIA's own driver"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    name: str
    ok: bool
    found: str
    next_step: str = ""


def examine(selector: str | int | None = None) -> list[Check]:
    """Run all checks in order; those that need a device are left out when there is none."""
    checks = [loader(), drivers(), permissions(), *caches()]
    if not all(c.ok for c in checks[:2]):
        return checks
    try:
        device = open_device(selector)
    except HintedError as error:
        return [*checks, Check("device", False, error.message, error.hint)]
    with device:
        checks.append(
            Check("device", True, f"{device.info.name} ({device.info.kind}, {device.info.driver_name} {device.info.driver_info})")
        )
        checks += [memory(device), kernel_result(device)]
    return checks


def loader() -> Check:
    """The Vulkan loader library."""
    found = ctypes.util.find_library("vulkan")
    return Check("Vulkan loader", bool(found), found or "libvulkan.so.1 not found", "`apt install libvulkan1`")


def drivers() -> Check:
    """At least one device with a driver."""
    try:
        names = [d.name for d in list_devices()]
    except HintedError as error:
        return Check("drivers", False, error.message, error.hint or INSTALL_DRIVERS)
    return Check("drivers", bool(names), ", ".join(names) or "no Vulkan device", INSTALL_DRIVERS)


def permissions() -> Check:
    """Render nodes must be readable and writable; a machine without any has no GPU, which is fine."""
    nodes = sorted(Path("/dev/dri").glob("renderD*")) if Path("/dev/dri").is_dir() else []
    denied = [str(node) for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    found = f"no access to {', '.join(denied)}" if denied else f"{len(nodes)} render nodes, all accessible"
    return Check("permissions", not denied, found, "`sudo usermod -aG render $USER`, then log in again")


def caches() -> Iterator[Check]:
    """The pipeline cache must be writable, or every start compiles all kernels again."""
    folder = directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ok = os.access(folder, os.W_OK)
    except OSError:
        ok = False
    yield Check("pipeline cache", ok, str(folder), "make it writable, or set VKLLM_CACHE_DIR")


def memory(device: Device) -> Check:
    """Room for at least a small model."""
    available, total = device.memory_budget()
    return Check(
        "memory",
        available >= 256 << 20,
        f"{available / 2**30:.1f} of {total / 2**30:.1f} GiB free",
        "close what uses the device's memory",
    )


def kernel_result(device: Device) -> Check:
    """Compile one kernel, run it, and compare with numpy."""
    return _attempt(
        "kernel", lambda: _scale_and_add(device), "report the driver's version with this output; another device: --device"
    )


def _attempt(name: str, action: Callable[[], str | None], next_step: str) -> Check:
    try:
        wrong = action()
    except HintedError as error:
        return Check(name, False, error.message, error.hint or next_step)
    return Check(name, wrong is None, wrong or "right numbers", next_step)


def _scale_and_add(device: Device) -> str | None:
    """y = 2x + i on 1,000 floats. Returns what is wrong, or None."""
    from vkllm_codegen import Block, Value, f32, kernel, read, u32, write
    from vkllm_codegen import Buffer as KernelBuffer

    @kernel(x=read(f32), y=write(f32), push={"n": u32}, local_size=64)
    def scale_and_add(b: Block, x: KernelBuffer, y: KernelBuffer, *, n: Value) -> None:
        i = b.global_id(0)
        with b.when(i < n):
            y[i] = x[i] * 2.0 + i.to(f32)

    n = 1000
    values = np.random.default_rng(0).standard_normal(n, dtype=np.float32)
    x, y = device.buffer(n * 4, host=True), device.buffer(n * 4, host=True)
    x.write(values)
    pipeline = device.pipeline("doctor", scale_and_add.spirv(), ("storage", "storage"), scale_and_add.push_bytes)
    recording = device.recording("doctor")
    recording.dispatch(pipeline, [Binding(x), Binding(y)], (-(-n // 64), 1, 1), scale_and_add.pack_push(n=n))
    recording.barrier()
    recording.finish()
    recording.run()
    wrong = np.flatnonzero(~np.isclose(y.read(n * 4, dtype=np.float32), values * 2 + np.arange(n), rtol=1e-6))
    return f"{len(wrong)} of {n} results are wrong, the first at {wrong[0]}" if len(wrong) else None
