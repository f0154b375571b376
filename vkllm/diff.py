"""`vkllm diff`: run the device and the numpy reference side by side and compare after every op.

The first op whose output differs by more than the limit is where to look: what comes after it only inherits the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vkllm.chain import Rows
from vkllm.engine import LLMEngine
from vkllm.reference import ReferenceExecutor


def nmse(actual: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """Normalized mean squared error: |actual - expected|² / |expected|², in float64."""
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    power = float(np.sum(e * e))
    error = float(np.sum((a - e) ** 2))
    return error / power if power else (0.0 if error == 0.0 else float("inf"))


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
    """Compare every op's output for one prefill of `token_ids` (at most one chunk of the engine's prefill).

    Raises: RequestError: ids out of range or more than the context.
    """
    ids = list(token_ids)[: engine.runtime.prefill_chunk]
    expected: dict[str, NDArray[np.floating]] = {}
    ReferenceExecutor(engine.graph, engine.file, n_ctx=engine.n_ctx).forward(
        ids, watch=lambda op, y: expected.update({op: np.array(y)})
    )

    found: list[OpDifference] = []

    def compare(op: str, y: NDArray[np.float32]) -> None:
        if op in expected:
            e = expected[op]
            found.append(OpDifference(op, nmse(y, e), float(np.max(np.abs(y - e))), bool(np.isfinite(y).all())))

    with engine.scratch_sequence(len(ids)) as table:
        engine.chain.forward(Rows.of_sequence(ids, 0, table, outputs="all"), watch=compare)
    return DiffReport(tuple(found), limit)
