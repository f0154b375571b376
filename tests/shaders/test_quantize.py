"""Activations in 8 bits from a dispatch of their own: the kernel, and the matrix products that read what it writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from check import check_kernel, lanes, run_on_device
from test_matmul import Case, spec_of

from vkllm_codegen.errors import KernelError
from vkllm_shaders.matmul import MatmulSpec, matmul
from vkllm_shaders.quantize import SCALE_ROWS, in_sixteenths, quantize

EPS = 1e-5
INT8_FORMATS = ("Q4_0", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4")


def grouped(v: np.ndarray, sixteenths: bool) -> np.ndarray:
    """v [n_row, n_col] as [n_row, n_col / 32, 32]: the values that share a scale."""
    if not sixteenths:
        return v.reshape(len(v), -1, 32)
    halves = v.reshape(len(v), -1, 2, 2, 2, 16)  # half of a block, pair of its quarters, quarter, sixteenth, value
    return halves.transpose(0, 1, 4, 2, 3, 5).reshape(len(v), -1, 32)


def model(v: np.ndarray, sixteenths: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel computes: (integers i8, grouped like `grouped`, scales f64 [n_row, n_col / 32])."""
    blocks = grouped(v.astype(np.float64), sixteenths)
    most = np.abs(blocks).max(axis=-1)
    inverse = np.divide(127.0, most, out=np.zeros_like(most), where=most > 0)
    return np.rint(blocks * inverse[..., None]).astype(np.int8), most / 127.0


