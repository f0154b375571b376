"""Float64 oracles of every kernel but the matrix products: what the tests hold a device to. Plain numpy, no tricks.

They know nothing of schedules, tiles or packing; shapes are those of the kernels' docstrings.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
F64 = NDArray[np.float64]

NO_ID = 0xFFFFFFFF
"""The id that the sampling kernels give when a row or a segment has no finite value left."""


def softmax(x: Array) -> F64:
    """exp(x - max) / sum of it over the last dimension."""
    e = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def rmsnorm(x: Array, w: Array, eps: float) -> F64:
    """x * rsqrt(mean(x²) + eps) * w over the last dimension. Source: arXiv 1910.07467."""
    wide = x.astype(np.float64)
    return np.asarray(wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + eps) * w.astype(np.float64))


def rope(x: Array, position: Array, table: Array, pairing: str) -> F64:
    """Rotate the pairs of every head. Source: RoFormer, arXiv 2104.09864.

    Args: x: [T, n_head, head_dim]; position: [T]; table: [n_ctx, head_dim / 2, 2] of (cos, sin);
        pairing: "interleaved" pairs (2j, 2j + 1), "half" pairs (j, j + head_dim / 2).
    """
    n_row, n_head, head_dim = x.shape
    turn = table.astype(np.float64)[position]
    cos, sin = turn[:, None, :, 0], turn[:, None, :, 1]
    axis = 3 if pairing == "interleaved" else 2  # where the two of a pair are told apart
    shape = (n_row, n_head, head_dim // 2, 2) if axis == 3 else (n_row, n_head, 2, head_dim // 2)
    first, second = np.moveaxis(x.astype(np.float64).reshape(shape), axis, 0)
    return np.stack([first * cos - second * sin, first * sin + second * cos], axis=axis).reshape(x.shape)


def attention(q: Array, k: Array, v: Array, kv_length: Array, table_start: Array, block_table: Array, block_size: int) -> F64:
    """Grouped-head attention of every row over its own paged cache; zeros where the length is 0.

    Args: q: [T, n_head, head_dim]; k, v: [n_slot, n_kv_head, head_dim]; kv_length, table_start: [T] (a row's positions
        0 … kv_length - 1 lie in blocks block_table[table_start …]).
    Returns: [T, n_head, head_dim].
    """
    n_row, n_head, head_dim = q.shape
    n_kv_head = k.shape[1]
    out = np.zeros(q.shape)
    for row in range(n_row):
        position = np.arange(int(kv_length[row]))
        if not position.size:
            continue
        slot = block_table[int(table_start[row]) + position // block_size].astype(np.int64) * block_size + position % block_size
        grouped = q[row].astype(np.float64).reshape(n_kv_head, n_head // n_kv_head, head_dim)
        p = softmax(np.einsum("hgd,nhd->hgn", grouped, k[slot].astype(np.float64)) / np.sqrt(head_dim))
        out[row] = np.einsum("hgn,nhd->hgd", p, v[slot].astype(np.float64)).reshape(n_head, head_dim)
    return out


def top_k(logits: Array, k: int) -> tuple[NDArray[np.uint32], NDArray[np.float32], int]:
    """The k best of one row, best first, ties to the lowest id, non-finite values left out and counted.

    Returns: ids [k] (NO_ID beyond the finite ones), values [k] (-inf there), number of non-finite values.
    """
    finite = np.isfinite(logits)
    ids = np.flatnonzero(finite)
    best = ids[np.argsort(-logits[ids].astype(np.float64), kind="stable")][:k]
    out_id, out_value = np.full(k, NO_ID, np.uint32), np.full(k, -np.inf, np.float32)
    out_id[: best.size], out_value[: best.size] = best, logits[best]
    return out_id, out_value, int((~finite).sum())
