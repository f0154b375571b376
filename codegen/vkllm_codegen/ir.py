"""The intermediate representation: immutable operations in nested regions.

A program's body is a `Region`: operations in execution order. Control operations (RANGE, IF, LOOP) own regions. Values are the
operations themselves; a value is visible from its place to the end of its region, nested regions included. Leaves (constants,
push and specialization constants, built-ins) have no place: they are visible everywhere. Mutable state is explicit (VAR, ARRAY,
SHARED, buffers), so cloning a region is always correct.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from .types import CoopType, DType

Where = tuple[str, int]  # Python file and line that traced an operation


class OpCode(StrEnum):
    """What an operation does. The groups below are also sets."""

    # leaves; arg: the value(s) · the name · the name · (built-in, dimension)
    CONST, SPEC, PUSH, BUILTIN = "const", "spec", "push", "builtin"
    # arithmetic, comparison, selection
    ADD, SUB, MUL, DIV, IDIV, MOD, NEG = "add", "sub", "mul", "div", "idiv", "mod", "neg"
    AND, OR, XOR, NOT, SHL, SHR = "and", "or", "xor", "not", "shl", "shr"
    EQ, NE, LT, LE, GT, GE, SELECT = "eq", "ne", "lt", "le", "gt", "ge", "select"
    # types and vectors; EXTRACT's arg is the component
    CAST, BITCAST, VEC, EXTRACT, EXTRACT_DYN = "cast", "bitcast", "vec", "extract", "extract_dyn"
    # mathematics
    FMA, SQRT, RSQRT, EXP, EXP2, LOG, LOG2 = "fma", "sqrt", "rsqrt", "exp", "exp2", "log", "log2"
    SIN, COS, TANH, ABS, MIN, MAX, CLAMP = "sin", "cos", "tanh", "abs", "min", "max", "clamp"
    FLOOR, ROUND, ISNAN, ISINF = "floor", "round", "isnan", "isinf"
    # bits
    UNPACK_HALF, PACK_HALF, BIT_EXTRACT = "unpack_half", "pack_half", "bit_extract"
    DOT_I8, DOT_U8I8 = "dot_i8", "dot_u8i8"
    # a promise of the program: the operand is the same in all invocations of a workgroup
    UNIFORM = "uniform"
    # subgroup; SHUFFLE_XOR's arg is the mask, BROADCAST's the lane
    SG_ADD, SG_MAX, SG_MIN = "sg_add", "sg_max", "sg_min"
    SHUFFLE, SHUFFLE_XOR, BROADCAST = "shuffle", "shuffle_xor", "broadcast"
    SG_ANY, SG_ALL, SG_ELECT = "sg_any", "sg_all", "sg_elect"
    # declarations: VAR(init), ARRAY (arg: length), SHARED(dimensions...)
    VAR, ARRAY, SHARED = "var", "array", "shared"
    # memory; buffer operations' arg is the binding number
    VAR_LOAD, VAR_STORE = "var_load", "var_store"
    ARRAY_LOAD, ARRAY_STORE = "array_load", "array_store"
    SHARED_LOAD, SHARED_STORE = "shared_load", "shared_store"
    BUF_LOAD, BUF_STORE, TEXEL_LOAD = "buf_load", "buf_store", "texel_load"
    ATOMIC_ADD, ATOMIC_MAX, ATOMIC_MIN = "atomic_add", "atomic_max", "atomic_min"
    BARRIER, FENCE = "barrier", "fence"
    # cooperative matrices; loads and stores: arg = (binding or None for shared memory, row major)
    COOP_FILL, COOP_LOAD, COOP_STORE, COOP_MULADD = "coop_fill", "coop_load", "coop_store", "coop_muladd"
    # control; RANGE(start, stop, step) with arg = unroll
    INDEX, RANGE, IF, LOOP, BREAK_IF = "index", "range", "if", "loop", "break_if"


LEAVES = frozenset({OpCode.CONST, OpCode.SPEC, OpCode.PUSH, OpCode.BUILTIN})
DECLARATIONS = frozenset({OpCode.VAR, OpCode.ARRAY, OpCode.SHARED})
CONTROL = frozenset({OpCode.RANGE, OpCode.IF, OpCode.LOOP})
COMPARISONS = frozenset({OpCode.EQ, OpCode.NE, OpCode.LT, OpCode.LE, OpCode.GT, OpCode.GE})
SUBGROUP = frozenset({
    OpCode.SG_ADD, OpCode.SG_MAX, OpCode.SG_MIN, OpCode.SHUFFLE, OpCode.SHUFFLE_XOR, OpCode.BROADCAST,
    OpCode.SG_ANY, OpCode.SG_ALL, OpCode.SG_ELECT,
})  # fmt: skip
LOADS = frozenset({OpCode.VAR_LOAD, OpCode.ARRAY_LOAD, OpCode.SHARED_LOAD, OpCode.BUF_LOAD, OpCode.TEXEL_LOAD, OpCode.COOP_LOAD})
ATOMICS = frozenset({OpCode.ATOMIC_ADD, OpCode.ATOMIC_MAX, OpCode.ATOMIC_MIN})
EFFECTS = ATOMICS | {
    OpCode.VAR_STORE, OpCode.ARRAY_STORE, OpCode.SHARED_STORE, OpCode.BUF_STORE, OpCode.COOP_STORE,
    OpCode.BARRIER, OpCode.FENCE, OpCode.BREAK_IF,
}  # fmt: skip
COOPERATIVE = frozenset({OpCode.COOP_FILL, OpCode.COOP_MULADD})  # pure, but all lanes of a subgroup must compute them
PURE = frozenset(OpCode) - COOPERATIVE - LEAVES - DECLARATIONS - CONTROL - SUBGROUP - LOADS - EFFECTS - {OpCode.INDEX}


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One operation: an opcode, the type of its result (None: no result), operands, an immediate, regions it owns.

    Identity is equality: two adds of the same operands are two operations until the CSE pass merges them.
    """

    code: OpCode
    dtype: DType | CoopType | None
    src: tuple[Op, ...] = ()
    arg: Any = None
    regions: tuple[Region, ...] = ()
    where: Where | None = None
    name: str = ""

    def __repr__(self) -> str:
        return f"<{self.code} {self.dtype!r} {self.arg!r}>"


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """Operations in order. `index` is the INDEX operation of a RANGE body: the running number."""

    ops: tuple[Op, ...]
    index: Op | None = None


