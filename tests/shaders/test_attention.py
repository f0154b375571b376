"""Attention against the float64 oracle: odd lengths, groups and head sizes, shuffled block tables, rows of many sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from check import check_kernel, lanes, nmse, run_on_device
from hypothesis import given, settings
from hypothesis import strategies as st

from vkllm_codegen.errors import KernelError
from vkllm_shaders import attention, reference
from vkllm_shaders.attention import AttentionSpec, cache_row_nbytes
from vkllm_shaders.records import LANES, n_group, record_nbytes
from vkllm_shaders.to_records import to_records

BLOCK = 32
ONE_ROW = {"n_token": 1, "n_kv_head": 1}
LENGTHS = [1, 7, 8, 31, 32, 33, 511, 512, 513]


def case(spec: AttentionSpec, n_kv_head: int, lengths: list[int], seed: int = 0, window: int = 0) -> dict[str, Any]:
    """Inputs of rows with these lengths, each a sequence of its own, blocks in shuffled order; k, v: [block, KV head, position].

    Unused slots hold NaN, positions before a row's window too, and blocks wholly before it are no longer the row's.
    """
    rng, n_row, dim = np.random.default_rng(seed), len(lengths), spec.head_dim
    counts = [-(-length // spec.block_size) for length in lengths]
    n_block = sum(counts) + 1
    order = rng.permutation(n_block).astype(np.uint32)
    table, spare = order[: max(sum(counts), 1)].copy(), order[-1]
    starts = np.cumsum([0, *counts[:-1]]).astype(np.uint32)
    rows = cache_row_nbytes(dim, spec.cache) // 4
    k, v = (np.full((n_block * spec.block_size, n_kv_head, rows), 0xFFFFFFFF, np.uint32) for _ in range(2))
    for length, start in zip(lengths, starts, strict=True):
        first = max(0, length - window) if window else 0
        position = np.arange(first, length)
        slot = table[start + position // spec.block_size].astype(np.int64) * spec.block_size + position % spec.block_size
        for cache in (k, v):
            cache[slot] = kept(spec, rng.standard_normal((position.size, n_kv_head, dim)))
        table[start : start + first // spec.block_size] = spare
    params = np.full(6 * n_row, 0xDEAD, np.uint32)
    params[3 * n_row : 4 * n_row], params[4 * n_row : 5 * n_row] = lengths, starts
    q = rng.standard_normal((n_row, n_kv_head * spec.group, dim)).astype(np.float32)
    sinks = {"sinks": rng.normal(1.0, 2.0, n_kv_head * spec.group).astype(np.float32)} if spec.sinks else {}
    k, v = (cache.reshape(n_block, spec.block_size, n_kv_head, rows).swapaxes(1, 2).copy() for cache in (k, v))
    return {"q": q, "k": k, "v": v, "block_table": table, "params": params} | sinks


def kept(spec: AttentionSpec, x: Any) -> Any:
    """x [..., head_dim] as words of the cache."""
    return reference.q8_rows(x) if spec.cache == "q8_0" else np.ascontiguousarray(x.astype(np.float16)).view(np.uint32)


def dequantized(spec: AttentionSpec, words: Any) -> Any:
    """What the words of the cache stand for."""
    return reference.q8_values(words, spec.head_dim) if spec.cache == "q8_0" else words.view(np.float16)


def oracle(inputs: dict[str, Any], spec: AttentionSpec, window: int = 0) -> Any:
    n_row = len(inputs["q"])
    length, start = inputs["params"][3 * n_row : 4 * n_row], inputs["params"][4 * n_row : 5 * n_row]
    k, v = (dequantized(spec, inputs[name]).swapaxes(1, 2).reshape(-1, inputs[name].shape[1], spec.head_dim) for name in "kv")
    options: dict[str, Any] = {"scale": spec.scale, "softcap": spec.softcap, "window": window, "sinks": inputs.get("sinks")}
    return reference.attention(inputs["q"], k, v, length, start, inputs["block_table"], spec.block_size, **options)


def check_direct(spec: AttentionSpec, n_kv_head: int, lengths: list[int], seed: int = 0, window: int = 0, **options: Any) -> None:
    inputs = case(spec, n_kv_head, lengths, seed, window)
    expected = oracle(inputs, spec, window)
    buffers = inputs | {"out": np.full(expected.shape, np.nan, np.float32)}
    push = {"n_token": len(lengths), "n_kv_head": n_kv_head} | ({"window": window} if spec.windowed else {})
    check_kernel(attention.direct(spec), {"out": expected}, buffers, push, groups=(1, n_kv_head, len(lengths)), **options)


def check_split(
    spec: AttentionSpec, n_kv_head: int, lengths: list[int], extra_splits: int = 0, seed: int = 0, window: int = 0
) -> Any:
    """`partial` and `combine`, with more splits recorded than any row needs. Returns: the partial results."""
    inputs = case(spec, n_kv_head, lengths, seed, window)
    expected, n_row = oracle(inputs, spec, window), len(lengths)
    n_split = max(1, spec.n_split(max(lengths))) + extra_splits
    scratch = np.full((n_row, n_kv_head, n_split, spec.group, 2 + spec.head_dim), np.nan, np.float32)
    assert scratch.nbytes == spec.scratch_nbytes(n_row, n_kv_head, n_split)
    limit = {"window": window} if spec.windowed else {}
    grid, push = (n_split, n_kv_head, n_row), {"n_token": n_row, "n_kv_head": n_kv_head} | limit
    partials = run_on_device(attention.partial(spec), inputs | {"out": scratch}, push, {}, grid)["out"]
    buffers = inputs | {"partials": partials, "out": np.full(expected.shape, np.nan, np.float32)}
    n_head = n_kv_head * spec.group
    push = {"n_token": n_row, "n_split": n_split, "n_head": n_head} | limit
    check_kernel(attention.combine(spec), {"out": expected}, buffers, push, groups=(n_head, n_row, 1), interpreted=False)
    return partials


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
    inputs["k"].view(np.float16)[inputs["block_table"][0], :, where] = damage
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


# -- what other architectures ask of attention, and the Q8_0 cache ---------------------------------------------------------------

SCHEDULES = ["lane_row", "lane_chunk"]
WINDOW = 40
VARIANTS: dict[str, dict[str, Any]] = {
    "scale": {"scale": 0.0625},
    "softcap": {"softcap": 5.0},
    "window": {"windowed": True},
    "sinks": {"sinks": True},
    "q8_0": {"cache": "q8_0"},
    "all": {"scale": 0.2, "softcap": 3.0, "windowed": True, "sinks": True, "cache": "q8_0"},
}
ALL_BUT_CACHE: dict[str, Any] = {"softcap": 20.0, "windowed": True, "sinks": True}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(schedule: Any, variant: str) -> None:
    spec = AttentionSpec(64, 2, lanes=lanes(), schedule=schedule, split=64, **VARIANTS[variant])
    window = WINDOW if spec.windowed else 0
    check_direct(spec, 2, [1, 9, 0, 33, 41, 200], window=window, interpreted=schedule == "lane_row")
    check_split(spec, 2, [1, 39, 40, 41, 0, 64, 65, 300], extra_splits=1, window=window)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("head_dim", "group", "cache"),
    [(256, 1, "f16"), (256, 1, "q8_0"), (128, 2, "q8_0"), (96, 1, "q8_0"), (32, 3, "q8_0"), (80, 2, "f16")],
)
def test_head_sizes_with_everything(schedule: Any, head_dim: int, group: int, cache: Any) -> None:
    spec = AttentionSpec(head_dim, group, lanes=lanes(), split=64, schedule=schedule, subgroups=2, cache=cache, **ALL_BUT_CACHE)
    check_direct(spec, 2, [1, 33, 0, 100], window=50, interpreted=False)
    check_split(spec, 1, [50, 130], window=70)


@pytest.mark.parametrize("lanes", [16, 32, 64])
@pytest.mark.parametrize(("head_dim", "cache"), [(64, "q8_0"), (32, "q8_0"), (160, "q8_0"), (80, "f16")])
def test_variants_in_subgroups_of_other_devices(lanes: int, head_dim: int, cache: Any) -> None:
    for schedule in SCHEDULES:
        spec = AttentionSpec(head_dim, 2, lanes=lanes, split=64, schedule=schedule, subgroups=2, cache=cache, **ALL_BUT_CACHE)
        check_direct(spec, 1, [31, 90, 0], window=37, on_device=False, interpreted=True, subgroup_size=lanes)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 90), st.sampled_from([127, 128, 129, 256, 257])), min_size=1, max_size=6),
    window=st.one_of(st.integers(1, 140), st.sampled_from([7, 8, 9, 31, 32, 33, 64, 128, 1 << 31])),
    seed=st.integers(0, 1000),
)
def test_any_window(lengths: list[int], window: int, seed: int) -> None:
    """Sequences of any length, blocks before the window given back; splits wholly outside it are left alone."""
    spec = AttentionSpec(32, 2, lanes=lanes(), split=32, windowed=True, cache="q8_0")
    check_direct(spec, 2, lengths, seed, window, interpreted=False)
    partials = check_split(spec, 2, lengths, seed=seed, window=window)
    for row, length in enumerate(lengths):
        seen = range(max(0, length - window) // spec.split, spec.n_split(length)) if length else range(0)
        written = [i for i in range(partials.shape[2]) if not np.isnan(partials[row, :, i]).all()]
        assert written == list(seen), f"length {length}, window {window}"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_window_of_zero_is_none(schedule: Any) -> None:
    spec = AttentionSpec(16, 2, lanes=lanes(), schedule=schedule, split=32, windowed=True)
    check_direct(spec, 1, [0, 1, 100], window=0)
    check_split(spec, 1, [0, 1, 100], window=0)


def test_window_tiles_over_several_blocks() -> None:
    spec = AttentionSpec(16, 2, block_size=8, lanes=lanes(), tile=4 * lanes(), split=32 * lanes(), windowed=True)
    check_direct(spec, 2, [1, 31, 33, 100], window=21)


@pytest.mark.parametrize("sink", [-np.inf, -200.0, 200.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sinks_far_off(schedule: Any, sink: float) -> None:
    """Far below all scores a sink changes nothing; far above it takes all."""
    spec = AttentionSpec(16, 2, lanes=lanes(), schedule=schedule, split=32, sinks=True)
    inputs = case(spec, 1, [50]) | {"sinks": np.full(2, sink, np.float32)}
    expected = oracle(inputs, spec)
    buffers = inputs | {"out": np.full(expected.shape, np.nan, np.float32)}
    out = run_on_device(attention.direct(spec), buffers, ONE_ROW, {}, (1, 1, 1))["out"]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("damage", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["k", "v", "sinks"])
def test_a_non_finite_value_is_not_hidden_by_a_cap_or_a_scale(schedule: Any, damage: float, where: str) -> None:
    if where == "sinks" and damage == np.inf:
        pytest.skip("an infinite sink takes all: zeros are right")
    spec = AttentionSpec(64, 1, lanes=lanes(), split=64, schedule=schedule, cache="q8_0", **ALL_BUT_CACHE)
    inputs = case(spec, 1, [40])
    inputs["q"] = np.ones_like(inputs["q"])
    if where == "sinks":
        inputs["sinks"][:] = damage
    else:
        inputs[where].view(np.float32)[inputs["block_table"][0], 0, 25, :2] = damage
        inputs[where].view(np.int8)[inputs["block_table"][0], 0, 25, 16:] = 1
    push = ONE_ROW | {"window": 30}
    out = run_on_device(attention.direct(spec), inputs | {"out": np.zeros((1, 1, 64), np.float32)}, push, {}, (1, 1, 1))["out"]
    assert not np.isfinite(out).any()
    scratch = np.zeros(spec.scratch_nbytes(1, 1, 1) // 4, np.float32)
    partials = run_on_device(attention.partial(spec), inputs | {"out": scratch}, push, {}, (1, 1, 1))["out"]
    merging = inputs | {"partials": partials, "out": np.zeros((1, 1, 64), np.float32)}
    merge_push = {"n_token": 1, "n_split": 1, "n_head": 1, "window": 30}
    assert not np.isfinite(run_on_device(attention.combine(spec), merging, merge_push, {}, (1, 1, 1))["out"]).any()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_large_scores_stop_at_the_cap(schedule: Any) -> None:
    """Scores of ±3,000: far into tanh's ends, where its exponential overflows."""
    spec = AttentionSpec(64, 1, lanes=lanes(), schedule=schedule, softcap=5.0)
    inputs = case(spec, 1, [40])
    inputs["q"] *= 1000
    expected = oracle(inputs, spec)
    buffers = inputs | {"out": np.zeros(expected.shape, np.float32)}
    check_kernel(attention.direct(spec), {"out": expected}, buffers, ONE_ROW, interpreted=False)


