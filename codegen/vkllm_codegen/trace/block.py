"""`Block`: the object that a kernel's Python body receives. Its methods record operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..ir import Op, OpCode, Program, Region, leaf
from ..types import CoopType, DType, Number, boolean, convert_exactly, f32, i32, u32
from .value import Buffer, PrivateArray, Shared, Value, Var, fail
from .where import caller

Operand = Value | Number
Index = Value | int


class Block:
    """Records the operations of one kernel while its Python body runs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._ops: list[Op] = []  # the region being filled
        self._shared: list[Op] = []  # shared memory is declared before everything else
        self._depth_of_loops = 0
        self._reduce_scratch: dict[DType, Shared] = {}

    # recording

    def emit(self, code: OpCode, dtype: DType | CoopType | None, src: tuple[Op, ...], arg: Any = None) -> Value:
        """Record an operation with a result."""
        op = Op(code, dtype, src, arg, (), caller())
        self._ops.append(op)
        return Value(self, op)

    def effect(self, code: OpCode, src: tuple[Op, ...], arg: Any = None) -> None:
        """Record an operation without a result."""
        self._ops.append(Op(code, None, src, arg, (), caller()))

    def splice(self, region: Region) -> None:
        """Record another region's operations here, as they are."""
        self._ops += region.ops

    def finish(self) -> Region:
        """The body recorded so far."""
        return Region((*self._shared, *self._ops))

    # operands

    def operand(self, value: Operand, dtype: DType | CoopType) -> Op:
        """`value` as an operand of exactly `dtype`; numbers are converted, a scalar is spread over a vector."""
        if isinstance(value, Value) and value.op.dtype is dtype:
            return value.op
        if isinstance(dtype, CoopType):
            fail(f"expected {dtype!r}, found {value!r}", "make one with b.coop_fill or b.coop_load")
        if not isinstance(value, Value):
            return self._constant(dtype, value)
        if dtype.count > 1 and value.dtype is dtype.scalar:
            return self.emit(OpCode.VEC, dtype, (value.op,) * dtype.count).op
        fail(f"expected {dtype!r}, found {value.op.dtype!r}", "conversions are written: v.to(dtype) or v.bitcast(dtype)")

    def _constant(self, dtype: DType, value: Any) -> Op:
        if hasattr(value, "op") or isinstance(value, (str, Var, Buffer)):
            fail(f"{type(value).__name__} is no value", "read a variable with .get(), a buffer with x[i]")
        try:
            if dtype.count == 1:
                return leaf(OpCode.CONST, dtype, convert_exactly(dtype, value))
            parts = value if isinstance(value, (tuple, list)) else (value,) * dtype.count
            if len(parts) != dtype.count:
                raise ValueError(f"{len(parts)} components for {dtype!r}")
            return leaf(OpCode.CONST, dtype, tuple(convert_exactly(dtype.scalar, p) for p in parts))
        except (ValueError, TypeError, OverflowError) as error:
            fail(str(error), "use a number that the type holds, or convert the other operand with .to(dtype)")

    def _pair(self, a: Operand, b: Operand) -> tuple[Op, Op, DType]:
        """Two operands of one type. A scalar meets a vector of its type by spreading."""
        if isinstance(a, Value) and isinstance(b, Value):
            dtype = a.dtype if a.dtype.count >= b.dtype.count else b.dtype
        else:
            dtype = a.dtype if isinstance(a, Value) else b.dtype  # type: ignore[union-attr]
        return self.operand(a, dtype), self.operand(b, dtype), dtype

    def index_operand(self, index: Index) -> Op:
        """An index: u32 or i32, or a Python integer (u32)."""
        if isinstance(index, Value):
            if index.op.dtype is not u32 and index.op.dtype is not i32:
                fail(f"an index is u32 or i32, found {index.op.dtype!r}")
            return index.op
        return self._constant(u32, index)

    def flat_index(self, index: Index | tuple[Index, ...], dims: tuple[Value, ...]) -> Op:
        """Row-major position of a multi-dimensional index; a single index is already flat."""
        if not isinstance(index, tuple):
            return self.index_operand(index)
        if len(index) != len(dims):
            fail(f"{len(index)} indices for {len(dims)} declared dimensions")
        flat = index[0]
        for position, size in zip(index[1:], dims[1:], strict=True):
            flat = (flat if isinstance(flat, Value) else self.const(u32, flat)) * size + position
        return self.index_operand(flat)

    # arithmetic behind Value's operators

    def binary(self, code: OpCode, a: Operand, b: Operand) -> Value:
        x, y, dtype = self._pair(a, b)
        if dtype.is_bool:
            fail(f"no {code} for booleans", "use & | ^ ~, or .to(u32) first")
        return self.emit(code, dtype, (x, y))

    def integer_binary(self, code: OpCode, a: Operand, b: Operand) -> Value:
        x, y, dtype = self._pair(a, b)
        logical = code in (OpCode.AND, OpCode.OR, OpCode.XOR)
        if not (dtype.is_integer or (dtype.is_bool and logical)):
            fail(f"{code} needs integers, found {dtype!r}", "use .to(u32) or .bitcast(u32) first")
        return self.emit(code, dtype, (x, y))

    def divide(self, a: Operand, b: Operand) -> Value:
        x, y, dtype = self._pair(a, b)
        if not dtype.is_float:
            fail(f"/ divides floats, found {dtype!r}", "use // for integers (it truncates toward zero), or convert with .to(f32)")
        return self.emit(OpCode.DIV, dtype, (x, y))

    def compare(self, code: OpCode, a: Operand, b: Operand) -> Value:
        x, y, dtype = self._pair(a, b)
        return self.emit(code, boolean.with_count(dtype.count), (x, y))

    def unary(self, code: OpCode, a: Value) -> Value:
        if a.dtype.is_bool if code is OpCode.NEG else a.dtype.is_float:
            fail(f"no {code} for {a.dtype!r}")
        return self.emit(code, a.dtype, (a.op,))

    def cast(self, a: Value, dtype: DType) -> Value:
        target = dtype.with_count(a.dtype.count) if dtype.count == 1 else dtype
        if target.count != a.dtype.count:
            fail(f"cannot convert {a.dtype!r} to {dtype!r}", "a conversion keeps the number of components")
        return a if target is a.dtype else self.emit(OpCode.CAST, target, (a.op,))

    def bitcast(self, a: Value, dtype: DType) -> Value:
        if a.dtype.is_bool or dtype.is_bool or a.dtype.itemsize != dtype.itemsize:
            fail(f"cannot bitcast {a.dtype!r} to {dtype!r}", "both must have the same number of bits")
        return a if dtype is a.dtype else self.emit(OpCode.BITCAST, dtype, (a.op,))

    # leaves

    def const(self, dtype: DType, value: Any) -> Value:
        """A constant; for a vector a tuple of components or one number for all."""
        return Value(self, self._constant(dtype, value))

    def _builtin(self, name: str, dimension: int = 0) -> Value:
        if not 0 <= dimension < 3:
            fail(f"no dimension {dimension}; expected 0, 1 or 2")
        return Value(self, leaf(OpCode.BUILTIN, u32, (name, dimension)))

    def workgroup_id(self, dimension: int = 0) -> Value:
        """Which workgroup of the dispatch, u32."""
        return self._builtin("workgroup_id", dimension)

    def local_id(self, dimension: int = 0) -> Value:
        """Which invocation of the workgroup, u32."""
        return self._builtin("local_id", dimension)

    def global_id(self, dimension: int = 0) -> Value:
        """workgroup_id * local size + local_id, u32."""
        return self._builtin("global_id", dimension)

    def num_workgroups(self, dimension: int = 0) -> Value:
        """Size of the dispatch in workgroups, u32."""
        return self._builtin("num_workgroups", dimension)

    def local_index(self) -> Value:
        """local_id flattened over the three dimensions, u32."""
        return self._builtin("local_index")

    def subgroup_lane(self) -> Value:
        """Which invocation of the subgroup, u32."""
        return self._builtin("subgroup_lane")

    def subgroup_id(self) -> Value:
        """Which subgroup of the workgroup, u32."""
        return self._builtin("subgroup_id")

    def subgroup_size(self) -> Value:
        """Invocations in a subgroup, u32."""
        return self._builtin("subgroup_size")

    def num_subgroups(self) -> Value:
        """Subgroups in a workgroup, u32."""
        return self._builtin("num_subgroups")

    # state

    def var(self, dtype: DType | CoopType, init: Operand, name: str = "") -> Var:
        """A mutable variable of this invocation, set to `init` here."""
        op = Op(OpCode.VAR, dtype, (self.operand(init, dtype),), None, (), caller(), name)
        self._ops.append(op)
        return Var(self, op, dtype)

    def array(self, dtype: DType, length: int, name: str = "") -> PrivateArray:
        """An uninitialized array of this invocation."""
        op = Op(OpCode.ARRAY, dtype, (), length, (), caller(), name)
        self._ops.append(op)
        return PrivateArray(self, op, dtype, length)

    def shared(self, dtype: DType, *dims: Index, name: str = "") -> Shared:
        """Memory of the workgroup, uninitialized. Dimensions are ints or specialization constants."""
        sizes = tuple(self.const(u32, d) if isinstance(d, int) else d for d in dims)
        if not sizes or any(s.op.code not in (OpCode.CONST, OpCode.SPEC) for s in sizes):
            fail("a dimension of shared memory must be an int or a specialization constant")
        op = Op(OpCode.SHARED, dtype, tuple(s.op for s in sizes), None, (), caller(), name)
        self._shared.append(op)
        return Shared(self, op, dtype, sizes)

    def vec(self, *parts: Operand) -> Value:
        """A vector of 2 to 4 scalars of one type; at least one part is a GPU value."""
        first = next((p for p in parts if isinstance(p, Value)), None)
        if first is None or not 2 <= len(parts) <= 4:
            fail(f"b.vec of {len(parts)} parts", "give 2 to 4 scalars, one of them a GPU value; else b.const(vec(f32, 4), (…))")
        src = tuple(self.operand(p, first.dtype) for p in parts)
        return self.emit(OpCode.VEC, first.dtype.with_count(len(parts)), src)

    # control

    @contextmanager
    def _region(self) -> Iterator[list[Op]]:
        outer, inner = self._ops, list[Op]()
        self._ops = inner
        try:
            yield inner
        finally:
            self._ops = outer

    @contextmanager
    def range(self, start: Index, stop: Index, step: Index = 1, unroll: int = 1) -> Iterator[Value]:
        """A loop over start, start + step, … below stop. u32, unless start, stop or step is an i32 Value.

        unroll: copies of the body a turn (a constant number of turns up to `unroll` needs no loop at all).
        """
        given = [v for v in (start, stop, step) if isinstance(v, Value)]
        dtype = i32 if any(v.dtype is i32 for v in given) else u32
        bounds = tuple(self.operand(v, dtype) for v in (start, stop, step))
        where = caller()
        index = Op(OpCode.INDEX, dtype, (), None, (), where)
        self._depth_of_loops += 1
        with self._region() as inner:
            yield Value(self, index)
        self._depth_of_loops -= 1
        self._ops.append(Op(OpCode.RANGE, None, bounds, unroll, (Region(tuple(inner), index),), where))

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Run the body where `condition` (boolean) holds."""
        where = caller()
        with self._region() as inner:
            yield
        self._ops.append(Op(OpCode.IF, None, (self.operand(condition, boolean),), None, (Region(tuple(inner)),), where))

    @contextmanager
    def otherwise(self) -> Iterator[None]:
        """The other side of the b.when directly before."""
        last = self._ops[-1] if self._ops else None
        if last is None or last.code is not OpCode.IF or len(last.regions) != 1:
            fail("b.otherwise() without a b.when(...) directly before it")
        with self._region() as inner:
            yield
        self._ops[-1] = Op(OpCode.IF, None, last.src, None, (*last.regions, Region(tuple(inner))), last.where)

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Repeat the body until b.break_if."""
        where = caller()
        self._depth_of_loops += 1
        with self._region() as inner:
            yield
        self._depth_of_loops -= 1
        self._ops.append(Op(OpCode.LOOP, None, (), None, (Region(tuple(inner)),), where))

    def break_if(self, condition: Value) -> None:
        """Leave the innermost loop where `condition` holds."""
        if not self._depth_of_loops:
            fail("b.break_if outside a loop")
        self.effect(OpCode.BREAK_IF, (self.operand(condition, boolean),))

    # mathematics

    def _float_math(self, code: OpCode, *args: Operand) -> Value:
        dtype = self._common(args)
        if not dtype.is_float:
            fail(f"{code} needs floats, found {dtype!r}", "convert with .to(f32)")
        return self.emit(code, dtype, tuple(self.operand(a, dtype) for a in args))

    def _any_math(self, code: OpCode, *args: Operand) -> Value:
        dtype = self._common(args)
        if dtype.is_bool:
            fail(f"{code} needs numbers, found {dtype!r}")
        return self.emit(code, dtype, tuple(self.operand(a, dtype) for a in args))

    def _common(self, args: tuple[Operand, ...]) -> DType:
        """The widest type among the GPU values."""
        types = [a.dtype for a in args if isinstance(a, Value)]
        if not types:
            return f32
        return max(types, key=lambda t: t.count)

    def fma(self, a: Operand, b: Operand, c: Operand) -> Value:
        """a * b + c, in one rounding where the device has it."""
        return self._float_math(OpCode.FMA, a, b, c)

    def sqrt(self, a: Operand) -> Value:
        return self._float_math(OpCode.SQRT, a)

    def rsqrt(self, a: Operand) -> Value:
        return self._float_math(OpCode.RSQRT, a)

    def exp(self, a: Operand) -> Value:
        return self._float_math(OpCode.EXP, a)

    def exp2(self, a: Operand) -> Value:
        return self._float_math(OpCode.EXP2, a)

    def log(self, a: Operand) -> Value:
        return self._float_math(OpCode.LOG, a)

    def log2(self, a: Operand) -> Value:
        return self._float_math(OpCode.LOG2, a)

    def sin(self, a: Operand) -> Value:
        return self._float_math(OpCode.SIN, a)

    def cos(self, a: Operand) -> Value:
        return self._float_math(OpCode.COS, a)

    def tanh(self, a: Operand) -> Value:
        return self._float_math(OpCode.TANH, a)

    def floor(self, a: Operand) -> Value:
        return self._float_math(OpCode.FLOOR, a)

    def round(self, a: Operand) -> Value:
        """To the nearest integer, halves to even."""
        return self._float_math(OpCode.ROUND, a)

    def abs(self, a: Operand) -> Value:
        return self._any_math(OpCode.ABS, a)

    def min(self, a: Operand, b: Operand) -> Value:
        return self._any_math(OpCode.MIN, a, b)

    def max(self, a: Operand, b: Operand) -> Value:
        return self._any_math(OpCode.MAX, a, b)

    def clamp(self, a: Operand, low: Operand, high: Operand) -> Value:
        return self._any_math(OpCode.CLAMP, a, low, high)

    def isnan(self, a: Value) -> Value:
        return self._float_test(OpCode.ISNAN, a)

    def isinf(self, a: Value) -> Value:
        return self._float_test(OpCode.ISINF, a)

    def _float_test(self, code: OpCode, a: Value) -> Value:
        if not a.dtype.is_float:
            fail(f"{code} needs floats, found {a.dtype!r}")
        return self.emit(code, boolean.with_count(a.dtype.count), (a.op,))

    def select(self, condition: Value, x: Operand, y: Operand) -> Value:
        """x where `condition` holds, else y; both are computed."""
        dtype = self._common((x, y)) if isinstance(x, Value) or isinstance(y, Value) else None
        if dtype is None:
            fail("b.select needs a GPU value among x and y", "make one with b.const(dtype, value)")
        test = self.operand(condition, boolean.with_count(dtype.count))
        return self.emit(OpCode.SELECT, dtype, (test, self.operand(x, dtype), self.operand(y, dtype)))

    # bits

    def unpack_half2x16(self, bits: Value) -> Value:
        """The two f16 of a u32 as f32x2, low half first."""
        return self.emit(OpCode.UNPACK_HALF, f32.with_count(2), (self.operand(bits, u32),))

    def pack_half2x16(self, pair: Value) -> Value:
        """f32x2 rounded to two f16 in a u32, low half first."""
        return self.emit(OpCode.PACK_HALF, u32, (self.operand(pair, f32.with_count(2)),))

    def bit_extract(self, value: Value, offset: Operand, count: Operand) -> Value:
        """`count` bits from `offset` of a 32-bit integer, sign-extended when it is signed."""
        if value.dtype.scalar not in (u32, i32):
            fail(f"bit_extract needs u32 or i32, found {value.dtype!r}")
        return self.emit(OpCode.BIT_EXTRACT, value.dtype, (value.op, self.operand(offset, u32), self.operand(count, u32)))

    def dot_i8(self, a: Value, b: Value) -> Value:
        """Sum of the products of four signed bytes of a and b (u32 each), i32."""
        return self.emit(OpCode.DOT_I8, i32, (self.operand(a, u32), self.operand(b, u32)))

    def dot_u8i8(self, a: Value, b: Value) -> Value:
        """Sum of the products of four unsigned bytes of a and signed bytes of b (u32 each), i32."""
        return self.emit(OpCode.DOT_U8I8, i32, (self.operand(a, u32), self.operand(b, u32)))

    # subgroup

    def _subgroup(self, code: OpCode, value: Value, extra: tuple[Op, ...] = (), arg: Any = None) -> Value:
        if value.dtype.is_bool:
            fail(f"{code} needs numbers, found {value.dtype!r}")
        return self.emit(code, value.dtype, (value.op, *extra), arg)

    def subgroup_add(self, value: Value) -> Value:
        """Sum over the subgroup's active invocations."""
        return self._subgroup(OpCode.SG_ADD, value)

    def subgroup_max(self, value: Value) -> Value:
        return self._subgroup(OpCode.SG_MAX, value)

    def subgroup_min(self, value: Value) -> Value:
        return self._subgroup(OpCode.SG_MIN, value)

    def subgroup_shuffle(self, value: Value, lane: Index) -> Value:
        """The value of another lane; it must be active. A constant lane is the quick case on lavapipe."""
        return self._subgroup(OpCode.SHUFFLE, value, (self.operand(lane, u32),))

    def subgroup_shuffle_xor(self, value: Value, mask: int) -> Value:
        """The value of lane ^ mask."""
        return self._subgroup(OpCode.SHUFFLE_XOR, value, (self.operand(mask, u32),))

    def subgroup_broadcast(self, value: Value, lane: int) -> Value:
        """The value of a constant lane, in every invocation."""
        return self._subgroup(OpCode.BROADCAST, value, (self.operand(lane, u32),))

    def subgroup_any(self, condition: Value) -> Value:
        return self.emit(OpCode.SG_ANY, boolean, (self.operand(condition, boolean),))

    def subgroup_all(self, condition: Value) -> Value:
        return self.emit(OpCode.SG_ALL, boolean, (self.operand(condition, boolean),))

    def subgroup_elect(self) -> Value:
        """True in the first active invocation of the subgroup."""
        return self.emit(OpCode.SG_ELECT, boolean, ())

    # workgroup

    def barrier(self, why: str = "") -> None:
        """All invocations of the workgroup arrive, and see each other's writes to shared memory and buffers."""
        self.effect(OpCode.BARRIER, (), why)

    def fence(self, why: str = "") -> None:
        """Buffers before and after: who sees what this invocation writes after it sees what it wrote before, and the other way
        round."""
        self.effect(OpCode.FENCE, (), why)

    def assume_uniform(self, value: Value) -> Value:
        """The same value, promised to be equal in all invocations of the workgroup (the verifier then trusts it)."""
        return self.emit(OpCode.UNIFORM, value.dtype, (value.op,))

    def workgroup_reduce_add(self, value: Value) -> Value:
        """Sum over the workgroup, in every invocation. Must be reached by all of them."""
        return self._workgroup_reduce(OpCode.SG_ADD, OpCode.ADD, value, 0)

    def workgroup_reduce_max(self, value: Value) -> Value:
        """Maximum over the workgroup, in every invocation. Must be reached by all of them."""
        return self._workgroup_reduce(OpCode.SG_MAX, OpCode.MAX, value, _lowest(value.dtype))

    def _workgroup_reduce(self, across: OpCode, pairwise: OpCode, value: Value, identity: Number) -> Value:
        """Reduce each subgroup; then every invocation combines the partial results, in the same order, from shared memory."""
        scratch = self._scratch(value.dtype)
        partial = self._subgroup(across, value)
        with self.when(self.subgroup_elect()):
            scratch[self.subgroup_id()] = partial
        self.barrier("each subgroup's partial result is in shared memory")
        total = self.var(value.dtype, identity)
        with self.range(0, self.num_subgroups()) as i:
            total.set(self.emit(pairwise, value.dtype, (total.get().op, scratch[i].op)))
        self.barrier("the scratch may be written again")
        return self.assume_uniform(total.get())

    def _scratch(self, dtype: DType) -> Shared:
        """Shared memory with one slot a subgroup (as many as invocations: a subgroup may have one lane)."""
        known = self._reduce_scratch.get(dtype)
        if known is None:
            first, y, z = self.program.local_size
            size = self.spec_value(first) if isinstance(first, str) else self.const(u32, first * y * z)
            known = self._reduce_scratch[dtype] = self.shared(dtype, size, name=f"reduce_{dtype!r}")
        return known

    def spec_value(self, name: str) -> Value:
        """The specialization constant of this name."""
        return Value(self, leaf(OpCode.SPEC, self.program.spec[name][1], name))

    # cooperative matrices

    def coop_fill(self, matrix: CoopType, value: Operand) -> Value:
        """A matrix with `value` in every element."""
        return self.emit(OpCode.COOP_FILL, matrix, (self.operand(value, matrix.element),))

    def coop_load(self, memory: Buffer | Shared, offset: Index, stride: Index, matrix: CoopType, row_major: bool = True) -> Value:
        """The matrix at element `offset`; rows (columns, if not row_major) start `stride` elements apart.

        All invocations of the subgroup must arrive with the same operands.
        """
        return self.emit(OpCode.COOP_LOAD, matrix, *self._coop_place(memory, offset, stride, matrix, row_major))

    def coop_store(self, memory: Buffer | Shared, offset: Index, stride: Index, matrix: Value, row_major: bool = True) -> None:
        """Write a matrix to memory, laid out as in coop_load."""
        if not isinstance(matrix.op.dtype, CoopType):
            fail(f"coop_store of {matrix.op.dtype!r}; expected a cooperative matrix")
        src, arg = self._coop_place(memory, offset, stride, matrix.op.dtype, row_major)
        self.effect(OpCode.COOP_STORE, (matrix.op, *src), arg)

    def _coop_place(
        self, memory: Buffer | Shared, offset: Index, stride: Index, matrix: CoopType, row_major: bool
    ) -> tuple[tuple[Op, ...], tuple[int | None, bool]]:
        """Operands ([shared memory], offset, stride) and the immediate (binding, row_major)."""
        if memory.dtype is not matrix.element or (isinstance(memory, Buffer) and memory.binding.kind != "storage"):
            fail(f"a matrix of {matrix.element!r} needs a storage buffer or shared memory of that type, found {memory.dtype!r}")
        place = (self.index_operand(offset), self.index_operand(stride))
        if isinstance(memory, Buffer):
            return place, (memory.number, row_major)
        return (memory.op, *place), (None, row_major)

    def coop_mul_add(self, a: Value, b: Value, c: Value) -> Value:
        """a @ b + c for matrices of use "a" [M, K], "b" [K, N] and "acc" [M, N]."""
        return self.emit(OpCode.COOP_MULADD, c.op.dtype, (a.op, b.op, c.op))

    # atomics

    def _atomic(self, code: OpCode, buffer: Buffer, index: Index, value: Operand) -> Value:
        if buffer.dtype not in (u32, i32) or buffer.binding.access != "readwrite" or buffer.binding.kind != "storage":
            fail(f"atomics need a readwrite(u32) or readwrite(i32) buffer; {buffer.binding.name} is {buffer.binding.access}"
                 f"({buffer.dtype!r})")  # fmt: skip
        src = (self.index_operand(index), self.operand(value, buffer.dtype))
        return self.emit(code, buffer.dtype, src, buffer.number)

    def atomic_add(self, buffer: Buffer, index: Index, value: Operand) -> Value:
        """buffer[index] += value; returns the old value."""
        return self._atomic(OpCode.ATOMIC_ADD, buffer, index, value)

    def atomic_max(self, buffer: Buffer, index: Index, value: Operand) -> Value:
        return self._atomic(OpCode.ATOMIC_MAX, buffer, index, value)

    def atomic_min(self, buffer: Buffer, index: Index, value: Operand) -> Value:
        return self._atomic(OpCode.ATOMIC_MIN, buffer, index, value)


def _lowest(dtype: DType) -> Number:
    """The identity of max."""
    if dtype.is_float:
        return float("-inf")
    return -(1 << (dtype.bits - 1)) if dtype.is_signed else 0


__all__ = ["Block"]
