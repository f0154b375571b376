"""One oracle helper for every kernel: interpreter, device and the GLSL path against a float64 reference.

What is checked, in this order:
1. `spirv-val` accepts the module;
2. the numpy interpreter gives the expected outputs (where the case is small);
3. the device gives them, by NMSE for floats and exactly for integers, without a new NaN or Inf;
4. the guard bytes round every buffer are intact, and what the kernel only reads is unchanged;
5. on demand: the kernel's GLSL, compiled by glslang, gives the same numbers on the same device.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vkllm_codegen import Binding, Kernel
from vkllm_codegen.interpret import interpret
from vkllm_codegen.types import DType

Array = NDArray[Any]

GUARD_BYTE = 0xA5
SMALL = 2048
"""Cases of at most this many invocations run in the interpreter too."""

_TEXEL_FORMATS: dict[str, Any] = {"u32x4": "rgba32ui", "f32x4": "rgba32f", "f16x4": "rgba16f", "u32": "r32ui"}


class KernelMismatch(AssertionError):
    """A kernel's result is not the expected one."""


@functools.cache
def device() -> Any:
    """The device under test (VKLLM_DEVICE chooses it), opened once; skips the test where there is none."""
    try:
        from vkllm.vk import open_device
    except ImportError as error:
        pytest.skip(f"the device binding is not built: {error}")
    return open_device(os.environ.get("VKLLM_DEVICE"))


def lanes() -> int:
    """The subgroup size of the device under test."""
    return int(device().limits.subgroup_size)


