"""The rules of every opcode, as data: opcode → checks. A check returns None, or says what is wrong.

`RULES` look at an operation alone, `ACCESS` at the buffer that it names. `TRACED` are for the program as it was written: passes
may leave what they forbid in branches that are never taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..ir import ATOMICS, LEAVES, Binding, Op, OpCode, Region
from ..types import CoopType, DType, boolean, f32, i32, u32, vec

Rule = Callable[[Op], str | None]


def operands(*counts: int) -> Rule:
    """The number of operands."""
    return lambda op: None if len(op.src) in counts else f"{op.code} has {len(op.src)} operands, expected {counts[0]}"


def same_type(first: int = 0) -> Rule:
    """Operands from `first` on share the result's type."""

    def check(op: Op) -> str | None:
        found = [s.dtype for s in op.src[first:]]
        return None if all(t is op.dtype for t in found) else f"{op.code} of {found} gives {op.dtype!r}: types must be the same"

    return check


def operand_type(position: int, *allowed: DType) -> Rule:
    """One operand has one of these types."""

    def check(op: Op) -> str | None:
        found = op.src[position].dtype
        wanted = " or ".join(map(repr, allowed))
        return None if found in allowed else f"operand {position} of {op.code} is {found!r}, expected {wanted}"

    return check


def operand_kind(position: int, *kinds: str) -> Rule:
    """One operand's components are of one of these kinds."""

    def check(op: Op) -> str | None:
        found = op.src[position].dtype
        ok = isinstance(found, DType) and found.kind in kinds
        return None if ok else f"operand {position} of {op.code} is {found!r}, expected {' or '.join(kinds)}"

    return check


def result_type(*allowed: DType) -> Rule:
    return lambda op: None if op.dtype in allowed else f"{op.code} gives {op.dtype!r}, expected {allowed[0]!r}"


def no_result(op: Op) -> str | None:
    return None if op.dtype is None else f"{op.code} has no result, found {op.dtype!r}"


def regions(*counts: int) -> Rule:
    return lambda op: None if len(op.regions) in counts else f"{op.code} owns {len(op.regions)} regions, expected {counts[0]}"


def declared_by(code: OpCode, stored: int | None = None) -> Rule:
    """The first operand is a declaration; the result, or the operand number `stored`, has its type."""

    def check(op: Op) -> str | None:
        declaration = op.src[0]
        if declaration.code is not code:
            return f"{op.code} of a {declaration.code}, expected a {code}"
        found = op.dtype if stored is None else op.src[stored].dtype
        return None if found is declaration.dtype else f"{op.code} of {found!r}; declared as {declaration.dtype!r}"

    return check


def comparison(op: Op) -> str | None:
    a, b = (s.dtype for s in op.src)
    if a is not b or not isinstance(a, DType):
        return f"{op.code} compares {a!r} with {b!r}: types must be the same"
    if a.is_bool and op.code not in (OpCode.EQ, OpCode.NE):
        return f"{op.code} of booleans: they have no order"
    return None if op.dtype is boolean.with_count(a.count) else f"{op.code} gives {op.dtype!r}"


def same_bits(op: Op) -> str | None:
    source, target = op.src[0].dtype, op.dtype
    assert isinstance(source, DType) and isinstance(target, DType)
    return None if source.itemsize == target.itemsize else f"bitcast of {source!r} to {target!r}: sizes differ"


def same_count(op: Op) -> str | None:
    source, target = op.src[0].dtype, op.dtype
    assert isinstance(source, DType) and isinstance(target, DType)
    return None if source.count == target.count else f"{op.code} of {source!r} to {target!r}: component counts differ"


def cast_sizes(op: Op) -> str | None:
    source, target = op.src[0].dtype, op.dtype
    assert isinstance(source, DType) and isinstance(target, DType)
    mixed = 64 in (source.bits, target.bits) and (source.is_float or target.is_float)
    return f"{op.code} of {source!r} to {target!r}: no conversion between floats and 64 bits" if mixed else None


