"""Quantization: weights in f32 become the blocks of a GGUF type, and a whole model file one of another type."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vkllm.errors import FileFormatError, UnsupportedQuantError
from vkllm.files.types import TYPES
from vkllm.quantize.blocks import QUANTIZERS, finite_f16

__all__ = ["TARGETS", "quantize"]

TARGETS = ("F32", "F16", "BF16", *QUANTIZERS)
"""The types that `quantize` writes."""


def quantize(values: NDArray[np.float32], kind: str, name: str = "the matrix") -> NDArray[np.uint8]:
    """Rows of weights as blocks of a type: f32 [n_row, n_col] → u8 [n_row, row_bytes], byte for byte as ggml's reference does.

    Raises: UnsupportedQuantError: an unknown type, rows that are no whole blocks, or weights too large for the type;
        FileFormatError: NaN or infinity. Both call the tensor by `name`.
    """
    if kind not in TARGETS:
        raise UnsupportedQuantError(f"cannot quantize to {kind}", hint=f"choose one of {', '.join(TARGETS)}")
    n_row, n_col = values.shape
    if n_col % TYPES[kind].block_size:
        raise UnsupportedQuantError(
            f"{name} has rows of {n_col}; {kind} needs multiples of {TYPES[kind].block_size}",
            hint="choose a type with smaller blocks",
        )
    if not np.isfinite(values).all():
        raise FileFormatError(f"{name} holds NaN or infinity", hint="the file is damaged: download or convert it again")
    with np.errstate(all="ignore"):  # groups of zeros divide by zero, and are set right
        return _bytes(values, kind, name).reshape(n_row, -1)


def _bytes(values: NDArray[np.float32], kind: str, name: str) -> NDArray[np.uint8]:
    if kind == "F32":
        return np.ascontiguousarray(values, "<f4").view(np.uint8)
    if kind == "BF16":
        bits = np.ascontiguousarray(values, "<f4").view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").view(np.uint8)
    try:
        if kind == "F16":
            return finite_f16(values).view(np.uint8)
        return QUANTIZERS[kind](values.reshape(-1, TYPES[kind].block_size))
    except OverflowError:
        raise UnsupportedQuantError(
            f"{name} has weights up to {np.abs(values).max():.3g}, for which {kind} has no number", hint="choose BF16 or F32"
        ) from None
