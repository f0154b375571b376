"""The order of dispatches: a barrier where two of them conflict, a cut where a submit would grow too long.

Pure: it sees names of buffers, not buffers. `order` is what the chain records; `unordered_hazards` is the proof that a recorded
list needs no more barriers, written against byte ranges and without knowing how the barriers were placed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from vkllm.kernel_cache import CompiledKernel

Access = Literal["read", "write", "readwrite"]
Command = TypeVar("Command")


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One kernel on named buffers. `cost_us` is a rough estimate of its time, for bounding submits; `turns`: of the loops of a
    workgroup, at most (None: nobody knows)."""

    op: str
    kernel: CompiledKernel
    buffers: tuple[str, ...]
    push: bytes
    groups: tuple[int, int, int]
    cost_us: float = 0.0
    turns: int | None = None

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(name for name, b in zip(self.buffers, self.kernel.bindings, strict=True) if b.access != "write")

    @property
    def writes(self) -> frozenset[str]:
        return frozenset(name for name, b in zip(self.buffers, self.kernel.bindings, strict=True) if b.access != "read")


class Barrier:
    """Everything before it is finished and visible to everything after it."""


Step = Dispatch | Barrier


def order(dispatches: Iterable[Dispatch]) -> list[Step]:
    """Put a barrier before each dispatch that conflicts (RAW, WAR, WAW) with one since the last barrier, and one at the end.

    The last one makes the results visible to the host, and to the next replay of the same commands.
    """
    steps: list[Step] = []
    read: set[str] = set()
    written: set[str] = set()
    for dispatch in dispatches:
        if dispatch.reads & written or dispatch.writes & (read | written):
            steps.append(Barrier())
            read.clear()
            written.clear()
        read |= dispatch.reads
        written |= dispatch.writes
        steps.append(dispatch)
    return [*steps, Barrier()]


def cut(steps: Sequence[Step], limit_us: float) -> list[list[Step]]:
    """Split after barriers into runs whose estimated time stays below `limit_us` (a single dispatch may exceed it)."""
    runs: list[list[Step]] = []
    run: list[Step] = []
    spent = 0.0
    for group in _between_barriers(steps):
        cost = sum(step.cost_us for step in group if isinstance(step, Dispatch))
        if run and spent + cost > limit_us:
            runs.append(run)
            run, spent = [], 0.0
        run += group
        spent += cost
    return [*runs, run] if run else runs


def _between_barriers(steps: Sequence[Step]) -> Iterable[list[Step]]:
    """Groups of steps, each ending with its barrier."""
    group: list[Step] = []
    for step in steps:
        group.append(step)
        if isinstance(step, Barrier):
            yield group
            group = []
    if group:
        yield group


@dataclass(frozen=True, slots=True)
class Touch:
    """One use of a byte range of one buffer by one command."""

    buffer: int
    start: int
    stop: int
    access: Access

    def conflicts(self, other: Touch) -> bool:
        overlap = self.buffer == other.buffer and self.start < other.stop and other.start < self.stop
        return overlap and not self.access == other.access == "read"


def unordered_hazards(
    commands: Sequence[Command], is_barrier: Callable[[Command], bool], touches: Callable[[Command], Sequence[Touch]]
) -> list[tuple[int, int]]:
    """Pairs of commands (by index) that touch the same bytes, one writing, with no barrier between them."""
    hazards: list[tuple[int, int]] = []
    since: list[tuple[int, Sequence[Touch]]] = []
    for index, command in enumerate(commands):
        if is_barrier(command):
            since.clear()
            continue
        mine = touches(command)
        hazards += [(earlier, index) for earlier, theirs in since if any(a.conflicts(b) for a in theirs for b in mine)]
        since.append((index, mine))
    return hazards