def component(op: Op) -> str | None:
    vector = op.src[0].dtype
    assert isinstance(vector, DType)
    if op.dtype is not vector.scalar or vector.count == 1:
        return f"{op.code} of {vector!r} gives {op.dtype!r}"
    in_range = op.code is OpCode.EXTRACT_DYN or 0 <= op.arg < vector.count
    return None if in_range else f"component {op.arg} of {vector!r}"


def vector_of_operands(op: Op) -> str | None:
    assert isinstance(op.dtype, DType)
    ok = op.dtype.count == len(op.src) and all(s.dtype is op.dtype.scalar for s in op.src)
    return None if ok else f"vec of {[s.dtype for s in op.src]} gives {op.dtype!r}"


def select_condition(op: Op) -> str | None:
    assert isinstance(op.dtype, DType)
    wanted = boolean.with_count(op.dtype.count)
    return None if op.src[0].dtype is wanted else f"condition of select is {op.src[0].dtype!r}, expected {wanted!r}"


def range_bounds(op: Op) -> str | None:
    kinds = {s.dtype for s in op.src}
    index = op.regions[0].index
    if index is None or kinds != {index.dtype} or index.dtype not in (u32, i32):
        return f"range over {[s.dtype for s in op.src]}: start, stop and step must all be u32 or all i32"
    if op.src[2].code is OpCode.CONST and op.src[2].arg <= 0:
        return f"range with step {op.src[2].arg}: it must be positive"
    return None


def type_of_operand(op: Op) -> str | None:
    found = op.src[0].dtype
    return None if op.dtype is found else f"{op.code} of {found!r} gives {op.dtype!r}"


def truth(op: Op) -> str | None:
    return None if isinstance(op.dtype, DType) and op.dtype.is_bool else f"{op.code} gives {op.dtype!r}, expected a boolean"


def sizes(op: Op) -> str | None:
    fixed = op.src and all(s.code in (OpCode.CONST, OpCode.SPEC) and s.dtype is u32 and s.arg != 0 for s in op.src)
    return None if fixed else f"{op.code} needs one or more sizes above 0, constants or specialization constants of type u32"


def positive(op: Op) -> str | None:
    """Lengths of arrays and numbers of copies."""
    return None if isinstance(op.arg, int) and op.arg > 0 else f"{op.code} of {op.arg}: it must be 1 or more"


def same_in_all_lanes(op: Op) -> str | None:
    return None if op.src[1].code in (OpCode.CONST, OpCode.SPEC) else f"the lane of {op.code} must be a constant"


def no_division_by_zero(op: Op) -> str | None:
    zero = op.src[1].code is OpCode.CONST and not all(_components(op.src[1].arg))
    return f"{op.code} by the constant 0" if zero else None


def shift_within(op: Op) -> str | None:
    assert isinstance(op.dtype, DType)
    distances = _components(op.src[1].arg) if op.src[1].code is OpCode.CONST else ()
    far = [d for d in distances if not 0 <= d < op.dtype.bits]
    return f"{op.code} of {op.dtype!r} by {far[0]} bits is undefined" if far else None


def leaves(op: Op) -> str | None:
    return None if _breaks(op.regions[0]) else f"a {op.code} without a break_if never ends"


