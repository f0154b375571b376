"""What the user's Python code handles: values with operators, variables, arrays, shared memory and buffers.

Nothing here computes; every operator records one operation in the block that is being traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from ..errors import TraceError
from ..ir import Binding, Op, OpCode
from ..types import CoopType, DType, Number, f32
from .where import at, caller

if TYPE_CHECKING:
    from .block import Block

Operand: TypeAlias = "Value | Number"
Index: TypeAlias = "Value | int"
TEXEL_RESULT = {"f16x4": f32.with_count(4)}  # a texel of half floats arrives as f32


def fail(message: str, hint: str = "") -> NoReturn:
    """Raise a TraceError that names the user's line."""
    raise TraceError(at(caller()) + message, hint)


class Value:
    """A value that a GPU invocation will compute. Operators need operands of one type, or Python numbers that fit it."""

    __slots__ = ("block", "op")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, block: Block, op: Op) -> None:
        self.block = block
        self.op = op

    @property
    def dtype(self) -> DType:
        if not isinstance(self.op.dtype, DType):
            fail(f"{self.op.dtype!r} has no arithmetic of its own", "use b.coop_mul_add, or b.coop_store and load the elements")
        return self.op.dtype

    def __repr__(self) -> str:
        return f"Value({self.op!r})"

    def __bool__(self) -> bool:
        fail("a GPU value has no truth value in Python", "use b.when(cond) or b.select(cond, x, y), and & | ~ for and, or, not")

    def __index__(self) -> int:
        fail("a GPU value is no Python integer", "for a loop with a GPU value as its bound use b.range")

    def __iter__(self) -> NoReturn:
        fail("a GPU value cannot be iterated", "take components with .x .y .z .w or v[0]")

    # arithmetic

    def __add__(self, other: Operand) -> Value:
        return self.block.binary(OpCode.ADD, self, other)

    def __radd__(self, other: Number) -> Value:
        return self.block.binary(OpCode.ADD, self, other)

    def __sub__(self, other: Operand) -> Value:
        return self.block.binary(OpCode.SUB, self, other)

    def __rsub__(self, other: Number) -> Value:
        return self.block.binary(OpCode.SUB, other, self)

    def __mul__(self, other: Operand) -> Value:
        return self.block.binary(OpCode.MUL, self, other)

    def __rmul__(self, other: Number) -> Value:
        return self.block.binary(OpCode.MUL, self, other)

    def __truediv__(self, other: Operand) -> Value:
        return self.block.divide(self, other)

    def __rtruediv__(self, other: Number) -> Value:
        return self.block.divide(other, self)

    def __floordiv__(self, other: Operand) -> Value:
        return self.block.integer_binary(OpCode.IDIV, self, other)

    def __rfloordiv__(self, other: Number) -> Value:
        return self.block.integer_binary(OpCode.IDIV, other, self)

    def __mod__(self, other: Operand) -> Value:
        return self.block.integer_binary(OpCode.MOD, self, other)

    def __rmod__(self, other: Number) -> Value:
        return self.block.integer_binary(OpCode.MOD, other, self)

    def __neg__(self) -> Value:
        return self.block.unary(OpCode.NEG, self)

    # bits and booleans

    def __and__(self, other: Operand) -> Value:
        return self.block.integer_binary(OpCode.AND, self, other)

    def __rand__(self, other: Number) -> Value:
        return self.block.integer_binary(OpCode.AND, self, other)

    def __or__(self, other: Operand) -> Value:
        return self.block.integer_binary(OpCode.OR, self, other)

    def __ror__(self, other: Number) -> Value:
        return self.block.integer_binary(OpCode.OR, self, other)

    def __xor__(self, other: Operand) -> Value:
        return self.block.integer_binary(OpCode.XOR, self, other)

    def __rxor__(self, other: Number) -> Value:
        return self.block.integer_binary(OpCode.XOR, self, other)

    def __lshift__(self, other: Operand) -> Value:
        return self.block.integer_binary(OpCode.SHL, self, other)

    def __rlshift__(self, other: Number) -> Value:
        return self.block.integer_binary(OpCode.SHL, other, self)

    def __rshift__(self, other: Operand) -> Value:
        return self.block.integer_binary(OpCode.SHR, self, other)

    def __rrshift__(self, other: Number) -> Value:
        return self.block.integer_binary(OpCode.SHR, other, self)

    def __invert__(self) -> Value:
        return self.block.unary(OpCode.NOT, self)

    # comparison

    def __eq__(self, other: Operand) -> Value:  # type: ignore[override]
        return self.block.compare(OpCode.EQ, self, other)

    def __ne__(self, other: Operand) -> Value:  # type: ignore[override]
        return self.block.compare(OpCode.NE, self, other)

    def __lt__(self, other: Operand) -> Value:
        return self.block.compare(OpCode.LT, self, other)

    def __le__(self, other: Operand) -> Value:
        return self.block.compare(OpCode.LE, self, other)

    def __gt__(self, other: Operand) -> Value:
        return self.block.compare(OpCode.GT, self, other)

    def __ge__(self, other: Operand) -> Value:
        return self.block.compare(OpCode.GE, self, other)

    # types and components

    def to(self, dtype: DType) -> Value:
        """Numeric conversion: f32 → i32 truncates, integers wrap, booleans become 0 or 1. A vector keeps its length."""
        return self.block.cast(self, dtype)

    def bitcast(self, dtype: DType) -> Value:
        """The same bits as another type of the same total size."""
        return self.block.bitcast(self, dtype)

    def __getitem__(self, component: int) -> Value:
        if isinstance(component, Value):
            fail("a component number must be a Python integer", "use v.extract(i) for a GPU value")
        count = self.dtype.count
        if count == 1 or not 0 <= component < count:
            fail(f"no component {component} in {self.dtype!r}")
        return self.block.emit(OpCode.EXTRACT, self.dtype.scalar, (self.op,), component)

    def extract(self, component: Index) -> Value:
        """The component whose number is a GPU value (out of range: undefined)."""
        if isinstance(component, int):
            return self[component]
        return self.block.emit(OpCode.EXTRACT_DYN, self.dtype.scalar, (self.op, component.op))

    @property
    def x(self) -> Value:
        return self[0]

    @property
    def y(self) -> Value:
        return self[1]

    @property
    def z(self) -> Value:
        return self[2]

    @property
    def w(self) -> Value:
        return self[3]


