"""Which positions a workgroup takes."""

from __future__ import annotations

from dataclasses import dataclass

from vkllm_codegen import Block, Value, u32
from vkllm_shaders.attention.spec import AttentionSpec


@dataclass(frozen=True)
class Span:
    """The positions of a workgroup: `first` (where its loop starts) … `last` - 1, but none below `lowest` (None: all count)."""

    b: Block
    first: Value
    last: Value
    lowest: Value | None

    @classmethod
    def whole(cls, b: Block, spec: AttentionSpec, length: Value, lowest: Value | None) -> Span:
        """All that a row sees."""
        return cls(b, b.const(u32, 0) if lowest is None else _tile_start(spec, lowest), length, lowest)

    @classmethod
    def split(cls, b: Block, spec: AttentionSpec, length: Value, lowest: Value | None) -> Span:
        """What the workgroup's split holds of it; empty (first ≥ last) where that is nothing."""
        first = b.workgroup_id(0) * spec.split
        last = b.min(first + spec.split, length)
        return cls(b, first if lowest is None else b.max(first, _tile_start(spec, lowest)), last, lowest)

    def holds(self, position: Value) -> Value:
        """Does a position of the loop count?"""
        below = position < self.last
        return below if self.lowest is None else below & (position >= self.lowest)

    def bounded(self, position: Value) -> Value:
        """The position itself, or one that counts: what does not may lie in a block that is no longer the row's."""
        below = self.b.min(position, self.last - 1)
        return below if self.lowest is None else self.b.max(below, self.lowest)


def lowest_position(b: Block, length: Value, window: Value) -> Value:
    """The first position that a row of this length sees through a window (0: it sees all)."""
    return b.select(window == 0, 0, length - b.min(length, window))


def _tile_start(spec: AttentionSpec, lowest: Value) -> Value:
    """Tiles start at multiples of their size: then each lies in one block, where blocks are no smaller."""
    return lowest - lowest % spec.turn
