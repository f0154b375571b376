"""Weight formats: how ggml's blocks are packed for the kernels, and how a kernel reads them back.

A file's blocks (18, 22, 34, 176, 210 bytes …) cannot be loaded 16 bytes at a time. `pack` rearranges them, once, into texels of
16 bytes (u32x4) without changing a bit of information; the size grows only by what padding needs.

Words. A row group is `lanes * rows` rows. A *chunk* is 64 weights (256 for K-quants) of the `rows` rows of one lane; it has
`n_head` texels and `steps` times `n_body` texels; a *step* is 64 weights of each row. The 64 weights of a step belong to 16
*slots* of four, so that a slot is one texel of x; `Format.texel` tells which (ggml's nibble order is kept).

In the formats of 4, 5 and 6 bits a word holds two rows: 16 bits of row 2i below 16 bits of row 2i + 1. A *quad* is such a word
with one weight a byte: [row 2i, weight k], [2i, k + 1], [2i + 1, k], [2i + 1, k + 1]. The f32 kernels mask a byte and convert
it without a shift (its power of two goes into the scale), the int8 kernels multiply two rows at a time.

Layouts:
- "lane_row" (lavapipe): texel ((group * n_chunk + chunk) * n_texel + j) * lanes + lane.
  Packed row (group * rows + r) * lanes + lane.
- "lane_chunk" (GPUs; lanes = 1): a group holds its head texels [n_head, n_chunk], then its body texels
  [n_body, n_chunk * steps], so that neighbouring invocations, one a step, read neighbouring texels. Packed row group * rows + r.

This module does not know what is multiplied with what; see matmul.py.
Source of the block structures: ggml's quantization formats as gguf.quants dequantizes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vkllm_codegen import Block, Value, f32, i32
from vkllm_codegen.errors import KernelError

U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]
Load = Callable[[int], Value]

STEP = 64  # weights of a row in a step
SLOTS = 16  # texels of x in a step
SLAB_BYTES = 1 << 18  # of file data packed at a time: small enough to stay in the cache


@dataclass(frozen=True, slots=True)
class Layout:
    """Where packed texels lie.

    lanes: rows side by side (the subgroup size for lane_row, 1 for lane_chunk); rows: rows a lane.
    """

    kind: Literal["lane_row", "lane_chunk"] = "lane_row"
    lanes: int = 8
    rows: int = 4

    def __post_init__(self) -> None:
        if self.rows not in (2, 4, 8) or self.lanes < 1 or (self.kind == "lane_chunk" and self.lanes != 1):
            raise KernelError(f"layout {self}", hint="rows must be 2, 4 or 8; lane_chunk has lanes = 1")

    @property
    def group_rows(self) -> int:
        """Rows of a row group."""
        return self.lanes * self.rows

    def n_group(self, n_row: int) -> int:
        """Row groups that hold `n_row` rows."""
        return -(-n_row // self.group_rows)


class StepWeights:
    """The weights of one step in a kernel: raw numbers and what makes them weights.

    weight[r, slot, comp] = scale(r, sub) * (raw(r, slot, comp) * 2**-exponent(r, comp) - zero) - minimum(r, sub),
    sub = slot * n_sub // 16. Values are made when asked for and kept, so ask in the order of use.
    """

    def __init__(self, fmt: Format, b: Block, head: Load, body: Load, rows: int, step: Value | int) -> None:
        self.fmt, self.b, self.rows, self.step = fmt, b, rows, step
        self._head, self._body = head, body
        self._kept: dict[Any, Value] = {}

    def keep(self, key: Any, make: Callable[[], Value]) -> Value:
        """`make()`, once for each key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def body(self, word: int) -> Value:
        """Word of the step's texels."""
        return self.keep(("body", word // 4), lambda: self._body(word // 4))[word % 4]

    def head(self, word: int) -> Value:
        """Word of the chunk's head texels."""
        return self.keep(("head", word // 4), lambda: self._head(word // 4))[word % 4]

    def half(self, word: Value, i: int) -> Value:
        """One of the two f16 in a word, as f32."""
        return self.b.unpack_half2x16(word)[i]

    def raw(self, r: int, slot: int, comp: int) -> Value:
        """f32: the stored number times 2**exponent(r, comp)."""
        return self.fmt.raw(self, r, slot, comp)

    def magic(self, r: int, slot: int, comp: int) -> tuple[Value, int]:
        """The same, with its exponent, for GPUs, which convert integers slowly: bits in the mantissa of 2**23."""
        shift, mask, exponent = self.fmt.mantissa(r, comp)
        word = self.fmt.raw_word(self, r, slot, comp)
        bits = ((word >> shift) if shift else word) & mask
        return (bits | 0x4B000000).bitcast(f32) - 8388608.0, exponent

    def scale(self, r: int, sub: int) -> Value:
        return self.keep(("scale", r, sub), lambda: self.fmt.scale(self, r, sub))

    def minimum(self, r: int, sub: int) -> Value | None:
        if not self.fmt.has_minimum:
            return None
        return self.keep(("minimum", r, sub), lambda: self.fmt.minimum(self, r, sub))

    def quad(self, pair: int, slot: int, half: int) -> Value:
        """u32, a weight a byte, of rows 2 * pair and 2 * pair + 1: weights 2 * half and 2 * half + 1 of a slot."""
        return self.keep(("quad", pair, slot, half), lambda: self.fmt.quad(self, pair, slot, half))

    def both(self, pair: int, slot: int, comp: int) -> Value:
        """i32: one weight of row 2 * pair in the lower 16 bits, of row 2 * pair + 1 in the upper, without the zero point."""
        return self.fmt.both(self, pair, slot, comp).bitcast(i32)


@dataclass(frozen=True)
class Format:
    """One ggml type: `block` weights in `block_bytes`; `n_sub` scales a step (0: the raw numbers are the weights)."""

    name: str
    block: int
    block_bytes: int
    chunk: int = STEP
    n_sub: int = 2
    zero: int = 0
    bits: int = 0
    has_minimum: bool = False
    pairs: bool = False

    @property
    def steps(self) -> int:
        """Steps a chunk."""
        return self.chunk // STEP

    def n_head(self, rows: int) -> int:
        """Head texels a chunk."""
        return 0

    def n_body(self, rows: int) -> int:
        """Texels a step."""
        raise NotImplementedError

    def n_texel(self, rows: int) -> int:
        """Texels a lane and chunk."""
        return self.n_head(rows) + self.steps * self.n_body(rows)

    def n_chunk(self, n_col: int) -> int:
        """Chunks of a row; the last may be padded with weights that are exactly zero."""
        return -(-n_col // self.chunk)

    def row_bytes(self, n_col: int) -> int:
        """Bytes of a row in the file."""
        if n_col % self.block:
            raise KernelError(f"{self.name} rows of {n_col} weights", hint=f"expected a multiple of {self.block}")
        return n_col // self.block * self.block_bytes

    def texel(self, step: Value | int, slot: Value | int) -> Value | int:
        """Texel of x (four floats), within a chunk, that a slot of a step multiplies."""
        return step * SLOTS + slot

    def exponent(self, r: int, comp: int) -> int:
        """Power of two in `raw`."""
        return 8 * (comp % 2) + 16 * (r % 2) if self.pairs else 0

    def mantissa(self, r: int, comp: int) -> tuple[int, int, int]:
        """How to get a raw number into 23 bits: (shift right, mask, exponent that is left)."""
        exponent, width = 8 * (comp % 2) + 16 * (r % 2) if self.pairs else 8 * comp, (1 << self.bits) - 1
        shift = 0 if exponent + self.bits <= 23 else 8 if self.pairs else exponent
        return shift, width << (exponent - shift), exponent - shift

    # What a kernel computes; `w` holds the step's texels.

    def raw_word(self, w: StepWeights, r: int, slot: int, comp: int) -> Value:
        """u32: the word whose byte is the raw number."""
        return w.quad(r // 2, slot, comp // 2)

    def raw(self, w: StepWeights, r: int, slot: int, comp: int) -> Value:
        mask = ((1 << self.bits) - 1) << self.exponent(r, comp)
        return (self.raw_word(w, r, slot, comp) & mask).bitcast(i32).to(f32)

    def scale(self, w: StepWeights, r: int, sub: int) -> Value:
        """Two f16 a row, one for each half of the step."""
        return w.half(w.body(r), sub)

    def minimum(self, w: StepWeights, r: int, sub: int) -> Value:
        raise NotImplementedError

    def quad(self, w: StepWeights, pair: int, slot: int, half: int) -> Value:
        raise NotImplementedError

    def both(self, w: StepWeights, pair: int, slot: int, comp: int) -> Value:
        quad = w.quad(pair, slot, comp // 2)
        return ((quad >> 8) if comp % 2 else quad) & 0x00FF00FF

    # What the packer writes.

    def pack(self, rows: U16, head: U32, body: U32) -> None:
        """Fill the texels (zero before) of some row groups.

        Args: rows [group, row, lane, chunk, block, u16 of a block]; head [group, chunk, n_head, lane, 4];
            body [group, chunk, step, n_body, lane, 4].
        """
        raise NotImplementedError


def two_rows(rows: U16) -> U32:
    """[group, row, …] u16 → [group, pair, …] u32: row 2i below row 2i + 1."""
    words = rows[:, 1::2].astype(np.uint32)
    words <<= 16
    words |= rows[:, 0::2]
    return words


def put_words(words: U32, texels: U32) -> None:
    """words [group, row, lane, chunk] → the first texels [group, chunk, texel, lane, 4]: a word a row."""
    for i in range(0, words.shape[1], 4):
        part = words[:, i : i + 4]
        texels[:, :, i // 4, :, : part.shape[1]] = part.transpose(0, 3, 2, 1)


def put_texels(words: U32, texels: U32) -> None:
    """words [group, row or pair, lane, chunk, block, 4 k] → texels [group, chunk, (row or pair, block, k), lane, 4]."""
    source = words.view(np.complex128)  # a number of 16 bytes that numpy copies without looking at it
    p, n, k = source.shape[1], source.shape[4], source.shape[5]
    split_axis(texels.view(np.complex128)[..., 0], 2, (p, n, k))[...] = source.transpose(0, 3, 1, 4, 5, 2)


def put_steps(words: U32, texels: U32) -> None:
    """words [group, pair, lane, chunk, step, 4 k] → texels [group, chunk, step, (pair, k), lane, 4]."""
    source = words.view(np.complex128)
    p, k = source.shape[1], source.shape[5]
    split_axis(texels.view(np.complex128)[..., 0], 3, (p, k))[...] = source.transpose(0, 3, 4, 1, 5, 2)


def split_axis(a: NDArray[Any], axis: int, sizes: tuple[int, ...]) -> NDArray[Any]:
    """One axis as several, never a copy."""
    strides = [a.strides[axis] * int(np.prod(sizes[i + 1 :])) for i in range(len(sizes))]
    shape = (*a.shape[:axis], *sizes, *a.shape[axis + 1 :])
    return np.lib.stride_tricks.as_strided(a, shape, (*a.strides[:axis], *strides, *a.strides[axis + 1 :]))


def nibbles(w: StepWeights, word: int, high: int) -> Value:
    """The low or the high nibbles of a word, a nibble a byte."""
    q = w.body(word)
    return ((q >> 4) if high else q) & 0x0F0F0F0F


def fifth_bits(word: Value, index: int) -> Value:
    """Bit `index` (0 … 7) of each byte, moved to bit 4."""
    return ((word << (4 - index)) if index < 4 else (word >> (index - 4))) & 0x10101010


class _Nibble32(Format):
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
        return q | fifth_bits(w.body(4 * (self._fifths(w.rows) + pair) + block * 2 + i // 4), i % 4 * 2 + high)

    def pack(self, rows: U16, head: U32, body: U32) -> None:
        r, n = rows.shape[1], rows.shape[4]
        body, first = body[:, :, 0], 1 + self.has_minimum
        for i in range(first):
            halves = np.ascontiguousarray(rows[..., i]).view(np.uint32)[..., 0]  # both blocks' scales in a word
            put_words(halves, body[:, :, i * self._scale_texels(r) :])
        words = two_rows(rows)
        if self.five:
            # Bits of qh: 16 * high + weight. Word f of a block holds weights 8f … of both halves; see fifth_bits for its bytes.
            low, high = words[..., first], words[..., first + 1]
            first += 2
            even = (low & 0x55555555) | ((high & 0x55555555) << 1)
            odd = ((low >> 1) & 0x55555555) | (high & 0xAAAAAAAA)
            f0 = (even & 0x00FF00FF) | ((odd & 0x00FF00FF) << 8)
            f1 = ((even >> 8) & 0x00FF00FF) | (odd & 0xFF00FF00)
            fifths = np.stack([f0, f1], axis=-1).reshape(*f0.shape[:-1], 4)  # (block, f)
            put_texels(fifths[..., None, :], body[:, :, self._fifths(r) : self._nibbles(r)])
        put_texels(words[..., first:].reshape(*words.shape[:4], n, 8), body[:, :, self._nibbles(r) :])


class _Q8(Format):
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


class _KNibble(Format):
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
        return q | fifth_bits(w.body(4 * pair + m // 4), m % 4 * 2 + high) if self.bits == 5 else q

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


class _Q6K(Format):
    """Q6_K. Head: 16 signed scales a row, then d. Body: upper bits, nibbles. A step: 16 weights of each quarter of a half."""

    def n_head(self, rows: int) -> int:
        return rows + -(-rows // 8)

    def n_body(self, rows: int) -> int:
        return 3 * rows

    def texel(self, step: Value | int, slot: Value | int) -> Value | int:
        return (step >> 1) * 32 + (step & 1) * 4 + (slot >> 2) * 8 + (slot & 3)

    def scale(self, w: StepWeights, r: int, sub: int) -> Value:
        d = w.keep(("d", r), lambda: w.half(w.head(4 * w.rows + r // 2), r % 2))

        def four() -> Value:
            """The word of quarters 0 and 1, or of 2 and 3: byte 2 * (quarter % 2) + (step & 1) counts."""
            words = [w.head(4 * r + i + sub // 2) for i in (0, 2)]
            word = words[w.step >> 1] if isinstance(w.step, int) else w.b.select(w.step < 2, words[0], words[1])
            return word << (8 - (w.step & 1) * 8)

        word = w.keep(("six", r, sub // 2), four)
        return d * (((word << 16) if sub % 2 == 0 else word).bitcast(i32) >> 24).to(f32)

    def quad(self, w: StepWeights, pair: int, slot: int, half: int) -> Value:
        quarter, m = slot // 4, slot % 4 * 2 + half
        upper = w.body(8 * pair + m)
        upper = upper << (4 - 2 * quarter) if quarter < 2 else upper >> (2 * quarter - 4) if quarter > 2 else upper
        return nibbles(w, 4 * w.rows + pair * 16 + quarter % 2 * 8 + m, quarter // 2) | (upper & 0x30303030)

    def pack(self, rows: U16, head: U32, body: U32) -> None:
        r, block = rows.shape[1], rows[..., 0, :]
        put_texels(rows[..., 96:104].view(np.uint32), head[:, :, :r])
        last = head.view(np.uint16)[:, :, r:]  # eight f16 a texel
        for i in range(r):
            last[:, :, i // 8, :, i % 8] = block[:, i, :, :, 104].swapaxes(1, 2)
        words = two_rows(rows)[..., 0, :]
        outer = words.shape[:4]
        low = words[..., :64].reshape(*outer, 2, 2, 2, 8).swapaxes(5, 6)  # to (half, step, quarter % 2, 8)
        put_steps(words[..., 64:96].reshape(*outer, 4, 8), body[:, :, :, :r])
        put_steps(low.reshape(*outer, 4, 16), body[:, :, :, r:])


class _Float(Format):
    """F32, F16, BF16: rows of words, nothing else."""

    @property
    def words(self) -> int:
        """Words of a row in a step."""
        return STEP * self.block_bytes // 4

    def n_body(self, rows: int) -> int:
        return rows * self.words // 4

    def raw(self, w: StepWeights, r: int, slot: int, comp: int) -> Value:
        first = r * self.words
        if self.name == "F32":
            return w.body(first + slot * 4 + comp).bitcast(f32)
        word = w.body(first + slot * 2 + comp // 2)
        if self.name == "BF16":
            return (word & 0xFFFF0000 if comp % 2 else word << 16).bitcast(f32)
        return w.keep(("f16", r, slot, comp // 2), lambda: w.b.unpack_half2x16(word))[comp % 2]

    def pack(self, rows: U16, head: U32, body: U32) -> None:
        put_texels(rows.reshape(*rows.shape[:4], 1, -1).view(np.uint32), body[:, :, 0])


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        _Float("F32", 1, 4, n_sub=0),
        _Float("F16", 1, 2, n_sub=0),
        _Float("BF16", 1, 2, n_sub=0),
        _Nibble32("Q4_0", 32, 18, zero=8, bits=4, pairs=True),
        _Nibble32("Q4_1", 32, 20, bits=4, has_minimum=True, pairs=True),
        _Nibble32("Q5_0", 32, 22, zero=16, bits=5, pairs=True),
        _Nibble32("Q5_1", 32, 24, bits=5, has_minimum=True, pairs=True),
        _Q8("Q8_0", 32, 34, zero=128, bits=8),
        _KNibble("Q4_K", 256, 144, chunk=256, bits=4, has_minimum=True, pairs=True),
        _KNibble("Q5_K", 256, 176, chunk=256, bits=5, has_minimum=True, pairs=True),
        _Q6K("Q6_K", 256, 210, chunk=256, n_sub=4, zero=32, bits=6, pairs=True),
    )
}


def format_of(fmt: str | Format) -> Format:
    """The format of a ggml type. Raises: KernelError: one that has no kernels."""
    if isinstance(fmt, Format):
        return fmt
    if fmt not in FORMATS:
        raise KernelError(f"there are no kernels for {fmt}", hint=f"expected one of {', '.join(FORMATS)}")
    return FORMATS[fmt]


def packed_shape(fmt: str | Format, n_row: int, n_col: int, layout: Layout) -> tuple[int, int, int]:
    """Shape of a packed matrix in texels: (row groups, texels a lane, lanes)."""
    f = format_of(fmt)
    return layout.n_group(n_row), f.n_chunk(n_col) * f.n_texel(layout.rows), layout.lanes


def packed_nbytes(fmt: str | Format, n_row: int, n_col: int, layout: Layout) -> int:
    """Bytes of a packed matrix. `n_row`: its packed rows, or the length of its row order."""
    return 16 * int(np.prod(packed_shape(fmt, n_row, n_col, layout)))


def pack(
    fmt: str | Format,
    blocks: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
    n_col: int,
    layout: Layout,
    out: NDArray[np.uint8],
    row_order: NDArray[np.integer[Any]] | None = None,
    threads: int = 2,
) -> None:
    """Pack a matrix, a slab of row groups at a time; no second copy of it is made.

    Args: blocks: u8 [n_row, row_bytes] as in the file, or several such parts, one below the other; n_col: weights a row;
        out: u8 [packed_nbytes], e.g. mapped device memory; row_order: source row of each packed row, -1 for a row of zeros
        (default: as they are); threads: workers (numpy releases the GIL while it copies).
    Raises: KernelError: sizes that do not fit.
    """
    f = format_of(fmt)
    parts = [blocks] if isinstance(blocks, np.ndarray) else list(blocks)
    n_row = sum(len(part) for part in parts)
    order = np.arange(n_row) if row_order is None else np.asarray(row_order)
    groups, n_texel, _ = packed_shape(f, len(order), n_col, layout)
    need = packed_nbytes(f, len(order), n_col, layout)
    if any(part.shape[1] != f.row_bytes(n_col) for part in parts) or out.nbytes < need or out.dtype != np.uint8:
        raise KernelError(
            f"packing {f.name} rows of {n_col} weights: {[p.shape for p in parts]} into {out.nbytes} bytes",
            hint=f"expected rows of {f.row_bytes(n_col)} bytes, and {need} bytes of uint8 to write to",
        )
    order = np.concatenate([order, np.full(groups * layout.group_rows - len(order), -1, order.dtype)])
    slab_groups = max(1, SLAB_BYTES // max(1, layout.group_rows * f.row_bytes(n_col)))
    slab_bytes = 16 * n_texel * layout.lanes

    def work(first: int) -> None:
        last = min(first + slab_groups, groups)
        rows = _gather(parts, order[first * layout.group_rows : last * layout.group_rows], f, n_col)
        texels = _pack_slab(f, rows, n_col, layout)
        out[first * slab_bytes : last * slab_bytes] = texels.reshape(-1).view(np.uint8)

    slabs = range(0, groups, slab_groups)
    if threads > 1 and len(slabs) > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, slabs))
    else:
        for first in slabs:
            work(first)


def _gather(parts: Sequence[NDArray[np.uint8]], order: NDArray[np.integer[Any]], f: Format, n_col: int) -> U16:
    """Rows of the file in packed order, zero-padded to whole chunks: u16 [rows, chunks, blocks a chunk, words of a block]."""
    used, n_chunk = f.row_bytes(n_col), f.n_chunk(n_col)
    rows = np.zeros((len(order), n_chunk * (f.chunk // f.block) * f.block_bytes), np.uint8)
    start = 0
    for part in parts:
        index = order - start
        mine = (index >= 0) & (index < len(part))
        if mine.all() and (np.diff(index) == 1).all():
            rows[:, :used] = part[index[0] : index[-1] + 1]
        elif mine.any():
            at = np.flatnonzero(mine)
            for target, source in zip(at.tolist(), index[at].tolist(), strict=True):
                rows[target, :used] = part[source]
        start += len(part)
    return rows.view(np.uint16).reshape(len(order), n_chunk, f.chunk // f.block, f.block_bytes // 2)


def _pack_slab(f: Format, rows: U16, n_col: int, layout: Layout) -> U32:
    """The texels of some whole row groups."""
    s, r, c = layout.lanes, layout.rows, f.n_chunk(n_col)
    g, nh, nb = len(rows) // layout.group_rows, f.n_head(r), f.n_body(r)
    if layout.kind == "lane_row":
        out = np.zeros((g, c, nh + f.steps * nb, s, 4), np.uint32)
        head, body = out[:, :, :nh], split_axis(out[:, :, nh:], 2, (f.steps, nb))
    else:
        out = np.zeros((g, c * (nh + f.steps * nb), 4), np.uint32)
        head = split_axis(out[:, : nh * c], 1, (nh, c, 1)).transpose(0, 2, 1, 3, 4)
        body = split_axis(out[:, nh * c :], 1, (nb, c, f.steps, 1)).transpose(0, 2, 3, 1, 4, 5)
    f.pack(rows.reshape(g, r, s, *rows.shape[1:]), head, body)
    return out


def row_order(
    epilogue: str,
    layout: Layout,
    n_rows: Sequence[int],
    head_dim: int = 0,
    rope_pairing: str = "interleaved",
) -> NDArray[np.int64]:
    """The source row of each packed row, over the rows of the parts one below the other; -1 is padding.

    "store", "residual": as they are. "swiglu": parts (gate, up); a lane's rows are (gate i, up i) pairs.
    "qkv": parts q, k, v or some of them, heads of `head_dim` rows; a lane's rows are RoPE pairs: rows (2i, 2i + 1) of a head
    where rope_pairing is "interleaved", rows (i, i + head_dim / 2) where it is "half".
    """
    n_row = sum(n_rows)
    if epilogue in ("store", "residual"):
        return _padded(np.arange(n_row), layout.group_rows)
    if epilogue == "swiglu":
        if len(n_rows) != 2 or n_rows[0] != n_rows[1]:
            raise KernelError(f"swiglu of parts with {list(n_rows)} rows", hint="expected gate and up of one size")
        pairs = np.stack([np.arange(n_rows[0]), np.arange(n_rows[0]) + n_rows[0]])
    else:
        if head_dim < 2 or head_dim % 2 or any(n % head_dim for n in n_rows):
            raise KernelError(f"qkv of parts with {list(n_rows)} rows", hint=f"expected whole heads of {head_dim} (even) rows")
        i = np.arange(n_row // 2)
        head, j = i // (head_dim // 2) * head_dim, i % (head_dim // 2)
        first = head + (2 * j if rope_pairing == "interleaved" else j)
        pairs = np.stack([first, first + (1 if rope_pairing == "interleaved" else head_dim // 2)])
    s, p = layout.lanes, layout.rows // 2
    columns = np.stack([_padded(part, s * p) for part in pairs])  # pair index (group * p + j) * s + lane
    return np.ascontiguousarray(columns.reshape(2, -1, p, s).transpose(1, 2, 0, 3)).reshape(-1)


def _padded(order: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    return np.concatenate([order, np.full(-len(order) % multiple, -1, np.int64)])


def pack_vector(values: NDArray[np.float32], order: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """A vector over the parts' rows (a bias) in packed order, zero where there is no row."""
    return np.where(order >= 0, values[np.maximum(order, 0)], np.float32(0.0)).astype(np.float32)
