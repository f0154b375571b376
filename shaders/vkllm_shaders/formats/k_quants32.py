"""Formats of 256 weights a block with a scale of few bits for every 32: Q4_K, Q5_K."""

from __future__ import annotations

import numpy as np

from vkllm_codegen import Value, f32, i32
from vkllm_shaders.formats.base import U16, U32, Format, StepWeights
from vkllm_shaders.formats.words import bit_of_bytes, nibbles, put_steps, put_texels, two_rows


class KNibble(Format):
    """Q4_K, Q5_K. Head: for each row d, dmin and the 12 bytes of 6-bit scales. Body: fifth bits, nibbles."""

    def n_head(self, rows: int) -> int:
        return rows

    def _fifths(self, rows: int) -> int:
        return rows // 2 if self.bits == 5 else 0

    def n_body(self, rows: int) -> int:
        return self._fifths(rows) + 2 * rows

    def scale(self, w: StepWeights, r: int, sub: int) -> Value:
        d = w.keep(("d", r), lambda: w.half(w.head(4 * r), 0))
        return d * self._six_bits(w, r, sub, 0)

    def minimum(self, w: StepWeights, r: int, sub: int) -> Value:
        d = w.keep(("dmin", r), lambda: w.half(w.head(4 * r), 1))
        return d * self._six_bits(w, r, sub, 1)

    def _six_bits(self, w: StepWeights, r: int, sub: int, which: int) -> Value:
        """The scale (0) or minimum (1) of block 2 * step + sub: four are bytes, four are nibbles and the bytes' top bits."""

        def four() -> Value:
            plain, split = w.head(4 * r + 1 + which), w.head(4 * r + 3)
            upper = (((split >> 4) if which else split) & 0x0F0F0F0F) | ((plain >> 2) & 0x30303030)
            if isinstance(w.step, int):
                return (plain & 0x3F3F3F3F if w.step < 2 else upper) >> (16 * (w.step % 2))
            return w.b.select(w.step < 2, plain & 0x3F3F3F3F, upper) >> ((w.step & 1) * 16)

        word = w.keep(("six", r, which), four)
        return ((word >> (8 * sub)) & 0xFF).bitcast(i32).to(f32)

    def quad(self, w: StepWeights, pair: int, slot: int, half: int) -> Value:
        high, m = slot // 8, slot % 8 * 2 + half
        q = nibbles(w, 4 * self._fifths(w.rows) + pair * 16 + m, high)
        return q | bit_of_bytes(w.body(4 * pair + m // 4), m % 4 * 2 + high, 4) if self.bits == 5 else q

    def pack(self, rows: U16, head: U32, body: U32) -> None:
        put_texels(rows[..., :8].view(np.uint32), head)
        words, at = two_rows(rows)[..., 0, :], self._fifths(rows.shape[1])  # [group, pair, lane, chunk, 72 or 88]
        if at:
            put_steps(_transpose_fields(words[..., 8:24]), body[:, :, :, :at])
        put_steps(words[..., -64:].reshape(*words.shape[:4], 4, 16), body[:, :, :, at:])


def _transpose_fields(qh: U32) -> U32:
    """Q5_K's fifth bits. Byte by byte: bit pair `step` of word 4f + i → bit pair i of word [step, f]: [.., 16] → [.., 4, 4]."""
    words = qh.reshape(*qh.shape[:-1], 4, 4)
    out = np.zeros((*qh.shape[:-1], 4, 4), np.uint32)
    for step in range(4):
        for i in range(4):
            out[..., step, :] |= ((words[..., i] >> (2 * step)) & 0x03030303) << (2 * i)
    return out
