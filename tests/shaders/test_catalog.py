"""Both back ends of the compiler agree on every kernel: our SPIR-V, and the kernel's GLSL through glslang, on the same device."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from check import compare, compile_glsl, lanes, run_on_device, validate

from vkllm_codegen import Kernel
from vkllm_shaders.catalog import entries

PUSH = {
    "n_chunk": 2, "n_group": 2, "x_stride": 128, "n_token": 2, "n_row": 16, "first_row": 0, "n_col": 256, "capacity": 8,
    "y_stride": 64, "n_head": 14, "n_kv_head": 2, "n_vocab": 5003, "n_segment": 2, "n_split": 2, "n_share": 1,
    "n_texel": 50, "n_tile": 8, "window": 4, "eps": 1e-5, "squares_stride": 4, "y_squares_stride": 4,
    "n_chunk_2": 2, "n_group_2": 2, "n_row_2": 16, "first_row_2": 16, "n_first": 1,
    "block_size": 4, "more": 1,
}  # fmt: skip
SIZE = 1 << 19
"""Bytes of every buffer: more than the push constants above reach."""

CATALOG = entries(chunk_lanes=8)


def example(name: str, dtype: Any, rng: np.random.Generator) -> Any:
    """Contents that keep every index in bounds and every number finite, whatever the kernel makes of them."""
    if name in ("params", "block_table", "candidates", "ids"):
        return np.full(SIZE // 4, 5, np.uint32)
    if name == "rows":
        return np.ones(SIZE // 4, np.uint32)
    if dtype.is_float:
        return rng.standard_normal(SIZE // dtype.scalar.itemsize).astype(dtype.numpy)
    return rng.integers(0, 1 << 32, SIZE // 4, np.uint32) & np.uint32(0x3FFF3FFF)  # as f16, bf16 or f32: below 2


@pytest.mark.parametrize("make", [pytest.param(make, id=label) for label, make in CATALOG])
def test_glsl_gives_the_same_numbers(make: Callable[[], Kernel]) -> None:
    if shutil.which("glslangValidator") is None:
        pytest.skip("glslangValidator is not installed (Debian: glslang-tools)")
    if lanes() != 8:
        pytest.skip(f"the catalog is made for subgroups of 8, the device has {lanes()}")
    kernel, rng = make(), np.random.default_rng(0)
    assert validate(kernel.spirv()) is None
    buffers = {b.name: example(b.name, b.dtype, rng) for b in kernel.bindings}
    whole = {"n_row": 64} if kernel.name.startswith("matmul") and "records" in kernel.name else {}  # whole groups of 32
    push = {name: (PUSH | whole)[name] for name, _, _ in kernel.push}
    in_place = kernel.name.startswith(("rope", "rmsnorm_add"))  # a row must be worked on once
    groups = (18, 1, 1) if kernel.name.startswith("heads") else (2, 1, 1) if in_place else (2, 2, 1)
    first = run_on_device(kernel, buffers, push, {}, groups)
    code = compile_glsl(kernel.glsl())
    assert code is not None
    second = run_on_device(kernel, buffers, push, {}, groups, spirv=code)
    written = {b.name: first[b.name] for b in kernel.bindings if b.access != "read"}
    assert any(not np.array_equal(data, buffers[name]) for name, data in written.items()), "the kernel wrote nothing"
    compare(f"{kernel.name} (GLSL)", second, written, 1e-10)


def test_names_are_unique_and_features_known() -> None:
    small = [make() for label, make in CATALOG if not label.startswith("matmul") and "d128" not in label]
    assert len({kernel.name for kernel in small}) == len(small)
    assert len({label for label, _ in CATALOG}) == len(CATALOG)


def test_integer_products_of_lavapipe_are_for_subgroups_of_eight() -> None:
    assert any("lane_pair" in label for label, _ in entries(8))
    assert not any("lane_pair" in label or "record" in label for label, _ in entries(16))
