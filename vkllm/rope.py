"""Rotary position embedding as a table, made once on the host in float64.

Sources: RoFormer, arXiv 2104.09864; YaRN, arXiv 2309.00071; LongRoPE, arXiv 2402.13753.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vkllm.config import RopeScaling
from vkllm.plan import RopeTable

F64 = NDArray[np.float64]


def rope_table(table: RopeTable, rope_dim: int, n_ctx: int, vectors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """(cos, sin) of every position and pair, f32 [n_ctx, rope_dim / 2, 2].

    Args: vectors: the tensors that the table names, per-pair divisors of the frequency [rope_dim / 2].
    """
    scaling, pair = table.scaling, np.arange(rope_dim // 2, dtype=np.float64)
    frequency = table.theta ** (-2.0 * pair / rope_dim)
    long = table.long_factors is not None and n_ctx > scaling.n_ctx_original
    if factors := table.long_factors if long else table.factors:
        frequency = frequency / vectors[factors].astype(np.float64)
    if scaling.kind == "linear":
        frequency = frequency / scaling.factor
    if scaling.kind == "yarn":
        keep = _yarn_keep(scaling, table.theta, rope_dim)
        frequency = frequency * keep + frequency / scaling.factor * (1.0 - keep)
    angle = np.arange(n_ctx, dtype=np.float64)[:, None] * frequency
    return (np.stack([np.cos(angle), np.sin(angle)], axis=-1) * scaling.attn_factor).astype(np.float32)


def _yarn_keep(scaling: RopeScaling, theta: float, rope_dim: int) -> F64:
    """How much of each pair's frequency stays: 1 for those that turn `beta_fast` times and more within the original context, 0
    for those that turn `beta_slow` times and less."""

    def pair_that_turns(times: float) -> float:
        return rope_dim * math.log(scaling.n_ctx_original / (times * 2.0 * math.pi)) / (2.0 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, rope_dim - 1.0)
    ramp = (np.arange(rope_dim // 2, dtype=np.float64) - low) / max(high - low, 0.001)
    return np.asarray(1.0 - np.clip(ramp, 0.0, 1.0))
