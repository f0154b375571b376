"""Weight types that are expanded while they are loaded: what comes out, in what slabs, and what the user is told."""

from __future__ import annotations

import logging
import tracemalloc

import gguf
import numpy as np
import pytest
from random_models import random_blocks

from vkllm.expand import EXPANDED, IQ, SLAB_WEIGHTS, TERNARY, device_nbytes, device_type, expand, expand_rows, warn
from vkllm.files.model_file import TensorInfo
from vkllm_shaders.formats import FORMATS


def dequantize(kind: str, blocks: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", EXPANDED)
def test_expanded_weights_are_the_same(kind: str) -> None:
    blocks = random_blocks((5, 768), kind)
    wanted, got = dequantize(kind, blocks), dequantize(EXPANDED[kind], expand(kind, blocks))
    assert np.sqrt(np.mean(wanted**2)) == pytest.approx(768**-0.5, rel=0.2)
    if kind in TERNARY:
        np.testing.assert_array_equal(got, wanted)
    else:
        assert np.sum((got - wanted) ** 2) <= 3e-5 * np.sum(wanted**2)


def test_nan_is_not_hidden() -> None:
    for kind in ("IQ3_S", "TQ2_0"):
        blocks = random_blocks((2, 512), kind)
        blocks[1] = 0xFF  # factors among them
        got = dequantize(EXPANDED[kind], expand(kind, blocks))
        assert np.isfinite(got[0]).all() and not np.isfinite(got[1]).any()


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_several_parts_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = ["IQ2_XS", "Q8_0", "IQ1_M"]
    parts = [random_blocks((n, 256), kind) for n, kind in zip((7, 1, 12), kinds, strict=True)]
    whole = np.concatenate([expand(kind, part) if kind in EXPANDED else part for kind, part in zip(kinds, parts, strict=True)])
    order = rng.integers(-1, 20, 33)
    rows, order_of_rows = expand_rows(parts, kinds, order)
    assert sum(map(len, rows)) == len(np.unique(order[order >= 0]))
    np.testing.assert_array_equal(order_of_rows < 0, order < 0)
    np.testing.assert_array_equal(np.concatenate(rows)[order_of_rows[order >= 0]], whole[order[order >= 0]])


def test_a_slab_takes_bounded_memory() -> None:
    for kind in ("IQ1_M", "IQ2_XXS", "IQ3_S", "TQ1_0"):
        blocks = random_blocks((SLAB_WEIGHTS // 4096, 4096), kind)
        tracemalloc.start()
        expand(kind, blocks)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12 * SLAB_WEIGHTS, f"{kind}: {peak / SLAB_WEIGHTS:.0f} bytes a weight"


def test_the_warning_gives_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    iq, plain = TensorInfo("a", (1 << 20, 4096), "IQ2_XXS", 0, (1 << 32) // 256 * 66), TensorInfo("b", (1, 256), "Q4_K", 0, 144)
    assert (device_type("IQ2_XXS"), device_type("Q4_K")) == ("Q8_0", "Q4_K")
    assert (device_nbytes(iq), device_nbytes(plain)) == ((1 << 32) // 32 * 34, 144)
    with caplog.at_level(logging.WARNING):
        warn([plain])
        assert not caplog.records
        warn([iq, plain])
    assert "1 tensors have no kernels" in caplog.text and "IQ2_XXS as Q8_0" in caplog.text
    assert "4.25 GiB on the device instead of 1.03" in caplog.text


def test_every_type_of_weights_has_kernels_or_is_expanded() -> None:
    from vkllm.files.types import TYPES

    others = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}  # never weights in files
    assert set(TYPES) == set(FORMATS) | set(EXPANDED) | others
    assert set(EXPANDED) == set(IQ) | set(TERNARY)
