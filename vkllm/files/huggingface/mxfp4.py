"""gpt-oss's MXFP4 as its checkpoint holds it, to GGUF's: only bits move.

The checkpoint keeps, for 32 weights, 16 bytes of neighbours (low nibble first) in one tensor and a scale byte in another; GGUF a
block of the scale and 16 bytes that pair weight i with weight i + 16.
Source: OCP Microscaling Formats 1.0; block_mxfp4 in ggml-common.h.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vkllm.errors import FileFormatError
from vkllm.files.huggingface.safetensors import Stored

BLOCK = 32


def shape(blocks: Stored, scales: Stored) -> tuple[int, ...]:
    """The shape of the weights, [n_expert, n_row, n_col]. Raises: FileFormatError: blocks and scales do not fit each other."""
    if blocks.shape[3:] != (BLOCK // 2,) or blocks.shape[:3] != scales.shape or {blocks.dtype, scales.dtype} != {"U8"}:
        found = " and ".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in (blocks, scales))
        raise FileFormatError(
            f"{found} are no MXFP4",
            hint="expected U8 [n_expert, n_row, n_block, 16] and U8 [n_expert, n_row, n_block]: download the folder again",
        )
    return (*blocks.shape[:2], blocks.shape[2] * BLOCK)


def repacked(blocks: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.uint8]:
    """uint8 [n_expert, n_row, n_block, 16] and [n_expert, n_row, n_block] to [n_expert, n_row, n_block * 17]."""
    out = np.empty((*scales.shape, 1 + BLOCK // 2), np.uint8)
    out[..., 0] = scales
    first, second = blocks[..., :8], blocks[..., 8:]  # weights 0 to 15, and 16 to 31
    np.bitwise_or(first & 0x0F, second << 4, out=out[..., 1::2])
    np.bitwise_or(first >> 4, second & 0xF0, out=out[..., 2::2])
    return out.reshape(*scales.shape[:2], -1)
