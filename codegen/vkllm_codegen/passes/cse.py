"""Common subexpressions: a pure operation is computed once in a scope and the scopes inside it."""

from __future__ import annotations

from typing import Any

from ..ir import PURE, Op, Program, Region
from .rewrite import Rewriter


def merge_equal(program: Program) -> Program:
    """Replace every pure operation by an equal one that dominates it. Loads are never merged: memory may change between them."""
    return _MergeEqual().run(program)


class _MergeEqual(Rewriter):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[Any, ...], Op] = {}

    def region(self, region: Region) -> Region:
        outer, self.seen = self.seen, dict(self.seen)
        result = super().region(region)
        self.seen = outer
        return result

    def visit(self, op: Op) -> Op:
        if op.code not in PURE:
            return self.place(op)
        key = (op.code, op.dtype, op.src, op.arg)
        found = self.seen.get(key)
        if found is None:
            found = self.seen[key] = self.place(op)
        return found
