"""Formats whose four bits are the number of a value in a table: IQ4_NL, IQ4_XS, MXFP4.

A table is slow to look up in a kernel (on lavapipe a loop over the lanes). So the packer cuts the numbers of 16 weights of two
rows into bit planes, four words with one bit of each; the kernel makes the planes of the values by Boolean functions,
32 weights an operation, and transposes them to bytes: about 3 operations a weight for 8 bits, 2 for the 5 bits of MXFP4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vkllm_codegen import Value, f32, i32
from vkllm_shaders.formats.base import U16, U32, Format, StepWeights
from vkllm_shaders.formats.words import put_steps, put_texels, put_words, two_rows


class Codebook(Format):
    """Body: scales, then for each pair of rows and 16 weights a texel of four bit planes."""

    def value_planes(self, a: Value, b: Value, c: Value, d: Value) -> list[Value]:
        """The bits of value + zero, lowest first, from the bits of the number."""
        raise NotImplementedError

    def first_planes(self, rows: int) -> int:
        """Texels before the planes."""
        return -(-rows // 4)

    def n_body(self, rows: int) -> int:
        return self.first_planes(rows) + 2 * rows

    def exponent(self, r: int, comp: int) -> int:
        exponent = super().exponent(r, comp)
        return 0 if exponent + self.bits > 31 else exponent

    def mantissa(self, r: int, comp: int) -> tuple[int, int, int]:
        exponent, mask = super().exponent(r, comp), (1 << self.bits) - 1
        return (0, mask << exponent, exponent) if exponent + self.bits <= 23 else (exponent, mask, 0)

    def raw(self, w: StepWeights, r: int, slot: int, comp: int) -> Value:
        if super().exponent(r, comp) == self.exponent(r, comp):
            return super().raw(w, r, slot, comp)
        return (self.raw_word(w, r, slot, comp) >> super().exponent(r, comp)).bitcast(i32).to(f32)

    def quad(self, w: StepWeights, pair: int, slot: int, half: int) -> Value:
        def values() -> list[Value]:
            word = 4 * (self.first_planes(w.rows) + pair * 4 + slot // 4)
            return to_bytes(self.value_planes(*(w.body(word + bit) for bit in range(4))))

        return w.keep(("values", pair, slot // 4), values)[slot % 4 * 2 + half]


class _IQ4(Codebook):
    """-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113."""

    def value_planes(self, a: Value, b: Value, c: Value, d: Value) -> list[Value]:
        return [
            ~(c ^ ((c & ~b) | ((a | c) & ~(b ^ d)))),
            a ^ ((a & ~b) | (c & ~(a ^ d))),
            (a & (c ^ d)) | (b ^ (c | (b & d))),
            ((b ^ c) & ~d) | (a ^ (b | (a & c))),
            a ^ (d & ((b ^ c) | (a ^ c))),
            b ^ (d & ((b | c) & ~a)),
            c & ~(d & ~(a | b)),
            d,
        ]


class IQ4NL(_IQ4):
    """IQ4_NL. Two f16 a row and step as scales."""

    def pack(self, rows: U16, head: U32, body: U32) -> None:
        body = body[:, :, 0]
        put_words(np.ascontiguousarray(rows[..., 0]).view(np.uint32)[..., 0], body)
        planes = bit_planes(rows[..., 1:].view(np.uint8))
        put_texels(two_rows(planes), body[:, :, self.first_planes(rows.shape[1]) :])


class IQ4XS(_IQ4):
    """IQ4_XS. Head: for each row eight signed scales, spread from 6 bits to 8, and d as f32."""

    def n_head(self, rows: int) -> int:
        return rows

    def first_planes(self, rows: int) -> int:
        return 0

    def scale(self, w: StepWeights, r: int, sub: int) -> Value:
        def two() -> Value:
            """The step's two scales in the upper bytes."""
            words = w.head(4 * r), w.head(4 * r + 1)
            word = words[w.step >> 1] if isinstance(w.step, int) else w.b.select(w.step < 2, words[0], words[1])
            return word << (16 - (w.step & 1) * 16)

        word = w.keep(("two", r), two)
        d = w.head(4 * r + 2).bitcast(f32)
        return d * (((word << 8) if sub == 0 else word).bitcast(i32) >> 24).to(f32)

    def pack(self, rows: U16, head: U32, body: U32) -> None:
        words = np.zeros((*rows.shape[:5], 4), np.uint32)
        scales, upper, lower = words.view(np.int8), rows[..., 1], rows[..., 2:4].view(np.uint32)[..., 0]
        for i in range(8):
            scales[..., i] = (((lower >> (4 * i)) & 15) | (((upper >> (2 * i)) & 3) << 4)).astype(np.int8) - 32
        words.view(np.float32)[..., 2] = rows[..., 0].view(np.float16)
        put_texels(words, head)
        planes = bit_planes(rows[..., 0, 4:].view(np.uint8).reshape(*rows.shape[:4], 8, 16))
        put_steps(two_rows(planes.reshape(*rows.shape[:4], 4, 16)), body)


