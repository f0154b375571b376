"""Attention against the float64 oracle: odd lengths, groups and head sizes, shuffled block tables, rows of many sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from check import check_kernel, lanes, run_on_device
from hypothesis import given, settings
from hypothesis import strategies as st

from vkllm_codegen.errors import KernelError
from vkllm_shaders import attention, reference
from vkllm_shaders.attention import AttentionSpec

BLOCK = 32
ONE_ROW = {"n_token": 1, "n_kv_head": 1}
LENGTHS = [1, 7, 8, 31, 32, 33, 511, 512, 513]


def case(spec: AttentionSpec, n_kv_head: int, lengths: list[int], seed: int = 0) -> dict[str, Any]:
    """Inputs of rows with these lengths, each a sequence of its own, blocks in shuffled order; unused slots hold NaN."""
    rng, n_row, dim = np.random.default_rng(seed), len(lengths), spec.head_dim
    counts = [-(-length // spec.block_size) for length in lengths]
    n_block = sum(counts) + 1
    table = rng.permutation(n_block)[: max(sum(counts), 1)].astype(np.uint32)
    starts = np.cumsum([0, *counts[:-1]]).astype(np.uint32)
    k, v = (np.full((n_block * spec.block_size, n_kv_head, dim), np.nan, np.float16) for _ in range(2))
    for length, start in zip(lengths, starts, strict=True):
        position = np.arange(length)
        slot = table[start + position // spec.block_size] * spec.block_size + position % spec.block_size
        k[slot] = rng.standard_normal((length, n_kv_head, dim))
        v[slot] = rng.standard_normal((length, n_kv_head, dim))
    params = np.full(6 * n_row, 0xDEAD, np.uint32)
    params[3 * n_row : 4 * n_row], params[4 * n_row : 5 * n_row] = lengths, starts
    q = rng.standard_normal((n_row, n_kv_head * spec.group, dim)).astype(np.float32)
    return {"q": q, "k": k, "v": v, "block_table": table, "params": params}


def oracle(inputs: dict[str, Any], spec: AttentionSpec) -> Any:
    n_row = len(inputs["q"])
    length, start = inputs["params"][3 * n_row : 4 * n_row], inputs["params"][4 * n_row : 5 * n_row]
    return reference.attention(inputs["q"], inputs["k"], inputs["v"], length, start, inputs["block_table"], spec.block_size)


def check_direct(spec: AttentionSpec, n_kv_head: int, lengths: list[int], seed: int = 0, **options: Any) -> None:
    inputs = case(spec, n_kv_head, lengths, seed)
    expected = oracle(inputs, spec)
    buffers = inputs | {"out": np.full(expected.shape, np.nan, np.float32)}
    push = {"n_token": len(lengths), "n_kv_head": n_kv_head}
    check_kernel(attention.direct(spec), {"out": expected}, buffers, push, groups=(1, n_kv_head, len(lengths)), **options)


def check_split(spec: AttentionSpec, n_kv_head: int, lengths: list[int], extra_splits: int = 0, seed: int = 0) -> None:
    """`partial` and `combine`, with more splits recorded than any row needs."""
    inputs = case(spec, n_kv_head, lengths, seed)
    expected, n_row = oracle(inputs, spec), len(lengths)
    n_split = max(1, spec.n_split(max(lengths))) + extra_splits
    scratch = np.full(spec.scratch_nbytes(n_row, n_kv_head, n_split) // 4, np.nan, np.float32)
    grid, push = (n_split, n_kv_head, n_row), {"n_token": n_row, "n_kv_head": n_kv_head}
    partials = run_on_device(attention.partial(spec), inputs | {"out": scratch}, push, {}, grid)["out"]
    buffers = {"partials": partials, "params": inputs["params"], "out": np.full(expected.shape, np.nan, np.float32)}
    n_head = n_kv_head * spec.group
    push = {"n_token": n_row, "n_split": n_split, "n_head": n_head}
    check_kernel(attention.combine(spec), {"out": expected}, buffers, push, groups=(n_head, n_row, 1), interpreted=False)


def test_interpreter_and_device_agree_with_the_oracle() -> None:
    check_direct(AttentionSpec(8, 2, lanes=lanes()), 2, [1, 9, 0, 33], interpreted=True)


@pytest.mark.parametrize("schedule", ["lane_row", "lane_chunk"])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 7), (64, 1), (8, 2), (128, 4), (80, 1), (24, 2)])
def test_all_lengths_in_one_dispatch(schedule: Any, head_dim: int, group: int) -> None:
    check_direct(AttentionSpec(head_dim, group, lanes=lanes(), schedule=schedule), 2, [*LENGTHS, 0])


@pytest.mark.parametrize("schedule", ["lane_row", "lane_chunk"])
@pytest.mark.parametrize(("head_dim", "group", "split"), [(64, 2, 128), (32, 4, 256), (128, 1, 512)])
def test_split_and_combine(schedule: Any, head_dim: int, group: int, split: int) -> None:
    spec = AttentionSpec(head_dim, group, lanes=lanes(), schedule=schedule, split=split)
    check_split(spec, 2, [*LENGTHS, 0], extra_splits=1)


@pytest.mark.parametrize("lanes", [16, 32, 64])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 2), (128, 1), (8, 3), (80, 1)])
def test_subgroup_sizes_of_other_devices(lanes: int, head_dim: int, group: int) -> None:
    """GPUs' subgroup sizes, in the interpreter: the device under test need not have them."""
    for schedule in ("lane_row", "lane_chunk"):
        spec = AttentionSpec(head_dim, group, lanes=lanes, schedule=schedule, split=64)  # type: ignore[arg-type]
        check_direct(spec, 2, [1, 31, 64, 200, 0], on_device=False, interpreted=True, subgroup_size=lanes)


