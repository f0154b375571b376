"""Activations in 8 bits as integer products read them ("records"), written once by whatever makes them.

A record holds 32 columns of a row: scale = largest |v| / 127, integers round(v / scale). Two rows share a texel, so that one
load brings both: u32x4 texel [row pair, group of 32 columns, lane of 8] = (bytes, scale) of the even row, then of the odd row.
Lane l holds columns 4 l … 4 l + 3 of the group as signed bytes; the scale's f32 bits are the same in every lane.

For a norm the record holds v = x * norm_w, and beside it lies the sum of x² of each group: `squares` f32 [row, groups rounded
up to whole texels of four]. The norm's factor belongs to the result of the product. Every writer adds up in the same order and rounds
alike, so it does not matter which one made a row. The largest bits of |v| are taken as integers, so that NaN and infinity win and
reach the result through the scale.

Source: ggml's Q8_0, with f32 scales; llama.cpp quantizes activations likewise.
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
SCALE = 1.0 / 127.0


def n_group(n_col: int) -> int:
    """Groups of a row."""
    return -(-n_col // GROUP)


def squares_stride(n_col: int) -> int:
    """Floats from row to row of `squares`."""
    return -(-n_group(n_col) // 4) * 4


def record_nbytes(n_row: int, n_col: int) -> int:
    """Bytes of the records of so many rows."""
    return -(-n_row // 2) * n_group(n_col) * LANES * 16


def write_record(
    b: Block, record: Buffer, row: Value, groups: Value, group: Value, lane: Value | int, values: Sequence[Value], largest: Value
) -> None:
    """Write a lane's four columns. `groups`: of a row; `largest`: f32, max |v| of the whole group; record: u32 storage."""
    at = (((row >> 1) * groups + group) * LANES + lane) * 4 + (row & 1) * 2
    record[at] = as_bytes(rounded(b, values, inverse_of(b, largest)))
    record[at + 1] = (largest * SCALE).bitcast(u32)


def inverse_of(b: Block, largest: Value) -> Value:
    """What makes whole numbers of up to ±127 of a group with this largest |v|; 0 where all are 0."""
    return b.select(largest > 0.0, 127.0 / largest, 0.0)


def rounded(b: Block, values: Sequence[Value], inverse: Value) -> list[Value]:
    """i32: values in units of their scale."""
    return [b.round(v * inverse).to(i32) for v in values]


def as_bytes(q: Sequence[Value]) -> Value:
    """u32: four integers as signed bytes."""
    u = [(v & 0xFF).bitcast(u32) for v in q]
    return (u[0] | (u[1] << 8)) | ((u[2] << 16) | (u[3] << 24))


def largest_of(b: Block, values: Sequence[Value]) -> Value:
    """u32 bits of the largest |v|."""
    return reduce(b.max, [v.bitcast(u32) & 0x7FFFFFFF for v in values])


def over_lanes(b: Block, combine: Callable[[Value, Value], Value], value: Value, lanes: int = LANES) -> Value:
    """Combine a value over the `lanes` lanes of an aligned run, by exchanges in pairs; every lane gets the result."""
    distance = 1
    while distance < lanes:
        value = combine(value, b.subgroup_shuffle_xor(value, distance))
        distance *= 2
    return value


def write_group(b: Block, record: Buffer, row: Value, groups: Value, group: Value, lane: Value, values: Sequence[Value]) -> None:
    """Write a whole group, each lane of a subgroup of eight its four columns."""
    largest = over_lanes(b, b.max, largest_of(b, values)).bitcast(f32)
    write_record(b, record, row, groups, group, lane, values, largest)


def squares_of(values: Sequence[Value]) -> Value:
    """A lane's share of the sum of x² of a group."""
    return tree_sum([v * v for v in values])


def group_squares(b: Block, values: Sequence[Value]) -> Value:
    """The sum of x² of a group, each lane of a subgroup of eight holding its four columns."""
    return over_lanes(b, operator.add, squares_of(values))


def norm_factor(b: Block, squares: Buffer, row: Value, stride: Value, lane: Value, n_col: Value, eps: Value) -> Value:
    """1 / sqrt(mean(x²) + eps) of a row. squares: f32x4 texels, `stride` (a row's texels) of them a row, zero past the groups."""
    total = b.var(f32, 0.0)
    with b.range(lane, stride, step=LANES) as at:
        part = squares[row * stride + at]
        total.add(tree_sum([part[i] for i in range(4)]))
    return b.rsqrt(over_lanes(b, operator.add, total.get()) / n_col.to(f32) + eps)
