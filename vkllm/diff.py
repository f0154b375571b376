"""`vkllm diff`: run the device and the numpy reference side by side and compare after every op.

The first op whose output differs by more than the limit is where to look: what comes after it only inherits the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vkllm.chain import Rows, Span
from vkllm.engine import LLMEngine
from vkllm.reference import ReferenceExecutor


def nmse(actual: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """Normalized mean squared error: |actual - expected|² / |expected|², in float64."""
    sums = _Sums()
    sums.add(actual, expected)
    return sums.nmse


@dataclass(slots=True)
class _Sums:
    """What the figures of one op are made of, added up over chunks."""

    error: float = 0.0
    power: float = 0.0
    max_abs: float = 0.0
    finite: bool = True

    def add(self, actual: NDArray[np.floating], expected: NDArray[np.floating]) -> None:
        wide = expected.astype(np.float64)
        difference = actual.astype(np.float64) - wide
        self.error += float(np.sum(difference * difference))
        self.power += float(np.sum(wide * wide))
        self.max_abs = max(self.max_abs, float(np.max(np.abs(difference))))
        self.finite &= bool(np.isfinite(actual).all())

    @property
    def nmse(self) -> float:
        return self.error / self.power if self.power else (0.0 if self.error == 0.0 else float("inf"))


@dataclass(frozen=True, slots=True)
class OpDifference:
    """How far one op's output on the device is from the reference's."""

    op: str
    nmse: float
    max_abs: float
    finite: bool


@dataclass(frozen=True, slots=True)
class DiffReport:
    """All ops in order; `first_divergence` is the first one over `limit`, or None."""

    ops: tuple[OpDifference, ...]
    limit: float

    @property
    def first_divergence(self) -> OpDifference | None:
        return next((d for d in self.ops if not d.finite or not d.nmse <= self.limit), None)


def diff(engine: LLMEngine, token_ids: Sequence[int], limit: float = 1e-4) -> DiffReport:
    """Compare every op's output for a prefill of `token_ids`; an op's figures are over all of the prefill's chunks.

    Raises: RequestError: no ids, or one that is not in the vocabulary; ContextTooLongError.
    """
    engine.check_prompt(token_ids)
    reference = ReferenceExecutor(engine.graph, engine.file, n_ctx=engine.n_ctx)
    expected: dict[str, NDArray[np.floating]] = {}
    sums: dict[str, _Sums] = {}

    def compare(op: str, y: NDArray[np.float32]) -> None:
        sums.setdefault(op, _Sums()).add(y, expected[op])

    size = engine.chain.logits_chunk
    with engine.scratch_sequence(len(token_ids)) as table:
        for start in range(0, len(token_ids), size):
            chunk = token_ids[start : start + size]
            reference.forward(chunk, watch=lambda op, y: expected.update({op: np.array(y)}))
            engine.chain.forward(Rows.of(Span(chunk, start, table, n_output=len(chunk))), watch=compare)
    return DiffReport(tuple(OpDifference(op, s.nmse, s.max_abs, s.finite) for op, s in sums.items()), limit)
