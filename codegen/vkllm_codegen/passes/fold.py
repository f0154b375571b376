"""Constant folding and local algebra. Every rule is exact: no result changes, not even in the last bit of a float.

Integers are put into one shape so that equal addresses look equal to the CSE pass: constants stand on the right, sums carry
their constant outermost, products with powers of two are shifts.
"""

from __future__ import annotations

from collections.abc import Callable

from ..ir import COMPARISONS, PURE, Op, OpCode, Program, Region, constant
from ..types import DType, boolean, wrap_integer
from .evaluate import evaluate
from .rewrite import Rewriter

COMMUTATIVE = frozenset({OpCode.ADD, OpCode.MUL, OpCode.AND, OpCode.OR, OpCode.XOR, OpCode.EQ, OpCode.NE, OpCode.MIN, OpCode.MAX})


def fold(program: Program) -> Program:
    """Compute what is constant, simplify what is trivial, drop branches that are never taken."""
    return _Fold().run(program)


class _Fold(Rewriter):
    def visit(self, op: Op) -> Op:
        if op.code in PURE:
            return self.simplified(op)
        if op.code is OpCode.IF and op.src[0].code is OpCode.CONST:
            return self._taken(op)
        if op.code is OpCode.RANGE and _never_runs(op):
            return op
        return self.place(op)

    def _taken(self, op: Op) -> Op:
        """The region that a constant condition takes, in place of the IF."""
        taken = op.regions[0] if op.src[0].arg else op.regions[1] if len(op.regions) > 1 else Region(())
        self.out += taken.ops
        return op

    def simplified(self, op: Op) -> Op:
        """The simplest value equal to `op`, placed if it needs a place."""
        if all(s.code is OpCode.CONST for s in op.src):
            value = evaluate(op)
            if value is not None:
                assert isinstance(op.dtype, DType)
                return constant(op.dtype, value)
        if op.code in COMMUTATIVE and op.src[0].code is OpCode.CONST and op.src[1].code is not OpCode.CONST:
            op = Op(op.code, op.dtype, (op.src[1], op.src[0]), op.arg, (), op.where)
        rule = RULES.get(op.code)
        simpler = rule(self, op) if rule else None
        return simpler if simpler is not None else self.place(op)

    def new(self, like: Op, code: OpCode, *src: Op, dtype: DType | None = None) -> Op:
        """A simplified operation at the place of `like`."""
        return self.simplified(Op(code, dtype or like.dtype, src, None, (), like.where))

    def number(self, like: Op, value: int) -> Op:
        """An integer constant of `like`'s type, wrapped into its range."""
        assert isinstance(like.dtype, DType)
        return constant(like.dtype, wrap_integer(like.dtype, value))


Rule = Callable[[_Fold, Op], Op | None]


def _never_runs(op: Op) -> bool:
    start, stop, _ = op.src
    return start.code is OpCode.CONST and stop.code is OpCode.CONST and bool(start.arg >= stop.arg)


def _is_scalar_int(op: Op) -> bool:
    return isinstance(op.dtype, DType) and op.dtype.count == 1 and op.dtype.is_integer


def _fixed(op: Op) -> int | None:
    """The value of an integer constant."""
    return op.arg if op.code is OpCode.CONST and _is_scalar_int(op) else None


def _power(value: int) -> int | None:
    """k where value = 2**k."""
    return value.bit_length() - 1 if value > 0 and value & (value - 1) == 0 else None


def _sum_of(op: Op) -> tuple[Op, int] | None:
    """(x, c) where op = x + c."""
    if op.code is OpCode.ADD and (c := _fixed(op.src[1])) is not None:
        return op.src[0], c
    return None


def _add(f: _Fold, op: Op) -> Op | None:
    if not _is_scalar_int(op):
        return None
    a, b = op.src
    c = _fixed(b)
    if c is not None:
        if c == 0:
            return a
        inner = _sum_of(a)
        return f.new(op, OpCode.ADD, inner[0], f.number(op, inner[1] + c)) if inner else None
    for x, y in ((a, b), (b, a)):
        inner = _sum_of(x)
        if inner:
            variable = f.new(op, OpCode.ADD, inner[0], y) if x is a else f.new(op, OpCode.ADD, y, inner[0])
            return f.new(op, OpCode.ADD, variable, f.number(op, inner[1]))
    return None