@functools.cache
def validate(spirv: bytes) -> str | None:
    """What spirv-val says against a module; None when it is valid or when the tool is missing."""
    tool = shutil.which("spirv-val")
    if tool is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".spv") as file:
        file.write(spirv)
        file.flush()
        done = subprocess.run([tool, "--target-env", "vulkan1.2", file.name], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else None


@functools.cache
def compile_glsl(source: str) -> bytes | None:
    """SPIR-V of a compute shader's GLSL by glslangValidator; None when the tool is missing."""
    tool = shutil.which("glslangValidator")
    if tool is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        text, module = Path(folder, "kernel.comp"), Path(folder, "kernel.spv")
        text.write_text(source)
        done = subprocess.run(
            [tool, "-V", "--target-env", "vulkan1.2", "-o", str(module), str(text)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise KernelMismatch(f"glslang refuses the kernel's GLSL:\n{done.stdout}{done.stderr}\n{source}")
        return module.read_bytes()


def nmse(got: Array, expected: Array) -> float:
    """Σ(got - expected)² / Σ expected², over the finite expected values; inf when one of those is not finite in `got`."""
    finite = np.isfinite(expected)
    wanted, found = expected[finite].astype(np.float64), got[finite].astype(np.float64)
    if not np.isfinite(found).all():
        return float("inf")
    error, scale = float(np.sum((found - wanted) ** 2)), float(np.sum(wanted**2))
    return error / scale if scale else error


def compare(label: str, got: Mapping[str, Array], expected: Mapping[str, Array], max_nmse: float) -> None:
    """Raises: KernelMismatch: an output differs; the message names the first wrong places."""
    for name, wanted in expected.items():
        found = got[name].reshape(wanted.shape)
        if np.issubdtype(found.dtype, np.floating):
            special = ~np.isfinite(wanted)
            if not np.array_equal(found[special].astype(np.float64), wanted[special].astype(np.float64), equal_nan=True):
                raise KernelMismatch(f"{label}: {name}: the expected non-finite values are not there")
            error = nmse(found, wanted)
            if not error <= max_nmse:
                off = np.abs(found.astype(np.float64) - wanted.astype(np.float64))
                worst = np.unravel_index(int(np.argmax(np.where(np.isnan(off), np.inf, off))), off.shape)
                raise KernelMismatch(
                    f"{label}: {name}: NMSE {error:.3g} > {max_nmse:.3g}; worst at {tuple(map(int, worst))}: "
                    f"{found[worst]!r}, expected {wanted[worst]!r}"
                )
        elif not np.array_equal(found, wanted):
            wrong = np.argwhere(found != wanted)
            first = tuple(map(int, wrong[0]))
            raise KernelMismatch(
                f"{label}: {name}: {len(wrong)} wrong values, first at {first}: {found[first]}, expected {wanted[first]}"
            )


def run_on_device(
    kernel: Kernel,
    buffers: Mapping[str, Array],
    push: Mapping[str, Any],
    spec: Mapping[str, Any],
    groups: tuple[int, int, int],
    *,
    guard_bytes: int = 256,
    spirv: bytes | None = None,
    required_subgroup_size: int | None = None,
) -> dict[str, Array]:
    """Dispatch once with guard bytes round every buffer; returns the buffers afterwards.

    Raises: KernelMismatch: guard bytes or a read-only buffer changed.
    """
    gpu = device()
    from vkllm.vk import Binding as Bound

    guard = -(-guard_bytes // 256) * 256
    held, bindings = [], []
    try:
        for binding in kernel.bindings:
            data = np.ascontiguousarray(buffers[binding.name])
            size = -(-data.nbytes // 16) * 16
            image = np.full(size + 2 * guard, GUARD_BYTE, np.uint8)
            image[guard : guard + data.nbytes] = data.reshape(-1).view(np.uint8)
            buffer = gpu.buffer(image.nbytes, host=True, name=binding.name)
            buffer.write(image)
            held.append((binding, buffer, image, data))
            texel = "texel" in binding.kind
            bindings.append(Bound(buffer, guard, size if texel else data.nbytes, _texel_format(binding.dtype) if texel else None))
        values = tuple((number, spec.get(name, default)) for name, (number, default) in kernel.spec.items())
        name, code = (kernel.name, kernel.spirv()) if spirv is None else (f"{kernel.name}.glsl", spirv)
        pipeline = gpu.pipeline(
            name, code, tuple(binding.kind for binding in kernel.bindings), kernel.push_bytes, values, required_subgroup_size
        )
        recording = gpu.recording(kernel.name)
        recording.dispatch(pipeline, bindings, groups, kernel.pack_push(**push) if kernel.push else b"")
        recording.barrier()
        recording.finish()
        recording.run()
        return {binding.name: _result(kernel, binding, buffer, image, data, guard) for binding, buffer, image, data in held}
    finally:
        for _, buffer, _, _ in held:
            buffer.free()


def _texel_format(dtype: DType) -> Any:
    return _TEXEL_FORMATS[repr(dtype)]


def _result(kernel: Kernel, binding: Any, buffer: Any, before: NDArray[np.uint8], data: Array, guard: int) -> Array:
    after = np.asarray(buffer.read(before.nbytes, 0, np.uint8))
    end = guard + data.nbytes
    if not np.array_equal(after[:guard], before[:guard]):
        raise KernelMismatch(f"{kernel.name}: wrote before the start of {binding.name}")
    if not np.array_equal(after[end:], before[end:]):
        raise KernelMismatch(f"{kernel.name}: wrote past the end of {binding.name} ({data.nbytes} bytes)")
    if binding.access == "read" and not np.array_equal(after, before):
        raise KernelMismatch(f"{kernel.name}: changed {binding.name}, which it only reads")
    return after[guard:end].view(data.dtype).reshape(data.shape).copy()


def _interpreted(
    kernel: Kernel,
    buffers: Mapping[str, Array],
    push: Mapping[str, Any],
    spec: Mapping[str, Any],
    groups: tuple[int, int, int],
    size: int,
) -> dict[str, Array]:
    copies = {name: np.array(data, order="C") for name, data in buffers.items()}
    views = {binding.name: as_elements(copies[binding.name], binding) for binding in kernel.bindings}
    interpret(kernel, views, push=dict(push), spec=dict(spec), groups=groups, subgroup_size=size)
    for binding in kernel.bindings:
        if binding.access == "read" and not np.array_equal(
            copies[binding.name], buffers[binding.name], equal_nan=_is_float(copies[binding.name])
        ):
            raise KernelMismatch(f"{kernel.name} (interpreter): changed {binding.name}, which it only reads")
    return copies


def _is_float(data: Array) -> bool:
    return bool(np.issubdtype(data.dtype, np.floating))


def as_elements(data: Array, binding: Binding) -> Array:
    """`data` as the kernel declares it, in the same memory; what a last texel lacks is filled up (then a copy)."""
    raw = data.reshape(-1).view(np.uint8)
    missing = -raw.size % binding.dtype.itemsize
    if missing:
        assert binding.access == "read", f"{binding.name} is written, and no multiple of {binding.dtype.itemsize} bytes"
        raw = np.concatenate([raw, np.full(missing, GUARD_BYTE, np.uint8)])
    return raw.view(binding.dtype.numpy)


def check_kernel(
    kernel: Kernel,
    expected: Mapping[str, Array],
    buffers: Mapping[str, Array],
    push: Mapping[str, Any] | None = None,
    spec: Mapping[str, Any] | None = None,
    groups: tuple[int, int, int] = (1, 1, 1),
    outputs: Iterable[str] | None = None,
    max_nmse: float = 1e-6,
    guard_bytes: int = 256,
    *,
    interpreted: bool | None = None,
    on_device: bool = True,
    glsl: bool = False,
    subgroup_size: int | None = None,
) -> dict[str, Array]:
    """Run `kernel` everywhere it can run and compare with the oracle.

    Args: expected: output name → float64 (or integer) array; buffers: every binding's contents before the dispatch;
        outputs: the names to compare, default all of `expected`; interpreted: run the interpreter too, default: where the
        case is small; glsl: run the GLSL path too (test_catalog.py does, for every kernel);
        subgroup_size: what the kernel needs, default: what the device has.
    Returns: the buffers after the device's run (the interpreter's, when `on_device` is False).
    Raises: KernelMismatch.
    """
    push, spec = push or {}, spec or {}
    expected = {name: expected[name] for name in outputs} if outputs is not None else expected
    complaint = validate(kernel.spirv())
    if complaint:
        raise KernelMismatch(f"{kernel.name}: spirv-val: {complaint}")
    result: dict[str, Array] = {}
    if interpreted if interpreted is not None else _invocations(kernel, spec, groups) <= SMALL:
        result = _interpreted(kernel, buffers, push, spec, groups, subgroup_size or (lanes() if on_device else 8))
        compare(f"{kernel.name} (interpreter)", result, expected, max_nmse)
    if not on_device:
        return result
    run = functools.partial(
        run_on_device, kernel, buffers, push, spec, groups, guard_bytes=guard_bytes, required_subgroup_size=subgroup_size
    )
    result = run()
    compare(f"{kernel.name} (device)", result, expected, max_nmse)
    if glsl:
        code = compile_glsl(kernel.glsl())
        if code is not None:
            same = {name: result[name].astype(_wide(result[name])) for name in expected}
            compare(f"{kernel.name} (GLSL)", run(spirv=code), same, 1e-10)
    return result


def _wide(data: Array) -> Any:
    return np.float64 if _is_float(data) else data.dtype


def _invocations(kernel: Kernel, spec: Mapping[str, Any], groups: tuple[int, int, int]) -> int:
    local = spec.get("WG", kernel.local_size[0]) * kernel.local_size[1] * kernel.local_size[2]
    return int(np.prod(groups)) * int(local)
