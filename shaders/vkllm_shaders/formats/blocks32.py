"""Formats of 32 weights a block: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0."""

from __future__ import annotations

import numpy as np

from vkllm_codegen import Value, f32, i32
from vkllm_shaders.formats.base import U16, U32, Format, StepWeights
from vkllm_shaders.formats.words import bit_of_bytes, nibbles, put_texels, put_words, two_rows


class Nibble32(Format):
    """Q4_0, Q4_1, Q5_0, Q5_1: blocks of 32 with one scale (and minimum). Body: scales, minimums, fifth bits, nibbles."""

    @property
    def five(self) -> bool:
        return self.bits == 5

    def _scale_texels(self, rows: int) -> int:
        return -(-rows // 4)

    def _fifths(self, rows: int) -> int:
        return self._scale_texels(rows) * (2 if self.has_minimum else 1)

    def _nibbles(self, rows: int) -> int:
        return self._fifths(rows) + (rows // 2 if self.five else 0)

    def n_body(self, rows: int) -> int:
        return self._nibbles(rows) + 2 * rows

    def minimum(self, w: StepWeights, r: int, sub: int) -> Value:
        return -w.half(w.body(4 * self._scale_texels(w.rows) + r), sub)

    def quad(self, w: StepWeights, pair: int, slot: int, half: int) -> Value:
        block, high, i = slot // 8, slot % 8 // 4, slot % 4 * 2 + half
        q = nibbles(w, 4 * self._nibbles(w.rows) + (pair * 2 + block) * 8 + i, high)
        if not self.five:
            return q
        return q | bit_of_bytes(w.body(4 * (self._fifths(w.rows) + pair) + block * 2 + i // 4), i % 4 * 2 + high, 4)

    def pack(self, rows: U16, head: U32, body: U32) -> None:
        r, n = rows.shape[1], rows.shape[4]
        body, first = body[:, :, 0], 1 + self.has_minimum
        for i in range(first):
            halves = np.ascontiguousarray(rows[..., i]).view(np.uint32)[..., 0]  # both blocks' scales in a word
            put_words(halves, body[:, :, i * self._scale_texels(r) :])
        words = two_rows(rows)
        if self.five:
            # Bits of qh: 16 * high + weight. Word f of a block holds weights 8f … of both halves; see bit_of_bytes for its bytes.
            low, high = words[..., first], words[..., first + 1]
            first += 2
            even = (low & 0x55555555) | ((high & 0x55555555) << 1)
            odd = ((low >> 1) & 0x55555555) | (high & 0xAAAAAAAA)
            f0 = (even & 0x00FF00FF) | ((odd & 0x00FF00FF) << 8)
            f1 = ((even >> 8) & 0x00FF00FF) | (odd & 0xFF00FF00)
            fifths = np.stack([f0, f1], axis=-1).reshape(*f0.shape[:-1], 4)  # (block, f)
            put_texels(fifths[..., None, :], body[:, :, self._fifths(r) : self._nibbles(r)])
        put_texels(words[..., first:].reshape(*words.shape[:4], n, 8), body[:, :, self._nibbles(r) :])


class Q8(Format):
    """Q8_0. Body: scales, then for each row 16 words of four weights, stored plus 128. One row a word."""

    def n_body(self, rows: int) -> int:
        return -(-rows // 4) + 4 * rows

    def exponent(self, r: int, comp: int) -> int:
        return (0, 8, 16, 0)[comp]

    def word(self, w: StepWeights, r: int, slot: int) -> Value:
        """u32: the four weights of a slot plus 128."""
        return w.body(4 * (-(-w.rows // 4)) + r * 16 + slot)

    def quad(self, w: StepWeights, pair: int, slot: int, half: int) -> Value:
        low, high = self.word(w, 2 * pair, slot), self.word(w, 2 * pair + 1, slot)
        return (low >> 16) | (high & 0xFFFF0000) if half else (low & 0xFFFF) | (high << 16)

    def raw_word(self, w: StepWeights, r: int, slot: int, comp: int) -> Value:
        return self.word(w, r, slot)

    def raw(self, w: StepWeights, r: int, slot: int, comp: int) -> Value:
        q = self.word(w, r, slot)
        byte = q >> 24 if comp == 3 else q & (0xFF << (8 * comp))
        return byte.bitcast(i32).to(f32)

    def pack(self, rows: U16, head: U32, body: U32) -> None:
        body, at = body[:, :, 0], -(-rows.shape[1] // 4)
        put_words(np.ascontiguousarray(rows[..., 0]).view(np.uint32)[..., 0], body)
        put_texels((rows[..., 1:] ^ 0x8080).view(np.uint32), body[:, :, at:])
