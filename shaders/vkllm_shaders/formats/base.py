"""What every format has: its sizes, what a kernel computes with it, what the packer writes; and a step's weights in a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vkllm_codegen import Block, Value, f32, i32
from vkllm_codegen.errors import KernelError

U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]
Load = Callable[[Any], Value]  # by the number of a texel, which may be a Value
Kept = TypeVar("Kept")

STEP = 64  # weights of a row in a step
SLOTS = 16  # texels of x in a step


class Texels:
    """The texels of one step in a kernel, loaded when a word of them is asked for, and whatever is made of them, kept."""

    def __init__(self, b: Block, head: Load, body: Load, step: Value | int) -> None:
        self.b, self.step = b, step
        self._head, self._body = head, body
        self._kept: dict[Any, Any] = {}

    def keep(self, key: Any, make: Callable[[], Kept]) -> Kept:
        """`make()`, once for each key."""
        if key not in self._kept:
            self._kept[key] = make()
        kept: Kept = self._kept[key]
        return kept

    def body(self, word: int) -> Value:
        """Word of the step's texels."""
        return self.keep(("body", word // 4), lambda: self._body(word // 4))[word % 4]

    def head(self, word: int) -> Value:
        """Word of the chunk's head texels."""
        return self.keep(("head", word // 4), lambda: self._head(word // 4))[word % 4]


class StepWeights(Texels):
    """The weights of one step in a kernel: raw numbers and what makes them weights.

    weight[r, slot, comp] = scale(r, sub) * (raw(r, slot, comp) * 2**-exponent(r, comp) - zero) - minimum(r, sub),
    sub = slot * n_sub // 16. Values are made when asked for and kept, so ask in the order of use.
    """

    def __init__(self, fmt: Format, b: Block, head: Load, body: Load, rows: int, step: Value | int) -> None:
        super().__init__(b, head, body, step)
        self.fmt, self.rows = fmt, rows

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
    def unit_bytes(self) -> int:
        """Bytes of the fewest whole blocks that are made of u16."""
        return self.block_bytes * (1 + self.block_bytes % 2)

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

        Args: rows [group, row, lane, chunk, unit, u16 of a unit]; head [group, chunk, n_head, lane, 4];
            body [group, chunk, step, n_body, lane, 4].
        """
        raise NotImplementedError
