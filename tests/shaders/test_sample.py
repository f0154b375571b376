"""Argmax and top-k candidates: ties, non-finite values, rows that start inside a texel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from check import check_kernel, lanes
from hypothesis import given, settings
from hypothesis import strategies as st

from vkllm_shaders import reference, sample
from vkllm_shaders.sample import SampleSpec


def words(ids: Any, values: Any) -> Any:
    """(id, bits of the value) pairs, u32 [..., 2]."""
    return np.stack([np.asarray(ids, np.uint32), np.asarray(values, np.float32).view(np.uint32)], axis=-1)


def expected_candidates(logits: Any, spec: SampleSpec) -> Any:
    """What `top_k` writes, from the oracle: its segments are counted in texels of the whole buffer."""
    n_row, n_vocab = logits.shape
    out = np.zeros((n_row, spec.n_segment(n_vocab), spec.k + 1, 2), np.uint32)
    for row in range(n_row):
        first_texel = row * n_vocab // 4
        for segment in range(out.shape[1]):
            first, last = ((first_texel + (segment + s) * spec.segment) * 4 - row * n_vocab for s in (0, 1))
            start, stop = (min(max(i, 0), n_vocab) for i in (first, last))
            ids, values, bad = reference.top_k(logits[row, start:stop], spec.k)
            ids = np.where(ids == reference.NO_ID, ids, ids + np.uint32(start))
            out[row, segment, : spec.k] = words(ids, values)
            out[row, segment, spec.k] = (bad, 0)
    return out


def check(logits: Any, spec: SampleSpec, **options: Any) -> None:
    n_row, n_vocab = logits.shape
    padded = np.zeros(-(-logits.size // 4) * 4, np.float32)
    padded[: logits.size] = logits.reshape(-1)
    wanted = expected_candidates(logits, spec)
    n_segment = wanted.shape[1]
    buffers = {"logits": padded, "candidates": np.full(wanted.shape, 77, np.uint32)}
    grid = (n_segment, n_row, 1)
    got = check_kernel(sample.top_k(spec), {"candidates": wanted}, buffers, {"n_vocab": n_vocab}, groups=grid, **options)
    best = np.zeros((n_row, 4), np.uint32)
    for row in range(n_row):
        ids, values, bad = reference.top_k(logits[row], 1)
        best[row] = *words(ids, values)[0], bad, 0
    buffers = {"candidates": got["candidates"], "result": np.full((n_row, 4), 77, np.uint32)}
    check_kernel(sample.argmax(spec), {"result": best}, buffers, {"n_segment": n_segment}, groups=(n_row, 1, 1), **options)


KINDS = ["normal", "ties", "some bad", "all bad", "negative", "one bad at the end"]


def logits_of(kind: str, n_row: int, n_vocab: int) -> Any:
    x = np.random.default_rng(n_vocab).standard_normal((n_row, n_vocab)).astype(np.float32)
    if kind == "ties":
        x = np.round(x) + np.float32(0)  # no -0: which of two equal zeros is reported is open
    elif kind == "some bad":
        x[:, ::3], x[0, -1] = np.nan, np.inf
    elif kind == "all bad":
        x[...] = np.nan
    elif kind == "negative":
        x = -np.abs(x) - 1e30
    elif kind == "one bad at the end":
        x[-1, -1] = -np.inf
    return x


@settings(deadline=None, max_examples=25, derandomize=True)
@given(kind=st.sampled_from(KINDS), n_row=st.integers(1, 3), n_vocab=st.sampled_from([1, 2, 3, 4, 5, 31, 257, 1023, 2049]))
def test_argmax(kind: str, n_row: int, n_vocab: int) -> None:
    check(logits_of(kind, n_row, n_vocab), SampleSpec(segment=64, lanes=lanes()))


@settings(deadline=None, max_examples=10, derandomize=True)
@given(kind=st.sampled_from(KINDS), n_vocab=st.sampled_from([3, 39, 40, 41, 515, 2049]))
def test_top_k(kind: str, n_vocab: int) -> None:
    check(logits_of(kind, 2, n_vocab), SampleSpec(k=40, segment=64, lanes=lanes()), interpreted=False)


@pytest.mark.parametrize("n_vocab", [151936, 49155])
def test_real_vocabularies(n_vocab: int) -> None:
    check(logits_of("ties", 2, n_vocab), SampleSpec(lanes=lanes()))


@pytest.mark.parametrize("lanes", [16, 32, 64])
def test_subgroup_sizes_of_other_devices(lanes: int) -> None:
    options = {"on_device": False, "interpreted": True, "subgroup_size": lanes}
    check(logits_of("some bad", 2, 2049), SampleSpec(k=3, segment=64, lanes=lanes), **options)
