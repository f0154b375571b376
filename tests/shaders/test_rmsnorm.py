"""RMS normalization of rows."""

from __future__ import annotations

import numpy as np
from check import check_kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from vkllm_shaders import reference
from vkllm_shaders.rmsnorm import rmsnorm


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
