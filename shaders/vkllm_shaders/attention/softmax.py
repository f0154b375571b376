"""Online softmax: the running state of one query head. Scores are in log2 units: exp2 is the cheaper exponential."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from vkllm_codegen import Block, Value, Var, f32
from vkllm_shaders.attention.spec import AttentionSpec

LOWEST = -1.0e30
"""Stands for "no score yet": finite, so that no difference of two of them is NaN."""

HIGHEST = 3.0e38
"""No finite number that a softcap may bend is larger."""

LOG2_E = math.log2(math.e)


def query_scale(spec: AttentionSpec) -> float:
    """What queries are multiplied with, so that `capped` has little left to do."""
    return 2.0 * LOG2_E * spec.score_scale / spec.softcap if spec.softcap else LOG2_E * spec.score_scale


def capped(b: Block, spec: AttentionSpec, products: list[Value]) -> list[Value]:
    """Scores from products of a scaled query and a key.

    softcap * tanh(s) by one exponential, exp(2 s); NaN and infinities stay what they are, where tanh would hide them.
    """
    if not spec.softcap:
        return products
    bent = [1.0 - 2.0 / (b.exp2(product) + 1.0) for product in products]
    return [
        b.select(b.abs(product) <= HIGHEST, value * (spec.softcap * LOG2_E), product)
        for product, value in zip(products, bent, strict=True)
    ]


@dataclass(frozen=True)
class Highest:
    """The largest scores so far, each lane with one of its own: in log2 units."""

    var: Var

    @classmethod
    def fresh(cls, b: Block) -> Highest:
        return cls(b.var(f32, LOWEST))

    def update(self, b: Block, scores: Value) -> tuple[Value, Value]:
        """Take in more scores. Returns: the largest now, and the factor that brings weights so far to it."""
        before, now = self.var.get(), b.max(self.var.get(), scores)
        self.var.set(now)
        return now, b.exp2(before - now)


@dataclass(frozen=True)
class Head:
    """The running state of one query head: this lane's part of the sum of weights, and weighted values."""

    total: Var
    values: list[Var]

    @classmethod
    def fresh(cls, b: Block, n_value: int) -> Head:
        return cls(b.var(f32, 0.0), [b.var(f32, 0.0) for _ in range(n_value)])

    def update(self, b: Block, top: tuple[Value, Value], scores: Sequence[Value], valid: Sequence[Value]) -> list[Value]:
        """Move to the largest score as Highest tells it; returns the weights 2^(score - largest), zero where not valid.

        A NaN stays one: lavapipe's exp2 makes 0 of it.
        """
        now, keep = top
        below = [score - now for score in scores]
        powers = [b.select(distance <= 0.0, b.exp2(distance), distance) for distance in below]
        weights = [b.select(ok, power, 0.0) for ok, power in zip(valid, powers, strict=True)]
        self.total.set(reduce(operator.add, weights, self.total.get() * keep))
        for value in self.values:
            value.set(value.get() * keep)
        return weights


def with_sink(b: Block, sink: Value, highest: Value, total: Value) -> Value:
    """The sum of weights with that of a sink logit, in units of the largest score's weight.

    Where the sink is far above all scores, the sum is infinite and all shares are zero, which is right.
    """
    above = sink * LOG2_E - highest
    return total + b.select(b.isnan(above), above, b.exp2(above))
