"""`vkllm doctor`: is everything there that vkllm needs? Each check says what it found and, if it failed, what to do next.

Nothing here may fail where there is no loader or driver, so `vkllm.vk` loads the native module within the checks only.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vkllm import vk
from vkllm.vk import Binding
from vkllm.vk.cache import directory
from vkllm_codegen.errors import HintedError

if TYPE_CHECKING:
    from vkllm.vk import Device

LOADER = {"win32": "vulkan-1.dll", "darwin": "libvulkan.1.dylib"}.get(sys.platform, "libvulkan.so.1")
RENDER_NODES = Path("/dev/dri")
LEAST_BYTES = 256 << 20
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
    checks = [loader(), drivers(), permissions(), cache()]
    if not all(c.ok for c in checks[:2]):
        return checks
    try:
        device = vk.open_device(selector)
    except HintedError as error:
        return [*checks, Check("device", False, error.message, error.hint)]
    with device:
        info = device.info
        found = Check("device", True, f"{info.name} ({info.kind}, {info.driver_name} {info.driver_info})")
        return [*checks, found, memory(device), kernel_result(device)]


def loader() -> Check:
    """The Vulkan loader library."""
    try:
        ctypes.CDLL(LOADER)
    except OSError as error:
        return Check("Vulkan loader", False, str(error), "install it: `apt install libvulkan1`")
    return Check("Vulkan loader", True, LOADER)


def drivers() -> Check:
    """At least one device with a driver."""
    try:
        names = [d.name for d in vk.list_devices()]
    except HintedError as error:
        return Check("drivers", False, error.message, error.hint or INSTALL_DRIVERS)
    chosen = next((name for name in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES") if os.environ.get(name)), None)
    advice = f"unset {chosen}, which is {os.environ[chosen]}" if chosen else INSTALL_DRIVERS
    return Check("drivers", bool(names), ", ".join(names) or "no Vulkan device", advice)


def permissions() -> Check:
    """Render nodes must be readable and writable; a machine without any has no GPU, which is fine."""
    nodes = sorted(RENDER_NODES.glob("renderD*"))
    denied = [str(node) for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    found = f"no right to use {', '.join(denied)}" if denied else f"{len(nodes)} render nodes, all accessible"
    return Check("permissions", not denied, found, "`sudo usermod -aG render $USER`, then log in again")


def cache() -> Check:
    """The cache of kernels and pipelines must be writable, or every start compiles all of them again."""
    folder = directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ok = os.access(folder, os.W_OK)
    except OSError:
        ok = False
    return Check("cache", ok, str(folder), "make this folder writable, or name another one in VKLLM_CACHE_DIR")


def memory(device: Device) -> Check:
    """Room for at least a small model."""
    available, total = device.memory_budget()
    found = f"{available / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return Check("memory", available >= LEAST_BYTES, found, "close what uses the device's memory, or choose another --device")


def kernel_result(device: Device) -> Check:
    """Compile one kernel, run it, and compare with numpy."""
    next_step = "update the driver, or choose another --device; please report this output"
    try:
        wrong = _scale_and_add(device)
    except HintedError as error:
        return Check("kernel", False, error.message, error.hint or next_step)
    return Check("kernel", wrong is None, wrong or "right numbers", next_step)


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
