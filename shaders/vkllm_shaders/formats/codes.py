"""ggml's blocks taken apart by numpy: a code for each weight, and what scales them.

Source: ggml's quantization formats as gguf.quants dequantizes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]


@dataclass(frozen=True)
class Unpacked:
    """Rows of a type: codes u8 [row, column]; d and minimum, f16 bits u16 [row, block]; of K-quants, u8 [row, block, group]:
    scales and minimums (signed ones in two's complement; Q2_K has both in a byte of scales)."""

    codes: U8
    d: U16
    minimum: U16 | None = None
    scales: U8 | None = None
    minimums: U8 | None = None


def _blocks(rows: U8, nbytes: int) -> U8:
    return rows.reshape(len(rows), -1, nbytes)


def _half(blocks: U8, at: int) -> U16:
    """The f16 bits at a byte of each block."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.uint16)[..., 0]


def _nibbles(bytes_: U8) -> U8:
    """[.., n] → [.., 2, n]: the low ones, then the high ones."""
    out = np.empty((*bytes_.shape[:-1], 2, bytes_.shape[-1]), np.uint8)
    np.bitwise_and(bytes_, 15, out=out[..., 0, :])
    np.right_shift(bytes_, 4, out=out[..., 1, :])
    return out


def _flat(codes: U8) -> U8:
    return codes.reshape(len(codes), -1)


def _simple(nbytes: int, *, five: bool = False, minimum: bool = False) -> Callable[[U8], Unpacked]:
    """Q4_0, Q4_1, Q5_0, Q5_1."""

    def unpack(rows: U8) -> Unpacked:
        blocks = _blocks(rows, nbytes)
        codes = _nibbles(blocks[..., -16:]).reshape(*blocks.shape[:2], 32)
        if five:
            fifths = np.unpackbits(blocks[..., -20:-16], axis=-1, bitorder="little")
            codes |= fifths << 4
        return Unpacked(_flat(codes), _half(blocks, 0), _half(blocks, 2) if minimum else None)

    return unpack


def _q8_0(rows: U8) -> Unpacked:
    blocks = _blocks(rows, 34)
    return Unpacked(_flat(blocks[..., 2:] ^ 0x80), _half(blocks, 0))


def _k_quant(nbytes: int, *, five: bool = False) -> Callable[[U8], Unpacked]:
    """Q4_K, Q5_K: eight groups of 32; the nibbles of 32 bytes are two of them."""

    def unpack(rows: U8) -> Unpacked:
        blocks = _blocks(rows, nbytes)
        codes = _nibbles(blocks[..., -128:].reshape(*blocks.shape[:2], 4, 32))
        if five:
            bits = blocks[..., 16:48, None] >> np.arange(8, dtype=np.uint8) & 1  # [row, block, column, group]
            codes |= bits.swapaxes(-1, -2).reshape(codes.shape) << np.uint8(4)
        packed = blocks[..., 4:16]
        first, second, upper = packed[..., :4], packed[..., 4:8], packed[..., 8:]
        scales = np.concatenate([first & 63, (upper & 15) | (first >> 6) << 4], axis=-1)
        minimums = np.concatenate([second & 63, (upper >> 4) | (second >> 6) << 4], axis=-1)
        return Unpacked(_flat(codes), _half(blocks, 0), _half(blocks, 2), scales, minimums)

    return unpack


def _two_bits(bytes_: U8) -> U8:
    """[.., n] → [.., 4, n]: bits 0 and 1 of each byte, then 2 and 3 …"""
    return np.stack([(bytes_ >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-2)


def _q2_k(rows: U8) -> Unpacked:
    blocks = _blocks(rows, 84)
    codes = _two_bits(blocks[..., 16:80].reshape(*blocks.shape[:2], 2, 32))
    return Unpacked(_flat(codes), _half(blocks, 80), _half(blocks, 82), blocks[..., :16])


def _q3_k(rows: U8) -> Unpacked:
    blocks = _blocks(rows, 110)
    codes = _two_bits(blocks[..., 32:96].reshape(*blocks.shape[:2], 2, 32))
    thirds = blocks[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes |= thirds.reshape(codes.shape) << 2
    low, upper = _nibbles(blocks[..., 96:104]), _two_bits(blocks[..., 104:108])
    six = low.reshape(*upper.shape) | upper << 4
    return Unpacked(_flat(codes), _half(blocks, 108), scales=(six - 32).reshape(*blocks.shape[:2], 16))


def _q6_k(rows: U8) -> Unpacked:
    blocks = _blocks(rows, 210)
    n = blocks.shape[:2]
    low = blocks[..., :128].reshape(*n, 2, 2, 32)  # [.., half, quarter % 2, column]
    upper = _two_bits(blocks[..., 128:192].reshape(*n, 2, 32))  # [.., half, quarter, column]
    codes = np.concatenate([low & 15, low >> 4], axis=-2) | upper << 4
    return Unpacked(_flat(codes), _half(blocks, 208), scales=blocks[..., 192:208])


BLOCKS: dict[str, Callable[[U8], Unpacked]] = {
    "Q4_0": _simple(18),
    "Q4_1": _simple(20, minimum=True),
    "Q5_0": _simple(22, five=True),
    "Q5_1": _simple(24, five=True, minimum=True),
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _k_quant(144),
    "Q5_K": _k_quant(176, five=True),
    "Q6_K": _q6_k,
}