@dataclass(frozen=True, slots=True)
class Binding:
    """A buffer of a kernel. kind: "storage", "texel" (storage texel buffer) or "uniform_texel"; access: "read|write|readwrite".

    `dims` are the declared dimensions, slowest first: ints or names of push or specialization constants. coherent: workgroups see
    each other's writes behind fences.
    """

    name: str
    kind: str
    dtype: DType
    access: str
    dims: tuple[int | str, ...] = ()
    coherent: bool = False


@dataclass(frozen=True, slots=True)
class Program:
    """A whole kernel: its interface and its body."""

    name: str
    bindings: tuple[Binding, ...]
    push: tuple[tuple[str, DType, int], ...]  # name, type, byte offset
    spec: dict[str, tuple[int, DType, int | float | bool]]  # name → id, type, default
    local_size: tuple[int | str, int, int]  # the first may be the name of a specialization constant
    body: Region = field(default_factory=lambda: Region(()))
    doc: str = ""

    def with_body(self, body: Region) -> Program:
        """The same interface around another body."""
        return replace(self, body=body)

    @property
    def default_local_size(self) -> tuple[int, int, int]:
        """The workgroup size with every specialization constant at its default."""
        first, y, z = self.local_size
        return (int(self.spec[first][2]) if isinstance(first, str) else first, y, z)


_LEAVES: dict[tuple[OpCode, DType, str], Op] = {}


def leaf(code: OpCode, dtype: DType, arg: Any) -> Op:
    """The one leaf of this opcode, type and argument: leaves are interned, so that identity is equality for them."""
    key = (code, dtype, repr(arg))
    found = _LEAVES.get(key)
    if found is None:
        found = _LEAVES[key] = Op(code, dtype, (), arg)
    return found


def constant(dtype: DType, value: Any) -> Op:
    """The constant `value`, already in the range of `dtype` (a tuple for a vector)."""
    return leaf(OpCode.CONST, dtype, value)


def walk(region: Region) -> Iterator[Op]:
    """Every operation of `region` and of the regions inside, in order (leaves excepted)."""
    for op in region.ops:
        yield op
        for inner in op.regions:
            yield from walk(inner)
