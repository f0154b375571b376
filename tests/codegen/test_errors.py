"""Mistakes in kernels: a typed error that names this file and the line, and says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from vkllm_codegen import (
    Block,
    Buffer,
    Kernel,
    KernelError,
    TraceError,
    Value,
    VerifyError,
    boolean,
    coop,
    f16,
    f32,
    i32,
    kernel,
    read,
    readwrite,
    texel,
    trace,
    u32,
    vec,
    write,
)  # fmt: skip
from vkllm_codegen.ir import Binding, Op, OpCode, Program, Region, constant, leaf
from vkllm_codegen.verify import RULES, verify

Body = Callable[[Block, Buffer, Buffer, Value], object]


def build(body: Body) -> Kernel:
    """A kernel with an f32 input x, an f32 output y and a push constant n around `body`."""
    bindings = {"x": read(f32), "y": write(f32)}
    return trace("example", bindings, {"n": u32}, {}, 8, lambda b, bufs, p: body(b, bufs["x"], bufs["y"], p["n"]))


def use_bool(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    if n > 3:
        y[0] = 1.0


def mix_types(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    y[0] = x[0] + n


def integer_slash(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    y[0] = (n / 2).to(f32)


def inexact(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    y[0] = (n + 1.5).to(f32)


def negative_unsigned(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    y[0] = (n & -1).to(f32)


def write_read_only(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    x[0] = 1.0


def read_write_only(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    y[0] = y[1]


def python_loop(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    for i in range(n):  # type: ignore[arg-type]
        y[i] = 0.0


def float_index(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    y[x[0]] = 0.0


def lonely_otherwise(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    with b.otherwise():
        y[0] = 0.0


def lonely_break(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    b.break_if(n == 0)


def no_component(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    y[0] = b.const(vec(f32, 2), 1.0).z


def forgotten_get(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    y[0] = b.var(f32, 0.0)  # type: ignore[assignment]


def atomic_on_floats(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    b.atomic_add(y, 0, 1)


def wrong_dims(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    y[0, 1] = 0.0


def array_overrun(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    b.array(f32, 4)[4] = 0.0


def half_bitcast(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    y[0] = n.bitcast(vec(f32, 2)).x


def returned(b: Block, x: Buffer, y: Buffer, n: Value) -> object:
    return n


TRACE_ERRORS: list[tuple[Body, str]] = [
    (use_bool, "truth value"), (mix_types, "expected f32, found u32"), (integer_slash, "// for integers"),
    (inexact, "1.5 is not exactly representable as u32"), (negative_unsigned, "-1 is not exactly"),
    (write_read_only, "x is read-only"), (read_write_only, r"y is declared write"), (python_loop, "b.range"),
    (float_index, "index is u32 or i32"), (lonely_otherwise, "without a b.when"), (lonely_break, "outside a loop"),
    (no_component, "no component 2"), (forgotten_get, r"\.get\(\)"), (atomic_on_floats, "atomics need"),
    (wrong_dims, "2 indices for 0"), (array_overrun, "index 4 is outside an array of 4"), (half_bitcast, "same number of bits"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), TRACE_ERRORS, ids=[b.__name__ for b, _ in TRACE_ERRORS])
def test_trace_error_names_the_line(body: Body, message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        build(body)
    line = int(re.match(rf"{re.escape(__file__)}:(\d+): ", str(caught.value)).group(1))  # type: ignore[union-attr]
    first = body.__code__.co_firstlineno
    assert first < line <= first + 3
    assert caught.value.message


def test_a_returned_value_is_an_error() -> None:
    with pytest.raises(TraceError, match="returned a value"):
        build(returned)


def test_divergent_barrier_names_the_line() -> None:
    def body(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
        with b.when(b.local_id(0) < n):
            b.barrier("wrong")

    with pytest.raises(VerifyError, match="barrier") as caught:
        build(body)
    assert f"{Path(__file__).name}:{body.__code__.co_firstlineno + 2}: kernel example" in str(caught.value)
    assert "hint:" in str(caught.value)


def in_divergent_loop(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    with b.range(b.local_id(0), n):
        y[0] = b.workgroup_reduce_add(x[0])


def after_divergent_store(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    flag = b.var(u32, 0)
    with b.range(0, n):
        with b.when(flag.get() == 1):
            b.barrier("depends on the turn before")
        flag.set(b.local_id(0))


def loop_left_early(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    with b.loop():
        b.break_if(b.local_id(0) > 2)
        b.barrier("some have left")


@pytest.mark.parametrize("body", [in_divergent_loop, after_divergent_store, loop_left_early])
def test_divergent_barriers_are_rejected(body: Body) -> None:
    with pytest.raises(VerifyError, match="barrier"):
        build(body)


def uniform_loop(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    with b.range(b.workgroup_id(0), n), b.when(x[n] > 0.0):
        b.barrier("the index, and so the value, is the same for all")


def promised(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    limit = b.assume_uniform(b.subgroup_max(b.local_id(0)))
    with b.range(0, limit):
        b.barrier("promised")


def reduced(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
    with b.when(b.workgroup_reduce_add(x[b.local_id(0)]) > 1.0):
        y[0] = b.workgroup_reduce_max(x[b.local_id(0)])


@pytest.mark.parametrize("body", [uniform_loop, promised, reduced])
def test_uniform_barriers_are_accepted(body: Body) -> None:
    build(body)


def test_a_value_does_not_leave_its_region() -> None:
    def body(b: Block, x: Buffer, y: Buffer, n: Value) -> None:
        with b.range(0, n) as i:
            inside = x[i]
        y[0] = inside

    with pytest.raises(VerifyError, match=r"not visible here[\s\S]*b\.var"):
        build(body)


def _program(*ops: Op) -> Program:
    bindings = (Binding("y", "storage", f32, "write"), Binding("x", "storage", f32, "read"), Binding("w", "texel", u32, "read"))
    return Program("broken", bindings, (), {}, (8, 1, 1), Region(ops))


ONE, ONE_F = constant(u32, 1), constant(f32, 1.0)
BROKEN = [
    Op(OpCode.ADD, f32, (ONE, ONE_F)),
    Op(OpCode.ADD, u32, (ONE,)),
    Op(OpCode.SHL, f32, (ONE_F, ONE_F)),
    Op(OpCode.LT, u32, (ONE, ONE)),
    Op(OpCode.LT, boolean, (constant(boolean, True), constant(boolean, True))),
    Op(OpCode.SELECT, f32, (ONE, ONE_F, ONE_F)),
    Op(OpCode.VEC, vec(f32, 3), (ONE_F, ONE_F)),
    Op(OpCode.EXTRACT, f32, (constant(vec(f32, 2), (1.0, 2.0)),), 2),
    Op(OpCode.BUF_STORE, None, (ONE_F, ONE_F), 0),
    Op(OpCode.FMA, f32, (ONE_F, ONE_F, ONE)),
    Op(OpCode.BITCAST, vec(f32, 2), (ONE,)),
    Op(OpCode.IF, None, (ONE,), None, (Region(()),)),
    Op(OpCode.RANGE, None, (ONE, ONE, constant(i32, 1)), 1, (Region((), Op(OpCode.INDEX, u32)),)),
    Op(OpCode.VAR_LOAD, f32, (ONE_F,)),
    Op(OpCode.DOT_I8, u32, (ONE, ONE)),
    Op(OpCode.BREAK_IF, None, (constant(boolean, True),)),
    Op(OpCode.COOP_MULADD, f32, (ONE_F, ONE_F, ONE_F)),
    Op(OpCode.NEG, f32, (Op(OpCode.NEG, f32, (ONE_F,)),)),
    Op(OpCode.ISNAN, f32, (ONE_F,)),
    Op(OpCode.SHUFFLE, u32, (ONE_F, ONE)),
    Op(OpCode.SHARED, f32, ()),
    Op(OpCode.SHARED, f32, (ONE_F,)),
    Op(OpCode.SHARED, f32, (constant(u32, 0),)),
    Op(OpCode.COOP_FILL, coop(f16, 8, 8, "a"), (ONE_F,)),
    Op(OpCode.COOP_LOAD, f32, (ONE, ONE), (1, True)),
    Op(OpCode.COOP_LOAD, coop(f16, 8, 8, "a"), (ONE, ONE), (1, True)),
    Op(OpCode.ARRAY, f32, (), 0),
    Op(OpCode.RANGE, None, (ONE, ONE, ONE), 0, (Region((), Op(OpCode.INDEX, u32)),)),
    Op(OpCode.BROADCAST, f32, (ONE_F, leaf(OpCode.BUILTIN, u32, ("subgroup_lane", 0)))),
    Op(OpCode.IDIV, u32, (ONE, constant(u32, 0))),
    Op(OpCode.MOD, vec(u32, 2), (constant(vec(u32, 2), (1, 1)), constant(vec(u32, 2), (1, 0)))),
    Op(OpCode.SHL, u32, (ONE, constant(u32, 32))),
    Op(OpCode.SHR, i32, (constant(i32, 1), constant(i32, -1))),
    Op(OpCode.LOOP, None, (), None, (Region(()),)),
    Op(OpCode.BUF_LOAD, f32, (ONE,), 0),
    Op(OpCode.BUF_LOAD, u32, (ONE,), 1),
    Op(OpCode.BUF_LOAD, u32, (ONE,), 2),
    Op(OpCode.BUF_LOAD, f32, (ONE,), 3),
    Op(OpCode.BUF_STORE, None, (ONE, ONE_F), 1),
    Op(OpCode.BUF_STORE, None, (ONE, ONE), 0),
    Op(OpCode.TEXEL_LOAD, f32, (ONE,), 1),
    Op(OpCode.TEXEL_LOAD, f32, (ONE,), 2),
    Op(OpCode.ATOMIC_ADD, u32, (ONE, ONE), 1),
    Op(OpCode.ATOMIC_ADD, f32, (ONE, ONE_F), 0),
]


@pytest.mark.parametrize("op", BROKEN, ids=[f"{i}-{op.code}" for i, op in enumerate(BROKEN)])
def test_verifier_rejects(op: Op) -> None:
    with pytest.raises(VerifyError, match="kernel broken"):
        verify(_program(op))


def test_an_operation_has_one_place() -> None:
    op = Op(OpCode.NEG, f32, (ONE_F,))
    with pytest.raises(VerifyError, match="two places"):
        verify(_program(op, op))


def test_every_opcode_has_rules() -> None:
    assert set(RULES) == set(OpCode)


def test_interface_errors() -> None:
    with pytest.raises(KernelError, match="local_size"):
        trace("k", {}, {}, {}, "WG", lambda b, bufs, p: None)
    for size in (0, (8, 0), (8, 8, 8, 1), ()):
        with pytest.raises(KernelError, match="local_size"):
            trace("k", {}, {}, {}, size, lambda b, bufs, p: None)
    with pytest.raises(KernelError, match="128"):
        trace("k", {}, {f"p{i}": u32 for i in range(33)}, {}, 1, lambda b, bufs, p: None)
    with pytest.raises(KernelError, match="dimension"):
        trace("k", {"x": read(f32, "n_row", "missing")}, {}, {}, 1, lambda b, bufs, p: None)


def test_pack_push() -> None:
    @kernel(y=readwrite(u32), w=texel(u32), push={"a": u32, "e": f32, "s": i32})
    def k(b: Block, y: Buffer, w: Buffer, *, a: Value, e: Value, s: Value) -> None:
        y[0] = a + w[0]

    assert k.pack_push(a=1, e=1.0, s=-1) == bytes.fromhex("010000000000803fffffffff")
    assert (k.push_bytes, k.local_size, [b.kind for b in k.bindings]) == (12, (1, 1, 1), ["storage", "texel"])
    with pytest.raises(KernelError, match="push constants of k"):
        k.pack_push(a=1)
