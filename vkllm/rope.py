"""Rotary position embedding as a table, made once on the host in float64. Source: RoFormer, arXiv 2104.09864."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vkllm.config import ModelConfig


def rope_table(config: ModelConfig, n_ctx: int, factors: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """(cos, sin) of every position and pair, f32 [n_ctx, head_dim / 2, 2].

    Args: factors: per-pair divisors of the frequency [head_dim / 2] (Llama 3.1's `rope_freqs.weight`).
    """
    pair = np.arange(config.head_dim // 2, dtype=np.float64)
    frequency = config.rope_theta ** (-2.0 * pair / config.rope_dim)
    if factors is not None:
        frequency = frequency / factors.astype(np.float64)
    angle = np.arange(n_ctx, dtype=np.float64)[:, None] * frequency
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)
