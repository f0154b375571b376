"""Rotary position embedding: both pairings, frequency factors, partial rotation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from check import check_kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from vkllm_shaders import reference
from vkllm_shaders.rope import rope


def angles(n_ctx: int, head_dim: int, rope_dim: int, factors: Any = None) -> Any:
    """(cos, sin) of every position and pair; pairs beyond `rope_dim` do not turn."""
    frequency = 10000.0 ** (-2.0 * np.arange(rope_dim // 2) / rope_dim)
    frequency = np.concatenate([frequency, np.zeros((head_dim - rope_dim) // 2)])
    angle = np.arange(n_ctx)[:, None] * (frequency if factors is None else frequency / factors)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)


def check(n_row: int, n_head: int, head_dim: int, pairing: Any, table: Any) -> None:
    rng = np.random.default_rng(head_dim)
    x = rng.standard_normal((n_row, n_head, head_dim)).astype(np.float32)
    params = np.zeros(6 * n_row, np.uint32)
    params[n_row : 2 * n_row] = rng.integers(0, len(table), n_row)
    expected = reference.rope(x, params[n_row : 2 * n_row], table, pairing)
    buffers, push = {"x": x, "table": table, "params": params}, {"n_token": n_row, "n_head": n_head}
    check_kernel(rope(head_dim, pairing), {"x": expected}, buffers, push, groups=(n_row, 1, 1))


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    n_row=st.integers(1, 5),
    n_head=st.sampled_from([1, 3, 14]),
    head_dim=st.sampled_from([2, 8, 64, 80]),
    pairing=st.sampled_from(["interleaved", "half"]),
)
def test_rope(n_row: int, n_head: int, head_dim: int, pairing: str) -> None:
    check(n_row, n_head, head_dim, pairing, angles(50, head_dim, head_dim))


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_partial_rotation_and_frequency_factors(pairing: str) -> None:
    check(3, 2, 64, pairing, angles(40, 64, 32))
    check(3, 2, 64, pairing, angles(40, 64, 64, np.linspace(1, 8, 32)))


def test_position_zero_changes_nothing() -> None:
    x = np.arange(16, dtype=np.float32).reshape(1, 2, 8)
    buffers = {"x": x, "table": angles(1, 8, 8), "params": np.zeros(6, np.uint32)}
    check_kernel(rope(8, "half"), {"x": x.astype(np.float64)}, buffers, {"n_token": 1, "n_head": 2}, max_nmse=0.0)
