"""From a file's blocks to packed texels, a slab of row groups at a time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vkllm_codegen.errors import KernelError
from vkllm_shaders.formats.base import U16, U32, Format
from vkllm_shaders.formats.code_words import pack_codes
from vkllm_shaders.formats.coded import coded_of
from vkllm_shaders.formats.layout import Layout
from vkllm_shaders.formats.scratch import scratch
from vkllm_shaders.formats.table import format_of
from vkllm_shaders.formats.words import split_axis

SLAB_BYTES = 1 << 18  # of file data packed at a time: small enough to stay in the cache


def packed_shape(fmt: str | Format, n_row: int, n_col: int, layout: Layout) -> tuple[int, int, int]:
    """Shape of a packed matrix in texels: (row groups, texels a lane, lanes)."""
    f = format_of(fmt)
    if layout.kind == "lane_pair":
        coded = coded_of(f.name)
        return layout.n_group(n_row), coded.n_chunk(n_col) * coded.n_texel, layout.lanes
    return layout.n_group(n_row), f.n_chunk(n_col) * f.n_texel(layout.rows), layout.lanes


def packed_nbytes(fmt: str | Format, n_row: int, n_col: int, layout: Layout) -> int:
    """Bytes of a packed matrix. `n_row`: its packed rows, or the length of its row order."""
    return 16 * int(np.prod(packed_shape(fmt, n_row, n_col, layout)))


def pack(
    fmt: str | Format,
    blocks: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
    n_col: int,
    layout: Layout,
    out: NDArray[np.uint8],
    row_order: NDArray[np.integer[Any]] | None = None,
    threads: int = 2,
) -> None:
    """Pack a matrix, a slab of row groups at a time; no second copy of it is made.

    Args: blocks: u8 [n_row, row_bytes] as in the file, or several such parts, one below the other; n_col: weights a row;
        out: u8 [packed_nbytes], e.g. mapped device memory; row_order: source row of each packed row, -1 for a row of zeros
        (default: as they are); threads: workers (numpy releases the GIL while it copies).
    Raises: KernelError: sizes that do not fit.
    """
    f = format_of(fmt)
    parts = [blocks] if isinstance(blocks, np.ndarray) else list(blocks)
    n_row = sum(len(part) for part in parts)
    order = np.arange(n_row) if row_order is None else np.asarray(row_order)
    groups, n_texel, _ = packed_shape(f, len(order), n_col, layout)
    need = packed_nbytes(f, len(order), n_col, layout)
    if any(part.shape[1] != f.row_bytes(n_col) for part in parts) or out.nbytes < need or out.dtype != np.uint8:
        raise KernelError(
            f"packing {f.name} rows of {n_col} weights: {[p.shape for p in parts]} into {out.nbytes} bytes",
            hint=f"expected rows of {f.row_bytes(n_col)} bytes, and {need} bytes of uint8 to write to",
        )
    order = np.concatenate([order, np.full(groups * layout.group_rows - len(order), -1, order.dtype)])
    slab_groups = max(1, SLAB_BYTES // max(1, layout.group_rows * f.row_bytes(n_col)))
    slab_bytes = 16 * n_texel * layout.lanes

    def work(first: int) -> None:
        last = min(first + slab_groups, groups)
        wanted = order[first * layout.group_rows : last * layout.group_rows]
        slab = out[first * slab_bytes : last * slab_bytes]
        if layout.kind == "lane_pair":
            rows = _gather(parts, wanted, f.row_bytes(n_col)).reshape(last - first, layout.rows, layout.lanes, -1)
            pack_codes(coded_of(f.name), rows, n_col, slab)
        else:
            whole = f.n_chunk(n_col) * (f.chunk // f.block) * f.block_bytes
            slab[...] = _pack_slab(f, _gather(parts, wanted, whole), n_col, layout).reshape(-1).view(np.uint8)

    slabs = range(0, groups, slab_groups)
    if threads > 1 and len(slabs) > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, slabs))
    else:
        for first in slabs:
            work(first)


def _gather(parts: Sequence[NDArray[np.uint8]], order: NDArray[np.integer[Any]], width: int) -> NDArray[np.uint8]:
    """Rows of the file in packed order, zero-padded to `width` bytes, in scratch memory."""
    used = parts[0].shape[1]
    rows = scratch("rows", (len(order), width), np.uint8)
    found, start = np.zeros(len(order), np.bool_), 0
    for part in parts:
        index = order - start
        mine = (index >= 0) & (index < len(part))
        if width == used and mine.all():
            return part.take(index, axis=0, out=rows, mode="clip")
        source = index[mine]
        rows[mine, :used] = part.take(source, axis=0, out=scratch("part", (len(source), used), np.uint8), mode="clip")
        found |= mine
        start += len(part)
    rows[~found] = 0
    rows[:, used:] = 0
    return rows


def _pack_slab(f: Format, padded: NDArray[np.uint8], n_col: int, layout: Layout) -> U32:
    """The texels of some whole row groups, from rows of whole chunks."""
    s, r, c = layout.lanes, layout.rows, f.n_chunk(n_col)
    rows: U16 = padded.view(np.uint16).reshape(len(padded), c, -1, f.unit_bytes // 2)
    g, nh, nb = len(rows) // layout.group_rows, f.n_head(r), f.n_body(r)
    if layout.kind == "lane_row":
        out = np.zeros((g, c, nh + f.steps * nb, s, 4), np.uint32)
        head, body = out[:, :, :nh], split_axis(out[:, :, nh:], 2, (f.steps, nb))
    else:
        out = np.zeros((g, c * (nh + f.steps * nb), 4), np.uint32)
        head = split_axis(out[:, : nh * c], 1, (nh, c, 1)).transpose(0, 2, 1, 3, 4)
        body = split_axis(out[:, nh * c :], 1, (nb, c, f.steps, 1)).transpose(0, 2, 3, 1, 4, 5)
    f.pack(rows.reshape(g, r, s, *rows.shape[1:]), head, body)
    return out