def test_what_a_q8_0_cache_loses() -> None:
    """Against unrounded keys and values: f16 keeps 1e-7 of the error's square, Q8_0 a few 1e-5."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 4, 64), (512, 2, 64), (512, 2, 64)))

    def attend(k: Any, v: Any) -> Any:
        return reference.attention(q, k, v, np.array([512]), np.array([0]), np.arange(16), 32)

    loss = {}
    for cache in ("f16", "q8_0"):
        spec = AttentionSpec(64, 2, cache=cache)  # type: ignore[arg-type]
        loss[cache] = nmse(attend(*(dequantized(spec, kept(spec, x)) for x in (k, v))), attend(k, v))
    assert loss["f16"] < 1e-6 < loss["q8_0"] < 1e-4


def test_cache_rows() -> None:
    assert [cache_row_nbytes(d, "f16") for d in (64, 80, 256)] == [128, 160, 512]
    assert [cache_row_nbytes(d, "q8_0") for d in (32, 64, 128, 160, 256)] == [48, 80, 144, 192, 288]
    for head_dim in (32, 64, 128, 160, 256):
        rows = reference.q8_rows(np.ones((2, head_dim)))
        assert rows.nbytes == 2 * cache_row_nbytes(head_dim, "q8_0")
    with pytest.raises(KernelError, match="80 dims"):
        cache_row_nbytes(80, "q8_0")
    with pytest.raises(KernelError, match="8 dims"):
        AttentionSpec(8, 2, cache="q8_0")
    with pytest.raises(KernelError, match="softcap"):
        AttentionSpec(64, 2, softcap=-1.0)


# -- the output in 8 bits --------------------------------------------------------------------------------------------------------


def with_records(spec: AttentionSpec, inputs: dict[str, Any], n_kv_head: int, window: int = 0) -> dict[str, Any]:
    """`direct` on the device, whose `out` and `record` these are; and `expected`, the records of that `out` by to_records."""
    n_row, n_col = len(inputs["q"]), n_kv_head * spec.group * spec.head_dim
    if lanes() != LANES:
        pytest.skip(f"records are made by subgroups of {LANES}; the device has {lanes()}")
    empty = {"record": np.full(record_nbytes(n_row, n_col) // 4, 0xDEADBEEF, np.uint32)}
    push = {"n_token": n_row, "n_kv_head": n_kv_head, "n_group": n_group(n_col)} | ({"window": window} if spec.windowed else {})
    buffers = inputs | empty | {"out": np.full(inputs["q"].shape, np.nan, np.float32)}
    got = run_on_device(attention.direct(spec), buffers, push, {}, (1, n_kv_head, n_row))
    alone = {"x_stride": n_col // 4, "n_group": n_group(n_col)}
    made = run_on_device(to_records(norm=False), {"x": got["out"]} | empty, alone, {}, (n_row, 1, 1))
    return got | {"expected": made["record"]}


@pytest.mark.parametrize("cache", ["f16", "q8_0"])
@pytest.mark.parametrize("group", [1, 7])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 256])
def test_records_are_those_of_the_output_to_the_bit(head_dim: int, group: int, cache: Any) -> None:
    """Also where a sequence is empty; an odd row's place beside the last even one is left alone."""
    spec, lengths = AttentionSpec(head_dim, group, cache=cache, records=True), [33, 1, 0, 9, 100]
    inputs = case(spec, 2, lengths)
    got = with_records(spec, inputs, 2)
    assert nmse(got["out"], oracle(inputs, spec)) < 1e-6
    assert np.array_equal(got["record"], got["expected"])


