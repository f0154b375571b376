"""Softmax over rows."""

from __future__ import annotations

import numpy as np
import pytest
from check import check_kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from vkllm_shaders import reference
from vkllm_shaders.softmax import softmax


@settings(deadline=None, max_examples=12, derandomize=True)
@given(n_row=st.integers(1, 4), n_col=st.sampled_from([1, 2, 63, 64, 65, 127, 257, 1031]), scale=st.sampled_from([1.0, 100.0]))
def test_softmax(n_row: int, n_col: int, scale: float) -> None:
    x = (np.random.default_rng(n_col).standard_normal((n_row, n_col)) * scale).astype(np.float32)
    buffers = {"x": x, "y": np.full_like(x, np.nan)}
    check_kernel(softmax(), {"y": reference.softmax(x)}, buffers, {"n_row": n_row, "n_col": n_col}, groups=(n_row, 1, 1))


@pytest.mark.parametrize("workgroup", [8, 32, 256])
def test_workgroup_sizes(workgroup: int) -> None:
    """The size is a specialization constant: one module, several pipelines."""
    x = np.linspace(-5, 5, 300, dtype=np.float32).reshape(2, 150)
    buffers, push = {"x": x, "y": np.zeros_like(x)}, {"n_row": 2, "n_col": 150}
    check_kernel(softmax(), {"y": reference.softmax(x)}, buffers, push, {"WG": workgroup}, (2, 1, 1))