class MXFP4(Codebook):
    """MXFP4: 0, 1, 2, 3, 4, 6, 8, 12 and the same with a minus. A scale is a power of two, kept as bf16, two a row and step.

    Source: OCP Microscaling Formats v1.0; the values are doubled and the scale halved, as in ggml.
    """

    def value_planes(self, a: Value, b: Value, c: Value, d: Value) -> list[Value]:
        return [
            a & ~c,
            b ^ ((a | b) & (c | (a & d))),
            (d & (a | b)) ^ (c & ~(b & ~(a ^ d))),
            d ^ ((b ^ (d & ~a)) & ~(b ^ c)),
            ~(d & (a | b | c)),
        ]

    def scale(self, w: StepWeights, r: int, sub: int) -> Value:
        word = w.body(r)
        return (word & 0xFFFF0000 if sub else word << 16).bitcast(f32)

    def pack(self, rows: U16, head: U32, body: U32) -> None:
        body, blocks = body[:, :, 0], rows[..., 0, :].view(np.uint8).reshape(*rows.shape[:4], 2, 17)
        e = blocks[..., 0].astype(np.uint16)
        half_scale = np.where(e < 2, 0x20 << np.minimum(e, 1), (np.maximum(e, 1) - 1) << 7).astype(np.uint16)
        put_words(half_scale.view(np.uint32)[..., 0], body)
        put_texels(two_rows(bit_planes(blocks[..., 1:])), body[:, :, self.first_planes(rows.shape[1]) :])


def to_bytes(planes: Sequence[Value]) -> list[Value]:
    """Bit planes, lowest first, → 8 words: byte m of word k is made of the planes' bits 8m + k. A transposition."""
    words: list[Any] = [*planes, *[None] * (8 - len(planes))]
    for distance, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F)):
        for i in [i for i in range(8) if not i & distance]:
            x, y = words[i], words[i + distance]
            if y is None:
                words[i], words[i + distance] = (None, None) if x is None else (x & mask, (x >> distance) & mask)
            else:
                swap = ((x >> distance) ^ y) & mask
                words[i], words[i + distance] = x ^ (swap << distance), y ^ swap
    return words


def bit_planes(blocks: NDArray[np.uint8]) -> U16:
    """Nibbles of 32 weights as ggml has them, [.., 16] → the four planes of each half, [.., 8].

    A plane has weight 2i in bit i, 2i + 1 in bit 8 + i.
    """
    planes = _transposed(blocks[..., 1::2]).astype(np.uint16)
    planes <<= 8
    planes |= _transposed(blocks[..., 0::2])
    return planes


def _transposed(part: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bit i of byte k → bit k of byte i, [.., 8]: three swaps of bits in numbers of 64."""
    v = np.ascontiguousarray(part).view(np.uint64)
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        swap = (v ^ (v >> np.uint64(shift))) & np.uint64(mask)
        v ^= swap ^ (swap << np.uint64(shift))
    return v.view(np.uint8)
