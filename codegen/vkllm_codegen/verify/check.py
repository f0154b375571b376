"""Runs the rules over a program, and checks that values are used where they are visible."""

from __future__ import annotations

from typing import NoReturn

from ..errors import VerifyError
from ..ir import LEAVES, Op, OpCode, Program, Region
from ..trace.where import at
from .rules import RULES, TRACED, binding_complaint
from .uniformity import check_uniformity


def verify(program: Program, after: str = "") -> None:
    """Check a whole program. `after` names the pass that produced it.

    Raises: VerifyError: names the kernel, the Python line that traced the operation, what was found and what was expected.
    """
    checker = _Checker(program, after)
    checker.region(program.body, set())
    check_uniformity(program, checker.fail)


class _Checker:
    def __init__(self, program: Program, after: str) -> None:
        self.program = program
        self.after = after
        self.loops = 0

    def fail(self, op: Op, message: str, hint: str = "") -> NoReturn:
        stage = f" after {self.after}" if self.after else ""
        raise VerifyError(f"{at(op.where)}kernel {self.program.name}{stage}: {message}", hint)

    def region(self, region: Region, visible: set[Op]) -> None:
        """`visible` holds the values of the regions around; it is restored at the end."""
        added: list[Op] = []
        if region.index is not None:
            added.append(region.index)
            visible.add(region.index)
        for op in region.ops:
            self.op(op, visible)
            added.append(op)
            visible.add(op)
        visible.difference_update(added)

    def op(self, op: Op, visible: set[Op]) -> None:
        for s in op.src:
            if s not in visible and s.code not in LEAVES:
                self.fail(op, f"{op.code} uses a value of {at(s.where) or s.code!r} that is not visible here",
                          "a value lives in its loop or branch: carry it out in a b.var")  # fmt: skip
        if op in visible:
            self.fail(op, f"{op.code} stands in two places")
        rules = RULES[op.code]
        if not self.after and op.code in TRACED:
            rules = (*rules, TRACED[op.code])
        complaint = next(filter(None, (rule(op) for rule in rules)), None)
        if complaint := complaint or binding_complaint(op, self.program.bindings):
            self.fail(op, complaint)
        if op.code is OpCode.BREAK_IF and not self.loops:
            self.fail(op, "break_if outside a loop")
        if op.regions:
            self.nested(op, visible)

    def nested(self, op: Op, visible: set[Op]) -> None:
        self.loops += op.code in (OpCode.RANGE, OpCode.LOOP)
        for inner in op.regions:
            self.region(inner, visible)
        self.loops -= op.code in (OpCode.RANGE, OpCode.LOOP)
