"""Loop-invariant code: a pure operation on values from outside a loop moves in front of it.

lavapipe runs SPIR-V as it is written: what stands in a loop is computed in every turn. Operations stay on their side of an IF.
"""

from __future__ import annotations

from ..ir import LEAVES, PURE, Op, OpCode, Program, Region
from .rewrite import Rewriter


def hoist(program: Program) -> Program:
    """Move invariant pure operations out of loops."""
    return _Hoist().run(program)


def _may_run_early(op: Op) -> bool:
    """Whether computing `op` is harmless even if the loop never runs: no division by zero, no index out of range."""
    if op.code in (OpCode.IDIV, OpCode.MOD):
        return op.src[1].code is OpCode.CONST and op.src[1].arg != 0
    return op.code not in (OpCode.EXTRACT_DYN, OpCode.UNIFORM)


class _Hoist(Rewriter):
    def __init__(self) -> None:
        super().__init__()
        self.scopes: list[list[Op]] = []  # the operations placed so far, outermost region first
        self.is_loop: list[bool] = []
        self.depth: dict[Op, int] = {}  # where a value was placed

    def region(self, region: Region) -> Region:
        self.is_loop.append(False)
        return self._scoped(region)

    def nested(self, region: Region, owner: Op) -> Region:
        self.is_loop.append(owner.code is not OpCode.IF)
        if region.index is not None:
            self.depth[region.index] = len(self.scopes)
        return self._scoped(region)

    def _scoped(self, region: Region) -> Region:
        scope: list[Op] = []
        self.scopes.append(scope)
        for op in region.ops:
            self.replacement[op] = self.visit(self.renewed(op))
        self.scopes.pop()
        self.is_loop.pop()
        return Region(tuple(scope), region.index)

    def visit(self, op: Op) -> Op:
        level = len(self.scopes) - 1
        if op.code in PURE and _may_run_early(op):
            needed = max((self.depth[s] for s in op.src if s.code not in LEAVES), default=0)
            while level > needed and self.is_loop[level]:
                level -= 1
        self.scopes[level].append(op)
        self.depth[op] = level
        return op
