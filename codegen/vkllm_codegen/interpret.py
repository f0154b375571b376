"""The meaning of a program, executed in numpy: slow, exact about types, and strict about bounds.

Lanes run in lock step: every value is an array over the lanes of a batch of workgroups, and control flow is a mask. What Vulkan
leaves undefined is an error here (an index out of range, a shuffle from a lane that does not take part, a barrier that part of a
workgroup skips); fresh shared memory and arrays hold NaN or all-ones. Missing barriers cannot be found: lock step hides them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from .errors import KernelError
from .ir import Binding, Op, OpCode, Program, Region, walk
from .trace.kernel import Kernel
from .trace.where import at
from .types import CoopType, DType

Array = np.ndarray[Any, np.dtype[Any]]
BATCH_LANES = 1 << 15  # workgroups are run together up to this many lanes …
BATCH_VALUES = 1 << 25  # … and this many values of operations


class InterpretError(KernelError):
    """The program did something that no device defines."""


def interpret(
    kernel: Kernel | Program,
    buffers: Mapping[str, Array],
    push: Mapping[str, int | float] | None = None,
    spec: Mapping[str, int | float | bool] | None = None,
    groups: tuple[int, ...] = (1, 1, 1),
    subgroup_size: int = 8,
) -> None:
    """Run a kernel over `groups` workgroups; writable buffers are changed in place.

    buffers: one C-contiguous array per binding, of the binding's component type, any shape with the right number of elements
    (vectors and texels: a multiple of their component count).
    Raises: InterpretError: wrong buffers or parameters, or undefined behaviour, with the Python line that traced it.
    """
    program = kernel.program if isinstance(kernel, Kernel) else kernel
    x, y, z = (*groups, 1, 1)[:3]
    machine = _Setup(program, buffers, push or {}, spec or {}, subgroup_size)
    total, lanes = x * y * z, int(np.prod(machine.local_size))
    batch = max(1, min(BATCH_LANES, BATCH_VALUES // (1 + sum(1 for _ in walk(program.body)))) // lanes)
    with np.errstate(all="ignore"):
        for first in range(0, total, batch):
            numbers = np.arange(first, min(first + batch, total))
            _Run(machine, numbers, (x, y, z)).region(program.body)


class _Setup:
    """What all workgroups share: checked buffers and parameters."""

    def __init__(
        self, program: Program, buffers: Mapping[str, Array], push: Mapping[str, Any], spec: Mapping[str, Any], size: int
    ) -> None:
        self.program = program
        self.subgroup_size = size
        self._check_names("buffer", buffers, {b.name for b in program.bindings})
        self._check_names("push constant", push, {n for n, _, _ in program.push})
        if unknown := set(spec) - set(program.spec):
            raise InterpretError(f"{program.name} has no specialization constants {sorted(unknown)}")
        self.buffers = [_elements(b, buffers[b.name]) for b in program.bindings]
        self.push = {n: np.asarray(push[n], t.numpy) for n, t, _ in program.push}
        self.spec = {n: np.asarray(spec.get(n, default), t.numpy) for n, (_, t, default) in program.spec.items()}
        first, second, third = program.local_size
        self.local_size = (int(self.spec[first]) if isinstance(first, str) else first, second, third)

    def _check_names(self, what: str, given: Mapping[str, Any], wanted: set[str]) -> None:
        if set(given) != wanted:
            raise InterpretError(f"{what}s of {self.program.name} are {sorted(wanted)}, found {sorted(given)}")


def _elements(binding: Binding, array: Array) -> Array:
    """A view of a buffer with one row an element."""
    wanted = binding.dtype.numpy
    if array.dtype != wanted or not array.flags.c_contiguous:
        raise InterpretError(f"buffer {binding.name} is {array.dtype}, expected C-contiguous {wanted}")
    count = binding.dtype.count
    if array.size % count:
        raise InterpretError(f"buffer {binding.name} has {array.size} numbers, no multiple of {count}")
    return array.reshape(-1) if count == 1 else array.reshape(-1, count)


class _Run:
    """A batch of workgroups in lock step."""

    def __init__(self, setup: _Setup, numbers: Array, groups: tuple[int, int, int]) -> None:
        self.setup = setup
        self.program = setup.program
        self.n_group = len(numbers)
        self.group_lanes = int(np.prod(setup.local_size))
        self.n = self.n_group * self.group_lanes
        self.lane = np.arange(self.n)
        self.group = self.lane // self.group_lanes
        self.mask = np.ones(self.n, bool)
        self.alive: Array | None = None  # lanes that have not left the innermost loop
        self.values: dict[Op, Array] = {}
        self.builtins = self._builtins(numbers, groups)
        self.members = self._members()

    def _builtins(self, numbers: Array, groups: tuple[int, int, int]) -> dict[tuple[str, int], Array]:
        local_index = self.lane % self.group_lanes
        size, sub = self.setup.local_size, self.setup.subgroup_size
        number = numbers[self.group]
        found: dict[tuple[str, int], Any] = {
            ("local_index", 0): local_index,
            ("subgroup_lane", 0): local_index % sub,
            ("subgroup_id", 0): local_index // sub,
            ("subgroup_size", 0): sub,
            ("num_subgroups", 0): -(-self.group_lanes // sub),
        }
        below_local = below_group = 1
        for d in range(3):
            local, group = local_index // below_local % size[d], number // below_group % groups[d]
            found |= {("local_id", d): local, ("workgroup_id", d): group, ("global_id", d): group * size[d] + local,
                      ("num_workgroups", d): groups[d]}  # fmt: skip
            below_local, below_group = below_local * size[d], below_group * groups[d]
        return {key: np.asarray(value, np.uint32) for key, value in found.items()}

    def _members(self) -> Array:
        """Lanes of each subgroup [n_subgroup, subgroup_size]; -1 where a subgroup is short."""
        sub = self.setup.subgroup_size
        per_group = -(-self.group_lanes // sub)
        local = np.arange(per_group * sub)
        lanes = np.where(local < self.group_lanes, local, -1)
        table = lanes[None, :] + np.where(lanes >= 0, np.arange(self.n_group)[:, None] * self.group_lanes, 0)
        return table.reshape(-1, sub)

    def fail(self, op: Op, message: str, hint: str = "") -> NoReturn:
        raise InterpretError(f"{at(op.where)}kernel {self.program.name}: {message}", hint)

    # values

    def get(self, op: Op) -> Array:
        """The value of an operand: an array over lanes, or one value for all (no lane axis)."""
        if op.code is OpCode.CONST:
            assert isinstance(op.dtype, DType)
            return np.asarray(op.arg, op.dtype.numpy)
        if op.code is OpCode.PUSH:
            return self.setup.push[op.arg]
        if op.code is OpCode.SPEC:
            return self.setup.spec[op.arg]
        if op.code is OpCode.BUILTIN:
            return self.builtins[op.arg]
        return self.values[op]

    def full(self, op: Op) -> Array:
        """The value of an operand in every lane: [n] or [n, count]."""
        value = self.get(op)
        count = op.dtype.count if isinstance(op.dtype, DType) else 1
        return np.broadcast_to(value, (self.n,) if count == 1 else (self.n, count))

    def fresh(self, dtype: DType, length: int) -> Array:
        """Uninitialized memory."""
        shape = (length,) if dtype.count == 1 else (length, dtype.count)
        return np.frombuffer(b"\xff" * (int(np.prod(shape)) * dtype.numpy.itemsize), dtype.numpy).reshape(shape).copy()

    # control

    def region(self, region: Region) -> None:
        for op in region.ops:
            result = EXECUTE[op.code](self, op)
            if result is not None:
                self.values[op] = result

    def under(self, mask: Array, region: Region) -> None:
        """Run a region for some of the active lanes."""
        outer = self.mask
        self.mask = outer & mask
        if self.mask.any():
            self.region(region)
        self.mask = outer if self.alive is None else outer & self.alive

    def branch(self, op: Op) -> None:
        condition = self.full(op.src[0])
        self.under(condition, op.regions[0])
        if len(op.regions) > 1:
            self.under(~condition, op.regions[1])

    def range(self, op: Op) -> None:
        start, stop, step = (self.full(s) for s in op.src)
        index = op.regions[0].index
        assert index is not None
        number = start.copy()

        def begin() -> None:
            self.values[index] = number.copy()

        self.repeat(op, lambda: number < stop, begin, lambda: _advance(number, step))

    def loop(self, op: Op) -> None:
        self.repeat(op, lambda: np.True_, lambda: None, lambda: None)

    def repeat(self, op: Op, inside: Callable[[], Any], begin: Callable[[], None], advance: Callable[[], None]) -> None:
        """Turns of a loop while any lane is inside."""
        outer_mask, outer_alive = self.mask, self.alive
        self.alive = outer_mask.copy()
        while True:
            self.alive &= inside()
            self.mask = self.alive.copy()
            if not self.mask.any():
                break
            begin()
            self.region(op.regions[0])
            advance()
        self.mask, self.alive = outer_mask, outer_alive

    def break_if(self, op: Op) -> None:
        leaving = self.mask & self.full(op.src[0])
        assert self.alive is not None
        self.alive = self.alive & ~leaving
        self.mask = self.mask & ~leaving

    def barrier(self, op: Op) -> None:
        arrived = self.mask.reshape(self.n_group, self.group_lanes)
        if (arrived.any(1) != arrived.all(1)).any():
            self.fail(op, "a barrier that only part of a workgroup reaches", "move it out of divergent control flow")

    def fence(self, op: Op) -> None:
        """Invocations run in lock step, and all see one memory."""

    # memory

    def positions(self, op: Op, index: Op, length: int, what: str) -> Array:
        """Element numbers; those of inactive lanes become 0."""
        at_lane = self.full(index).astype(np.int64)
        bad = self.mask & ((at_lane < 0) | (at_lane >= length))
        if bad.any():
            lane = int(np.argmax(bad))
            where = f"workgroup lane {lane % self.group_lanes} of workgroup {self._group_of(lane)}"
            self.fail(op, f"index {at_lane[lane]} of {what} with {length} elements ({where})", "guard ragged edges with b.when")
        return np.where(self.mask, at_lane, 0)

    def _group_of(self, lane: int) -> tuple[int, ...]:
        return tuple(int(np.broadcast_to(self.builtins["workgroup_id", d], self.n)[lane]) for d in range(3))

    def _buffer(self, op: Op) -> tuple[Array, Array]:
        data, name = self.setup.buffers[op.arg], self.program.bindings[op.arg].name
        return data, self.positions(op, op.src[0], len(data), f"buffer {name}")

    def load(self, op: Op) -> Array:
        assert isinstance(op.dtype, DType)
        data, position = self._buffer(op)
        if not len(data):
            return self.fresh(op.dtype, self.n)
        loaded = data[position]
        return loaded if loaded.dtype == op.dtype.numpy else loaded.astype(op.dtype.numpy)

    def store(self, op: Op) -> None:
        data, position = self._buffer(op)
        data[position[self.mask]] = self.full(op.src[1])[self.mask]

    def atomic(self, op: Op) -> Array:
        """One lane after the other."""
        data, position = self._buffer(op)
        value = self.full(op.src[1])
        old = np.zeros(self.n, data.dtype)
        combine: Any = {OpCode.ATOMIC_ADD: np.add, OpCode.ATOMIC_MAX: np.maximum, OpCode.ATOMIC_MIN: np.minimum}[op.code]
        for lane in np.flatnonzero(self.mask):
            old[lane] = data[position[lane]]
            data[position[lane]] = combine(data[position[lane]], value[lane])
        return old

    def var(self, op: Op) -> Array:
        if isinstance(op.dtype, CoopType):
            return self.values[op.src[0]].copy()
        assert isinstance(op.dtype, DType)
        value = self.values.get(op)
        value = self.fresh(op.dtype, self.n) if value is None else value
        self.assign(value, op.src[0])
        return value

    def var_load(self, op: Op) -> Array:
        return self.values[op.src[0]].copy()

    def var_store(self, op: Op) -> None:
        self.assign(self.values[op.src[0]], op.src[1])

    def assign(self, variable: Array, op: Op) -> None:
        """Set a variable in the active lanes."""
        if isinstance(op.dtype, CoopType):
            np.copyto(variable, self.values[op], where=self.mask[self.members[:, 0]][:, None, None])
            return
        value = self.full(op)
        np.copyto(variable, value, where=self.mask if value.ndim == 1 else self.mask[:, None])

    def array(self, op: Op) -> Array:
        assert isinstance(op.dtype, DType)
        return self.fresh(op.dtype, self.n * op.arg).reshape(self.n, op.arg, *((op.dtype.count,) if op.dtype.count > 1 else ()))

    def shared(self, op: Op) -> Array:
        assert isinstance(op.dtype, DType)
        length = int(np.prod([int(self.get(s)) for s in op.src]))
        shape = (self.n_group, length, *((op.dtype.count,) if op.dtype.count > 1 else ()))
        return self.fresh(op.dtype, self.n_group * length).reshape(shape)

    def _slots(self, op: Op) -> tuple[Array, Array, Array]:
        """Memory of an ARRAY or SHARED, the row of each lane, the element of each lane."""
        memory = self.values[op.src[0]]
        row = self.lane if op.src[0].code is OpCode.ARRAY else self.group
        return memory, row, self.positions(op, op.src[1], memory.shape[1], op.src[0].name or op.src[0].code)

    def slot_load(self, op: Op) -> Array:
        memory, row, position = self._slots(op)
        loaded: Array = memory[row, position]
        return loaded

    def slot_store(self, op: Op) -> None:
        memory, row, position = self._slots(op)
        memory[row[self.mask], position[self.mask]] = self.full(op.src[2])[self.mask]

    # subgroup

    def spread(self, per_subgroup: Array) -> Array:
        """One value a subgroup → all its lanes."""
        lanes = self.members.ravel()
        result = np.empty((self.n, *per_subgroup.shape[1:]), per_subgroup.dtype)
        result[lanes[lanes >= 0]] = np.repeat(per_subgroup, self.members.shape[1], axis=0)[lanes >= 0]
        return result

    def gathered(self, op: Op, filler: Any) -> Array:
        """Operand 0 by subgroup [n_subgroup, size, …]; inactive lanes hold `filler`."""
        value = self.full(op.src[0])
        active = (self.members >= 0) & self.mask[self.members]
        return np.where(active.reshape(active.shape + (1,) * (value.ndim - 1)), value[self.members], value.dtype.type(filler))

    def subgroup_reduce(self, op: Op) -> Array:
        assert isinstance(op.dtype, DType)
        limits: Any = np.iinfo(op.dtype.numpy) if op.dtype.is_integer else None
        low, high = (limits.min, limits.max) if limits else (-np.inf, np.inf)
        if op.code is OpCode.SG_ADD:
            return self.spread(self.gathered(op, 0).sum(axis=1, dtype=op.dtype.numpy))
        if op.code is OpCode.SG_MAX:
            return self.spread(self.gathered(op, low).max(axis=1))
        return self.spread(self.gathered(op, high).min(axis=1))

    def vote(self, op: Op) -> Array:
        if op.code is OpCode.SG_ANY:
            return self.spread(np.asarray(self.gathered(op, False).any(axis=1)))
        return self.spread(np.asarray(self.gathered(op, True).all(axis=1)))

    def elect(self, op: Op) -> Array:
        active = (self.members >= 0) & self.mask[self.members]
        first = np.take_along_axis(self.members, active.argmax(axis=1)[:, None], 1)[:, 0]
        elected: Array = np.equal(self.lane, self.spread(first))
        return elected

    def shuffle(self, op: Op) -> Array:
        sub = self.setup.subgroup_size
        local = self.lane % self.group_lanes
        wanted = self.full(op.src[1]).astype(np.int64)
        if op.code is OpCode.SHUFFLE_XOR:
            wanted = wanted ^ (local % sub)
        subgroup = self.group * (len(self.members) // self.n_group) + local // sub
        source = self.members[subgroup, np.clip(wanted, 0, sub - 1)]
        bad = self.mask & ((wanted < 0) | (wanted >= sub) | (source < 0) | ~self.mask[source])
        if bad.any():
            lane = int(np.argmax(bad))
            self.fail(op, f"{op.code} from lane {wanted[lane]}, which does not take part (subgroup size {sub})",
                      "all lanes that are read must reach the same shuffle")  # fmt: skip
        moved: Array = self.full(op.src[0])[source]
        return moved

    # pure operations

    def pure(self, op: Op) -> Array:
        return PURE_FUNCTIONS[op.code](*(self.get(s) for s in op.src))

    def cast(self, op: Op) -> Array:
        assert isinstance(op.dtype, DType)
        value, target = self.get(op.src[0]), op.dtype.numpy
        if value.dtype.kind == "f" and op.dtype.is_integer:
            return np.trunc(value.astype(np.float64)).astype(np.int64).astype(target)
        return value.astype(target) if not op.dtype.is_bool else np.not_equal(value, 0)

    def bitcast(self, op: Op) -> Array:
        assert isinstance(op.dtype, DType) and isinstance(op.src[0].dtype, DType)
        value = np.ascontiguousarray(self.full(op.src[0])).reshape(self.n, -1).view(op.dtype.numpy)
        return value if op.dtype.count > 1 else value[:, 0]

    def vec(self, op: Op) -> Array:
        parts = [self.get(s) for s in op.src]
        return np.stack(np.broadcast_arrays(*parts), axis=-1)

    def extract(self, op: Op) -> Array:
        part: Array = self.get(op.src[0])[..., op.arg]
        return part

    def extract_dyn(self, op: Op) -> Array:
        value = self.full(op.src[0])
        return value[self.lane, self.positions(op, op.src[1], value.shape[1], "a vector")]

    def select(self, op: Op) -> Array:
        return np.where(*(self.get(s) for s in op.src))

    def bit_extract(self, op: Op) -> Array:
        value, offset, count = (self.get(s) for s in op.src)
        shifted = value.astype(np.int64) >> offset.astype(np.int64)
        size = count.astype(np.int64)
        field = shifted & ((np.int64(1) << size) - 1)
        if value.dtype.kind == "i":
            field = np.where((field >> np.maximum(size - 1, 0)) & (size > 0), field - (np.int64(1) << size), field)
        return field.astype(value.dtype)

    def uniform(self, op: Op) -> Array:
        """A promise: checked here."""
        value = self.full(op.src[0]).reshape(self.n_group, self.group_lanes, -1)
        active = self.mask.reshape(self.n_group, self.group_lanes)
        first = value[np.arange(self.n_group), active.argmax(axis=1)][:, None]
        same = (value == first) | ((value != value) & (first != first))
        if (active & ~same.all(axis=2)).any():
            self.fail(op, "b.assume_uniform of a value that differs within a workgroup")
        return self.get(op.src[0])

    # cooperative matrices: one matrix a subgroup, values are [n_subgroup, rows, cols]

    def coop_fill(self, op: Op) -> Array:
        assert isinstance(op.dtype, CoopType)
        value = self.full(op.src[0])[self.members[:, 0]]
        return np.broadcast_to(value[:, None, None], (len(value), op.dtype.rows, op.dtype.cols)).copy()

    def coop_positions(self, op: Op, matrix: CoopType, operands: tuple[Op, Op]) -> Array:
        """Element numbers [n_subgroup, rows, cols] of a matrix in memory."""
        offset, stride = (self.full(s).astype(np.int64)[self.members[:, 0]][:, None, None] for s in operands)
        row, col = np.arange(matrix.rows)[:, None], np.arange(matrix.cols)[None, :]
        slow, fast = (row, col) if op.arg[1] else (col, row)
        found: Array = offset + slow * stride + fast
        return found

    def coop_memory(self, op: Op, declaration: Op | None) -> tuple[Array, Array]:
        """Memory as [rows of memory, elements], and the row of each subgroup."""
        if declaration is None:
            return self.setup.buffers[op.arg[0]][None], np.zeros(len(self.members), int)
        return self.values[declaration], self.group[self.members[:, 0]]

    def coop_access(self, op: Op, matrix: CoopType, src: tuple[Op, ...]) -> tuple[Array, Array, Array]:
        declaration = src[0] if op.arg[0] is None else None
        memory, row = self.coop_memory(op, declaration)
        position = self.coop_positions(op, matrix, (src[-2], src[-1]))
        active = self.mask[self.members[:, 0]]
        if (active[:, None, None] & ((position < 0) | (position >= memory.shape[1]))).any():
            self.fail(op, f"a {matrix!r} reaches outside of memory with {memory.shape[1]} elements")
        return memory, row[:, None, None], np.where(active[:, None, None], position, 0)

    def coop_load(self, op: Op) -> Array:
        assert isinstance(op.dtype, CoopType)
        memory, row, position = self.coop_access(op, op.dtype, op.src)
        loaded: Array = memory[row, position]
        return loaded

    def coop_store(self, op: Op) -> None:
        matrix = op.src[0]
        assert isinstance(matrix.dtype, CoopType)
        memory, row, position = self.coop_access(op, matrix.dtype, op.src[1:])
        active = self.mask[self.members[:, 0]]
        memory[np.broadcast_to(row, position.shape)[active], position[active]] = self.values[matrix][active]

    def coop_muladd(self, op: Op) -> Array:
        a, b, c = (self.values[s] for s in op.src)
        wide = np.float32 if c.dtype.kind == "f" else np.int64
        result: Array = (a.astype(wide) @ b.astype(wide) + c.astype(wide)).astype(c.dtype)
        return result


def _advance(number: Array, step: Array) -> None:
    number += step


def _trunc_divide(a: Array, b: Array) -> Array:
    safe = np.where(b == 0, b.dtype.type(1), b)
    result: Array = (a - np.fmod(a, safe)) // safe
    return result


def _remainder(a: Array, b: Array) -> Array:
    result: Array = np.fmod(a, np.where(b == 0, b.dtype.type(1), b))
    return result


def _fma(a: Array, b: Array, c: Array) -> Array:
    """In double precision, rounded once more: the exact product, nearly always the exact sum."""
    result: Array = (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)
    return result


def _bytes(value: Array, signed: bool) -> Array:
    value = np.ascontiguousarray(value)
    return value.reshape(*value.shape, 1).view(np.int8 if signed else np.uint8).astype(np.int32)


def _dot(a: Array, b: Array, first_signed: bool) -> Array:
    result: Array = (_bytes(a, first_signed) * _bytes(b, True)).sum(axis=-1, dtype=np.int32)
    return np.asarray(result)


def _unpack_half(bits: Array) -> Array:
    bits = np.ascontiguousarray(bits)
    return bits.reshape(*bits.shape, 1).view(np.float16).astype(np.float32)


def _pack_half(pair: Array) -> Array:
    result: Array = np.ascontiguousarray(pair.astype(np.float16)).view(np.uint32)[..., 0]
    return result


def _shift(operation: Any) -> Callable[[Array, Array], Array]:
    """Shift counts of the width and above are undefined; here they give 0 or the sign."""
    return lambda a, b: operation(a, b)


def _like(operation: Any) -> Callable[..., Array]:
    """Computed in the type of the first operand (numpy promotes some small types)."""
    return lambda a, *rest: np.asarray(operation(a, *rest)).astype(a.dtype, copy=False)


PURE_FUNCTIONS: dict[OpCode, Callable[..., Array]] = {
    OpCode.ADD: np.add, OpCode.SUB: np.subtract, OpCode.MUL: np.multiply, OpCode.DIV: np.divide, OpCode.NEG: np.negative,
    OpCode.IDIV: _trunc_divide, OpCode.MOD: _remainder, OpCode.AND: np.bitwise_and, OpCode.OR: np.bitwise_or,
    OpCode.XOR: np.bitwise_xor, OpCode.NOT: np.invert, OpCode.SHL: _shift(np.left_shift), OpCode.SHR: _shift(np.right_shift),
    OpCode.EQ: np.equal, OpCode.NE: np.not_equal, OpCode.LT: np.less, OpCode.LE: np.less_equal, OpCode.GT: np.greater,
    OpCode.GE: np.greater_equal, OpCode.FMA: _fma, OpCode.SQRT: np.sqrt, OpCode.RSQRT: _like(lambda a: 1 / np.sqrt(a)),
    OpCode.EXP: np.exp, OpCode.EXP2: np.exp2, OpCode.LOG: np.log, OpCode.LOG2: np.log2, OpCode.SIN: np.sin, OpCode.COS: np.cos,
    OpCode.TANH: np.tanh, OpCode.ABS: np.abs, OpCode.FLOOR: np.floor, OpCode.ROUND: np.rint, OpCode.ISNAN: np.isnan,
    OpCode.ISINF: np.isinf, OpCode.MIN: np.fmin, OpCode.MAX: np.fmax,
    OpCode.CLAMP: lambda x, low, high: np.fmin(np.fmax(x, low), high),
    OpCode.UNPACK_HALF: _unpack_half, OpCode.PACK_HALF: _pack_half,
    OpCode.DOT_I8: lambda a, b: _dot(a, b, True), OpCode.DOT_U8I8: lambda a, b: _dot(a, b, False),
}  # fmt: skip

EXECUTE: dict[OpCode, Callable[[_Run, Op], Array | None]] = {
    **dict.fromkeys(PURE_FUNCTIONS, _Run.pure),
    OpCode.CAST: _Run.cast, OpCode.BITCAST: _Run.bitcast, OpCode.VEC: _Run.vec, OpCode.EXTRACT: _Run.extract,
    OpCode.EXTRACT_DYN: _Run.extract_dyn, OpCode.SELECT: _Run.select, OpCode.BIT_EXTRACT: _Run.bit_extract,
    OpCode.UNIFORM: _Run.uniform, OpCode.RANGE: _Run.range, OpCode.LOOP: _Run.loop, OpCode.IF: _Run.branch,
    OpCode.BREAK_IF: _Run.break_if, OpCode.BARRIER: _Run.barrier, OpCode.FENCE: _Run.fence,
    OpCode.BUF_LOAD: _Run.load, OpCode.TEXEL_LOAD: _Run.load,
    OpCode.BUF_STORE: _Run.store, OpCode.VAR: _Run.var, OpCode.VAR_LOAD: _Run.var_load, OpCode.VAR_STORE: _Run.var_store,
    OpCode.ARRAY: _Run.array, OpCode.SHARED: _Run.shared,
    **dict.fromkeys((OpCode.ARRAY_LOAD, OpCode.SHARED_LOAD), _Run.slot_load),
    **dict.fromkeys((OpCode.ARRAY_STORE, OpCode.SHARED_STORE), _Run.slot_store),
    **dict.fromkeys((OpCode.ATOMIC_ADD, OpCode.ATOMIC_MAX, OpCode.ATOMIC_MIN), _Run.atomic),
    **dict.fromkeys((OpCode.SG_ADD, OpCode.SG_MAX, OpCode.SG_MIN), _Run.subgroup_reduce),
    **dict.fromkeys((OpCode.SG_ANY, OpCode.SG_ALL), _Run.vote),
    **dict.fromkeys((OpCode.SHUFFLE, OpCode.SHUFFLE_XOR, OpCode.BROADCAST), _Run.shuffle), OpCode.SG_ELECT: _Run.elect,
    OpCode.COOP_FILL: _Run.coop_fill, OpCode.COOP_LOAD: _Run.coop_load, OpCode.COOP_STORE: _Run.coop_store,
    OpCode.COOP_MULADD: _Run.coop_muladd,
}  # fmt: skip

__all__ = ["InterpretError", "interpret"]
