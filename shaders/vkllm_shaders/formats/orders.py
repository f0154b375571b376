"""In which order the rows of a kernel's matrices are packed, so that what its epilogue needs together lies in one lane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vkllm_codegen.errors import KernelError
from vkllm_shaders.formats.layout import Layout


def row_order(
    epilogue: str,
    layout: Layout,
    n_rows: Sequence[int],
    head_dim: int = 0,
    rope_pairing: str = "interleaved",
) -> NDArray[np.int64]:
    """The source row of each packed row, over the rows of the parts one below the other; -1 is padding.

    "store", "residual": as they are. "swiglu", "geglu", "swiglu_oai": parts (gate, up); a lane's rows are (gate i, up i) pairs.
    "qkv", "pairs": parts q, k, v or some of them, heads of `head_dim` rows; a lane's rows are RoPE pairs: rows (2i, 2i + 1) of a
    head where rope_pairing is "interleaved", rows (i, i + head_dim / 2) where it is "half".
    """
    n_row = sum(n_rows)
    if epilogue in ("store", "residual"):
        order = _padded(np.arange(n_row), layout.group_rows)
        if layout.kind == "lane_pair":  # a lane's rows are neighbours
            order = order.reshape(-1, layout.lanes, layout.rows).swapaxes(1, 2).reshape(-1)
        return order
    if epilogue in ("swiglu", "geglu", "swiglu_oai"):
        if len(n_rows) != 2 or n_rows[0] != n_rows[1]:
            raise KernelError(f"{epilogue} of parts with {list(n_rows)} rows", hint="expected gate and up of one size")
        pairs = np.stack([np.arange(n_rows[0]), np.arange(n_rows[0]) + n_rows[0]])
        if layout.kind == "lane_pair":  # of four neighbours, a lane has two in a group and two in the group half of all further
            both = np.stack([_padded(part, layout.group_rows) for part in pairs])
            return np.ascontiguousarray(both.reshape(2, -1, layout.lanes, 2, 2).transpose(3, 1, 4, 0, 2)).reshape(-1)
    else:
        if head_dim < 2 or head_dim % 2 or any(n % head_dim for n in n_rows):
            raise KernelError(f"qkv of parts with {list(n_rows)} rows", hint=f"expected whole heads of {head_dim} (even) rows")
        i = np.arange(n_row // 2)
        head, j = i // (head_dim // 2) * head_dim, i % (head_dim // 2)
        first = head + (2 * j if rope_pairing == "interleaved" else j)
        pairs = np.stack([first, first + (1 if rope_pairing == "interleaved" else head_dim // 2)])
    s, p = layout.lanes, layout.rows // 2
    columns = np.stack([_padded(part, s * p) for part in pairs])  # pair index (group * p + j) * s + lane
    return np.ascontiguousarray(columns.reshape(2, -1, p, s).transpose(1, 2, 0, 3)).reshape(-1)


def _padded(order: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    return np.concatenate([order, np.full(-len(order) % multiple, -1, np.int64)])


def pack_vector(values: NDArray[np.float32], order: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """A vector over the parts' rows (a bias) in packed order, zero where there is no row."""
    return np.where(order >= 0, values[np.maximum(order, 0)], np.float32(0.0)).astype(np.float32)
