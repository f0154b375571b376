"""Helpers: spirv-val and glslang on a kernel's output, a kernel on a real device."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vkllm_codegen import Kernel

FORMATS = {"u32": "r32ui", "u32x4": "rgba32ui", "f32x4": "rgba32f", "f16x4": "rgba16f"}


COOP_UNKNOWN = ("Invalid capability operand: 6022", "GL_KHR_cooperative_matrix")  # what tools say that are too old for it


def run_tool(*command: str) -> str:
    """Run a program; fail the test with its output if it fails. Skip where it is missing, or too old for cooperative matrices."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed (apt-get install spirv-tools glslang-tools)")
    done = subprocess.run(command, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if done.returncode and any(text in output for text in COOP_UNKNOWN):
        pytest.skip(f"{command[0]} does not know cooperative matrices")
    assert done.returncode == 0, f"{' '.join(command)}:\n{output}"
    return done.stdout


def validate(kernel: Kernel) -> None:
    """spirv-val on the module."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "k.spv")
        path.write_bytes(kernel.spirv())
        run_tool("spirv-val", "--target-env", "vulkan1.2", str(path))


def compile_glsl(source: str) -> bytes:
    """The SPIR-V that glslang makes of GLSL."""
    with tempfile.TemporaryDirectory() as folder:
        text, module = Path(folder, "k.comp"), Path(folder, "k.spv")
        text.write_text(source)
        run_tool("glslangValidator", "-V", "--target-env", "vulkan1.2", "-o", str(module), str(text))
        return module.read_bytes()


def run_on_device(
    device: Any,
    kernel: Kernel,
    buffers: Mapping[str, np.ndarray],
    push: Mapping[str, Any],
    groups: tuple[int, int, int],
    spirv: bytes | None = None,
) -> dict[str, np.ndarray]:
    """Run on a Vulkan device; returns the buffers afterwards."""
    from vkllm.vk import Binding

    held = {name: device.buffer(max(16, a.nbytes), host=True, name=name) for name, a in buffers.items()}
    try:
        for name, array in buffers.items():
            held[name].write(array)
        formats = [FORMATS[repr(b.dtype)] if b.kind != "storage" else None for b in kernel.bindings]
        bindings = [Binding(held[b.name], format=f) for b, f in zip(kernel.bindings, formats, strict=True)]
        kinds = tuple(b.kind for b in kernel.bindings)
        pipeline = device.pipeline(kernel.name, spirv or kernel.spirv(), kinds, kernel.push_bytes)
        recording = device.recording()
        recording.dispatch(pipeline, bindings, groups, kernel.pack_push(**push))
        recording.finish()
        recording.run()
        return {n: held[n].read(a.nbytes, dtype=a.dtype).reshape(a.shape) for n, a in buffers.items()}
    finally:
        for buffer in held.values():
            buffer.free()