def _components(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _breaks(region: Region) -> bool:
    """Is there a BREAK_IF of this region's loop? Those of loops inside are their own."""
    inner = (r for op in region.ops if op.code is OpCode.IF for r in op.regions)
    return any(op.code is OpCode.BREAK_IF for op in region.ops) or any(map(_breaks, inner))


def matrix_element(op: Op) -> str | None:
    ok = isinstance(op.dtype, CoopType) and op.src[0].dtype is op.dtype.element
    return None if ok else f"{op.code} of {op.src[0].dtype!r} gives {op.dtype!r}"


def a_matrix(op: Op) -> str | None:
    found = op.src[0].dtype if op.code is OpCode.COOP_STORE else op.dtype
    return None if isinstance(found, CoopType) else f"{op.code} of {found!r}, expected a cooperative matrix"


def matrices(op: Op) -> str | None:
    """a[M, K] × b[K, N] + c[M, N]."""
    a, b, c = (s.dtype for s in op.src)
    if not (isinstance(a, CoopType) and isinstance(b, CoopType) and isinstance(c, CoopType)):
        return "coop_mul_add needs three cooperative matrices"
    shapes = (a.use, b.use, c.use) == ("a", "b", "acc") and a.cols == b.rows and (a.rows, b.cols) == (c.rows, c.cols)
    return None if shapes and op.dtype is c else f"coop_mul_add of {a!r}, {b!r}, {c!r}: shapes or uses do not fit"


INDEX_TYPES = (u32, i32)
NUMBER = ("float", "int", "uint")
INTEGER = ("int", "uint")
O = OpCode  # noqa: E741

RULES: dict[OpCode, tuple[Rule, ...]] = {
    **dict.fromkeys(LEAVES, (operands(0),)),
    **dict.fromkeys((O.ADD, O.SUB, O.MUL, O.MIN, O.MAX), (operands(2), same_type(), operand_kind(0, *NUMBER))),
    O.DIV: (operands(2), same_type(), operand_kind(0, "float")),
    **dict.fromkeys((O.IDIV, O.MOD, O.SHL, O.SHR), (operands(2), same_type(), operand_kind(0, *INTEGER))),
    **dict.fromkeys((O.AND, O.OR, O.XOR), (operands(2), same_type(), operand_kind(0, *INTEGER, "bool"))),
    O.NOT: (operands(1), same_type(), operand_kind(0, *INTEGER, "bool")),
    **dict.fromkeys((O.NEG, O.ABS), (operands(1), same_type(), operand_kind(0, *NUMBER))),
    **dict.fromkeys((O.EQ, O.NE, O.LT, O.LE, O.GT, O.GE), (operands(2), comparison)),
    O.SELECT: (operands(3), same_type(1), select_condition),
    O.CAST: (operands(1), same_count, cast_sizes),
    O.BITCAST: (operands(1), same_bits),
    O.VEC: (operands(2, 3, 4), vector_of_operands),
    O.EXTRACT: (operands(1), component),
    O.EXTRACT_DYN: (operands(2), component, operand_type(1, *INDEX_TYPES)),
    O.FMA: (operands(3), same_type(), operand_kind(0, "float")),
    O.CLAMP: (operands(3), same_type(), operand_kind(0, *NUMBER)),
    **dict.fromkeys(
        (O.SQRT, O.RSQRT, O.EXP, O.EXP2, O.LOG, O.LOG2, O.SIN, O.COS, O.TANH, O.FLOOR, O.ROUND),
        (operands(1), same_type(), operand_kind(0, "float")),
    ),
    **dict.fromkeys((O.ISNAN, O.ISINF), (operands(1), operand_kind(0, "float"), truth, same_count)),
    O.UNPACK_HALF: (operands(1), operand_type(0, u32), result_type(vec(f32, 2))),
    O.PACK_HALF: (operands(1), operand_type(0, vec(f32, 2)), result_type(u32)),
    O.BIT_EXTRACT: (operands(3), operand_kind(0, *INTEGER), operand_type(1, u32), operand_type(2, u32)),
    **dict.fromkeys((O.DOT_I8, O.DOT_U8I8), (operands(2), operand_type(0, u32), operand_type(1, u32), result_type(i32))),
    O.UNIFORM: (operands(1), same_type()),
    **dict.fromkeys((O.SG_ADD, O.SG_MAX, O.SG_MIN), (operands(1), same_type(), operand_kind(0, *NUMBER))),
    **dict.fromkeys((O.SHUFFLE, O.SHUFFLE_XOR), (operands(2), type_of_operand, operand_kind(0, *NUMBER), operand_type(1, u32))),
    O.BROADCAST: (operands(2), type_of_operand, operand_kind(0, *NUMBER), operand_type(1, u32), same_in_all_lanes),
    **dict.fromkeys((O.SG_ANY, O.SG_ALL), (operands(1), operand_type(0, boolean), result_type(boolean))),
    O.SG_ELECT: (operands(0), result_type(boolean)),
    O.VAR: (operands(1), same_type()),
    O.ARRAY: (operands(0), positive),
    O.SHARED: (sizes,),
    O.VAR_LOAD: (operands(1), declared_by(O.VAR)),
    O.VAR_STORE: (operands(2), declared_by(O.VAR, 1), no_result),
    O.ARRAY_LOAD: (operands(2), declared_by(O.ARRAY), operand_type(1, *INDEX_TYPES)),
    O.ARRAY_STORE: (operands(3), declared_by(O.ARRAY, 2), operand_type(1, *INDEX_TYPES), no_result),
    O.SHARED_LOAD: (operands(2), declared_by(O.SHARED), operand_type(1, *INDEX_TYPES)),
    O.SHARED_STORE: (operands(3), declared_by(O.SHARED, 2), operand_type(1, *INDEX_TYPES), no_result),
    O.BUF_LOAD: (operands(1), operand_type(0, *INDEX_TYPES)),
    O.BUF_STORE: (operands(2), operand_type(0, *INDEX_TYPES), no_result),
    O.TEXEL_LOAD: (operands(1), operand_type(0, *INDEX_TYPES)),
    **dict.fromkeys(ATOMICS, (operands(2), operand_type(0, *INDEX_TYPES), operand_type(1, *INDEX_TYPES), same_type(1))),
    O.BARRIER: (operands(0), no_result),
    O.FENCE: (operands(0), no_result),
    O.COOP_FILL: (operands(1), matrix_element),
    O.COOP_LOAD: (operands(2, 3), a_matrix),
    O.COOP_STORE: (operands(3, 4), a_matrix, no_result),
    O.COOP_MULADD: (operands(3), matrices),
    O.INDEX: (lambda op: "a running number stands outside its range",),
    O.RANGE: (operands(3), regions(1), range_bounds, positive, no_result),
    O.IF: (operands(1), operand_type(0, boolean), regions(1, 2), no_result),
    O.LOOP: (operands(0), regions(1), no_result),
    O.BREAK_IF: (operands(1), operand_type(0, boolean), no_result),
}

TRACED: dict[OpCode, Rule] = {
    **dict.fromkeys((O.IDIV, O.MOD), no_division_by_zero),
    **dict.fromkeys((O.SHL, O.SHR), shift_within),
    O.LOOP: leaves,
}

STORAGE, TEXELS = ("storage",), ("texel", "uniform_texel")
READ, WRITE = ("read", "readwrite"), ("write", "readwrite")

ACCESS: dict[OpCode, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys((O.BUF_LOAD, O.COOP_LOAD), (STORAGE, READ)),
    **dict.fromkeys((O.BUF_STORE, O.COOP_STORE), (STORAGE, WRITE)),
    **dict.fromkeys(ATOMICS, (STORAGE, ("readwrite",))),
    O.TEXEL_LOAD: (TEXELS, READ),
}
"""What a buffer operation asks of the binding that it names: its kind and its access."""


def binding_complaint(op: Op, bindings: Sequence[Binding]) -> str | None:
    """What is wrong with the binding of a buffer operation; None for other operations, and for matrices in shared memory."""
    number = op.arg[0] if op.code in (O.COOP_LOAD, O.COOP_STORE) else op.arg
    if op.code not in ACCESS or number is None:
        return None
    if not 0 <= number < len(bindings):
        return f"{op.code} of binding {number}: there are {len(bindings)}"
    binding, (kinds, access) = bindings[number], ACCESS[op.code]
    if binding.kind not in kinds or binding.access not in access:
        return f"{op.code} of {binding.name}, a {binding.kind} buffer that is declared {binding.access}"
    stored = {O.BUF_STORE: 1, O.COOP_STORE: 0}.get(op.code)
    moved = op.dtype if stored is None else op.src[stored].dtype
    if isinstance(moved, CoopType):
        moved = moved.element
    if op.code is O.TEXEL_LOAD and moved is not None:  # narrow texels are read as 32-bit components
        same = (moved.kind, moved.count) == (binding.dtype.kind, binding.dtype.count)
    else:
        same = moved is binding.dtype
    return None if same else f"{op.code} of {moved!r}; {binding.name} holds {binding.dtype!r}"
