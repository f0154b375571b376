"""The skeleton of a pass: visit every operation in order, with its operands already rewritten."""

from __future__ import annotations

from ..ir import LEAVES, Op, Program, Region


class Rewriter:
    """Copies a program. Subclasses override `visit`, which places operations with `place` and returns the value."""

    def __init__(self) -> None:
        self.replacement: dict[Op, Op] = {}
        self.out: list[Op] = []

    def run(self, program: Program) -> Program:
        return program.with_body(self.region(program.body))

    def region(self, region: Region) -> Region:
        outer, self.out = self.out, []
        for op in region.ops:
            self.replacement[op] = self.visit(self.renewed(op))
        ops, self.out = tuple(self.out), outer
        return Region(ops, region.index)

    def renewed(self, op: Op) -> Op:
        """`op` on rewritten operands and regions; itself when nothing changed."""
        known = self.replacement
        src = tuple([s if s.code in LEAVES else known.get(s, s) for s in op.src])
        regions = tuple([self.nested(r, op) for r in op.regions]) if op.regions else ()
        if src == op.src and not regions:
            return op
        return Op(op.code, op.dtype, src, op.arg, regions, op.where, op.name)

    def nested(self, region: Region, owner: Op) -> Region:
        """A region inside `owner`."""
        return self.region(region)

    def visit(self, op: Op) -> Op:
        return self.place(op)

    def place(self, op: Op) -> Op:
        self.out.append(op)
        return op
