"""RMS normalization of rows."""

from __future__ import annotations

import numpy as np
import pytest
from check import check_kernel, run_on_device
from hypothesis import given, settings
from hypothesis import strategies as st

from vkllm_shaders import reference
from vkllm_shaders.rmsnorm import rmsnorm, rmsnorm_add


@settings(deadline=None, max_examples=12, derandomize=True)
@given(n_row=st.integers(1, 4), n_col=st.sampled_from([1, 7, 63, 64, 65, 896, 1031]), eps=st.sampled_from([1e-6, 1e-5]))
def test_rmsnorm(n_row: int, n_col: int, eps: float) -> None:
    rng = np.random.default_rng(n_col)
    x, w = rng.standard_normal((n_row, n_col)).astype(np.float32), rng.standard_normal(n_col).astype(np.float32)
    buffers = {"x": x, "w": w, "y": np.full_like(x, np.nan)}
    push = {"n_row": n_row, "n_col": n_col, "eps": eps}
    check_kernel(rmsnorm(), {"y": reference.rmsnorm(x, w, eps)}, buffers, push, groups=(n_row, 1, 1))


def test_a_row_of_zeros_stays_zero() -> None:
    x, w = np.zeros((1, 96), np.float32), np.ones(96, np.float32)
    push = {"n_row": 1, "n_col": 96, "eps": 1e-6}
    check_kernel(rmsnorm(), {"y": np.zeros((1, 96))}, {"x": x, "w": w, "y": np.ones_like(x)}, push)


@settings(deadline=None, max_examples=16, derandomize=True)
@given(
    n_row=st.integers(1, 4),
    n_col=st.sampled_from([1, 3, 4, 63, 64, 65, 255, 257, 896, 1031]),
    padding=st.tuples(st.sampled_from([0, 4, 60]), st.integers(0, 5)),
)
def test_rmsnorm_add(n_row: int, n_col: int, padding: tuple[int, int]) -> None:
    """Rows wider than their columns: what lies beyond is NaN in x and stays as it is in y."""
    rng = np.random.default_rng(n_col)
    x_stride, y_stride = -(-n_col // 4) * 4 + padding[0], n_col + padding[1]
    x, y = np.full((n_row, x_stride), np.nan, np.float32), np.full((n_row, y_stride), 7.0, np.float32)
    x[:, :n_col], y[:, :n_col] = rng.standard_normal((n_row, n_col)), rng.standard_normal((n_row, n_col))
    w = rng.standard_normal(n_col).astype(np.float32)
    expected = y.astype(np.float64)
    expected[:, :n_col] += reference.rmsnorm(x[:, :n_col], w, 1e-6)
    push = {"n_row": n_row, "n_col": n_col, "x_stride": x_stride, "y_stride": y_stride, "eps": 1e-6}
    found = check_kernel(rmsnorm_add(), {"y": expected}, {"x": x, "w": w, "y": y}, push, groups=(n_row, 1, 1))
    assert (found["y"][:, n_col:] == 7.0).all()


@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_rmsnorm_add_hides_nothing(damage: float) -> None:
    x, y = np.ones((1, 64), np.float32), np.zeros((1, 64), np.float32)
    x[0, 37] = damage
    push = {"n_row": 1, "n_col": 64, "x_stride": 64, "y_stride": 64, "eps": 1e-6}
    out = run_on_device(rmsnorm_add(), {"x": x, "w": np.ones(64, np.float32), "y": y}, push, {}, (1, 1, 1))["y"]
    assert np.isnan(out[0, 37])
