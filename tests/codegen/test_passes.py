"""Passes change the shape of a program and never its results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from codegen_samples import SAMPLES
from codegen_tools import validate
from hypothesis import given, settings
from hypothesis import strategies as st

from vkllm_codegen import Block, Buffer, Kernel, Value, f32, i32, kernel, read, readwrite, trace, u32, write
from vkllm_codegen.interpret import interpret
from vkllm_codegen.ir import Op, OpCode, walk


def build(body: Callable[[Block, Buffer, Buffer, Value], object]) -> Kernel:
    """A kernel with u32 buffers x and y and a push constant n."""
    bindings = {"x": read(u32), "y": write(u32)}
    return trace("example", bindings, {"n": u32}, {}, 8, lambda b, bufs, p: body(b, bufs["x"], bufs["y"], p["n"]))


def codes(kernel: Kernel) -> Counter[OpCode]:
    """How often each opcode stands in the optimized program."""
    return Counter(op.code for op in walk(kernel.program.body))


def stored(kernel: Kernel) -> Op:
    """The value of the only store."""
    [store] = [op for op in walk(kernel.program.body) if op.code is OpCode.BUF_STORE]
    return store.src[1]


@pytest.mark.parametrize(
    ("expression", "code"),
    [
        (lambda n: n * 8, OpCode.SHL), (lambda n: n // 16, OpCode.SHR), (lambda n: n % 32, OpCode.AND),
        (lambda n: n + 0, OpCode.PUSH), (lambda n: n * 1, OpCode.PUSH), (lambda n: n * 0, OpCode.CONST),
        (lambda n: n - n, OpCode.CONST), (lambda n: (n << 3) << 2, OpCode.SHL), (lambda n: ~~n, OpCode.PUSH),
        (lambda n: n & 0xFFFFFFFF, OpCode.PUSH), (lambda n: n.bitcast(f32).bitcast(u32), OpCode.PUSH),
        (lambda n: (n + 3) - 3, OpCode.PUSH), (lambda n: 5 + n, OpCode.ADD),
    ],
)  # fmt: skip
def test_algebra(expression: Callable[[Value], Value], code: OpCode) -> None:
    def body(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
        y[0] = expression(n)

    assert stored(build(body)).code is code


def test_constants_gather_in_addresses() -> None:
    def body(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
        lane = b.local_id(0)
        y[0] = x[((n + 1) * 4 + 2) * 8 + lane] + x[((n + 2) * 4 + 3) * 8 + lane]

    kernel = build(body)
    assert codes(kernel) == {OpCode.SHL: 1, OpCode.ADD: 4, OpCode.BUF_LOAD: 2, OpCode.BUF_STORE: 1}


def test_loads_are_not_merged_and_dead_ones_go() -> None:
    def body(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
        unused = b.var(u32, 0)
        unused.set(x[3])
        y[0] = x[n] + x[n]

    assert codes(build(body)) == {OpCode.BUF_LOAD: 2, OpCode.ADD: 1, OpCode.BUF_STORE: 1}


def test_invariants_leave_loops_but_not_branches() -> None:
    def body(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
        with b.range(0, n) as i, b.when(i == 3), b.range(0, n) as j:
            y[i] = x[j] * (n * n + 1)

    [outer] = [op for op in build(body).program.body.ops if op.code is OpCode.RANGE]
    inside_if = outer.regions[0].ops[-1].regions[0].ops
    assert [op.code for op in inside_if] == [OpCode.MUL, OpCode.ADD, OpCode.RANGE]


def test_constant_branches_disappear() -> None:
    def body(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
        with b.when(b.const(u32, 1) == 2):
            y[0] = 1
        with b.otherwise():
            y[1] = 2
        with b.range(5, 5) as i:
            y[i] = 3

    assert codes(build(body)) == {OpCode.BUF_STORE: 1}


@pytest.mark.parametrize(
    ("turns", "unroll", "loops", "copies"), [(4, 4, 0, 4), (8, 4, 1, 4), (10, 4, 1, 6), (3, 8, 0, 3), (7, 1, 1, 1)]
)
def test_unrolling_of_constant_loops(turns: int, unroll: int, loops: int, copies: int) -> None:
    def body(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
        with b.range(0, turns, unroll=unroll) as i:
            y[i] = x[i] + 1

    found = codes(build(body))
    assert (found[OpCode.RANGE], found[OpCode.BUF_STORE]) == (loops, copies)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(0, 30), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.booleans())
def test_unrolled_loops_run_the_same_turns(start: int, stop: int, step: int, unroll: int, signed: bool, constant: bool) -> None:
    dtype = i32 if signed else u32

    @kernel(y=readwrite(u32), push={"first": dtype, "last": dtype}, local_size=1)
    def k(b: Block, y: Buffer, *, first: Value, last: Value) -> None:
        count, bounds = b.var(u32, 0), (first, last)
        if constant:
            bounds = b.const(dtype, start), b.const(dtype, stop)
        with b.range(*bounds, step=step, unroll=unroll) as i:
            y[count.get()] = i.to(u32)
            count.add(1)

    y = np.full(40, 99, np.uint32)
    interpret(k, {"y": y}, {"first": start, "last": stop})
    wanted = list(range(start, stop, step))
    assert y.tolist() == wanted + [99] * (40 - len(wanted))


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_optimized_samples_compute_what_was_traced(name: str) -> None:
    sample = SAMPLES[name]
    results = []
    for program in (sample.kernel.traced, sample.kernel.program):
        buffers = {n: a.copy() for n, a in sample.buffers.items()}
        interpret(program, buffers, sample.push, groups=sample.groups)
        results.append(buffers)
    for n in sample.buffers:
        np.testing.assert_array_equal(results[0][n], results[1][n])


# Random expressions. Each draw gives a GPU value and, independently, the numpy array it must equal.

Pair = tuple[Value, np.ndarray]
U, S, F = np.uint32, np.int32, np.float32
CONSTANTS = {
    U: [0, 1, 2, 3, 4, 8, 31, 255, 1 << 16, 0xFFFFFFFF],
    S: [0, 1, -1, 2, 3, 8, -7, 1 << 20],
    F: [0.0, 1.0, -1.0, 0.5, 2.0, 3.25],
}
DTYPES = {U: u32, S: i32, F: f32}


class Expressions:
    """Draws random expressions over three inputs."""

    def __init__(self, b: Block, draw: Callable[..., object], inputs: dict[type, Pair]) -> None:
        self.b, self.draw, self.inputs = b, draw, inputs

    def pick(self, options: list[object]) -> object:
        return options[self.draw(st.integers(0, len(options) - 1))]  # type: ignore[call-overload,no-any-return]

    def leaf(self, kind: type) -> Pair:
        if self.draw(st.booleans()):
            return self.inputs[kind]
        number = kind(self.pick(CONSTANTS[kind]))
        return self.b.const(DTYPES[kind], number.item()), np.asarray(number)

    def value(self, kind: type, depth: int) -> Pair:
        if depth == 0:
            return self.leaf(kind)
        rule = self.pick([self.arithmetic, self.arithmetic, self.bitwise, self.select, self.convert])
        return rule(kind, depth - 1)  # type: ignore[operator,no-any-return]

    def arithmetic(self, kind: type, depth: int) -> Pair:
        (a, x), (c, y) = self.value(kind, depth), self.value(kind, depth)
        name = self.pick(["add", "sub", "mul", "min", "max"])
        if name == "min":
            return self.b.min(a, c), np.minimum(x, y)
        if name == "max":
            return self.b.max(a, c), np.maximum(x, y)
        operation = {"add": (a.__add__, np.add), "sub": (a.__sub__, np.subtract), "mul": (a.__mul__, np.multiply)}[str(name)]
        return operation[0](c), operation[1](x, y)

    def bitwise(self, kind: type, depth: int) -> Pair:
        a, x = self.value(kind, depth)
        if kind is F:
            return -a, np.negative(x)
        number = self.pick([1, 2, 3, 4, 7, 8, 16])
        name = self.pick(["and", "shl", "shr", "div", "mod", "xor"])
        n = kind(number)
        if name == "div":
            return a // number, np.asarray(np.trunc(x / np.float64(n))).astype(kind)  # type: ignore[operator]
        if name == "mod":
            return a % number, np.asarray(np.fmod(x, n)).astype(kind)  # type: ignore[operator]
        bits = {"and": (a.__and__, x & n), "xor": (a.__xor__, x ^ n)}
        table = bits | {"shl": (a.__lshift__, x << n), "shr": (a.__rshift__, x >> n)}
        made, wanted = table[str(name)]
        return made(number), np.asarray(wanted)  # type: ignore[arg-type]

    def select(self, kind: type, depth: int) -> Pair:
        (a, x), (c, y) = self.value(U, depth), self.value(U, depth)
        (v, p), (w, q) = self.value(kind, depth), self.value(kind, depth)
        return self.b.select(a < c, v, w), np.where(x < y, p, q)

    def convert(self, kind: type, depth: int) -> Pair:
        source = {U: S, S: U, F: U}[kind]
        a, x = self.value(source, depth)
        if kind is F:
            return (a & 0xFFFF).to(f32), (x & U(0xFFFF)).astype(F)
        return a.to(DTYPES[kind]), np.asarray(x).astype(kind)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_expressions(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    arrays = {
        U: rng.integers(0, 1 << 32, 8, dtype=U), S: rng.integers(-(1 << 20), 1 << 20, 8).astype(S),
        F: rng.integers(-16, 16, 8).astype(F),
    }  # fmt: skip
    kind = data.draw(st.sampled_from([U, S, F]))
    wanted: list[np.ndarray] = []

    @kernel(u=read(u32), i=read(i32), f=read(f32), out=write(DTYPES[kind]), local_size=8)
    def k(b: Block, u: Buffer, i: Buffer, f: Buffer, out: Buffer) -> None:
        lane = b.local_id(0)
        inputs: dict[type, Pair] = {U: (u[lane], arrays[U]), S: (i[lane], arrays[S]), F: (f[lane], arrays[F])}
        with np.errstate(all="ignore"):
            value, result = Expressions(b, data.draw, inputs).value(kind, data.draw(st.integers(1, 4)))
        wanted.append(np.broadcast_to(result, 8))
        out[lane] = value

    buffers = {"u": arrays[U], "i": arrays[S], "f": arrays[F], "out": np.zeros(8, kind)}
    for program in (k.traced, k.program):
        interpret(program, buffers)
        np.testing.assert_array_equal(buffers["out"], wanted[0])
    if data.draw(st.integers(0, 9)) == 0:
        validate(k)


def test_printed_program() -> None:
    def body(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
        with b.range(0, n) as i, b.when(x[i] > 3):
            y[i] = x[i] * 8

    assert build(body).ir() == (
        "kernel example, local size (8, 1, 1)\n"
        "  binding 0 x: read storage u32\n"
        "  binding 1 y: write storage u32\n"
        "  push n: u32\n"
        "  range 0 n 1 [1] as i1\n"
        "    v2: u32 = buf_load i1 [0]\n"
        "    v3: boolean = gt v2 3\n"
        "    if v3\n"
        "      v5: u32 = buf_load i1 [0]\n"
        "      v6: u32 = shl v5 3\n"
        "      buf_store i1 v6 [1]\n"
    )