def _sub(f: _Fold, op: Op) -> Op | None:
    if not _is_scalar_int(op):
        return None
    a, b = op.src
    if a is b:
        return f.number(op, 0)
    c = _fixed(b)
    return f.new(op, OpCode.ADD, a, f.number(op, -c)) if c is not None else None


def _mul(f: _Fold, op: Op) -> Op | None:
    a, b = op.src
    if b.code is OpCode.CONST and b.arg == 1 and not isinstance(b.arg, tuple):
        return a
    c = _fixed(b)
    if c is None:
        return None
    if c == 0:
        return b
    shift = _power(c)
    if shift is not None:
        return f.new(op, OpCode.SHL, a, f.number(op, shift))
    return _scaled(f, op, a, c)


def _scaled(f: _Fold, op: Op, a: Op, factor: int) -> Op | None:
    """a * factor where a itself is a sum with, or a product by, a constant."""
    inner = _sum_of(a)
    if inner:
        return f.new(op, OpCode.ADD, f.new(op, OpCode.MUL, inner[0], f.number(op, factor)), f.number(op, inner[1] * factor))
    if a.code is OpCode.MUL and (c := _fixed(a.src[1])) is not None:
        return f.new(op, OpCode.MUL, a.src[0], f.number(op, c * factor))
    if a.code is OpCode.SHL and (c := _fixed(a.src[1])) is not None and 0 <= c < 32:
        return f.new(op, OpCode.MUL, a.src[0], f.number(op, factor << c))
    return None


def _shl(f: _Fold, op: Op) -> Op | None:
    a, b = op.src
    c = _fixed(b)
    if c is None or not isinstance(op.dtype, DType) or not 0 <= c < op.dtype.bits:
        return None
    if c == 0:
        return a
    if a.code is OpCode.SHL and (inner := _fixed(a.src[1])) is not None and inner >= 0 and inner + c < op.dtype.bits:
        return f.new(op, OpCode.SHL, a.src[0], f.number(op, inner + c))
    total = _sum_of(a)
    if total:
        return f.new(op, OpCode.ADD, f.new(op, OpCode.SHL, total[0], b), f.number(op, total[1] << c))
    return None


def _shr(f: _Fold, op: Op) -> Op | None:
    return op.src[0] if _fixed(op.src[1]) == 0 else None


def _idiv(f: _Fold, op: Op) -> Op | None:
    c = _fixed(op.src[1])
    if c == 1:
        return op.src[0]
    shift = _power(c) if c is not None and _unsigned(op) else None
    return f.new(op, OpCode.SHR, op.src[0], f.number(op, shift)) if shift is not None else None


def _mod(f: _Fold, op: Op) -> Op | None:
    c = _fixed(op.src[1])
    if c is None or not _unsigned(op) or _power(c) is None:
        return None
    return f.new(op, OpCode.AND, op.src[0], f.number(op, c - 1))


def _unsigned(op: Op) -> bool:
    return isinstance(op.dtype, DType) and op.dtype.kind == "uint"


def _div(f: _Fold, op: Op) -> Op | None:
    """Dividing by a power of two is multiplying by its exact inverse."""
    a, b = op.src
    if b.code is not OpCode.CONST or isinstance(b.arg, tuple) or not 2.0**-14 <= b.arg <= 2.0**14:
        return None
    inverse = 1.0 / b.arg
    exact = inverse.hex().startswith("0x1.0000000000000p")
    assert isinstance(op.dtype, DType)
    return f.new(op, OpCode.MUL, a, constant(op.dtype, inverse)) if exact else None


