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


def heads(x: Array, position: Array, table: Array, pairing: str, norm_w: Array | None = None, eps: float = 0.0) -> F64:
    """Heads as they are multiplied and kept: normed over their dims (norm_w: None: not), their first dims turned.

    Args: x: [T, n_head, head_dim]; table: [n_ctx, rope_dim / 2, 2]; the other dims stay.
    """
    normed = x.astype(np.float64) if norm_w is None else rmsnorm(x, norm_w, eps)
    rope_dim = 2 * table.shape[1]
    return np.concatenate([rope(normed[..., :rope_dim], position, table, pairing), normed[..., rope_dim:]], axis=-1)


def attention(
    q: Array,
    k: Array,
    v: Array,
    kv_length: Array,
    table_start: Array,
    block_table: Array,
    block_size: int,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Array | None = None,
) -> F64:
    """Grouped-head attention of every row over its own paged cache; zeros where the length is 0.

    Args: q: [T, n_head, head_dim]; k, v: [n_slot, n_kv_head, head_dim]; kv_length, table_start: [T] (a row's positions
        0 … kv_length - 1 lie in blocks block_table[table_start …]); scale: None: 1 / sqrt(head_dim); softcap, window: 0: none;
        sinks: [n_head], logits that take part in the softmax and have no value.
    Returns: [T, n_head, head_dim].
    """
    n_row, n_head, head_dim = q.shape
    n_kv_head = k.shape[1]
    out = np.zeros(q.shape)
    for row in range(n_row):
        length = int(kv_length[row])
        position = np.arange(max(0, length - window) if window else 0, length)
        if not position.size:
            continue
        slot = block_table[int(table_start[row]) + position // block_size].astype(np.int64) * block_size + position % block_size
        grouped = q[row].astype(np.float64).reshape(n_kv_head, n_head // n_kv_head, head_dim)
        scores = np.einsum("hgd,nhd->hgn", grouped, k[slot].astype(np.float64)) * (scale or 1.0 / np.sqrt(head_dim))
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        if sinks is not None:
            scores = np.concatenate([scores, sinks.astype(np.float64).reshape(n_kv_head, -1, 1)], axis=-1)
        p = softmax(scores)[..., : position.size]
        out[row] = np.einsum("hgn,nhd->hgd", p, v[slot].astype(np.float64)).reshape(n_head, head_dim)
    return out


Q8_DIMS = 32
"""Dims of a Q8_0 cache row that share a scale."""


def q8_rows(x: Array) -> NDArray[np.uint32]:
    """Q8_0 cache rows of x [..., head_dim], as words: f32 scales, zeros up to whole 16 bytes, then signed bytes."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // Q8_DIMS, Q8_DIMS)
    most = np.abs(blocks).max(axis=-1)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    numbers = np.rint(blocks * inverse[..., None]).astype(np.int8).reshape(x.shape)
    scales = (most / np.float32(127)).view(np.uint32)
    padding = np.zeros((*x.shape[:-1], -scales.shape[-1] % 4), np.uint32)
    return np.concatenate([scales, padding, np.ascontiguousarray(numbers).view(np.uint32)], axis=-1)


def q8_values(words: NDArray[np.uint32], head_dim: int) -> F64:
    """The numbers that Q8_0 cache rows [..., words] stand for: [..., head_dim]."""
    n_scale = head_dim // Q8_DIMS
    scales = np.ascontiguousarray(words[..., :n_scale]).view(np.float32).astype(np.float64)
    numbers = np.ascontiguousarray(words[..., words.shape[-1] - head_dim // 4 :]).view(np.int8)
    blocks = numbers.reshape(*words.shape[:-1], n_scale, Q8_DIMS) * scales[..., None]
    return np.asarray(blocks.reshape(*words.shape[:-1], head_dim))


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


def route(logits: Array, n_used: int, over: str) -> tuple[NDArray[np.uint32], F64]:
    """The best experts of each row of logits [n_token, n_expert], best first, ties to the lowest id, and their softmax.

    `over`: "all" experts or the "used" ones. Returns: ids, weights, both [n_token, n_used].
    """
    ids = np.argsort(-logits.astype(np.float64), axis=-1, kind="stable")[:, :n_used]
    if over == "all":
        return ids.astype(np.uint32), np.take_along_axis(softmax(logits), ids, axis=-1)
    return ids.astype(np.uint32), softmax(np.take_along_axis(logits, ids, axis=-1))


def tiles(ids: Array, tile: int, n_tile: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """The rows of each expert in ids [n_row], by `tile`: experts [n_tile] and rows [n_tile, tile], NO_ID where there is none."""
    experts, rows = np.full(n_tile, NO_ID, np.uint32), np.full((n_tile, tile), NO_ID, np.uint32)
    at = 0
    for expert in np.unique(ids):
        its = np.flatnonzero(ids == expert)
        for i in range(0, len(its), tile):
            experts[at], rows[at, : len(its[i : i + tile])] = expert, its[i : i + tile]
            at += 1
    return experts, rows


def combine(y: Array, x: Array, weights: Array) -> F64:
    """y [n_token, n_col] plus the weighted [n_token, n_used] sum of x [n_token, n_used, n_col]."""
    return np.asarray(y + np.einsum("ts,tsn->tn", weights.astype(np.float64), x.astype(np.float64)))
