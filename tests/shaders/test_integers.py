"""Layout "lane_pair": codes come back from their words, and integer products are as exact as integers are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from check import check_kernel, lanes, nmse
from test_formats import Number, Numpy, random_blocks
from test_matmul import Case, as_q8, spec_of

from vkllm_codegen import i32
from vkllm_codegen.errors import KernelError
from vkllm_shaders.formats import CODED, FORMATS, Layout, code_order, coded_of, pack, packed_nbytes, packed_shape
from vkllm_shaders.formats.coded import CodedWeights
from vkllm_shaders.matmul import MatmulSpec, matmul, matmul_pair
from vkllm_shaders.records import GROUP, n_group, record_nbytes, squares_stride
from vkllm_shaders.reference_matmul import dequantize, linear

PAIR = Layout("lane_pair", 8, 4)


class Selecting(Numpy):
    """A Block that can choose as well."""

    def select(self, condition: Number, a: Number, b: Number) -> Number:
        return Number(np.where(condition.a, a.a, b.a))


class Step(Number):
    """A step that a kernel knows only when it runs."""

    def __lt__(self, end: int) -> Number:
        return Number(self.a < end)


def unpack(fmt: str, packed: np.ndarray, n_row: int, n_col: int) -> np.ndarray:
    """Packed texels → f32 [packed rows, n_col], by the expressions of the kernels."""
    coded = coded_of(fmt)
    groups, n_texel, s = packed_shape(fmt, n_row, n_col, PAIR)
    c = coded.n_chunk(n_col)
    texels = packed.view(np.uint32).reshape(groups, c, n_texel // c, s, 4)
    out = np.zeros((groups, PAIR.rows, s, c * coded.chunk), np.float32)
    lane = np.arange(s)
    order = code_order(coded.group)
    for step in range(coded.steps):
        body = texels[:, :, coded.n_head + step * coded.n_body :]
        for dynamic in (False, True):
            w = CodedWeights(
                coded,
                Selecting(),  # type: ignore[arg-type]
                lambda j: Number(texels[:, :, j]),  # type: ignore[arg-type, return-value]
                lambda j, body=body: Number(body[:, :, j]),  # type: ignore[misc]
                Step(np.uint32(step)) if dynamic else step,  # type: ignore[arg-type]
            )
            for r in range(PAIR.rows):
                for index, (q, j) in enumerate(order):
                    sub = index // coded.group
                    both = w.both(r // 2, index).bitcast(i32).a
                    value = w.scale(r, sub).a * (((both >> 16) if r % 2 else (both & 0xFFFF)) - coded.zero).astype(np.float32)
                    value = value - (w.minimum(r, sub).a if coded.minimum else 0)  # [group, chunk, lane]
                    columns = np.arange(c)[:, None] * coded.chunk + step * 32 + 4 * (lane ^ j) + q
                    out[:, r, lane, columns] = value
    return out.reshape(groups * PAIR.rows * s, -1)[:, :n_col]


@pytest.mark.parametrize("fmt", CODED)
def test_every_weight_comes_back(fmt: str) -> None:
    n_row, n_col = 37, 2 * FORMATS[fmt].block + (FORMATS[fmt].block == 32) * 32
    blocks = random_blocks(fmt, n_row, n_col)
    out = np.zeros(packed_nbytes(fmt, n_row, n_col, PAIR), np.uint8)
    pack(fmt, blocks, n_col, PAIR, out)
    got = unpack(fmt, out, n_row, n_col)
    np.testing.assert_allclose(got[:n_row], dequantize(fmt, blocks), rtol=1e-5, atol=1e-5)
    assert not got[n_row:].any()


def test_packing_costs_little_memory() -> None:
    """Against the file: 6-bit codes fill their words, 5-bit ones leave a bit in sixteen."""
    for fmt, most in (("Q4_0", 1.0), ("Q8_0", 1.0), ("Q5_0", 1.1), ("Q4_K", 1.03), ("Q5_K", 1.12), ("Q6_K", 1.01), ("Q2_K", 1.0)):
        assert packed_nbytes(fmt, 64, 1024, PAIR) <= most * 64 * FORMATS[fmt].row_bytes(1024), fmt


@pytest.mark.parametrize("side_by_side", [1, 2])
@pytest.mark.parametrize("tile", [1, 2, 8])
@pytest.mark.parametrize("fmt", CODED)
def test_products_of_whole_numbers(fmt: str, tile: int, side_by_side: int) -> None:
    spec = spec_of(fmt, "lane_pair", tile=tile, side_by_side=side_by_side)
    for i, (n_row, n_token) in enumerate([(7, 1), (100, 2), (33, 3)] if tile == 1 else [(32, tile), (1, 3), (100, 13)]):
        n_col = FORMATS[fmt].block * (1, 3, 2)[i]
        Case(spec, (n_row,), n_col, n_token, seed=i).check(max_nmse=1e-11, interpreted=i == 0 and tile == 1)


@pytest.mark.parametrize("tile", [1, 2, 8])
@pytest.mark.parametrize(
    "fused",
    [
        {"norm": True, "bias": True},
        {"epilogue": "residual", "bias": True},
        {"epilogue": "swiglu", "norm": True},
        {"epilogue": "swiglu", "norm": True, "bias": True, "side_by_side": 2},
        {"norm": True, "gather": True},
        {"scale": 0.25, "softcap": 30.0},
    ],
    ids=str,
)
def test_fused_work(fused: dict[str, Any], tile: int) -> None:
    fmt = {1: "Q5_0", 2: "Q4_K", 8: "Q8_0"}[tile]
    n_rows = (52, 52) if fused.get("epilogue") == "swiglu" else (52,)
    case = Case(spec_of(fmt, "lane_pair", tile=tile, **fused), n_rows, 256, 3)
    if "softcap" in fused:
        case.y = 30.0 * np.tanh(case.y * 0.25 / 30.0)
    case.check(max_nmse=1e-10)


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("tile", [1, 8])
def test_qkv_with_rope_and_cache(tile: int, pairing: str) -> None:
    fields: dict[str, Any] = {"norm": True, "bias": True, "epilogue": "qkv", "rope_pairing": pairing, "head_dim": 16}
    spec = spec_of("Q8_0", "lane_pair", tile=tile, side_by_side=3 - min(tile, 2), **fields)
    Case(spec, (48, 16, 16), 64, 5).check_qkv(3, 1)
    Case(spec, (32,), 64, 3).check_qkv(3, 2, first_head=5)