class Var:
    """A mutable variable of one invocation."""

    __slots__ = ("block", "dtype", "op")

    def __init__(self, block: Block, op: Op, dtype: DType | CoopType) -> None:
        self.block, self.op, self.dtype = block, op, dtype

    def get(self) -> Value:
        """The value at this point of the program."""
        return self.block.emit(OpCode.VAR_LOAD, self.dtype, (self.op,))

    def set(self, value: Operand) -> None:
        """Assign."""
        self.block.effect(OpCode.VAR_STORE, (self.op, self.block.operand(value, self.dtype)))

    def add(self, value: Operand) -> None:
        """Add to the variable."""
        self.set(self.get() + value)

    def __bool__(self) -> bool:
        fail("a GPU variable has no truth value in Python", "read it with .get() and use b.when or b.select")


class PrivateArray:
    """An array of one invocation; the index may be a GPU value."""

    __slots__ = ("block", "dtype", "length", "op")

    def __init__(self, block: Block, op: Op, dtype: DType, length: int) -> None:
        self.block, self.op, self.dtype, self.length = block, op, dtype, length

    def _index(self, index: Index) -> Op:
        if isinstance(index, int) and not 0 <= index < self.length:
            fail(f"index {index} is outside an array of {self.length}")
        return self.block.index_operand(index)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Index) -> Value:
        return self.block.emit(OpCode.ARRAY_LOAD, self.dtype, (self.op, self._index(index)))

    def __setitem__(self, index: Index, value: Operand) -> None:
        self.block.effect(OpCode.ARRAY_STORE, (self.op, self._index(index), self.block.operand(value, self.dtype)))


class Shared:
    """Memory of a workgroup, with one or more dimensions."""

    __slots__ = ("block", "dims", "dtype", "op")

    def __init__(self, block: Block, op: Op, dtype: DType, dims: tuple[Value, ...]) -> None:
        self.block, self.op, self.dtype, self.dims = block, op, dtype, dims

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Value:
        return self.block.emit(OpCode.SHARED_LOAD, self.dtype, (self.op, self.block.flat_index(index, self.dims)))

    def __setitem__(self, index: Index | tuple[Index, ...], value: Operand) -> None:
        stored = self.block.operand(value, self.dtype)
        self.block.effect(OpCode.SHARED_STORE, (self.op, self.block.flat_index(index, self.dims), stored))


class Buffer:
    """A bound buffer: `x[i]`, `x[row, column]` with declared dimensions, `x[i] = v`."""

    __slots__ = ("binding", "block", "dims", "number")

    def __init__(self, block: Block, binding: Binding, number: int, dims: Sequence[Value]) -> None:
        self.block, self.binding, self.number, self.dims = block, binding, number, tuple(dims)

    @property
    def dtype(self) -> DType:
        return self.binding.dtype

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Value:
        flat = self.block.flat_index(index, self.dims)
        if self.binding.kind != "storage":
            dtype = TEXEL_RESULT.get(repr(self.dtype), self.dtype)
            return self.block.emit(OpCode.TEXEL_LOAD, dtype, (flat,), self.number)
        if self.binding.access == "write":
            fail(f"buffer {self.binding.name} is declared write(...) but is read here", "declare it readwrite(...)")
        return self.block.emit(OpCode.BUF_LOAD, self.dtype, (flat,), self.number)

    def __setitem__(self, index: Index | tuple[Index, ...], value: Operand) -> None:
        if self.binding.access == "read":
            fail(f"buffer {self.binding.name} is read-only but is written here", "declare it write(...) or readwrite(...)")
        flat = self.block.flat_index(index, self.dims)
        self.block.effect(OpCode.BUF_STORE, (flat, self.block.operand(value, self.dtype)), self.number)
