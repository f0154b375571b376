"""f32 rows made into records (records.py), where no kernel that wrote the rows has done it."""

from __future__ import annotations

from functools import cache

from vkllm_codegen import Block, Buffer, Kernel, Value, f32, f32x4, read, texel, trace, u32, u32x2, write
from vkllm_shaders.records import LANES, group_squares, write_group


@cache
def to_records(norm: bool, gather: bool = False) -> Kernel:
    """v = x, or x * norm_w, in 8 bits; with norm also the sum of x² of each group. One subgroup a row. Dispatch: (n_row, 1, 1).

    Bindings:
        x        f32x4 texels [rows, x_stride]
        norm_w   f32x4 texels [8 n_group]; only with norm
        params   u32 [6, capacity]; only with gather: row i of the records is row params[5, i] of x, otherwise row i
        record   u32x2: records of n_row rows; an odd row's place beside the last even one is left alone
        squares  f32 [n_row, squares_stride], written up to n_group; only with norm
    Push: x_stride: texels a row of x; n_group: groups of 32 columns a row, all of them in x; with norm: squares_stride (floats);
        with gather: capacity.
    """
    bindings = {"x": texel(f32x4)} | ({"norm_w": texel(f32x4)} if norm else {}) | ({"params": read(u32)} if gather else {})
    bindings |= {"record": write(u32x2)} | ({"squares": write(f32)} if norm else {})
    push = ["x_stride", "n_group"] + ["squares_stride"] * norm + ["capacity"] * gather

    def body(b: Block, bufs: dict[str, Buffer], given: dict[str, Value]) -> None:
        row, lane, n_group = b.workgroup_id(0), b.subgroup_lane(), given["n_group"]
        source = bufs["params"][given["capacity"] * 5 + row] if gather else row
        start = source * given["x_stride"]
        with b.range(0, n_group) as group:
            at = group * LANES + lane
            v = bufs["x"][start + at]
            values = [v[i] for i in range(4)]
            if norm:
                total = group_squares(b, values)
                with b.when(lane == 0):
                    bufs["squares"][row * given["squares_stride"] + group] = total
                weight = bufs["norm_w"][at]
                values = [value * weight[i] for i, value in enumerate(values)]
            write_group(b, bufs["record"], row, n_group, group, lane, values)

    name = "to_records" + ("_norm" if norm else "") + ("_gather" if gather else "")
    return trace(name, bindings, dict.fromkeys(push, u32), {}, LANES, body)