@pytest.mark.parametrize("tile", [8, 16, 32])
def test_tiles(tile: int) -> None:
    if tile % lanes():
        pytest.skip(f"a tile of {tile} is no multiple of the device's subgroup of {lanes()}")
    check_direct(AttentionSpec(32, 2, lanes=lanes(), tile=tile), 1, LENGTHS)


def test_tile_over_several_blocks() -> None:
    spec = AttentionSpec(16, 2, block_size=8, lanes=lanes(), tile=4 * lanes(), split=32 * lanes())
    check_direct(spec, 2, [1, 31, 33, 100])


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    lengths=st.lists(
        st.one_of(st.integers(0, 80), st.sampled_from([0, 1, 127, 128, 129, 255, 256, 257])), min_size=1, max_size=6
    ),
    n_kv_head=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_rows(lengths: list[int], n_kv_head: int, seed: int) -> None:
    check_split(AttentionSpec(32, 2, lanes=lanes(), split=128), n_kv_head, lengths, seed=seed)
    check_direct(AttentionSpec(32, 2, lanes=lanes()), n_kv_head, lengths, seed=seed, interpreted=False)


def test_prefill_rows_of_one_sequence_are_causal() -> None:
    """Rows share a block table; their lengths grow by one; later positions are in the cache already."""
    spec, n_row, before = AttentionSpec(64, 2, lanes=lanes()), 12, 29
    inputs = case(spec, 2, [before + n_row] * n_row)
    inputs["params"][3 * n_row : 4 * n_row] = before + 1 + np.arange(n_row)
    inputs["params"][4 * n_row : 5 * n_row] = inputs["params"][4 * n_row]
    expected = oracle(inputs, spec)
    buffers = inputs | {"out": np.zeros(expected.shape, np.float32)}
    check_kernel(
        attention.direct(spec),
        {"out": expected},
        buffers,
        {"n_token": n_row, "n_kv_head": 2},
        groups=(1, 2, n_row),
        interpreted=False,
    )


def test_large_scores_do_not_overflow() -> None:
    """Scores of ±3,000: only the largest counts, nothing becomes NaN."""
    spec = AttentionSpec(64, 1, lanes=lanes())
    inputs = case(spec, 1, [40])
    inputs["q"] *= 1000
    expected = oracle(inputs, spec)
    buffers = inputs | {"out": np.zeros(expected.shape, np.float32)}
    check_kernel(attention.direct(spec), {"out": expected}, buffers, ONE_ROW, max_nmse=1e-5, interpreted=False)


@pytest.mark.parametrize("schedule", ["lane_row", "lane_chunk"])
@pytest.mark.parametrize("damage", [np.nan, np.inf])
@pytest.mark.parametrize("where", [slice(None), slice(25, 26), slice(0, 1)])
def test_a_non_finite_value_is_not_hidden(schedule: Any, damage: float, where: slice) -> None:
    spec = AttentionSpec(64, 1, lanes=lanes(), schedule=schedule, split=64)
    inputs = case(spec, 1, [40])
    inputs["k"][inputs["block_table"][0] * BLOCK + np.arange(BLOCK)[where]] = damage
    inputs["q"][...] = np.abs(inputs["q"])
    out = run_on_device(attention.direct(spec), inputs | {"out": np.zeros((1, 1, 64), np.float32)}, ONE_ROW, {}, (1, 1, 1))["out"]
    assert np.isnan(out).all()
    scratch = np.zeros(spec.scratch_nbytes(1, 1, 1) // 4, np.float32)
    partials = run_on_device(attention.partial(spec), inputs | {"out": scratch}, ONE_ROW, {}, (1, 1, 1))["out"]
    assert np.isnan(partials[2:]).all()


def test_refused_specs() -> None:
    with pytest.raises(KernelError, match="head_dim 20"):
        AttentionSpec(20, 1)
    with pytest.raises(KernelError, match="split 100"):
        AttentionSpec(64, 1, split=100)


def test_fitted_to_limits() -> None:
    spec = AttentionSpec(128, 8, lanes=32, schedule="lane_chunk")
    assert spec.fitted(1 << 17, 1024).subgroups == 8
    assert spec.fitted(32768, 1024).subgroups == 4
    assert spec.fitted(1 << 17, 64).subgroups == 2
    with pytest.raises(KernelError, match="shared memory"):
        spec.fitted(4096, 1024)


@pytest.mark.parametrize("subgroups", [1, 2, 8])
def test_subgroups_a_workgroup(subgroups: int) -> None:
    check_direct(AttentionSpec(32, 2, lanes=lanes(), schedule="lane_chunk", subgroups=subgroups), 2, [1, 33, 0, 300])
