"""Activations in 8 bits from a dispatch of their own: the kernel, and the matrix products that read what it writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check import check_kernel, lanes, run_on_device

from vkllm_codegen.errors import KernelError
from vkllm_shaders.matmul import MatmulSpec
from vkllm_shaders.quantize import SCALE_ROWS, quantize
from vkllm_shaders.reference import rmsnorm

sys.path.insert(0, str(Path(__file__).parent))
from test_matmul import Case, spec_of

EPS = 1e-5


def model(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel computes: (integers i8 [n_row, n_col], scales f64 [n_row, n_col / 32])."""
    blocks = v.astype(np.float64).reshape(len(v), -1, 32)
    most = np.abs(blocks).max(axis=-1)
    inverse = np.divide(127.0, most, out=np.zeros_like(most), where=most > 0)
    return np.rint(blocks * inverse[..., None]).astype(np.int8).reshape(v.shape), most / 127.0


def buffers(x: np.ndarray, norm: np.ndarray | None) -> dict[str, Any]:
    n_row, n_col = x.shape
    given: dict[str, Any] = {"x": x} | ({"norm_w": norm.astype(np.float32)} if norm is not None else {})
    q = np.full((n_row, n_col // 4), 0xDEAD, np.uint32)
    return given | {"q": q, "scales": np.full((-(-n_row // SCALE_ROWS), n_col // 32, SCALE_ROWS), np.nan, np.float32)}


def push(x: np.ndarray, n_col: int) -> dict[str, Any]:
    return {"x_stride": x.shape[1] // 4, "n_texel": x.shape[1] // 4, "n_col": n_col, "eps": EPS}


def run(x: np.ndarray, n_col: int, norm: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(q as i8 [n_row, width], scales [n_row, width / 32])."""
    kernel = quantize(norm is not None, lanes())
    values = {name: value for name, value in push(x, n_col).items() if norm is not None or name in ("x_stride", "n_texel")}
    got = run_on_device(kernel, buffers(x, norm), values, {}, (len(x), 1, 1))
    scales = got["scales"].reshape(-1, x.shape[1] // 32, SCALE_ROWS).swapaxes(1, 2).reshape(-1, x.shape[1] // 32)
    return got["q"].view(np.int8).reshape(x.shape), scales[: len(x)]


@pytest.mark.parametrize(("n_row", "n_col"), [(1, 64), (3, 100), (4, 896), (7, 320)])
def test_the_kernel_rounds_as_told(n_row: int, n_col: int) -> None:
    rng, width = np.random.default_rng(n_col), -(-n_col // 64) * 64
    x = np.zeros((n_row, width), np.float32)
    x[:, :n_col] = rng.standard_normal((n_row, n_col)) * rng.uniform(0.01, 100, (n_row, 1))
    q, scales = run(x, n_col, None)
    expected, expected_scales = model(x)
    assert np.allclose(scales, expected_scales, rtol=1e-6)
    assert np.abs(q.astype(int) - expected).max() <= 1  # a half may fall either way
    assert np.mean(q != expected) < 1e-3


def test_the_norm_comes_first() -> None:
    rng, n_col = np.random.default_rng(1), 172
    x, norm = np.zeros((5, 192), np.float32), np.zeros(192)
    x[:, :n_col], norm[:n_col] = rng.standard_normal((5, n_col)), rng.uniform(0.5, 1.5, n_col)
    q, scales = run(x, n_col, norm)
    normed = np.zeros(x.shape)
    normed[:, :n_col] = rmsnorm(x[:, :n_col], norm[:n_col], EPS)
    error = q * np.repeat(scales, 32, axis=1) - normed
    assert np.abs(error).max() <= 0.501 * scales.max()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_non_finite_is_hidden(bad: float) -> None:
    x = np.ones((2, 64), np.float32)
    x[1, 40] = bad
    _, scales = run(x, 64, None)
    assert np.isfinite(scales[0]).all()
    assert np.isfinite(scales[1, 0])
    assert not np.isfinite(scales[1, 1])


def test_the_interpreter_agrees() -> None:
    x = np.random.default_rng(2).standard_normal((2, 64)).astype(np.float32)
    _, expected = model(x)
    scales = np.full((1, 2, SCALE_ROWS), np.nan)
    scales[0, :, :2] = expected.T
    given = buffers(x, None)
    given["scales"][0, :, 2:] = 0.0
    scales[0, :, 2:] = 0.0
    check_kernel(
        quantize(False, lanes()),
        {"scales": scales},
        given,
        {"x_stride": 16, "n_texel": 16},
        {},
        (2, 1, 1),
        max_nmse=1e-10,
        interpreted=True,
    )


@pytest.mark.parametrize(
    "fmt", ["Q4_0", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
)
@pytest.mark.parametrize("n_token", [3, 9])
def test_products_of_quantized_rows(fmt: str, n_token: int) -> None:
    """Integer sums are exact: all that is left is f32's rounding of what is scaled."""
    spec = spec_of(fmt, "lane_row", tile=4, activations="int8", quantized=True)
    case = Case(spec, (37,), 512, n_token)
    q, scales = model(case.buffers["x"])
    case.y = (q * np.repeat(scales, 32, axis=1))[:n_token] @ case.weights.astype(np.float64).T
    padded = np.zeros((-(-len(q) // SCALE_ROWS) * SCALE_ROWS, scales.shape[1]), np.float32)
    padded[: len(q)] = scales
    case.buffers["x"] = q.view(np.uint32).reshape(-1, 4)
    case.buffers["scales"] = np.ascontiguousarray(padded.reshape(-1, SCALE_ROWS, scales.shape[1]).swapaxes(1, 2))
    case.push["x_stride"] = 512 // 16
    case.check(1e-9)


@pytest.mark.parametrize(
    "wrong",
    [{"tile": 8}, {"tile": 2, "activations": "f32"}, {"norm": True}, {"gather": True}, {"fmt": "F16"}],
    ids=str,
)
def test_what_cannot_be_quantized_is_refused(wrong: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"fmt": "Q8_0", "tile": 4, "activations": "int8", "quantized": True} | wrong
    with pytest.raises(KernelError, match="quantized"):
        spec_of(fields.pop("fmt"), "lane_row", **fields)
    with pytest.raises(KernelError, match="quantized"):
        MatmulSpec("Q8_0", spec_of("Q8_0", "lane_chunk").layout, activations="int8", quantized=True)
