"""The quantizers against the `gguf` package: byte for byte where it can quantize, by the error of the way back elsewhere."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from made_models import edges, weights

from vkllm.errors import FileFormatError, UnsupportedQuantError
from vkllm.quantize import TARGETS, quantize

BY_GGUF = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
NMSE = {"Q2_K": 0.08857, "Q3_K": 0.02262, "Q4_K": 0.005071, "Q5_K": 0.001297, "Q6_K": 0.0003111}
"""Measured, of normally distributed weights; Q4_0 has 0.007366."""


def restored(blocks: np.ndarray, kind: str) -> np.ndarray:
    return np.asarray(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]), np.float64)


def normal(n_row: int, n_col: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n_row, n_col), np.float32)


@pytest.mark.parametrize("kind", BY_GGUF)
@pytest.mark.parametrize("values", [normal(7, 96), weights((5, 64), 1).astype(np.float32), edges().astype(np.float32)])
def test_simple_types_equal_those_of_gguf(kind: str, values: np.ndarray) -> None:
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8)
    np.testing.assert_array_equal(quantize(values, kind), theirs)


@pytest.mark.parametrize("kind", NMSE)
def test_k_types_lose_no_more_than_they_must(kind: str) -> None:
    values = normal(64, 1024)
    error = restored(quantize(values, kind), kind) - values
    assert float(np.sum(error**2) / np.sum(values.astype(np.float64) ** 2)) == pytest.approx(NMSE[kind], rel=0.01)


@pytest.mark.parametrize("kind", TARGETS)
def test_zeros_stay_zeros_and_nothing_becomes_nan(kind: str) -> None:
    back = restored(quantize(edges().astype(np.float32), kind), kind)
    assert np.isfinite(back).all()
    assert not back[0].any()


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused_by_name(kind: str, value: float) -> None:
    values = normal(3, 512)
    values[1, 300] = value
    with pytest.raises(FileFormatError, match=r"blk.0.ffn_up.weight holds NaN or infinity"):
        quantize(values, kind, "blk.0.ffn_up.weight")


@pytest.mark.parametrize("kind", [kind for kind in TARGETS if kind not in ("F32", "BF16", "MXFP4")])
def test_weights_that_a_type_cannot_hold_are_refused_by_name(kind: str) -> None:
    values = normal(2, 256)
    values[1, 7] = 1e30
    with pytest.raises(UnsupportedQuantError, match=rf"blk.1.attn_q.weight has weights up to 1e\+30, for which {kind} has no"):
        quantize(values, kind, "blk.1.attn_q.weight")


def test_unknown_types_and_rows_that_are_no_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedQuantError, match="cannot quantize to IQ2_S"):
        quantize(normal(1, 256), "IQ2_S")
    with pytest.raises(UnsupportedQuantError, match="rows of 288; Q4_K needs multiples of 256"):
        quantize(normal(1, 288), "Q4_K")
