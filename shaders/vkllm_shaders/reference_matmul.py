"""Float64 oracles of the matmul family, on dequantized weights. Nothing here knows about packing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def dequantize(fmt: str, blocks: NDArray[np.uint8]) -> F64:
    """Blocks u8 [n_row, row_bytes] of a ggml type → weights [n_row, n_col]. Needs the gguf package."""
    from gguf import GGMLQuantizationType, quants

    if fmt == "F32":
        return blocks.view(np.float32).astype(np.float64)
    if fmt == "F16":
        return blocks.view(np.float16).astype(np.float64)
    return np.asarray(quants.dequantize(blocks, GGMLQuantizationType[fmt])).astype(np.float64)


def rmsnorm(x: F64, weight: F64, eps: float) -> F64:
    """x [n_token, n_col] scaled to a mean square of one a row, times weight [n_col]."""
    scale: F64 = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * scale * weight


def linear(w: F64, x: F64, bias: F64 | None = None, norm: F64 | None = None, eps: float = 0.0) -> F64:
    """norm(x) @ wᵀ + bias: w [n_row, n_col], x [n_token, n_col] → [n_token, n_row]."""
    y = (x if norm is None else rmsnorm(x, norm, eps)) @ w.T
    return y if bias is None else y + bias


def swiglu(gate: F64, up: F64) -> F64:
    """silu(gate) * up."""
    return gate / (1.0 + np.exp(-gate)) * up


def swiglu_oai(gate: F64, up: F64, limit: float = 7.0, alpha: float = 1.702) -> F64:
    """gpt-oss's gated unit: gate clamped from above, up from both sides, gate * sigmoid(alpha * gate) * (up + 1)."""
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return np.asarray(gate / (1.0 + np.exp(-alpha * gate)) * (up + 1.0))


def experts(w: F64, x: F64, ids: NDArray[np.uint32], bias: F64 | None = None) -> F64:
    """Row i is x[i] times the weights of expert ids[i].

    w [n_expert, n_row, n_col], x [n, n_col], bias [n_expert, n_row] → [n, n_row].
    """
    y = np.stack([w[e] @ row for e, row in zip(ids, x, strict=True)])
    return y if bias is None else y + bias[ids]


def rotate(x: F64, table: F64, head_dim: int, pairing: str) -> F64:
    """RoPE on heads: x [n_token, n_head * head_dim], table [n_token, head_dim / 2, 2] (cos, sin)."""
    heads = x.reshape(len(x), -1, head_dim)
    half = head_dim // 2
    first = np.arange(half) * 2 if pairing == "interleaved" else np.arange(half)
    second = first + (1 if pairing == "interleaved" else half)
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    out = heads.copy()
    out[..., first] = heads[..., first] * cos - heads[..., second] * sin
    out[..., second] = heads[..., first] * sin + heads[..., second] * cos
    return out.reshape(x.shape)
