"""Barriers must be reached by all invocations of a workgroup, or by none.

A value is *varying* if invocations of one workgroup may disagree about it. Control that depends on a varying value is divergent;
variables assigned in divergent control vary. The analysis repeats until nothing new varies, because loops feed values back.
"""

from __future__ import annotations

from collections.abc import Callable

from ..ir import ATOMICS, DECLARATIONS, LEAVES, Op, OpCode, Program, Region, walk

VARYING_BUILTINS = frozenset({"local_id", "global_id", "local_index", "subgroup_lane", "subgroup_id"})
VARYING_RESULTS = ATOMICS | {OpCode.SG_ADD, OpCode.SG_MAX, OpCode.SG_MIN, OpCode.SG_ANY, OpCode.SG_ALL, OpCode.SG_ELECT}
LOCAL_STORES = frozenset({OpCode.VAR_STORE, OpCode.ARRAY_STORE})
Fail = Callable[[Op, str, str], None]


def check_uniformity(program: Program, fail: Fail) -> None:
    """Call `fail` for the first barrier in divergent control flow."""
    if any(op.code is OpCode.BARRIER for op in walk(program.body)):
        _Analysis(fail).run(program)


class _Analysis:
    def __init__(self, fail: Fail) -> None:
        self.fail = fail
        self.varying: set[Op] = set()  # values, variables, and loops that some invocations leave early
        self.divergent_barriers: list[Op] = []

    def run(self, program: Program) -> None:
        before = -1
        while len(self.varying) != before:
            before = len(self.varying)
            self.divergent_barriers.clear()
            self.region(program.body, False, None)
        if self.divergent_barriers:
            self.fail(
                self.divergent_barriers[0],
                "a barrier stands in control flow that invocations of a workgroup may take differently",
                "move the barrier (or workgroup reduction) out of the b.when or b.range that depends on the invocation, "
                "or promise that the condition is the same for all with b.assume_uniform(value)",
            )

    def varies(self, op: Op) -> bool:
        if op.code in LEAVES:
            return op.code is OpCode.BUILTIN and op.arg[0] in VARYING_BUILTINS
        return op in self.varying

    def region(self, region: Region, divergent: bool, loop: Op | None) -> None:
        for op in region.ops:
            if op.regions:
                self.control(op, divergent, loop)
            elif op.code is OpCode.BREAK_IF:
                if divergent or self.varies(op.src[0]):
                    assert loop is not None
                    self.varying.add(loop)
            elif op.code is OpCode.BARRIER:
                if divergent:
                    self.divergent_barriers.append(op)
            else:
                self.value(op, divergent)

    def control(self, op: Op, divergent: bool, loop: Op | None) -> None:
        split = any(map(self.varies, op.src))
        if op.code is not OpCode.IF:
            loop = op
            split = split or op in self.varying
        index = op.regions[0].index
        if index is not None and (self.varies(op.src[0]) or self.varies(op.src[2])):
            self.varying.add(index)
        for region in op.regions:
            self.region(region, divergent or split, loop)

    def value(self, op: Op, divergent: bool) -> None:
        if op.code in LOCAL_STORES:
            if divergent or any(map(self.varies, op.src[1:])):
                self.varying.add(op.src[0])
        elif op.code is OpCode.UNIFORM:
            return
        elif op.code in DECLARATIONS:
            if op.code is OpCode.VAR and self.varies(op.src[0]):
                self.varying.add(op)
        elif op.code in VARYING_RESULTS or any(map(self.varies, op.src)):
            self.varying.add(op)
