"""The interpreter is strict: what Vulkan leaves undefined is an error that names the line."""

from __future__ import annotations

import numpy as np
import pytest

from vkllm_codegen import Block, Buffer, Kernel, Value, f32, i32, kernel, read, readwrite, u32, write
from vkllm_codegen.interpret import InterpretError, interpret


@kernel(x=read(f32), y=write(f32), push={"n": u32}, local_size=8)
def copy(b: Block, x: Buffer, y: Buffer, *, n: Value) -> None:
    i = b.global_id(0)
    with b.when(i < n):
        y[i] = x[i]


def run(k: Kernel, groups: int = 1, subgroup_size: int = 8, **buffers: np.ndarray) -> None:
    interpret(k, buffers, groups=(groups,), subgroup_size=subgroup_size)


def test_inactive_lanes_touch_nothing() -> None:
    x, y = np.arange(11, dtype=np.float32), np.full(13, -1, np.float32)
    interpret(copy, {"x": x, "y": y}, {"n": 11}, groups=(2,))
    assert y.tolist() == [*range(11), -1, -1]


def test_out_of_bounds_names_buffer_line_and_lane() -> None:
    message = r"test_interpret.py:\d+: kernel copy: index 11 of buffer x with 11.*lane 3 of .*\(1, 0, 0\)"
    with pytest.raises(InterpretError, match=message):
        interpret(copy, {"x": np.zeros(11, np.float32), "y": np.zeros(16, np.float32)}, {"n": 16}, groups=(2,))


def test_wrong_buffers_and_parameters() -> None:
    x = np.zeros(8, np.float32)
    with pytest.raises(InterpretError, match="buffers of copy"):
        interpret(copy, {"x": x}, {"n": 8})
    with pytest.raises(InterpretError, match="expected C-contiguous float32"):
        interpret(copy, {"x": x.astype(np.float64), "y": x}, {"n": 8})
    with pytest.raises(InterpretError, match="push constants of copy"):
        interpret(copy, {"x": x, "y": x}, {})
    with pytest.raises(InterpretError, match="no specialization constants"):
        interpret(copy, {"x": x, "y": x}, {"n": 8}, {"WG": 3})


def test_shuffle_from_an_inactive_lane() -> None:
    @kernel(y=write(f32), local_size=8)
    def k(b: Block, y: Buffer) -> None:
        lane = b.subgroup_lane()
        with b.when(lane < 4):
            y[lane] = b.subgroup_shuffle(lane.to(f32), 5)

    with pytest.raises(InterpretError, match="lane 5, which does not take part"):
        run(k, y=np.zeros(8, np.float32))


def test_fresh_shared_memory_is_no_number() -> None:
    @kernel(y=write(f32), local_size=8)
    def k(b: Block, y: Buffer) -> None:
        s = b.shared(f32, 8)
        y[b.local_id(0)] = s[b.local_id(0)]

    y = np.zeros(8, np.float32)
    run(k, y=y)
    assert np.isnan(y).all()


def test_a_broken_promise_is_found() -> None:
    @kernel(y=write(u32), local_size=8)
    def k(b: Block, y: Buffer) -> None:
        y[0] = b.assume_uniform(b.local_id(0))

    with pytest.raises(InterpretError, match="differs within a workgroup"):
        run(k, y=np.zeros(8, np.uint32))


def test_atomics_count_across_workgroups() -> None:
    @kernel(c=readwrite(u32), local_size=8)
    def k(b: Block, c: Buffer) -> None:
        c[b.atomic_add(c, 0, 1) + 1] = b.global_id(0)

    c = np.zeros(25, np.uint32)
    run(k, groups=3, c=c)
    assert c[0] == 24 and sorted(c[1:]) == list(range(24))


@pytest.mark.parametrize("subgroup_size", [4, 8, 16, 32])
@pytest.mark.parametrize("local_size", [1, 7, 32, 100])
def test_workgroup_reductions_for_every_subgroup_size(local_size: int, subgroup_size: int) -> None:
    @kernel(x=read(i32), y=write(i32), z=write(i32), spec={"WG": local_size})
    def k(b: Block, x: Buffer, y: Buffer, z: Buffer, *, WG: Value) -> None:
        i = b.global_id(0)
        y[i] = b.workgroup_reduce_add(x[i])
        z[i] = b.workgroup_reduce_max(x[i])

    x = np.random.default_rng(0).integers(-99, 99, local_size * 3).astype(np.int32)
    y, z = np.zeros_like(x), np.zeros_like(x)
    run(k, groups=3, subgroup_size=subgroup_size, x=x, y=y, z=z)
    rows = x.reshape(3, -1)
    assert (y.reshape(3, -1) == rows.sum(1, keepdims=True)).all()
    assert (z.reshape(3, -1) == rows.max(1, keepdims=True)).all()


def test_integers_truncate_toward_zero_and_wrap() -> None:
    @kernel(x=read(i32), q=write(i32), r=write(i32), w=write(i32), local_size=4)
    def k(b: Block, x: Buffer, q: Buffer, r: Buffer, w: Buffer) -> None:
        i = b.global_id(0)
        q[i], r[i], w[i] = x[i] // 3, x[i] % 3, x[i] * 0x40000001

    x = np.array([-7, 7, -1, 2], np.int32)
    q, r, w = (np.zeros(4, np.int32) for _ in range(3))
    run(k, x=x, q=q, r=r, w=w)
    assert (q.tolist(), r.tolist()) == ([-2, 2, 0, 0], [-1, 1, -1, 2])
    assert w.tolist() == [1073741817, -1073741817, -1073741825, -2147483646]


def test_three_dimensions() -> None:
    @kernel(y=write(u32), local_size=(2, 3, 4))
    def k(b: Block, y: Buffer) -> None:
        x_, y_, z_ = (b.global_id(d) for d in range(3))
        y[(z_ * (3 * 3) + y_) * (2 * 2) + x_] = b.local_index() + 100 * b.workgroup_id(2)

    found = np.zeros(2 * 2 * 3 * 3 * 4 * 2, np.uint32)
    interpret(k, {"y": found}, groups=(2, 3, 2))
    grid = found.reshape(8, 9, 4)
    assert grid[5, 4, 3] == ((5 % 4) * 3 + 4 % 3) * 2 + 3 % 2 + 100
