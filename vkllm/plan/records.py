"""Who writes the activations that integer products read in 8 bits ("records"): the op that made them, or a dispatch of its own.

An op can write the record of its result while it still has it. What the record holds depends on who reads it (the norm's weights
are multiplied in), so the writer is told by the first reader that follows; later readers with the same norm share the record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from vkllm.plan.graph import Argmax, ExpertLinear, Graph, Linear, Op, Qkv

Reader = Linear | Qkv | ExpertLinear
Origin = Op | Literal["dispatch", "earlier"]


@dataclass(frozen=True)
class RecordPlan:
    """`origins`: where a reader's record comes from, by op name: the op that wrote x, a dispatch of its own, an earlier reader's.
    `writers`: ops that write a record, and the norm for which (None: for none)."""

    origins: Mapping[str, Origin]
    writers: Mapping[str, str | None]


def plan_records(graph: Graph, reads: Callable[[Reader], bool], can_write: Callable[[Op, str | None], bool]) -> RecordPlan:
    """The plan of a graph. `reads`: does an op multiply integers? `can_write`: can an op write a record for this norm?"""
    origins: dict[str, Origin] = {}
    writers: dict[str, str | None] = {}
    wrote: dict[str, Op] = {}  # by row buffer
    holds: dict[str, str | None] = {}  # the norm of the record that is valid
    for op in graph.ops:
        if isinstance(op, Linear | Qkv | ExpertLinear) and reads(op):
            gathers = isinstance(op, Linear) and op.gather
            writer = wrote.get(op.x)
            if op.x in holds:
                origins[op.name] = "earlier" if holds[op.x] == op.norm and not gathers else "dispatch"
            elif writer is not None and can_write(writer, op.norm):
                origins[op.name], writers[writer.name] = writer, op.norm
            else:
                origins[op.name] = "dispatch"
            if not gathers:
                holds[op.x] = op.norm
        if not isinstance(op, Argmax):
            wrote[op.y] = op
            holds.pop(op.y, None)
    return RecordPlan(origins, writers)
