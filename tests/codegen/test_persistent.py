"""Persistent kernels: the results of their stages one after the other, whatever the grids and however many workgroups run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from codegen_tools import compile_glsl, validate
from hypothesis import given
from hypothesis import strategies as st

from vkllm_codegen import Block, Buffer, Kernel, Value, f32, kernel, read, readwrite, texel, u32, write
from vkllm_codegen.errors import TraceError
from vkllm_codegen.interpret import interpret
from vkllm_codegen.ir import OpCode, walk
from vkllm_codegen.persistent import COUNTERS, GAVE_UP, MAX_TURNS, Stage, persistent

LANES = 8
N = 240
Grid = tuple[int, int, int]


@kernel(x=texel(f32), y=write(f32), push={"factor": f32}, local_size=LANES)
def scale(b: Block, x: Buffer, y: Buffer, *, factor: Value) -> None:
    """y = x * factor, wherever its grid and its lanes reach."""
    groups = [b.num_workgroups(d) for d in range(3)]
    at = (b.workgroup_id(2) * groups[1] + b.workgroup_id(1)) * groups[0] + b.workgroup_id(0)
    with b.when(at * LANES + b.local_id(0) < N):
        y[at * LANES + b.local_id(0)] = x[at * LANES + b.local_id(0)] * factor


@kernel(x=read(f32), y=readwrite(f32), push={"n": u32}, local_size=LANES)
def add_reversed(b: Block, x: Buffer, y: Buffer, *, n: Value) -> None:
    """y += x from its end: needs what other workgroups wrote. A loop over what the grid does not reach."""
    with b.range(b.workgroup_id(0) * LANES + b.subgroup_lane(), n, step=b.num_workgroups(0) * LANES) as i:
        total = b.var(f32, 0.0)
        with b.range(0, 3) as turn:
            total.add(x[n - 1 - i] * turn.to(f32))
        y[i] = y[i] + total.get()


BINDINGS = {"a": texel(f32), "b": write(f32), "b_read": read(f32), "c": readwrite(f32)}
KINDS = ("a", "b", "b", "c")  # the buffer behind each binding


def two_stages(first: Grid, second: Grid, factor: float = 1.5) -> Kernel:
    stages = [Stage(scale, first, {"factor": factor}, (0, 1), waits=False), Stage(add_reversed, second, {"n": N}, (2, 3))]
    return persistent("two_stages", BINDINGS, stages)


def buffers() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal(N).astype(np.float32) for name in "abc"} | {"sync": np.zeros(COUNTERS + 1, np.uint32)}


def one_by_one(first: Grid, second: Grid, factor: float = 1.5) -> dict[str, np.ndarray]:
    """What two dispatches leave in the buffers."""
    held = buffers()
    interpret(scale, {"x": held["a"], "y": held["b"]}, {"factor": factor}, groups=first)
    interpret(add_reversed, {"x": held["b"], "y": held["c"]}, {"n": N}, groups=second)
    return held


def interpreted(k: Kernel, n_workgroup: int, sync: np.ndarray | None = None) -> dict[str, np.ndarray]:
    held = buffers()
    held["sync"] = held["sync"] if sync is None else sync
    shared = {"a": held["a"], "b": held["b"], "b_read": held["b"], "c": held["c"], "sync": held["sync"]}
    interpret(k, shared, {"counter": COUNTERS, "stages": 0}, groups=(n_workgroup, 1, 1))
    return held


grids = st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(1, 3))


@given(first=grids, second=st.integers(1, 40), n_workgroup=st.integers(1, 9))
def test_the_results_are_those_of_its_stages(first: Grid, second: int, n_workgroup: int) -> None:
    held = interpreted(two_stages(first, (second, 1, 1)), n_workgroup)
    wanted = one_by_one(first, (second, 1, 1))
    for name in "abc":
        np.testing.assert_array_equal(held[name], wanted[name], err_msg=name)
    assert held["sync"].tolist() == [0, n_workgroup], "all have met once, and none gave up"


def test_modules_are_valid_in_both_back_ends() -> None:
    k = two_stages((5, 3, 2), (4, 1, 1))
    validate(k)
    assert len(compile_glsl(k.glsl())) > 20
    assert [b.name for b in k.bindings] == [*BINDINGS, "sync"]


def test_push_constants_and_grids_are_filled_in() -> None:
    ops = list(walk(two_stages((5, 3, 2), (4, 1, 1)).program.body))
    pushed = {s.arg for op in ops for s in op.src if s.code is OpCode.PUSH}
    assert pushed == {"counter"}, "and stages, where one is optional"
    assert {s.arg[0] for op in ops for s in op.src if s.code is OpCode.BUILTIN and "workgroup" in s.arg[0]} <= {
        "workgroup_id",
        "num_workgroups",
    }


def test_a_stage_waits_only_where_it_says_so() -> None:
    stages = [Stage(scale, (30, 1, 1), {"factor": 2.0}, (0, 1), waits=False) for _ in range(3)]
    free = persistent("free", BINDINGS, stages)
    held = interpreted(free, 2)
    assert held["sync"].tolist() == [0, 0]
    assert not any(op.code is OpCode.FENCE for op in walk(free.program.body))


@pytest.mark.parametrize("wanted", range(8))
def test_optional_stages(wanted: int) -> None:
    """Those that are wanted, and those that always are."""
    factors = (2.0, 3.0, 5.0)
    stages = [Stage(scale, (30, 1, 1), {"factor": f}, (0, 1), waits=i > 0, optional=i > 0) for i, f in enumerate(factors)]
    held = buffers()
    shared = {"a": held["a"], "b": held["b"], "b_read": held["b"], "c": held["c"], "sync": np.zeros(COUNTERS + 2, np.uint32)}
    k = persistent("optional", BINDINGS, stages)
    validate(k)
    interpret(k, shared, {"counter": COUNTERS, "stages": wanted}, groups=(3, 1, 1))
    last = max([0, *(i for i in (1, 2) if wanted >> i & 1)])
    np.testing.assert_array_equal(held["b"], buffers()["a"] * np.float32(factors[last]))
    assert shared["sync"].tolist() == [0, 3, 3], "all meet, whatever is wanted"


def test_too_many_stages_are_refused() -> None:
    with pytest.raises(TraceError, match="33 stages"):
        persistent("long", BINDINGS, [Stage(scale, (1, 1, 1), {"factor": 1.0}, (0, 1))] * 33)


def test_who_comes_after_one_that_gave_up_does_not_wait() -> None:
    sync = np.array([1, 0], np.uint32)
    held = interpreted(two_stages((30, 1, 1), (4, 1, 1)), 2, sync)
    assert held["sync"].tolist() == [1, 2]


@kernel(y=write(u32), local_size=LANES)
def with_barrier(b: Block, y: Buffer) -> None:
    b.barrier("nothing")
    y[b.local_id(0)] = 1


@kernel(y=write(u32), local_size=LANES)
def by_global_id(b: Block, y: Buffer) -> None:
    y[b.global_id(0)] = 1


@kernel(y=write(u32), local_size=2 * LANES)
def larger(b: Block, y: Buffer) -> None:
    y[b.local_id(0)] = 1


@pytest.mark.parametrize("other", [with_barrier, by_global_id, larger])
def test_what_cannot_be_a_stage_is_refused(other: Kernel) -> None:
    assert other.stage_size == (2 * LANES if other is larger else 0)
    stages = [Stage(scale, (1, 1, 1), {"factor": 1.0}, (0, 1)), Stage(other, (1, 1, 1), {}, (1,))]
    with pytest.raises(TraceError, match=other.name):
        persistent("refused", BINDINGS, stages)


# -- on a device


def run(device: Any, k: Kernel, n_workgroup: int) -> dict[str, np.ndarray]:
    """On a device; b is bound twice."""
    from vkllm.vk import Binding

    held = {name: device.buffer(array.nbytes, host=True, name=name) for name, array in buffers().items()}
    try:
        for name, array in buffers().items():
            held[name].write(array)
        pipeline = device.pipeline(k.name, k.spirv(), tuple(b.kind for b in k.bindings), k.push_bytes)
        recording = device.recording()
        bound = [Binding(held["a"], format="r32f"), *(Binding(held[name]) for name in ("b", "b", "c", "sync"))]
        recording.dispatch(pipeline, bound, (n_workgroup, 1, 1), k.pack_push(counter=COUNTERS, stages=0))
        recording.finish()
        recording.run()
        return {
            name: buffer.read(array.nbytes, dtype=array.dtype)
            for (name, buffer), array in zip(held.items(), buffers().values(), strict=True)
        }
    finally:
        for buffer in held.values():
            buffer.free()


def test_on_a_device(device: Any) -> None:
    """Two workgroups together; a busy machine may make one give up, but not again and again."""
    wanted, k = one_by_one((30, 1, 1), (4, 1, 1)), two_stages((30, 1, 1), (4, 1, 1))
    for _ in range(20):
        held = run(device, k, 2)
        if not held["sync"][GAVE_UP]:
            break
    assert held["sync"].tolist() == [0, 2]
    for name in "abc":
        np.testing.assert_allclose(held[name], wanted[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_giving_up_is_told(device: Any) -> None:
    """More workgroups than a CPU has threads cannot wait for one another, and yet the dispatch ends."""
    if device.info.kind != "cpu":
        pytest.skip("a GPU may run all of them at once")
    held = run(device, two_stages((30, 1, 1), (4, 1, 1)), 4096)
    assert held["sync"][GAVE_UP] == 1
    assert MAX_TURNS < 65_535, "lavapipe ends all loops after so many turns"


def test_alone_it_never_waits(device: Any) -> None:
    held = run(device, two_stages((30, 1, 1), (4, 1, 1)), 1)
    assert held["sync"].tolist() == [0, 1]
