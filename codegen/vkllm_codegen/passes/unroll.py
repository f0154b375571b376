"""Loop unrolling for `b.range(..., unroll=n)`.

A constant number of turns up to n becomes straight code. Otherwise a turn holds n copies of the body; what is left over is
straight code (constant bounds) or a second loop (unknown bounds). A loop with a break stays as it is.
"""

from __future__ import annotations

from ..ir import CONTROL, Op, OpCode, Program, Region, constant, walk
from ..types import DType
from .rewrite import Rewriter


def unroll(program: Program) -> Program:
    """Unroll every loop that asks for it, innermost first."""
    if not any(op.code is OpCode.RANGE and op.arg > 1 for op in walk(program.body)):
        return program
    return _Unroll().run(program)


def _turns(op: Op) -> int | None:
    """How often a RANGE runs, if its bounds are constants."""
    if any(s.code is not OpCode.CONST for s in op.src) or op.src[2].arg <= 0:
        return None
    start, stop, step = (int(s.arg) for s in op.src)
    return max(0, -(-(stop - start) // step))


def _breaks(region: Region) -> bool:
    """Whether a BREAK_IF leaves the loop that owns `region`."""
    for op in region.ops:
        if op.code is OpCode.BREAK_IF:
            return True
        if op.code is OpCode.IF and any(_breaks(r) for r in op.regions):
            return True
    return False


class _Unroll(Rewriter):
    def visit(self, op: Op) -> Op:
        if op.code is not OpCode.RANGE or op.arg <= 1 or _breaks(op.regions[0]):
            return self.place(op)
        turns = _turns(op)
        if turns is None:
            return self._unknown_turns(op)
        return self._known_turns(op, turns)

    def emit(self, like: Op, code: OpCode, dtype: DType | None, *src: Op) -> Op:
        return self.place(Op(code, dtype, src, None, (), like.where))

    def copy(self, region: Region, index: Op) -> None:
        """Place a copy of a loop's body with `index` as its number."""
        assert region.index is not None
        self.out += clone(region, {region.index: index}).ops

    def _known_turns(self, op: Op, turns: int) -> Op:
        start, _, step = op.src
        dtype = _type(op)
        whole = 0 if turns <= op.arg else turns // op.arg * op.arg
        if whole:
            stop = constant(dtype, start.arg + whole * step.arg)
            self._main_loop(op, start, stop, constant(dtype, step.arg * op.arg))
        for i in range(whole, turns):
            self.copy(op.regions[0], constant(dtype, start.arg + i * step.arg))
        return op

    def _main_loop(self, op: Op, start: Op, stop: Op, stride: Op, following: Op | None = None) -> Op:
        """The loop of `op.arg` copies; `following` is a variable that keeps the first number not done."""
        dtype = _type(op)
        index = Op(OpCode.INDEX, dtype, (), None, (), op.where)
        outer, self.out = self.out, []
        number = index
        for i in range(op.arg):
            if i:
                number = self.emit(op, OpCode.ADD, dtype, number, op.src[2])
            self.copy(op.regions[0], number)
        if following is not None:
            after = self.emit(op, OpCode.ADD, dtype, index, stride)
            self.emit(op, OpCode.VAR_STORE, None, following, after)
        body, self.out = Region(tuple(self.out), index), outer
        return self.place(Op(OpCode.RANGE, None, (start, stop, stride), 1, (body,), op.where))

    def _unknown_turns(self, op: Op) -> Op:
        """i < main_stop says that i and the op.arg - 1 numbers after it are all below stop; no sum can overflow."""
        start, stop, step = op.src
        dtype = _type(op)
        first = self.emit(op, OpCode.MIN, dtype, start, stop)
        room = self.emit(op, OpCode.SUB, dtype, stop, first)
        reach = self.emit(op, OpCode.MUL, dtype, step, constant(dtype, op.arg - 1))
        main_stop = self.emit(op, OpCode.SUB, dtype, stop, self.emit(op, OpCode.MIN, dtype, room, reach))
        stride = self.emit(op, OpCode.MUL, dtype, step, constant(dtype, op.arg))
        following = self.emit(op, OpCode.VAR, dtype, start)
        self._main_loop(op, start, main_stop, stride, following)
        rest = self.emit(op, OpCode.VAR_LOAD, dtype, following)
        return self.place(Op(OpCode.RANGE, None, (rest, stop, step), 1, tuple(clone(r, {}) for r in op.regions), op.where))


def _type(op: Op) -> DType:
    dtype = op.src[0].dtype
    assert isinstance(dtype, DType)
    return dtype


def clone(region: Region, values: dict[Op, Op]) -> Region:
    """A copy of a region with fresh operations; `values` maps old operations to new ones and is filled."""
    index = region.index
    if index is not None and index not in values:
        values[index] = Op(OpCode.INDEX, index.dtype, (), None, (), index.where)
    ops = []
    for op in region.ops:
        src = tuple([values.get(s, s) for s in op.src])
        regions = tuple(clone(r, values) for r in op.regions) if op.code in CONTROL else ()
        copy = values[op] = Op(op.code, op.dtype, src, op.arg, regions, op.where, op.name)
        ops.append(copy)
    return Region(tuple(ops), values[index] if index is not None else None)
