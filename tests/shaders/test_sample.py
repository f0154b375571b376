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


@pytest.mark.parametrize("more", [0, 1])
def test_argmax_makes_the_rows_of_the_next_step(more: int) -> None:
    """Three rows of four, the last without a cache row; one moves to the next block, one has only bad logits."""
    spec, capacity, block_size, n_kv_head = SampleSpec(lanes=lanes()), 4, 8, 3
    candidates = np.zeros((capacity, 2, 2, 2), np.uint32)
    candidates[:, :, 0] = words([[5, 9], [reference.NO_ID] * 2, [7, 3], [1, 2]], [[1.0, 2.0], [-np.inf] * 2, [4.0, 4.0], [0, -1]])
    candidates[1, :, 1, 0] = 20, 22
    table = np.array([6, 2, 0, 5, 3], np.uint32)
    params = np.zeros((6, capacity), np.uint32)
    params[1] = 7, 9, 12, 0  # positions; the first is the last of its block
    params[4] = 0, 2, 3, 0  # where a row's table begins
    params[2] = [(table[start + p // 8] * n_kv_head) * 8 + p % 8 for start, p in zip(params[4], params[1], strict=True)]
    params[2, 3] = sample.NO_SLOT
    params[3] = params[1] + 1
    wanted = params.copy()
    if more:
        wanted[0, :3] = 9, 0, 3  # the best; none: any; of equals the lowest
        wanted[1, :3] = 8, 10, 13
        wanted[2, :3] = 2 * n_kv_head * 8, 5 * n_kv_head * 8 + 2, 3 * n_kv_head * 8 + 5
        wanted[3, :3] = 9, 11, 14
    result = np.full((3 * capacity, 4), 77, np.uint32)
    told = result.copy()
    told[capacity : 2 * capacity, 0] = 9, reference.NO_ID, 3, 1
    told[capacity : 2 * capacity, 1] = np.array([2.0, -np.inf, 4.0, 0.0], np.float32).view(np.uint32)
    told[capacity : 2 * capacity, 2:] = [[0, 0], [42, 0], [0, 0], [0, 0]]
    push = {"n_segment": 2, "first_row": capacity, "capacity": capacity, "block_size": block_size, "n_kv_head": n_kv_head}
    buffers = {"candidates": candidates, "result": result, "block_table": table, "params": params}
    expected = {"result": told, "params": wanted}
    check_kernel(sample.argmax(spec, follow=True), expected, buffers, push | {"more": more}, groups=(capacity, 1, 1))


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
