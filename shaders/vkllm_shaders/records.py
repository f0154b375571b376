"""Activations in 8 bits as integer products read them ("records"), written once by whatever makes them.

A record holds 32 columns of a row: whole numbers round(v / scale), their scale, and their sum. Two rows share a texel, so that
one load brings both: u32x4 texel [row pair, group of 32 columns, lane of 8] = (bytes, tail) of the even row, then of the odd row.
Lane l holds columns 4 l … 4 l + 3 of the group as signed bytes; the tail is the same in every lane: the sum in its lower 16 bits,
the upper half of the scale's f32 bits above. The lower half of the scale is cut off before anything is divided by it.

For a norm the record holds v = x * norm_w, and beside it lies the sum of x² of each group: `squares` f32 [row, groups rounded
up to whole texels of four]. The norm's factor belongs to the result of the product. Every writer adds up in the same order and
rounds alike, so it does not matter which one made a row. The largest bits of |v| are taken as integers, so that NaN and infinity
win and reach the result through the scale.

Source: ggml's Q8_0 and Q8_1; llama.cpp quantizes activations likewise.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce

from vkllm_codegen import Block, Buffer, Value, f32, i32, u32
from vkllm_shaders.sums import tree_sum

GROUP = 32  # columns that share a scale
LANES = 8  # of the subgroups that read and write records
OWN = GROUP // LANES  # columns of a lane
SCALE = 1.0 / 126.5  # of the largest |v|: cut off by up to 1 / 128 it still makes no number above 127
SMALLEST = 2.0**-126  # a scale below it has no inverse, and its values count as zeros


def n_group(n_col: int) -> int:
    """Groups of a row."""
    return -(-n_col // GROUP)


def squares_stride(n_col: int) -> int:
    """Floats from row to row of `squares`."""
    return -(-n_group(n_col) // 4) * 4


def record_nbytes(n_row: int, n_col: int) -> int:
    """Bytes of the records of so many rows."""
    return -(-n_row // 2) * n_group(n_col) * LANES * 16


def scale_bits(b: Block, largest: Value) -> Value:
    """u32: the scale of a group, from the bits of its largest |v|."""
    return (largest.bitcast(f32) * SCALE).bitcast(u32) & 0xFFFF0000


def whole_numbers(b: Block, values: Sequence[Value], bits: Value) -> list[Value]:
    """i32: values in units of the scale that has these bits."""
    scale = bits.bitcast(f32)
    inverse = b.select(scale > SMALLEST, 1.0 / scale, 0.0)
    return [b.round(v * inverse).to(i32) for v in values]


def as_bytes(q: Sequence[Value]) -> Value:
    """u32: four integers as signed bytes."""
    u = [(v & 0xFF).bitcast(u32) for v in q]
    return (u[0] | (u[1] << 8)) | ((u[2] << 16) | (u[3] << 24))


def write_record(
    b: Block,
    record: Buffer,
    place: tuple[Value, Value, Value, Value | int],
    whole: Sequence[Value],
    total: Value,
    bits: Value,
) -> None:
    """Write a lane's four numbers. `place`: row, groups of a row, group, lane; `total`: of the whole group; record: u32x2."""
    row, groups, group, lane = place
    at = (((row >> 1) * groups + group) * LANES + lane) * 2 + (row & 1)
    record[at] = b.vec(as_bytes(whole), bits | (total.bitcast(u32) & 0xFFFF))


def largest_of(b: Block, values: Sequence[Value]) -> Value:
    """u32 bits of the largest |v|."""
    return reduce(b.max, [v.bitcast(u32) & 0x7FFFFFFF for v in values])


def over_lanes(b: Block, combine: Callable[[Value, Value], Value], value: Value, lanes: int = LANES, done: int = 1) -> Value:
    """Combine a value over the `lanes` lanes of an aligned run, by exchanges in pairs; every lane gets the result.

    `done`: the lanes of an aligned run that it is combined over already.
    """
    distance = done
    while distance < lanes:
        value = combine(value, b.subgroup_shuffle_xor(value, distance))
        distance *= 2
    return value


def write_group(b: Block, record: Buffer, row: Value, groups: Value, group: Value, lane: Value, values: Sequence[Value]) -> None:
    """Write a whole group, each lane of a subgroup of eight its four columns."""
    bits = scale_bits(b, over_lanes(b, b.max, largest_of(b, values)))
    whole = whole_numbers(b, values, bits)
    total = over_lanes(b, operator.add, tree_sum(whole))
    write_record(b, record, (row, groups, group, lane), whole, total, bits)


def squares_of(values: Sequence[Value]) -> Value:
    """A lane's share of the sum of x² of a group."""
    return tree_sum([v * v for v in values])


def group_squares(b: Block, values: Sequence[Value]) -> Value:
    """The sum of x² of a group, each lane of a subgroup of eight holding its four columns."""
    return over_lanes(b, operator.add, squares_of(values))


def norm_factors(
    b: Block, squares: Buffer, rows: Sequence[Value], stride: Value, lane: Value, n_col: Value, eps: Value
) -> list[Value]:
    """1 / sqrt(mean(x²) + eps) of rows. squares: f32x4 texels, `stride` (a row's texels) of them a row, zero past the groups."""
    totals = [b.var(f32, 0.0) for _ in rows]
    with b.range(lane, stride, step=LANES) as at:
        for row, total in zip(rows, totals, strict=True):
            part = squares[row * stride + at]
            total.add(tree_sum([part[i] for i in range(4)]))
    sums = [over_lanes(b, operator.add, total.get()) for total in totals]
    return [b.rsqrt(v / n_col.to(f32) + eps) for v in sums]
