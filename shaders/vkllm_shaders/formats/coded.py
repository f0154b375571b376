"""Weights as whole numbers ("codes") for integer products: layout "lane_pair", two rows in the halves of a word.

Made for lavapipe, where a loop must be short to stay in the instruction cache: a step is only 32 weights of each of a lane's
four rows. A chunk of `steps` steps has head words, then for each step body words: the codes of both pairs of rows, word by word
in turn, then the tail. What is not said otherwise about words and texels is as in the other layouts.

Codes. A half holds as many whole codes as fit, the first in the lowest bits; 6-bit codes lie eight in three words. Lane l of a
group multiplies its weights with x in an order of its own, so that exchanges in pairs bring every lane the x that it needs: code
(q, j) is column 4 * (l ^ j) + q of the step. They follow one another by q, then j; where 16 weights share a scale, those with
j < 4 come first: of lanes 0 to 3 they are the first 16 columns, of lanes 4 to 7 the last, and the scales are packed to match.

weight = scale * (code - zero) - minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

from vkllm_codegen import Block, Value, f32, i32, u64
from vkllm_codegen.errors import KernelError
from vkllm_shaders.formats.base import Load, Texels

STEP_COLUMNS = 32
PAIR_ROWS = 4  # rows of a lane: two pairs
PAIR_LANES = 8
FIELDS = 0x0001_0001_0001_0001  # a one in each 16 bits of 64


def code_order(group: int) -> list[tuple[int, int]]:
    """(q, j) of each code of a step, `group` of them sharing a scale."""
    return [(q, j) for half in range(STEP_COLUMNS // group) for q in range(4) for j in _exchanges(group, half)]


def _exchanges(group: int, half: int) -> range:
    n = PAIR_LANES * group // STEP_COLUMNS
    return range(half * n, half * n + n)


@dataclass(frozen=True)
class Coded:
    """One ggml type as codes. `group`: weights that share a scale; `steps` a chunk.

    scales: "tail" (an f16 a row and step, in the body), "head" (the same for both steps of a chunk, in the head; with `minimum`
    they are followed by the minimums), or of K-quants "bytes" or "tail_bytes": d (and what scales the minimums) as f16 in the
    first head texel, and for each step two words with a byte a row, in the head behind it or in the body. The words are scales
    and minimums, or where 16 weights share a scale those of either half; `signed` bytes, or with `nibbles` scale and minimum.

    "carried_bytes" has no head, so that a kernel reads on in one loop: the tail, here a texel *in front* of the codes, has the
    words of bytes and then in even steps the factors of rows 0 and 1, in odd ones those of rows 2 and 3. These are of the chunk
    of the step that follows (of a row's last step: of its first), so that each two steps know all four from the first one's tail
    and from the one before.
    """

    name: str
    bits: int
    zero: int
    group: int = 32
    steps: int = 2
    minimum: bool = False
    scales: str = "head"
    signed: bool = False
    nibbles: bool = False

    @property
    def chunk(self) -> int:
        """Columns of a chunk."""
        return self.steps * STEP_COLUMNS

    @property
    def n_sub(self) -> int:
        """Scales a row and step."""
        return STEP_COLUMNS // self.group

    @property
    def pair_words(self) -> int:
        """Words of a pair's codes in a step."""
        return 12 if self.bits == 6 else -(-STEP_COLUMNS // (16 // self.bits))

    @property
    def n_tail(self) -> int:
        """Words of a step beside its codes."""
        return {"tail": 2, "tail_bytes": 2, "carried_bytes": 4}.get(self.scales, 0)

    @property
    def n_head(self) -> int:
        """Head texels a chunk."""
        if self.scales == "head":
            return self.steps // 2 * (1 + self.minimum)
        return {"tail": 0, "tail_bytes": 1, "bytes": 5, "carried_bytes": 0}[self.scales]

    @property
    def n_body(self) -> int:
        """Texels a step."""
        return -(-(2 * self.pair_words + self.n_tail) // 4)

    @property
    def n_texel(self) -> int:
        """Texels a lane and chunk."""
        return self.n_head + self.steps * self.n_body

    @property
    def carries(self) -> bool:
        """Do factors come from the step before, too?"""
        return self.scales == "carried_bytes"

    def place(self, texel: int) -> int:
        """Where in a step a texel of its words lies."""
        return (texel + 1) % self.n_body if self.carries else texel

    def n_chunk(self, n_col: int) -> int:
        """Chunks of a row. Steps that lie wholly past its end hold zeros and need not be walked."""
        return -(-n_col // self.chunk)

    @property
    def fits_wide(self) -> bool:
        """Does a whole step add up within 16 bits, so that its sums are read off only once?"""
        return self.limit == STEP_COLUMNS

    @property
    def limit(self) -> int:
        """Codes, counted from the middle of their range, whose products with 8 bits add up within 16."""
        return min(self.group, 32767 // (127 << (self.bits - 1)))


CODED: dict[str, Coded] = {
    c.name: c
    for c in (
        Coded("Q4_0", 4, 8),
        Coded("Q4_1", 4, 0, minimum=True),
        Coded("Q5_0", 5, 16, steps=1, scales="tail"),
        Coded("Q5_1", 5, 0, minimum=True),
        Coded("Q8_0", 8, 128),
        Coded("Q2_K", 2, 0, 16, steps=8, minimum=True, scales="bytes", nibbles=True),
        Coded("Q3_K", 3, 4, 16, steps=8, scales="tail_bytes", signed=True),
        Coded("Q4_K", 4, 0, steps=8, minimum=True, scales="carried_bytes"),
        Coded("Q5_K", 5, 0, steps=8, minimum=True, scales="tail_bytes"),
        Coded("Q6_K", 6, 32, 16, steps=8, scales="bytes", signed=True),
    )
}


def coded_of(fmt: str) -> Coded:
    """The codes of a ggml type. Raises: KernelError: it has none."""
    if fmt not in CODED:
        raise KernelError(f"{fmt} has no integer products", hint=f"expected one of {', '.join(CODED)}")
    return CODED[fmt]


class CodedWeights(Texels):
    """The weights of one step in a kernel. Values are made when asked for and kept, so ask in the order of use."""

    def __init__(self, coded: Coded, b: Block, head: Load, body: Load, step: Value | int) -> None:
        super().__init__(b, head, body, step)
        self.coded = coded

    def both(self, pair: int, index: int) -> Value:
        """i32: code `index` of row 2 * pair in the lower 16 bits, of row 2 * pair + 1 in the upper."""
        bits = self.coded.bits
        if bits == 6:
            return self._six(pair, index).bitcast(i32)
        per_word = 16 // bits
        word, shift = self.body(index // per_word * 2 + pair), index % per_word * bits
        return ((word >> shift if shift else word) & (((1 << bits) - 1) * 0x10001)).bitcast(i32)

    def four(self, index: int) -> Value:
        """u64: code `index` of all four rows, 16 bits each."""
        per_word, bits = 16 // self.coded.bits, self.coded.bits
        at, shift = index // per_word * 2, index % per_word * bits
        word = self.keep(("four", at), lambda: self.b.vec(self.body(at), self.body(at + 1)).bitcast(u64))
        return (word >> shift if shift else word) & (((1 << bits) - 1) * FIELDS)

    def _six(self, pair: int, index: int) -> Value:
        """Two whole codes in each of three words, A, B, C; the others have four bits in A or B and two in C."""
        triple, i = index // 8 * 3, index % 8

        def word(k: int) -> Value:
            return self.body((triple + k) * 2 + pair)

        if i < 6:
            return (word(i // 2) >> 6 if i % 2 else word(i // 2)) & 0x003F003F
        return ((word(i - 6) >> 12) & 0x000F000F) | ((word(2) >> (8 if i == 6 else 10)) & 0x00300030)

    def scale(self, r: int, sub: int) -> Value:
        """f32, of a row."""
        if not self.coded.scales.endswith("bytes"):
            return self._half(0, r)
        return self.factor(r) * self._byte(r, sub, 0).to(f32)

    def whole_scale(self, r: int, sub: int) -> Value:
        """i32: a scale that is a byte."""
        return self.keep(("whole scale", r, sub), lambda: self._byte(r, sub, 0))

    def minimum(self, r: int, sub: int) -> Value:
        """f32, of a row; only where there are minimums. Q4_1 and Q5_1 keep what they add."""
        if not self.coded.scales.endswith("bytes"):
            return -self._half(4, r)
        return self.factor(r, 1) * self._byte(r, sub, 1).to(f32)

    def _half(self, first: int, r: int) -> Value:
        """The f16 of a row and this step, from head word `first` on or from the tail."""

        def pair() -> Value:
            if self.coded.scales == "tail":
                return self.b.unpack_half2x16(self.body(2 * self.coded.pair_words + r // 2))
            early, late = self.head(first + r // 2), self.head(first + 2 + r // 2)
            return self.b.unpack_half2x16(self._by_parity(early, late))

        return self.keep(("half", first, r // 2), pair)[r % 2]

    def _by_parity(self, even: Value, odd: Value) -> Value:
        """One of two values for an even and an odd step."""
        if isinstance(self.step, int):
            return odd if self.step % 2 else even
        step = self.step
        return self.b.select(self.keep("is odd", lambda: (step & 1) == 1), odd, even)

    def factor(self, r: int, which: int = 0) -> Value:
        """f32: what a row's scales (0) or minimums (1) count for, where they are bytes."""
        word, i = (r, which) if self.coded.minimum else (r // 2, r % 2)
        return self.keep(("factors", word), lambda: self.b.unpack_half2x16(self.head(word)))[i]

    def _byte(self, r: int, sub: int, which: int) -> Value:
        """i32: the 8 bits of a row's group: its scale (0) or its minimum (1)."""
        c, i = self.coded, which if self.coded.group == STEP_COLUMNS else sub
        if c.scales in ("tail_bytes", "carried_bytes"):
            word = self.body(2 * c.pair_words + i)
        else:
            texel = self.keep("bytes", lambda: self._head((self.step >> 1) + 1))
            word = self.keep(("bytes", i), lambda: self._by_parity(texel[i], texel[2 + i]))
        if c.signed:
            return (word << (24 - 8 * r) if r < 3 else word).bitcast(i32) >> 24
        shift = 8 * r + (4 * which if c.nibbles else 0)
        return ((word >> shift if shift else word) & (0xF if c.nibbles else 0xFF)).bitcast(i32)
