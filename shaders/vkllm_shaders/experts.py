"""What a mixture of experts needs beside its matrices: the router's choice, and the sum over the chosen experts.

`route` finds each token's best experts as sampling finds the best logits: a turn for each, the best of those that come after the
last one in the order (value falling, id rising). The matrices themselves are matmul's with `experts`. For many tokens `tiles`
puts the rows of each expert together, so that its weights are read once for a tile of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from vkllm_codegen import Block, Buffer, Kernel, Value, f32, f32x4, kernel, read, readwrite, texel, u32, write
from vkllm_codegen.errors import KernelError
from vkllm_shaders.reference import NO_ID

MINUS_INFINITY, NAN = 0xFF800000, 0x7FC00000
MAX_EXPERTS, MAX_USED = 256, 16
MAX_TILED_ROWS = 1 << 16
WORKGROUP = 32


@dataclass(frozen=True)
class RouteSpec:
    """n_used of n_expert; softmax: "all" experts' (the weights of the used ones sum to less than 1), or only the "used" ones'.

    The softmax over all, divided by the used ones' sum (norm_topk_prob), is the softmax over the used.
    lanes: subgroup size, one subgroup a workgroup.
    """

    n_expert: int
    n_used: int
    softmax: Literal["all", "used"] = "used"
    lanes: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.n_used <= min(self.n_expert, MAX_USED) or self.n_expert > MAX_EXPERTS:
            raise KernelError(
                f"{self.n_used} of {self.n_expert} experts", hint=f"expected up to {MAX_USED} of up to {MAX_EXPERTS} experts"
            )


@cache
def route(spec: RouteSpec) -> Kernel:
    """logits f32 [n_token, x_stride] → ids u32, weights f32, both [n_token, n_used], best first. Dispatch: (n_token, 1, 1).

    Ties go to the lower id. NaN counts as -inf, so that ids are always those of experts; one NaN makes all weights NaN.
    Push: x_stride: floats a row of logits.
    """
    held = range(-(-spec.n_expert // spec.lanes))  # lane l has experts l, l + lanes, …
    slots = range(-(-spec.n_used // spec.lanes))  # and finishes slots l, l + lanes, …

    @kernel(
        logits=read(f32),
        ids=write(u32),
        weights=write(f32),
        push={"x_stride": u32},
        local_size=spec.lanes,
        name=f"route_{spec.n_used}_of_{spec.n_expert}_{spec.softmax}_s{spec.lanes}",
    )
    def body(b: Block, logits: Buffer, ids: Buffer, weights: Buffer, *, x_stride: Value) -> None:
        token, lane = b.workgroup_id(0), b.local_id(0)
        lowest = b.const(u32, MINUS_INFINITY).bitcast(f32)

        # 1. Each lane loads its experts' logits; those that do not exist come after all others.
        experts = [lane + i * spec.lanes for i in held]
        values, n_nan = [], b.const(u32, 0)
        for e in experts:
            v = logits[token * x_stride + b.min(e, spec.n_expert - 1)]
            n_nan = n_nan + b.select(b.isnan(v), b.const(u32, 1), 0)
            values.append(b.select(b.isnan(v) | (e >= spec.n_expert), lowest, v))
        damaged = b.subgroup_max(n_nan) > 0

        # 2. A turn for each expert used: the best after the last. All lanes know it; one keeps it.
        value, id = b.var(f32, lowest), b.var(u32, 0)
        kept_value, kept_id = [b.var(f32, 0.0) for _ in slots], [b.var(u32, 0) for _ in slots]
        highest, total = b.var(f32, 0.0), b.var(f32, 0.0)
        with b.range(0, spec.n_used) as turn:
            best_value, best_id = lowest, b.const(u32, spec.n_expert)
            for e, v in zip(experts, values, strict=True):
                after = (turn == 0) | (v < value.get()) | ((v == value.get()) & (e > id.get()))
                better = after & ((v > best_value) | (best_id == spec.n_expert)) & (e < spec.n_expert)
                best_value, best_id = b.select(better, v, best_value), b.select(better, e, best_id)
            value.set(b.subgroup_max(best_value))
            id.set(b.subgroup_min(b.select(best_value == value.get(), best_id, b.const(u32, spec.n_expert))))
            highest.set(b.select(turn == 0, value.get(), highest.get()))
            total.add(b.exp(value.get() - highest.get()))
            for i in slots:
                mine = turn == lane + i * spec.lanes
                kept_value[i].set(b.select(mine, value.get(), kept_value[i].get()))
                kept_id[i].set(b.select(mine, id.get(), kept_id[i].get()))

        # 3. The softmax; what does not exist adds exp(-inf) = 0.
        top = highest.get()
        if spec.softmax == "all":
            mine_of_all = b.exp(values[0] - top)
            for v in values[1:]:
                mine_of_all = mine_of_all + b.exp(v - top)
            total.set(b.subgroup_add(mine_of_all))
        for i in slots:
            slot = lane + i * spec.lanes
            with b.when(slot < spec.n_used):
                ids[token * spec.n_used + slot] = kept_id[i].get()
                weight = b.exp(kept_value[i].get() - top) / total.get()
                weights[token * spec.n_used + slot] = b.select(damaged, b.const(u32, NAN).bitcast(f32), weight)

    return body


@dataclass(frozen=True)
class TileSpec:
    """n_expert experts, `tile` rows a tile; lanes: subgroup size (a multiple of 4), one subgroup a dispatch."""

    n_expert: int
    tile: int = 4
    lanes: int = 8

    def n_tile(self, n_row: int) -> int:
        """Tiles that surely hold `n_row` rows, whatever their experts are. Raises: KernelError: too many rows."""
        if n_row > MAX_TILED_ROWS:
            raise KernelError(f"{n_row} rows of experts at once", hint=f"expected up to {MAX_TILED_ROWS}: lower prefill_chunk")
        return n_row // self.tile + min(n_row, self.n_expert)


@cache
def tiles(spec: TileSpec) -> Kernel:
    """ids u32 [n_row], the expert of each row → experts u32 [n_tile], rows u32 [n_tile, tile]. Dispatch: (1, 1, 1).

    Rows of one expert in rising order, its last tile filled up with NO_ID. Tiles that are left over have the expert NO_ID, and
    their rows are not written. Push: n_row, n_tile (at least spec.n_tile(n_row)).
    """
    held = range(-(-spec.n_expert // spec.lanes))  # lane l has experts l, l + lanes, …

    @kernel(
        ids=read(u32),
        experts=write(u32),
        rows=write(u32),
        push={"n_row": u32, "n_tile": u32},
        local_size=spec.lanes,
        name=f"tiles_of_{spec.tile}_of_{spec.n_expert}_experts_s{spec.lanes}",
    )
    def body(b: Block, ids: Buffer, experts: Buffer, rows: Buffer, *, n_row: Value, n_tile: Value) -> None:
        lane = b.local_id(0)
        mine = [lane + i * spec.lanes for i in held]

        def each_row(visit: Callable[[Value, Value], None]) -> None:
            """visit(row, expert) in all lanes, row after row: a lane loads one, all hear of it.

            Four a turn, because lavapipe ends loops after 65,535 turns, all of an invocation counted; more at once take a second
            to compile and are no faster (0.2 ms for 4,096 rows of 128 experts).
            """
            with b.range(0, n_row, step=spec.lanes) as first:
                loaded = ids[b.min(first + lane, n_row - 1)]
                with b.range(0, spec.lanes, step=4) as four:
                    for i in range(4):
                        row = first + four + i
                        visit(row, b.select(row < n_row, b.subgroup_shuffle(loaded, four + i), b.const(u32, NO_ID)))

        # 1. How many rows each expert has.
        count = [b.var(u32, 0) for _ in held]

        def add(row: Value, expert: Value) -> None:
            for i in held:
                count[i].set(b.select(expert == mine[i], count[i].get() + 1, count[i].get()))

        each_row(add)

        # 2. Where its tiles begin.
        n_used, place, end = b.const(u32, 0), [], []
        for i in held:
            own = (count[i].get() + (spec.tile - 1)) // spec.tile
            start = n_used
            for other in range(spec.lanes):
                start = b.select(lane == other, n_used, start)
                n_used = n_used + b.subgroup_shuffle(own, other)
            place.append(b.var(u32, start * spec.tile))
            end.append((start + own) * spec.tile)

        # 3. Put the rows there; the lane of a row's expert does it.
        def put(row: Value, expert: Value) -> None:
            at = b.const(u32, NO_ID)
            for i in held:
                its = expert == mine[i]
                at = b.select(its, place[i].get(), at)
                place[i].set(b.select(its, place[i].get() + 1, place[i].get()))
            with b.when(at != NO_ID):
                rows[at] = row
                with b.when(at % spec.tile == 0):
                    experts[at // spec.tile] = expert

        each_row(put)

        # 4. Fill up.
        for i in held:
            with b.range(place[i].get(), end[i]) as at:
                rows[at] = b.const(u32, NO_ID)
        with b.range(n_used + lane, n_tile, step=spec.lanes) as at:
            experts[at] = b.const(u32, NO_ID)

    return body


def combine_groups(n_col: int, n_token: int) -> tuple[int, int, int]:
    """Workgroups of a dispatch: an invocation takes four columns of a token."""
    return -(-n_col // (4 * WORKGROUP)), n_token, 1


@cache
def combine(n_used: int, kind: str = "lane_row") -> Kernel:
    """y[t] += sum over slots s of weights[t, s] * x[t * n_used + s], in the order of s. Dispatch: combine_groups(n_col, n_token).

    Bindings: x (f32x4; texel in lane_row, storage in lane_chunk), weights f32 [n_token, n_used], y f32x4. Push: n_texel:
    n_col / 4, rounded up: the padding of x, which is zero, is added too; x_stride, y_stride: texels a row.
    """

    @kernel(
        x=(texel if kind == "lane_row" else read)(f32x4),
        weights=read(f32),
        y=readwrite(f32x4),
        push={"n_texel": u32, "x_stride": u32, "y_stride": u32},
        local_size=WORKGROUP,
        name=f"combine_{n_used}_{kind}",
    )
    def body(b: Block, x: Buffer, weights: Buffer, y: Buffer, *, n_texel: Value, x_stride: Value, y_stride: Value) -> None:
        at, token = b.global_id(0), b.workgroup_id(1)
        with b.when(at < n_texel):
            total = y[token * y_stride + at]
            for slot in range(n_used):
                row = token * n_used + slot
                total = total + x[row * x_stride + at] * weights[row]
            y[token * y_stride + at] = total

    return body
