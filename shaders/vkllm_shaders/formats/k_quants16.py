"""Formats of 256 weights a block with a scale of few bits for every 16: Q2_K, Q3_K, Q6_K.

A step is 16 weights of each quarter of half a block, as ggml keeps the bits of a half's quarters in one byte.
"""

from __future__ import annotations

import numpy as np

from vkllm_codegen import Value, f32, i32
from vkllm_shaders.formats.base import U16, U32, Format, StepWeights
from vkllm_shaders.formats.words import bit_of_bytes, nibbles, put_steps, put_texels, two_rows


class Sixteenths(Format):
    """Head: 16 bytes a row, one for each 16 weights, then what scales them."""

    def texel(self, step: Value | int, slot: Value | int) -> Value | int:
        return (step >> 1) * 32 + (step & 1) * 4 + (slot >> 2) * 8 + (slot & 3)

    def sixteenth(self, w: StepWeights, r: int, sub: int) -> Value:
        """The word whose byte 1 (quarters 0 and 2) or 3 (quarters 1 and 3) belongs to a row's weights in quarter `sub`."""

        def four() -> Value:
            """The word of quarters 0 and 1, or of 2 and 3: byte 2 * (quarter % 2) + (step & 1) counts."""
            words = [w.head(4 * r + i + sub // 2) for i in (0, 2)]
            word = words[w.step >> 1] if isinstance(w.step, int) else w.b.select(w.step < 2, words[0], words[1])
            return word << (8 - (w.step & 1) * 8)

        return w.keep(("six", r, sub // 2), four)


class Signed(Sixteenths):
    """Q3_K, Q6_K. The bytes are signed scales; eight rows' d (f16) follow in a texel."""

    def n_head(self, rows: int) -> int:
        return rows + -(-rows // 8)

    def scale(self, w: StepWeights, r: int, sub: int) -> Value:
        d = w.keep(("d", r), lambda: w.half(w.head(4 * w.rows + r // 2), r % 2))
        word = self.sixteenth(w, r, sub)
        return d * (((word << 16) if sub % 2 == 0 else word).bitcast(i32) >> 24).to(f32)

    def put_scales(self, scales: U32, d: U16, head: U32) -> None:
        """scales [group, row, lane, chunk, 1, 4], d [group, row, lane, chunk] → head."""
        r = d.shape[1]
        put_texels(scales, head[:, :, :r])
        last = head.view(np.uint16)[:, :, r:]
        for i in range(r):
            last[:, :, i // 8, :, i % 8] = d[:, i].swapaxes(1, 2)


class Q2K(Sixteenths):
    """Q2_K. The head's bytes are a scale (lower nibble) and a minimum; d and dmin of four rows follow in a texel. Body: bits."""

    def n_head(self, rows: int) -> int:
        return rows + -(-rows // 4)

    def n_body(self, rows: int) -> int:
        return rows

    def _nibble(self, w: StepWeights, r: int, sub: int, which: int) -> Value:
        """The scale (0) or minimum (1) times d or dmin."""
        d = w.keep(("d", r, which), lambda: w.half(w.head(4 * w.rows + r), which))
        shift = (8 if sub % 2 == 0 else 24) + 4 * which
        return d * ((self.sixteenth(w, r, sub) >> shift) & 0xF).bitcast(i32).to(f32)

    def scale(self, w: StepWeights, r: int, sub: int) -> Value:
        return self._nibble(w, r, sub, 0)

    def minimum(self, w: StepWeights, r: int, sub: int) -> Value:
        return self._nibble(w, r, sub, 1)

    def quad(self, w: StepWeights, pair: int, slot: int, half: int) -> Value:
        return two_bits(w.body(8 * pair + slot % 4 * 2 + half), slot // 4)

    def pack(self, rows: U16, head: U32, body: U32) -> None:
        r = rows.shape[1]
        put_texels(rows[..., :8].view(np.uint32), head[:, :, :r])
        factors = rows[..., 0, 40:42].view(np.uint32)[..., 0]
        last = head[:, :, r:]
        for i in range(r):
            last[:, :, i // 4, :, i % 4] = factors[:, i].swapaxes(1, 2)
        words = two_rows(rows)[..., 0, 8:40]
        put_steps(np.ascontiguousarray(words).reshape(*words.shape[:4], 4, 8), body)


class Q3K(Signed):
    """Q3_K. Body: third bits, two bits. The packer spreads the scales from 6 bits to 8."""

    def n_body(self, rows: int) -> int:
        return rows // 2 + rows

    def quad(self, w: StepWeights, pair: int, slot: int, half: int) -> Value:
        quarter, m = slot // 4, slot % 4 * 2 + half
        third = bit_of_bytes(w.body(4 * pair + m % 4), quarter + m // 4 * 4, 2)
        return two_bits(w.body(2 * w.rows + 8 * pair + m), quarter) | third

    def pack(self, rows: U16, head: U32, body: U32) -> None:
        r = rows.shape[1]
        self.put_scales(_spread(np.ascontiguousarray(rows[..., 48:54]).view(np.uint32)), rows[..., 0, 54], head)
        words = two_rows(rows)[..., 0, :]
        outer = words.shape[:4]
        put_steps(_nibbles_of_quarters(words[..., :16]), body[:, :, :, : r // 2])
        put_steps(np.ascontiguousarray(words[..., 16:48]).reshape(*outer, 4, 8), body[:, :, :, r // 2 :])


class Q6K(Signed):
    """Q6_K. Body: upper bits, nibbles."""

    def n_body(self, rows: int) -> int:
        return 3 * rows

    def quad(self, w: StepWeights, pair: int, slot: int, half: int) -> Value:
        quarter, m = slot // 4, slot % 4 * 2 + half
        upper = w.body(8 * pair + m)
        upper = upper << (4 - 2 * quarter) if quarter < 2 else upper >> (2 * quarter - 4) if quarter > 2 else upper
        return nibbles(w, 4 * w.rows + pair * 16 + quarter % 2 * 8 + m, quarter // 2) | (upper & 0x30303030)

    def pack(self, rows: U16, head: U32, body: U32) -> None:
        r = rows.shape[1]
        self.put_scales(rows[..., 96:104].view(np.uint32), rows[..., 0, 104], head)
        words = two_rows(rows)[..., 0, :]
        outer = words.shape[:4]
        low = words[..., :64].reshape(*outer, 2, 2, 2, 8).swapaxes(5, 6)  # to (half, step, quarter % 2, 8)
        put_steps(words[..., 64:96].reshape(*outer, 4, 8), body[:, :, :, :r])
        put_steps(low.reshape(*outer, 4, 16), body[:, :, :, r:])


def two_bits(word: Value, quarter: int) -> Value:
    """Bits 2 * quarter and the next of each byte."""
    return ((word >> (2 * quarter)) if quarter else word) & 0x03030303


def _spread(scales: U32) -> U32:
    """Q3_K's 16 scales of 6 bits, [.., 3] → signed bytes, less 32, [.., 4]: low nibbles in words 0 and 1, the upper bits in 2."""
    out = np.empty((*scales.shape[:-1], 4), np.uint32)
    for i in range(4):
        low, upper = scales[..., i % 2] >> (i // 2 * 4), scales[..., 2] >> (2 * i)
        six = (low & 0x0F0F0F0F) | ((upper & 0x03030303) << 4)
        less = six ^ 0x20202020  # less 32, in 6 bits
        sign = less & 0x20202020
        out[..., i] = less | (sign << 1) | (sign << 2)
    return out


def _nibbles_of_quarters(mask: U32) -> U32:
    """Q3_K's third bits. Nibble `half` of each byte of words 8m + k and 8m + k + 4 → word k of step (half, m).

    [.., 16] → [.., 4, 4].
    """
    words = mask.reshape(*mask.shape[:-1], 2, 2, 4)
    out = np.empty((*mask.shape[:-1], 2, 2, 4), np.uint32)
    for half in range(2):
        nibble = (words >> (4 * half)) & 0x0F0F0F0F
        out[..., half, :, :] = nibble[..., 0, :] | (nibble[..., 1, :] << 4)
    return out.reshape(*mask.shape[:-1], 4, 4)
