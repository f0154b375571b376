"""Dead code: what no effect depends on is dropped. Stores to variables that nobody reads are dead too."""

from __future__ import annotations

from ..ir import EFFECTS, LEAVES, Op, OpCode, Program, Region

LOCAL_STORES = frozenset({OpCode.VAR_STORE, OpCode.ARRAY_STORE, OpCode.SHARED_STORE})
ROOTS = EFFECTS - LOCAL_STORES


def drop_dead(program: Program) -> Program:
    """Keep the operations that an effect outside the invocation's variables needs."""
    marking = _Marking()
    marking.collect(program.body, ())
    marking.run()
    return program.with_body(_sweep(program.body, marking.live))


class _Marking:
    def __init__(self) -> None:
        self.live: set[Op] = set()
        self.owners: dict[Op, tuple[Op, ...]] = {}  # the control operations around
        self.stores: dict[Op, list[Op]] = {}  # declaration → the stores to it
        self.work: list[Op] = []

    def collect(self, region: Region, owners: tuple[Op, ...]) -> None:
        for op in region.ops:
            self.owners[op] = owners
            if op.code in LOCAL_STORES:
                self.stores.setdefault(op.src[0], []).append(op)
            elif op.code in ROOTS:
                self.work.append(op)
            for inner in op.regions:
                self.collect(inner, (*owners, op))

    def run(self) -> None:
        work, live = self.work, self.live
        while work:
            op = work.pop()
            if op in live or op.code in LEAVES:
                continue
            live.add(op)
            work += op.src
            work += self.owners.get(op, ())
            work += self.stores.get(op, ())


def _sweep(region: Region, live: set[Op]) -> Region:
    kept = []
    for op in region.ops:
        if op in live:
            kept.append(_with_regions(op, live) if op.regions else op)
    return Region(tuple(kept), region.index)


def _with_regions(op: Op, live: set[Op]) -> Op:
    regions = tuple(_sweep(r, live) for r in op.regions)
    if len(regions) == 2 and not regions[1].ops:
        regions = regions[:1]
    return Op(op.code, op.dtype, op.src, op.arg, regions, op.where, op.name)
