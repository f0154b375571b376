"""Heads after a finished QKV product against the oracle: norms, rotations of a part, and cache rows in f16 and Q8_0."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from check import check_kernel, lanes, run_on_device
from hypothesis import given, settings
from hypothesis import strategies as st

from vkllm_codegen.errors import KernelError
from vkllm_shaders import reference
from vkllm_shaders.attention import cache_row_nbytes
from vkllm_shaders.heads import HeadSpec, heads

NO_SLOT = 0xFFFFFFFF
UNTOUCHED = 0xDEADBEEF
EPS = 1e-5
BLOCK = 4


def case(
    spec: HeadSpec, n_head: int, n_kv_head: int, n_token: int, seed: int = 0
) -> tuple[dict[str, Any], dict[str, int | float]]:
    """Buffers and push constants; rows are padded with NaN, the capacity is above the tokens, the last token has no slot."""
    rng, n_position, n_block, capacity = np.random.default_rng(seed), 40, n_token // BLOCK + 1, n_token + 2
    n_col = (n_head + 2 * n_kv_head) * spec.head_dim
    stride = -(-n_col // 64) * 64
    qkv = np.full((n_token, stride), np.nan, np.float32)
    qkv[:, :n_col] = rng.standard_normal((n_token, n_col)) * rng.uniform(0.1, 4.0, n_col)
    angle = rng.uniform(0, 6.3, (n_position, spec.rope_dim // 2))
    params = np.full((6, capacity), UNTOUCHED, np.uint32)
    params[1, :n_token] = rng.integers(0, n_position, n_token)
    slots = rng.permutation(n_block * BLOCK)[:n_token]
    params[2, :n_token] = slots // BLOCK * BLOCK * n_kv_head + slots % BLOCK
    params[2, n_token - 1] = NO_SLOT if n_token > 1 else params[2, 0]
    rows = np.full((n_block, n_kv_head, BLOCK, cache_row_nbytes(spec.head_dim, spec.cache) // 4), UNTOUCHED, np.uint32)
    norms = {name: rng.uniform(0.5, 1.5, spec.head_dim).astype(np.float32) for name in ("q_norm", "k_norm") if spec.norm}
    buffers = {"qkv": qkv} | norms | {"rope": np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32), "params": params}
    buffers |= {"q": np.full((n_token, n_head, spec.head_dim), np.nan, np.float32), "k": rows, "v": rows.copy()}
    push: dict[str, int | float] = {"n_head": n_head, "n_kv_head": n_kv_head, "block_size": BLOCK, "x_stride": stride // 4}
    return buffers, push | {"capacity": capacity} | ({"eps": EPS} if spec.norm else {})


def oracle(spec: HeadSpec, buffers: dict[str, Any], n_kv_head: int) -> dict[str, Any]:
    """q, and k and v as floats [n_block, n_kv_head, BLOCK, head_dim], NaN where nothing is written."""
    n_token, n_head, head_dim = buffers["q"].shape
    x = buffers["qkv"][:, : (n_head + 2 * n_kv_head) * head_dim].reshape(n_token, -1, head_dim)
    position, cache_rows = buffers["params"][1, :n_token], buffers["params"][2, :n_token]
    q, k, v = x[:, :n_head], x[:, n_head : n_head + n_kv_head], x[:, n_head + n_kv_head :]
    found = {
        name: reference.heads(part, position, buffers["rope"], spec.rope_pairing, buffers.get(norm), EPS)
        for name, part, norm in (("q", q, "q_norm"), ("k", k, "k_norm"))
    }
    for name, part in (("k", found["k"]), ("v", v)):
        found[name] = np.full((*buffers["k"].shape[:3], head_dim), np.nan)
        by_row = found[name].reshape(-1, head_dim)
        for token in np.flatnonzero(cache_rows != NO_SLOT):
            for head in range(n_kv_head):
                by_row[cache_rows[token] + head * BLOCK] = part[token, head]
    return found


def check(spec: HeadSpec, n_head: int, n_kv_head: int, n_token: int, seed: int = 0, **options: Any) -> None:
    buffers, push = case(spec, n_head, n_kv_head, n_token, seed)
    expected = oracle(spec, buffers, n_kv_head)
    groups = (n_head + 2 * n_kv_head, n_token, 1)
    found = check_kernel(heads(spec), {"q": expected["q"]}, buffers, push, groups=groups, **options)
    for name in ("k", "v"):
        check_rows(spec, found[name], expected[name])


def check_rows(spec: HeadSpec, words: Any, expected: Any) -> None:
    """The words of cache rows against floats; rows of NaN must be untouched."""
    written = ~np.isnan(expected[..., 0])
    assert (words[~written] == UNTOUCHED).all()
    rows, wanted = words[written], expected[written]
    if spec.cache == "f16":
        np.testing.assert_allclose(rows.view(np.float16), wanted, rtol=6e-4, atol=1e-6)
        return
    model = reference.q8_rows(wanted)
    n_scale, n_header = spec.head_dim // 32, rows.shape[-1] - spec.head_dim // 4
    np.testing.assert_allclose(rows[:, :n_scale].view(np.float32), model[:, :n_scale].view(np.float32), rtol=1e-5)
    assert (rows[:, n_scale:n_header] == 0).all()
    numbers, right = (np.ascontiguousarray(r[:, n_header:]).view(np.int8).astype(int) for r in (rows, model))
    off = np.abs(numbers - right)
    assert off.max(initial=0) <= 1  # f32 against float64, next to a half
    assert off.mean() < 1e-3


@pytest.mark.parametrize("cache", ["f16", "q8_0"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize(("head_dim", "rope_dim"), [(64, 64), (128, 96), (96, 96), (256, 64)])
def test_heads(head_dim: int, rope_dim: int, pairing: Any, norm: bool, cache: Any) -> None:
    check(HeadSpec(head_dim, rope_dim, pairing, norm, cache, lanes()), 3, 2, 3, interpreted=head_dim == 64)


@pytest.mark.parametrize(
    ("head_dim", "rope_dim", "pairing"), [(8, 8, "half"), (8, 4, "interleaved"), (80, 32, "half"), (24, 16, "half")]
)
def test_small_and_odd_heads(head_dim: int, rope_dim: int, pairing: Any) -> None:
    check(HeadSpec(head_dim, rope_dim, pairing, True, "f16", lanes()), 2, 1, 4)


@pytest.mark.parametrize("size", [2, 4, 16, 32, 64])
@pytest.mark.parametrize("head_dim", [32, 96, 128])
def test_subgroup_sizes_of_other_devices(size: int, head_dim: int) -> None:
    spec = HeadSpec(head_dim, 32, "half", True, "q8_0", size)
    check(spec, 1, 1, 2, on_device=False, interpreted=True, subgroup_size=size)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(n_head=st.integers(1, 9), n_kv_head=st.integers(1, 3), n_token=st.integers(1, 9), seed=st.integers(0, 1000))
def test_any_rows(n_head: int, n_kv_head: int, n_token: int, seed: int) -> None:
    check(HeadSpec(64, 32, "half", True, "q8_0", lanes()), n_head, n_kv_head, n_token, seed, interpreted=False)
    check(HeadSpec(64, 64, "interleaved", False, "f16", lanes()), n_head, n_kv_head, n_token, seed, interpreted=False)


def test_a_block_of_zeros_and_of_the_smallest_numbers() -> None:
    spec = HeadSpec(64, 64, "half", False, "q8_0", lanes())
    buffers, push = case(spec, 1, 1, 1)
    buffers["qkv"][0, :192] = 0.0
    buffers["qkv"][0, 160:192] = np.where(np.arange(32) % 2, 1e-30, -1e-30)
    found = run_on_device(heads(spec), buffers, push, {}, (3, 1, 1))
    block, place = divmod(int(buffers["params"][2, 0]), BLOCK)
    assert not found["k"][block, 0, place].any()
    expected = np.r_[np.zeros(32), buffers["qkv"][0, 160:192]]
    np.testing.assert_allclose(reference.q8_values(found["v"][block, 0, place], 64), expected, rtol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("cache", ["f16", "q8_0"])
@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf, 1e30])
def test_a_non_finite_value_is_not_hidden(damage: float, cache: Any, norm: bool) -> None:
    """Also 1e30, which f16 does not hold, and Q8_0 does."""
    spec = HeadSpec(64, 64, "half", norm, cache, lanes())
    buffers, push = case(spec, 1, 1, 1)
    buffers["qkv"][0, [5, 64 + 5, 128 + 5]] = damage
    found = run_on_device(heads(spec), buffers, push, {}, (3, 1, 1))
    block, place = divmod(int(buffers["params"][2, 0]), BLOCK)
    rows = [found[name][block, 0, place] for name in ("k", "v")]
    with np.errstate(invalid="ignore"):
        values = [reference.q8_values(row, 64) if cache == "q8_0" else row.view(np.float16) for row in rows]
    if damage == 1e30:
        assert np.isfinite(values[1]).all() == (cache == "q8_0")
        return
    assert not np.isfinite(found["q"][0, 0, 5])
    assert not np.isfinite(values[0][5])
    assert not np.isfinite(values[1][5])


def test_refused_specs() -> None:
    with pytest.raises(KernelError, match="12 dims"):
        HeadSpec(12, 8, "half")
    with pytest.raises(KernelError, match="80 dims"):
        HeadSpec(80, 80, "half", cache="q8_0")
    with pytest.raises(KernelError, match="rotation of 20 of 80"):
        HeadSpec(80, 20, "half")
    with pytest.raises(KernelError, match="rotation of 128 of 64"):
        HeadSpec(64, 128, "interleaved")
    with pytest.raises(KernelError, match="12 lanes"):
        HeadSpec(64, 64, "half", lanes=12)
