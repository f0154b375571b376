"""Sums of many values, and functions that keep NaN."""

from __future__ import annotations

from collections.abc import Sequence

from vkllm_codegen import Block, Value


def added(sums: list[Value], values: list[Value]) -> list[Value]:
    """Sums (none yet: an empty list) plus values."""
    return [a + v for a, v in zip(sums, values, strict=True)] if sums else values


def tanh(b: Block, v: Value) -> Value:
    """tanh by one exponential: right for any finite number, and NaN stays NaN where a driver's exp loses it."""
    return b.select(b.isnan(v), v, 1.0 - 2.0 / (b.exp(v * 2.0) + 1.0))


def at_most(b: Block, v: Value, limit: float) -> Value:
    """The smaller of the two; NaN stays NaN, which min may hide."""
    return b.select(v > limit, limit, v)


def tree_sum(values: Sequence[Value]) -> Value:
    """The sum, pairwise: short chains."""
    values = list(values)
    while len(values) > 1:
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=False)] + ([values[-1]] if len(values) % 2 else [])
    return values[0]
