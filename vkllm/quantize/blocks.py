"""Weights to ggml's blocks: f32 [n_block, block_size] in, u8 [n_block, block_bytes] out, one function a type.

Every function gives the bytes that ggml's reference quantizer gives. A scale that f16 cannot hold, which would be written as
infinity there, is an OverflowError here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vkllm.quantize.search import ONE, Affine, descend_symmetric, search_affine, search_symmetric

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def finite_f16(x: F32) -> NDArray[np.float16]:
    """Rounded to f16. Raises: OverflowError: too large for it."""
    y = x.astype("<f2")
    if not np.isfinite(y).all():
        raise OverflowError
    return y


def _f16(x: F32) -> U8:
    """Two bytes each: [n] → [n, 2]."""
    return finite_f16(x).reshape(-1, 1).view(np.uint8)


def _inverse(d: F32) -> F32:
    """1 / d, and 0 where that is no number."""
    inverse = 1 / d
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _join_halves(codes: U8) -> U8:
    """Nibbles of weights i and i + 16 share a byte: [n, 32] → [n, 16]."""
    return _nibbles(codes[:, :16], codes[:, 16:])


def _nibbles(low: U8, high: U8) -> U8:
    """The lower four bits of two arrays in one."""
    return np.asarray(low & 15 | (high & 15) << 4, np.uint8)


def q4_0(x: F32) -> U8:
    """f16 d, then nibbles: x ≈ d * (code - 8)."""
    d, codes = _signed(x, 8)
    return np.concatenate([_f16(d), _join_halves(codes)], axis=1)


def q5_0(x: F32) -> U8:
    """f16 d, the fifth bits, nibbles: x ≈ d * (code - 16)."""
    d, codes = _signed(x, 16)
    return np.concatenate([_f16(d), _fifth_bits(codes), _join_halves(codes)], axis=1)


def q4_1(x: F32) -> U8:
    """f16 d and m, then nibbles: x ≈ d * code + m."""
    d, low, codes = _from_low(x, 15)
    return np.concatenate([_f16(d), _f16(low), _join_halves(codes)], axis=1)


def q5_1(x: F32) -> U8:
    """f16 d and m, the fifth bits, nibbles: x ≈ d * code + m."""
    d, low, codes = _from_low(x, 31)
    return np.concatenate([_f16(d), _f16(low), _fifth_bits(codes), _join_halves(codes)], axis=1)


def q8_0(x: F32) -> U8:
    """f16 d, then signed bytes: x ≈ d * code, rounded half away from zero."""
    d = np.abs(x).max(axis=1) / np.float32(127)
    scaled = x * _inverse(d)[:, None]
    whole = np.trunc(scaled)
    codes = whole + np.trunc(2 * (scaled - whole))
    return np.concatenate([_f16(d), codes.astype(np.int8).view(np.uint8)], axis=1)


def _signed(x: F32, half: int) -> tuple[F32, U8]:
    """The weight farthest from zero gets code 0: d [n] and codes 0 … 2 * half - 1."""
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0]
    d = peak / np.float32(-half)
    codes = np.trunc(x * _inverse(d)[:, None] + np.float32(half + 0.5))
    return d, np.clip(codes, 0, 2 * half - 1).astype(np.uint8)


def _from_low(x: F32, top: int) -> tuple[F32, F32, U8]:
    """The least weight gets code 0, the greatest `top`: d [n], least weight [n], codes."""
    low = x.min(axis=1)
    d = (x.max(axis=1) - low) / np.float32(top)
    codes = np.trunc((x - low[:, None]) * _inverse(d)[:, None] + np.float32(0.5))
    return d, low, np.clip(codes, 0, top).astype(np.uint8)


def _fifth_bits(codes: U8) -> U8:
    """Bit 4 of 32 codes as a little-endian word: [n, 32] → [n, 4]."""
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _groups(x: F32, size: int) -> F32:
    """[n_block, 256] → [size, n_block * 256 / size]: a group a column."""
    return np.ascontiguousarray(x.reshape(-1, size).T)


def _blocks(codes: F32) -> U8:
    """The way back: codes [size, n_group] → [n_block, 256]."""
    return np.ascontiguousarray(codes.astype(np.uint8).T).reshape(-1, 256)


def _requantized(x: F32, d: F32, minimum: F32, top: int, searched: Callable[[], F32]) -> F32:
    """Codes 0 … top for the scales as they were stored; where a scale became 0, those of the search."""
    codes = np.clip(np.rint((x + minimum) / d), 0, top)
    return np.where(d == 0, searched(), codes) if not d.all() else codes


def _widened(factor: F32, per_group: NDArray[np.integer]) -> F32:
    """f16-rounded factor [n_block] times whole numbers [n_block, n]: f32 [n_block * n]."""
    return np.asarray(factor.astype(np.float16).astype(np.float32)[:, None] * per_group.astype(np.float32)).reshape(-1)


def _six_bit_scales(found: Affine) -> tuple[F32, F32, NDArray[np.uint8], NDArray[np.uint8]]:
    """Scales and minima of the 8 groups of a block as numbers 0 … 63: d, dmin [n_block], scales, minima [n_block, 8]."""
    out = []
    for values in (found.scale.reshape(-1, 8), found.minimum.reshape(-1, 8)):
        greatest = np.maximum(values.max(axis=1), 0)
        inverse = np.where(greatest > 0, np.float32(63) / greatest, np.float32(0))
        whole = np.rint(inverse[:, None] * values).astype(np.int32)
        out.append((greatest / np.float32(63), np.minimum(whole.astype(np.uint8), 63)))
    (d, scales), (dmin, minima) = out
    return d, dmin, scales, minima


def _pack_six_bits(scales: U8, minima: U8) -> U8:
    """Twelve bytes for eight scales and eight minima."""
    high = [(part[:, :4] & 63) | (part[:, 4:] >> 4) << 6 for part in (scales, minima)]
    return np.concatenate([*high, _nibbles(scales[:, 4:], minima[:, 4:])], axis=1)


def _k_nibbles(x: F32, top: int, first: float, n_step: int) -> tuple[list[U8], U8]:
    """What Q4_K and Q5_K share: the head (d, dmin, scales) and the codes [n_block, 8, 32]."""
    groups = _groups(x, 32)
    size = np.sqrt(np.add.reduce(groups * groups, axis=0) / np.float32(32))
    found = search_affine(groups, size + np.abs(groups), top, first, n_step, absolute=False)
    d, dmin, scales, minima = _six_bit_scales(found)
    codes = _requantized(groups, _widened(d, scales), _widened(dmin, minima), top, found.codes)
    return [_f16(d), _f16(dmin), _pack_six_bits(scales, minima)], _blocks(codes).reshape(-1, 8, 32)


def _join_pairs(codes: U8) -> U8:
    """Nibbles of neighbouring groups share bytes: [n, 8, 32] → [n, 128]."""
    return _nibbles(codes[:, 0::2], codes[:, 1::2]).reshape(-1, 128)


def q4_k(x: F32) -> U8:
    """d, dmin, 6-bit scales and minima of 8 groups, nibbles: x ≈ d * scale * code - dmin * minimum."""
    head, codes = _k_nibbles(x, 15, -1.0, 20)
    return np.concatenate([*head, _join_pairs(codes)], axis=1)


def q5_k(x: F32) -> U8:
    """As q4_k, with the fifth bits (bit i of byte j: weight j of group i) between scales and nibbles."""
    head, codes = _k_nibbles(x, 31, -0.5, 15)
    fifth = np.packbits(codes >> 4, axis=1, bitorder="little").reshape(-1, 32)
    return np.concatenate([*head, fifth, _join_pairs(codes)], axis=1)


def _join_quarters(codes: U8, shift: int = 0) -> U8:
    """Two bits, from bit `shift` on, of the codes of four groups of 32 share bytes: [n, 256] → [n, 64]."""
    c = (codes >> shift & 3).reshape(-1, 2, 4, 32)
    return np.asarray(c[:, :, 0] | c[:, :, 1] << 2 | c[:, :, 2] << 4 | c[:, :, 3] << 6, np.uint8).reshape(-1, 64)


def q2_k(x: F32) -> U8:
    """Nibbles (scale, minimum) of 16 groups, two-bit codes, d, dmin."""
    groups = _groups(x, 16)
    found = search_affine(groups, np.abs(groups), 3, -0.5, 15, absolute=True)
    factors, nibbles = [], []
    for values in (found.scale.reshape(-1, 16), found.minimum.reshape(-1, 16)):
        greatest = np.maximum(values.max(axis=1), 0)
        inverse = np.where(greatest > 0, np.float32(15) / greatest, np.float32(0))
        nibbles.append(np.clip(np.rint(inverse[:, None] * values), 0, 15).astype(np.uint8))
        factors.append(greatest / np.float32(15))
    d, minimum = (_widened(f, n) for f, n in zip(factors, nibbles, strict=True))
    codes = _requantized(groups, d, minimum, 3, found.codes)
    return np.concatenate([_nibbles(*nibbles), _join_quarters(_blocks(codes)), *map(_f16, factors)], axis=1)


def _greatest(scales: F32) -> F32:
    """Of each row the scale farthest from zero, the first of equals."""
    return np.take_along_axis(scales, np.abs(scales).argmax(axis=1)[:, None], axis=1)[:, 0]


def q3_k(x: F32) -> U8:
    """The third bits (bit i of byte j: weight j of 32 in group i), two-bit codes, 6-bit scales of 16 groups, d."""
    groups = _groups(x, 16)
    scale, searched = descend_symmetric(groups, 4)
    scales = scale.reshape(-1, 16)
    greatest = _greatest(scales)
    none = greatest == 0
    inverse = np.float32(-32) / np.where(none, np.float32(1), greatest)
    whole = np.where(none[:, None], -32, np.clip(np.rint(inverse[:, None] * scales), -32, 31)).astype(np.int8)
    d = np.where(none, np.float32(0), 1 / inverse)
    step = _widened(d, whole)
    codes = np.where(step == 0, searched, np.clip(np.rint(groups / step), -4, 3))
    blocks = _blocks(codes + np.float32(4))
    third = np.packbits((blocks >> 2).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    return np.concatenate([third, _join_quarters(blocks), _pack_q3_scales((whole + 32).astype(np.uint8)), _f16(d)], axis=1)


def _pack_q3_scales(scales: U8) -> U8:
    """Sixteen 6-bit scales in twelve bytes: nibbles of i and i + 8, then the upper bits of i, i + 4, i + 8, i + 12."""
    upper = (scales >> 4).reshape(-1, 4, 4)
    top = upper[:, 0] | upper[:, 1] << 2 | upper[:, 2] << 4 | upper[:, 3] << 6
    return np.concatenate([_nibbles(scales[:, :8], scales[:, 8:]), top], axis=1)


def q6_k(x: F32) -> U8:
    """Nibbles, upper two bits, signed 8-bit scales of 16 groups, d."""
    groups = _groups(x, 16)
    found = search_symmetric(groups, 32)
    scales = found.scale.reshape(-1, 16)
    greatest = _greatest(scales)
    none = np.abs(greatest) < np.float32(1e-15)
    inverse = np.float32(-128) / np.where(none, np.float32(1), greatest)
    whole = np.minimum(np.rint(inverse[:, None] * scales), 127).astype(np.int8)
    whole[none] = 0
    d = np.where(none, np.float32(0), 1 / inverse)
    step = _widened(d, whole)
    codes = np.clip(np.rint(groups / step), -32, 31)
    if not step.all():
        codes = np.where(step == 0, found.codes(), codes)
    blocks = _blocks(codes + np.float32(32))
    blocks[none] = 0
    c = blocks.reshape(-1, 2, 4, 32)
    low = _nibbles(c[:, :, :2], c[:, :, 2:]).reshape(-1, 128)
    return np.concatenate([low, _join_quarters(blocks, 4), whole.view(np.uint8), _f16(d)], axis=1)


def mxfp4(x: F32) -> U8:
    """A power of two as its exponent, then nibbles: of sixteen values, the nearest to each weight."""
    greatest = np.abs(x).max(axis=1)
    exponent = np.where(greatest > 0, np.clip(np.floor(np.log2(greatest)) + 125, 0, 254), 0).astype(np.uint8)
    scale = np.ldexp(ONE, exponent.astype(np.int32) - 128)[:, None]  # the values are twice those of the format
    codes, best = np.zeros(x.shape, np.uint8), np.abs(x)
    for code, value in enumerate(MXFP4_VALUES):
        error = np.abs(np.float32(value) * scale - x)
        np.copyto(codes, np.uint8(code), where=error < best)
        np.minimum(best, error, out=best)
    return np.concatenate([exponent[:, None], _join_halves(codes)], axis=1)


QUANTIZERS: dict[str, Callable[[F32], U8]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "MXFP4": mxfp4,
}