def buffers(x: np.ndarray, norm: np.ndarray | None) -> dict[str, Any]:
    n_row, n_col = x.shape
    given: dict[str, Any] = {"x": x} | ({"norm_w": norm.astype(np.float32)} if norm is not None else {})
    given |= {"q": np.full((n_row, n_col // 4), 0xDEAD, np.uint32)}
    given |= {"scales": np.full((-(-n_row // SCALE_ROWS), n_col // 32, SCALE_ROWS), np.nan, np.float32)}
    return given | ({"norms": np.full(n_row, np.nan, np.float32)} if norm is not None else {})


def run(x: np.ndarray, n_col: int, norm: np.ndarray | None, sixteenths: bool = False) -> dict[str, np.ndarray]:
    """q as i8 [n_row, width], scales [n_row, width / 32], norms; and all three as the matrix kernels read them, under `raw`."""
    kernel, push = quantize(norm is not None, sixteenths, lanes()), {"x_stride": x.shape[1] // 4, "n_texel": x.shape[1] // 4}
    push |= {"n_col": n_col, "eps": EPS} if norm is not None else {}  # type: ignore[dict-item]
    got = run_on_device(kernel, buffers(x, norm), push, {}, (len(x), 1, 1))
    scales = got["scales"].reshape(-1, x.shape[1] // 32, SCALE_ROWS).swapaxes(1, 2).reshape(-1, x.shape[1] // 32)
    return got | {"integers": got["q"].view(np.int8).reshape(x.shape), "by_row": scales[: len(x)]}


@pytest.mark.parametrize(
    ("n_row", "n_col", "sixteenths"), [(1, 64, False), (3, 100, False), (4, 896, False), (7, 320, False), (5, 512, True)]
)
def test_the_kernel_rounds_as_told(n_row: int, n_col: int, sixteenths: bool) -> None:
    rng, width = np.random.default_rng(n_col), -(-n_col // 64) * 64
    x = np.zeros((n_row, width), np.float32)
    x[:, :n_col] = rng.standard_normal((n_row, n_col)) * rng.uniform(0.01, 100, (n_row, 1))
    got = run(x, n_col, None, sixteenths)
    expected, expected_scales = model(x, sixteenths)
    assert np.allclose(got["by_row"], expected_scales, rtol=1e-6)
    integers = grouped(got["integers"].astype(int), sixteenths)
    assert np.abs(integers - expected).max() <= 1  # a half may fall either way
    assert np.mean(integers != expected) < 1e-3


def test_the_norm_weights_come_first_and_the_norm_is_told() -> None:
    rng, n_col = np.random.default_rng(1), 172
    x, norm = np.zeros((5, 192), np.float32), np.zeros(192)
    x[:, :n_col], norm[:n_col] = rng.standard_normal((5, n_col)), rng.uniform(0.5, 1.5, n_col)
    got = run(x, n_col, norm)
    assert np.allclose(got["norms"], 1.0 / np.sqrt(np.mean(x[:, :n_col].astype(np.float64) ** 2, axis=1) + EPS), rtol=1e-6)
    error = got["integers"] * np.repeat(got["by_row"], 32, axis=1) - x * norm
    assert np.abs(error).max() <= 0.501 * got["by_row"].max()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_non_finite_is_hidden(bad: float) -> None:
    x = np.ones((2, 64), np.float32)
    x[1, 40] = bad
    scales = run(x, 64, None)["by_row"]
    assert np.isfinite(scales[0]).all()
    assert np.isfinite(scales[1, 0])
    assert not np.isfinite(scales[1, 1])


def test_the_interpreter_agrees() -> None:
    x = np.random.default_rng(2).standard_normal((2, 64)).astype(np.float32)
    _, expected = model(x)
    scales = np.zeros((1, 2, SCALE_ROWS))
    scales[0, :, :2] = expected.T
    given = buffers(x, None)
    given["scales"][0, :, 2:] = 0.0
    kernel, push = quantize(False, False, lanes()), {"x_stride": 16, "n_texel": 16}
    check_kernel(kernel, {"scales": scales}, given, push, {}, (2, 1, 1), max_nmse=1e-10, interpreted=True)


@pytest.mark.parametrize("fmt", INT8_FORMATS)
@pytest.mark.parametrize(("n_token", "norm"), [(3, False), (9, True)])
def test_products_of_quantized_rows_are_those_of_the_loop_to_the_bit(fmt: str, n_token: int, norm: bool) -> None:
    """A row's result must not depend on how many rows there are: batches and prefill give what single tokens get."""
    spec = spec_of(fmt, "lane_row", tile=4, activations="int8", quantized=True, norm=norm)
    case = Case(spec, (37,), 512, n_token)
    x, norm_w = case.buffers["x"], case.buffers.get("norm_w")
    got = run(x, 512, norm_w, in_sixteenths(fmt))
    products = {}
    for tile, quantized in ((4, True), (1, False)):
        own = spec_of(fmt, "lane_row", tile=tile, activations="int8", quantized=quantized, norm=norm)
        given = case.buffers | {"y": np.zeros((n_token, 37), np.float32)}
        given |= {"x": got["q"].reshape(-1, 4), "scales": got["scales"], "norms": got.get("norms")} if quantized else {"x": x}
        push = case.push | {"y_stride": 37, "x_stride": 512 // (16 if quantized else 4)}
        kernel = matmul(own)
        bound = {b.name: given[b.name] for b in kernel.bindings}
        numbers = {name: push[name] for name, _, _ in kernel.push}
        products[quantized] = run_on_device(kernel, bound, numbers, {}, own.groups(len(case.order), n_token))["y"]
    assert np.array_equal(products[True].view(np.uint32), products[False].view(np.uint32))
    assert np.isfinite(products[True]).all()


@pytest.mark.parametrize(
    "wrong",
    [{"tile": 8}, {"tile": 2, "activations": "f32"}, {"gather": True}, {"fmt": "F16"}],
    ids=str,
)
def test_what_cannot_be_quantized_is_refused(wrong: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"fmt": "Q8_0", "tile": 4, "activations": "int8", "quantized": True} | wrong
    with pytest.raises(KernelError, match="quantized"):
        spec_of(fields.pop("fmt"), "lane_row", **fields)
    with pytest.raises(KernelError, match="quantized"):
        MatmulSpec("Q8_0", spec_of("Q8_0", "lane_chunk").layout, activations="int8", quantized=True)
