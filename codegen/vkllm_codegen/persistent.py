"""Persistent kernels: several kernels, one after the other, in a single dispatch.

A dispatch and the barrier behind it wake threads up and put them to sleep, which on a CPU costs as much as reading a quarter of a
megabyte of weights. A persistent kernel is dispatched with as many workgroups as run at the same time. Each does its share of the
first stage's workgroups, waits until all others have done theirs, and goes on with the second.

Vulkan does not promise that workgroups run at the same time. So waiting is bounded: a workgroup that gives up says so in the
buffer `sync`, and goes on without waiting. The results are then worthless, and who dispatched the kernel has to do its work in
another way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .ir import ATOMICS, LEAVES, Binding, Op, OpCode, Region, constant
from .passes.rewrite import Rewriter
from .trace import Block, Buffer, Kernel, Value, Var, readwrite, trace
from .trace.value import fail
from .types import DType, convert_exactly, u32

MAX_STAGES = 32
GAVE_UP = 0  # the element of `sync` that is not 0 after a workgroup gave up
COUNTERS = 1  # the first that counts

# Drivers may bound the turns of an invocation's loops (lavapipe: 65,535 together, then all end), but not how long one takes.
LOOKS = 32  # at the counter in a turn of waiting: 0.8 µs
MAX_TURNS = 20_000  # of waiting in a dispatch: 16 ms

ON_BUFFERS = ATOMICS | {OpCode.BUF_LOAD, OpCode.BUF_STORE, OpCode.TEXEL_LOAD}


@dataclass(frozen=True)
class Stage:
    """A kernel as a part of a persistent one: for one grid, and with its push constants known.

    bindings: which of the persistent kernel's bindings each of the kernel's own is; waits: for what the stages before it do;
    optional: a dispatch says whether it wants the stage.
    """

    kernel: Kernel
    groups: tuple[int, int, int]
    push: Mapping[str, int | float]
    bindings: tuple[int, ...]
    waits: bool = True
    optional: bool = False


def persistent(name: str, bindings: Mapping[str, Binding], stages: Sequence[Stage]) -> Kernel:
    """A kernel that does the work of all stages in their order. Dispatch: (workgroups that run at the same time, 1, 1).

    A workgroup is to be one subgroup: its first invocation arrives for all.
    bindings: those that a stage writes and another one reads must be coherent. Behind them comes sync: readwrite u32
    [COUNTERS + one for each stage that waits, of all dispatches until it is cleared], zero at first.
    Push: counter, the dispatch's first element of sync that counts; stages: bit i is set where optional stage i is wanted.
    Raises: TraceError: a stage uses shared memory or barriers, or stages have workgroups of different sizes, or are too many.
    """
    if len(stages) > MAX_STAGES:
        fail(f"{len(stages)} stages in {name}", f"expected up to {MAX_STAGES}")
    sizes = {stage.kernel.name: stage.kernel.stage_size for stage in stages}
    if 0 in sizes.values() or len(set(sizes.values())) != 1:
        fail(f"stages of {name} have workgroups of {sizes}", "expected one size, and none with shared memory or barriers (0)")

    def body(b: Block, bufs: dict[str, Buffer], push: dict[str, Value]) -> None:
        sync = bufs["sync"]
        turns = b.var(u32, b.select(sync[GAVE_UP] == 0, b.const(u32, 0), MAX_TURNS))
        n_wait = 0
        for number, stage in enumerate(stages):
            if stage.waits:
                _meet(b, sync, push["counter"] + n_wait, turns)
                n_wait += 1
            _share(b, stage, (push["stages"] & (1 << number)) != 0 if stage.optional else None)

    bound = dict(bindings) | {"sync": readwrite(u32)}
    return trace(name, bound, {"counter": u32, "stages": u32}, {}, stages[0].kernel.stage_size, body)


def _share(b: Block, stage: Stage, wanted: Value | None) -> None:
    """This workgroup's part of a stage, if it is wanted: neighbours, so that it reads on where it stopped."""
    x, y, z = stage.groups
    n = b.const(u32, x * y * z) if wanted is None else b.select(wanted, b.const(u32, x * y * z), 0)
    each = (b.num_workgroups() + (x * y * z - 1)) // b.num_workgroups()
    first = b.workgroup_id() * each
    with b.range(first, b.min(first + each, n)) as i:
        place = [i % x if y * z > 1 else i, i // x % y if z > 1 else i // x, i // (x * y)]
        b.splice(_Placed(stage, [own.op for own in place]).region(stage.kernel.program.body))


def _meet(b: Block, sync: Buffer, counter: Value, turns: Var) -> None:
    """Wait until all workgroups have come here, and see what they wrote; or give up."""
    b.fence("what this workgroup wrote is there")
    with b.when(b.local_index() == 0):
        b.atomic_add(sync, counter, 1)
        with b.loop():
            arrived = [b.atomic_add(sync, counter, 0) for _ in range(LOOKS)][-1]
            b.break_if((arrived >= b.num_workgroups()) | (turns.get() >= MAX_TURNS))
            turns.add(1)
        with b.when(turns.get() >= MAX_TURNS):
            b.atomic_max(sync, GAVE_UP, 1)
    b.fence("what the others wrote is here")


class _Placed(Rewriter):
    """A stage's body, with its workgroup's place in the grid, its push constants and its bindings filled in."""

    def __init__(self, stage: Stage, in_grid: Sequence[Op]) -> None:
        super().__init__()
        self.stage, self.in_grid = stage, in_grid

    def renewed(self, op: Op) -> Op:
        src = tuple(self._leaf(s) if s.code in LEAVES else self.replacement[s] for s in op.src)
        arg = self.stage.bindings[op.arg] if op.code in ON_BUFFERS else op.arg
        return Op(op.code, op.dtype, src, arg, tuple(self.nested(r, op) for r in op.regions), op.where, op.name)

    def nested(self, region: Region, owner: Op) -> Region:
        if region.index is None:
            return self.region(region)
        index = self.replacement[region.index] = Op(OpCode.INDEX, region.index.dtype, (), None, (), region.index.where)
        return Region(self.region(region).ops, index)

    def _leaf(self, op: Op) -> Op:
        if op.code is OpCode.PUSH:
            assert isinstance(op.dtype, DType)
            return constant(op.dtype, convert_exactly(op.dtype, self.stage.push[op.arg]))
        if op.code is not OpCode.BUILTIN:
            return op
        name, dimension = op.arg
        known = {"workgroup_id": self.in_grid, "num_workgroups": [constant(u32, n) for n in self.stage.groups]}
        return known[name][dimension] if name in known else op