def test_records_with_everything() -> None:
    spec = AttentionSpec(96, 2, tile=16, records=True, **ALL_BUT_CACHE)
    inputs = case(spec, 3, [70, 0, 31], window=WINDOW)
    got = with_records(spec, inputs, 3, window=WINDOW)
    assert nmse(got["out"], oracle(inputs, spec, WINDOW)) < 1e-6
    assert np.array_equal(got["record"], got["expected"])


def test_records_change_nothing_of_the_output() -> None:
    inputs = case(AttentionSpec(64, 2), 2, [50, 7])
    plain = inputs | {"out": np.full(inputs["q"].shape, np.nan, np.float32)}
    without = run_on_device(attention.direct(AttentionSpec(64, 2)), plain, {"n_token": 2, "n_kv_head": 2}, {}, (1, 2, 2))
    assert np.array_equal(with_records(AttentionSpec(64, 2, records=True), inputs, 2)["out"], without["out"])


@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_a_non_finite_value_reaches_its_records(damage: float) -> None:
    """One dim of V is damaged: the scales of its group tell, and only those."""
    spec = AttentionSpec(64, 1, records=True)
    inputs = case(spec, 1, [40])
    inputs["v"].view(np.float16)[inputs["block_table"][0], 0, 25, 45] = damage
    record = with_records(spec, inputs, 1)["record"]
    scales = record.reshape(2, 8, 4)[..., 1].view(np.float32)
    assert np.isfinite(scales[0]).all()
    assert not np.isfinite(scales[1]).any()


def test_where_no_records_are_written() -> None:
    for wrong in ({"schedule": "lane_chunk"}, {"lanes": 16}, {"head_dim": 80}):
        with pytest.raises(KernelError, match="records"):
            AttentionSpec(**({"head_dim": 64, "group": 1, "records": True} | wrong))
    for make in (attention.partial, attention.combine):
        with pytest.raises(KernelError, match="records"):
            make(AttentionSpec(64, 1, records=True))
