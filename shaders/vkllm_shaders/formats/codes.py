"""ggml's blocks taken apart by numpy, four rows at a time: a code for each weight, and what scales them.

A *plane* is u64 [lane, chunk]: 16 bits of each of a lane's four rows, the first row's lowest. Operations that keep to bytes or to
16 bits treat the rows of many chunks at once, whole vectors of them. Codes lie in scratch memory.

Source: ggml's quantization formats as gguf.quants dequantizes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vkllm_shaders.formats.scratch import scratch

U64 = NDArray[np.uint64]

BYTES, HALVES = 0x0101010101010101, 0x0001000100010001  # one in each


@dataclass(frozen=True)
class Unpacked:
    """Planes of a chunk: codes [step, 16, …], two columns in 16 bits; d and minimum, f16 bits [block, …]; of K-quants, two 8-bit
    groups in 16 bits: scales and minimums [n / 2, …] (signed ones in two's complement; Q2_K has both in a byte of scales)."""

    codes: U64
    d: U64
    minimum: U64 | None = None
    scales: U64 | None = None
    minimums: U64 | None = None


Unpack = Callable[[U64], Unpacked]  # of planes [block of a chunk, u16 of a block, …]


def moved(planes: U64, shift: int, mask: int, out: U64 | None = None) -> U64:
    """Bits shifted up, or down where `shift` is negative, and those of `mask` taken."""
    if shift:
        planes = out = np.left_shift(planes, shift, out=out) if shift > 0 else np.right_shift(planes, -shift, out=out)
    return np.bitwise_and(planes, mask, out=out)


def add_moved(out: U64, planes: U64, shift: int, mask: int) -> None:
    """Set the moved bits in `out`."""
    out |= moved(planes, shift, mask, scratch("moved", planes.shape))


def _split(planes: U64, bits: int, *shape: int) -> U64:
    """[n, lane, chunk], split to [*shape, lane, chunk] → [.., 8 / bits, last of shape, lane, chunk]: low bits of bytes first."""
    planes = planes.reshape(*shape, *planes.shape[1:])
    out = scratch("codes", (*shape[:-1], 8 // bits, *planes.shape[-3:]))
    for i in range(8 // bits):
        moved(planes, -bits * i, ((1 << bits) - 1) * BYTES, out[..., i, :, :, :])
    return out


def _simple(*, five: bool = False, minimum: bool = False) -> Unpack:
    """Q4_0, Q4_1, Q5_0, Q5_1."""

    def unpack(blocks: U64) -> Unpacked:
        codes = scratch("codes", (len(blocks), 2, 8, *blocks.shape[2:]))
        for half in range(2):
            moved(blocks[:, -8:], -4 * half, 15 * BYTES, codes[:, half])
        if five:
            for i in range(8):  # bits 2 i and 2 i + 1 of each half of the fifths
                add_moved(codes[:, :, i], blocks[:, -10:-8], 4 - 2 * i, HALVES << 4)
                add_moved(codes[:, :, i], blocks[:, -10:-8], 11 - 2 * i, HALVES << 12)
        steps = codes.reshape(len(codes), 16, *codes.shape[3:])
        return Unpacked(steps, blocks[:, 0], blocks[:, 1] if minimum else None)

    return unpack


def _q8_0(blocks: U64) -> Unpacked:
    codes = scratch("codes", blocks[:, 1:].shape)
    return Unpacked(np.bitwise_xor(blocks[:, 1:], 0x80 * BYTES, out=codes), blocks[:, 0])


def _k_quant(*, five: bool = False) -> Unpack:
    """Q4_K, Q5_K: eight groups of 32; the nibbles of 32 bytes are two of them."""

    def unpack(blocks: U64) -> Unpacked:
        (block,) = blocks
        codes = _split(block[-64:], 4, 4, 16).reshape(8, 16, *block.shape[1:])
        if five:
            for group in range(8):
                add_moved(codes[group], block[8:24], 4 - group, 16 * BYTES)
        first, second, upper = block[2:4], block[4:6], block[6:8]
        scales = [moved(first, 0, 63 * BYTES), moved(upper, 0, 15 * BYTES) | moved(first, -2, 48 * BYTES)]
        minimums = [moved(second, 0, 63 * BYTES), moved(upper, -4, 15 * BYTES) | moved(second, -2, 48 * BYTES)]
        return Unpacked(codes, blocks[:, 0], blocks[:, 1], np.concatenate(scales), np.concatenate(minimums))

    return unpack


def _q2_k(blocks: U64) -> Unpacked:
    (block,) = blocks
    codes = _split(block[8:40], 2, 2, 16)  # [half, quarter, …]
    return Unpacked(codes.reshape(8, 16, *block.shape[1:]), blocks[:, 40], blocks[:, 41], block[:8])


def _q3_k(blocks: U64) -> Unpacked:
    (block,) = blocks
    codes = _split(block[16:48], 2, 2, 16).reshape(8, 16, *block.shape[1:])
    for step in range(8):
        add_moved(codes[step], block[:16], 2 - step, 4 * BYTES)
    six = [moved(block[48:52], -4 * (i // 2), 15 * BYTES)[i % 2 * 2 :][:2] for i in range(4)]
    six = [low | moved(block[52:54], 4 - 2 * i, 48 * BYTES) for i, low in enumerate(six)]
    less = np.bitwise_xor(np.concatenate(six), 32 * BYTES)  # less 32, in 6 bits
    add_moved(less, less, 1, 64 * BYTES)
    add_moved(less, less, 1, 128 * BYTES)
    return Unpacked(codes, blocks[:, 54], scales=less)


def _q6_k(blocks: U64) -> Unpacked:
    (block,) = blocks
    codes = _split(block[:64], 4, 2, 32).reshape(2, 4, 16, *block.shape[1:])  # [half, quarter, …]
    for quarter in range(4):
        add_moved(codes[:, quarter], block[64:96].reshape(2, 16, *block.shape[1:]), 4 - 2 * quarter, 48 * BYTES)
    return Unpacked(codes.reshape(8, 16, *block.shape[1:]), blocks[:, 104], scales=block[96:104])


BLOCKS: dict[str, Unpack] = {
    "Q4_0": _simple(),
    "Q4_1": _simple(minimum=True),
    "Q5_0": _simple(five=True),
    "Q5_1": _simple(five=True, minimum=True),
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _k_quant(),
    "Q5_K": _k_quant(five=True),
    "Q6_K": _q6_k,
}
