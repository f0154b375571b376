"""Weight types without kernels, expanded to types that have them while they are loaded, a slab of rows at a time.

The IQ types become Q8_0, which loses little beside what they have lost; the ternary types become Q2_K, which holds them exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from vkllm.files.model_file import TensorInfo
from vkllm.files.types import TYPES
from vkllm_shaders.formats import FORMATS

log = logging.getLogger("vkllm.expand")

U8 = NDArray[np.uint8]

IQ = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
TERNARY = ("TQ1_0", "TQ2_0")
EXPANDED = dict.fromkeys(IQ, "Q8_0") | dict.fromkeys(TERNARY, "Q2_K")
"""File type → the type that the device gets instead."""

SLAB_WEIGHTS = 1 << 20  # expanded at a time: it takes 9 bytes for each


def device_type(kind: str) -> str:
    """The type in which a tensor of type `kind` lies on the device: its own, but for those that are expanded."""
    return EXPANDED.get(kind, kind)


def device_nbytes(info: TensorInfo) -> int:
    """Bytes of a tensor in its `device_type`."""
    if info.type not in EXPANDED:
        return info.nbytes
    n_row = int(np.prod(info.shape[:-1]))
    return n_row * FORMATS[device_type(info.type)].row_bytes(info.shape[-1])


def warn(tensors: Iterable[TensorInfo]) -> None:
    """Log a warning with the memory that expansion costs, where tensors need it."""
    found = [info for info in tensors if info.type in EXPANDED]
    if found:
        before, after = sum(info.nbytes for info in found), sum(device_nbytes(info) for info in found)
        kinds = ", ".join(f"{kind} as {EXPANDED[kind]}" for kind in sorted({info.type for info in found}))
        log.warning(
            "%d tensors have no kernels of their own and are expanded while loading (%s): %.2f GiB on the device instead of %.2f",
            *(len(found), kinds, after / 2**30, before / 2**30),
        )


def expand(kind: str, blocks: U8) -> U8:
    """Rows of an expanded type, [n_row, row bytes], in the type that the device gets."""
    import gguf  # takes long, and most models load without it

    with np.errstate(all="ignore"):  # NaN stays NaN
        if kind in TERNARY:
            return _ternary(kind, blocks)
        values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
        found: U8 = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        return found


def _ternary(kind: str, blocks: U8) -> U8:
    """weight = d * (q - 1) in blocks of 256 that end with d → Q2_K, where it is d * 1 * q - d * 1."""
    import gguf

    units = blocks.reshape(len(blocks), -1, TYPES[kind].block_bytes).copy()
    d = units[..., -2:].copy()
    units[..., -2:] = np.array([1.0], np.float16).view(np.uint8)
    q = gguf.quants.dequantize(units.reshape(len(blocks), -1), gguf.GGMLQuantizationType[kind]) + 1
    quarters = q.astype(np.uint8).reshape(*units.shape[:2], 2, 4, 32)  # of each half a block
    bits = quarters[..., 0, :] | quarters[..., 1, :] << 2 | quarters[..., 2, :] << 4 | quarters[..., 3, :] << 6
    ones = np.full((*units.shape[:2], 16), 0x11, np.uint8)
    return np.concatenate([ones, bits.reshape(*units.shape[:2], 64), d, d], axis=-1).reshape(len(blocks), -1)


def expand_rows(parts: Sequence[U8], kinds: Sequence[str], order: NDArray[np.int64]) -> tuple[list[U8], NDArray[np.int64]]:
    """Only the rows that `order` names, expanded where their part's kind needs it, and the order of these rows.

    Args: parts: rows in the file's types, one part below the other; order: row numbers over all parts, -1 for none.
    """
    found, order_of_found = [], np.full_like(order, -1)
    start = n_found = 0
    for part, kind in zip(parts, kinds, strict=True):
        mine = (order >= start) & (order < start + len(part))
        rows, inverse = np.unique(order[mine] - start, return_inverse=True)
        order_of_found[mine] = n_found + inverse
        if len(rows):
            found.append(expand(kind, part[rows]) if kind in EXPANDED else part[rows])
        start, n_found = start + len(part), n_found + len(rows)
    return found, order_of_found