def _and(f: _Fold, op: Op) -> Op | None:
    a, b = op.src
    if op.dtype is boolean:
        return _boolean(a, b, keep=True)
    c = _fixed(b)
    if c is None:
        return a if a is b else None
    if c == 0:
        return b
    if f.number(op, -1).arg == c:
        return a
    inner = _fixed(a.src[1]) if a.code is OpCode.AND else None
    return f.new(op, OpCode.AND, a.src[0], f.number(op, inner & c)) if inner is not None else None


def _or(f: _Fold, op: Op) -> Op | None:
    a, b = op.src
    if op.dtype is boolean:
        return _boolean(a, b, keep=False)
    return a if _fixed(b) == 0 or a is b else None


def _boolean(a: Op, b: Op, keep: bool) -> Op | None:
    """a & b (keep is True) or a | b (keep is False)."""
    if b.code is OpCode.CONST:
        return a if b.arg is keep else b
    return a if a is b else None


def _xor(f: _Fold, op: Op) -> Op | None:
    return op.src[0] if _fixed(op.src[1]) == 0 else None


def _involution(f: _Fold, op: Op) -> Op | None:
    """NOT NOT x, NEG NEG x."""
    inner = op.src[0]
    return inner.src[0] if inner.code is op.code else None


def _select(f: _Fold, op: Op) -> Op | None:
    condition, x, y = op.src
    if x is y:
        return x
    if condition.code is OpCode.CONST and condition.dtype is boolean:
        return x if condition.arg else y
    return None


def _extract(f: _Fold, op: Op) -> Op | None:
    vector = op.src[0]
    if vector.code is OpCode.VEC:
        part: Op = vector.src[op.arg]
        return part
    if vector.code is OpCode.CONST:
        assert isinstance(op.dtype, DType)
        return constant(op.dtype, vector.arg[op.arg])
    return None


def _extract_dyn(f: _Fold, op: Op) -> Op | None:
    c = _fixed(op.src[1])
    vector = op.src[0].dtype
    assert isinstance(vector, DType)
    if c is None or not 0 <= c < vector.count:
        return None
    return f.simplified(Op(OpCode.EXTRACT, op.dtype, (op.src[0],), c, (), op.where))


def _vec(f: _Fold, op: Op) -> Op | None:
    """The vector of all components of a vector, in order."""
    first = op.src[0]
    if first.code is not OpCode.EXTRACT or first.src[0].dtype is not op.dtype:
        return None
    whole = first.src[0]
    same = all(s.code is OpCode.EXTRACT and s.src[0] is whole and s.arg == i for i, s in enumerate(op.src))
    return whole if same else None


def _bitcast(f: _Fold, op: Op) -> Op | None:
    inner = op.src[0]
    if inner.dtype is op.dtype:
        return inner
    if inner.code is OpCode.BITCAST:
        return f.new(op, OpCode.BITCAST, inner.src[0])
    return None


def _compare(f: _Fold, op: Op) -> Op | None:
    """x < 0 and x >= 0 of an unsigned x."""
    x, y = op.src
    if isinstance(x.dtype, DType) and x.dtype.kind == "uint" and _fixed(y) == 0 and op.code in (OpCode.LT, OpCode.GE):
        return constant(boolean, op.code is OpCode.GE)
    return None


def _min(f: _Fold, op: Op) -> Op | None:
    """min(x, 0) of an unsigned x."""
    return op.src[1] if _unsigned(op) and _fixed(op.src[1]) == 0 else None


RULES: dict[OpCode, Rule] = {
    OpCode.MIN: _min,
    OpCode.ADD: _add, OpCode.SUB: _sub, OpCode.MUL: _mul, OpCode.SHL: _shl, OpCode.SHR: _shr, OpCode.IDIV: _idiv,
    OpCode.MOD: _mod, OpCode.DIV: _div, OpCode.AND: _and, OpCode.OR: _or, OpCode.XOR: _xor, OpCode.NOT: _involution,
    OpCode.NEG: _involution, OpCode.SELECT: _select, OpCode.EXTRACT: _extract, OpCode.EXTRACT_DYN: _extract_dyn,
    OpCode.VEC: _vec, OpCode.BITCAST: _bitcast, **dict.fromkeys(COMPARISONS, _compare),
}  # fmt: skip
