"""The k best logits of every row, on the device: greedy decoding copies back 16 bytes a token instead of the whole row.

`top_k(k)` gives every workgroup a segment of the row. Each turn finds the best value "after" the previous one, in the order
(value falling, id rising): k turns over a segment that stays in the cache, no sort, and no state but the last winner. Ties
go to the lowest id. Non-finite values are never chosen; they are counted, and the engine makes an error of the count.
`argmax` merges the segments' best to one record a row. For k > 1 the host merges: n_segment * k candidates are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from vkllm_codegen import (
    Block,
    Buffer,
    Kernel,
    Value,
    Var,
    boolean,
    f32,
    f32x4,
    kernel,
    read,
    readwrite,
    texel,
    trace,
    u32,
    write,
)
from vkllm_shaders.matmul.spec import NO_SLOT
from vkllm_shaders.reference import NO_ID

MINUS_INFINITY = 0xFF800000
EXPONENT = 0x7F800000


@dataclass(frozen=True)
class SampleSpec:
    """k: candidates a segment; segment: texels (4 logits) a workgroup; lanes: subgroup size, one subgroup a workgroup."""

    k: int = 1
    segment: int = 1024
    lanes: int = 8

    def n_segment(self, n_vocab: int) -> int:
        """Workgroups a row: a row that starts inside a texel touches one more."""
        return -(-(-(-n_vocab // 4) + 1) // self.segment)

    def candidates_nbytes(self, n_row: int, n_vocab: int) -> int:
        """Size of the candidates buffer, u32 [n_row, n_segment, k + 1, 2]."""
        return 8 * n_row * self.n_segment(n_vocab) * (self.k + 1)


@dataclass(frozen=True)
class _Best:
    """The best (value, id) that this lane has met; NO_ID and -inf when none."""

    value: Var
    id: Var

    @classmethod
    def fresh(cls, b: Block) -> _Best:
        return cls(b.var(f32, b.const(u32, MINUS_INFINITY).bitcast(f32)), b.var(u32, NO_ID))

    def reset(self, b: Block) -> None:
        self.value.set(b.const(u32, MINUS_INFINITY).bitcast(f32))
        self.id.set(b.const(u32, NO_ID))

    def offer(self, b: Block, allowed: Value, value: Value, id: Value) -> None:
        """Take (value, id) if allowed and better. Ids are offered in rising order, so that > keeps the lowest of equals."""
        better = allowed & (value > self.value.get())
        self.value.set(b.select(better, value, self.value.get()))
        self.id.set(b.select(better, id, self.id.get()))

    def over_lanes(self, b: Block) -> tuple[Value, Value]:
        """The best of the subgroup: largest value, lowest id among equals."""
        value = b.subgroup_max(self.value.get())
        return value, b.subgroup_min(b.select(self.value.get() == value, self.id.get(), NO_ID))


@cache
def top_k(spec: SampleSpec) -> Kernel:
    """logits f32 [n_row, n_vocab] → candidates u32 [n_row, n_segment, k + 1, 2]. Dispatch: (n_segment, n_row, 1).

    A segment's k pairs (id, bits of the f32 value) come best first, (NO_ID, -inf) beyond the finite ones; its last pair is
    (number of non-finite values, 0). Bindings: logits (texel f32x4; the buffer is a multiple of 16 bytes long, rows need not
    be), candidates. Push: n_vocab.
    """

    @kernel(
        logits=texel(f32x4),
        candidates=write(u32),
        push={"n_vocab": u32},
        local_size=spec.lanes,
        name=f"top_k_k{spec.k}_c{spec.segment}_s{spec.lanes}",
    )
    def body(b: Block, logits: Buffer, candidates: Buffer, *, n_vocab: Value) -> None:
        lane, row = b.local_id(0), b.workgroup_id(1)
        start = row * n_vocab
        first = start // 4 + b.workgroup_id(0) * spec.segment
        last = b.min(first + spec.segment, (start + n_vocab + 3) // 4)
        out = (row * b.num_workgroups(0) + b.workgroup_id(0)) * (2 * spec.k + 2)
        best, bad = _Best.fresh(b), b.var(u32, 0)
        previous_value, previous_id = b.var(f32, 0.0), b.var(u32, 0)

        with b.range(0, spec.k) as turn:
            best.reset(b)
            bad.set(b.const(u32, 0))
            with b.range(first + lane, last, step=spec.lanes) as i:
                values = logits[i]
                for part in range(4):
                    value, id = values[part], i * 4 + part - start
                    finite = (value.bitcast(u32) & EXPONENT) != EXPONENT
                    inside = id < n_vocab
                    after = (value < previous_value.get()) | ((value == previous_value.get()) & (id > previous_id.get()))
                    best.offer(b, inside & finite & (after | (turn == 0)), value, id)
                    bad.set(bad.get() + b.select(inside & ~finite, b.const(u32, 1), b.const(u32, 0)))
            value, id = best.over_lanes(b)
            previous_value.set(value)
            previous_id.set(id)
            with b.when(lane == 0):
                candidates[out + turn * 2] = id
                candidates[out + turn * 2 + 1] = value.bitcast(u32)

        count = b.subgroup_add(bad.get())
        with b.when(lane == 0):
            candidates[out + 2 * spec.k] = count
            candidates[out + 2 * spec.k + 1] = b.const(u32, 0)

    return body


@cache
def argmax(spec: SampleSpec, follow: bool = False) -> Kernel:
    """candidates of `top_k(spec)` → result u32 [n_row, 4]: id, bits of its value, non-finite values, 0. Dispatch: (n_row, 1, 1).

    `follow`: the next step is recorded behind this one and begins with these ids, so that its rows are made here: the tables
    of `params` u32 [5, capacity] are brought up to date (token ids, positions, cache rows of KV head 0, lengths, table starts;
    rows without a cache row stay as they are), where the push constant `more` is not zero.
    Bindings: candidates, result, with follow: block_table, params. Push: n_segment, with follow: first_row (of result),
        capacity, block_size, n_kv_head, more.
    """
    stride = 2 * spec.k + 2
    bindings = {"candidates": read(u32), "result": write(u32)}
    bindings |= {"block_table": texel(u32), "params": readwrite(u32)} if follow else {}
    push = ["n_segment"] + ["first_row", "capacity", "block_size", "n_kv_head", "more"] * follow

    def body(b: Block, bufs: dict[str, Buffer], push: dict[str, Value]) -> None:
        row, lane, candidates = b.workgroup_id(0), b.local_id(0), bufs["candidates"]
        best, bad = _Best.fresh(b), b.var(u32, 0)
        with b.range(lane, push["n_segment"], step=spec.lanes) as segment:
            place = (row * push["n_segment"] + segment) * stride
            best.offer(b, b.const(boolean, True), candidates[place + 1].bitcast(f32), candidates[place])
            bad.set(bad.get() + candidates[place + 2 * spec.k])
        value, id = best.over_lanes(b)
        count = b.subgroup_add(bad.get())
        with b.when(lane == 0):
            at = row + push["first_row"] if follow else row
            for i, word in enumerate([id, value.bitcast(u32), count, b.const(u32, 0)]):
                bufs["result"][at * 4 + i] = word
            if follow:
                _begin_next(b, bufs, push, row, id)

    return trace(f"argmax_k{spec.k}_s{spec.lanes}" + "_follow" * follow, bindings, dict.fromkeys(push, u32), {}, spec.lanes, body)


def _begin_next(b: Block, bufs: dict[str, Buffer], push: dict[str, Value], row: Value, id: Value) -> None:
    """Move a row of `params` to the position behind it, where the token `id` is to be read."""
    params, capacity, size = bufs["params"], push["capacity"], push["block_size"]
    with b.when((push["more"] != 0) & (params[capacity * 2 + row] != NO_SLOT)):
        position = params[capacity + row] + 1
        block = bufs["block_table"][params[capacity * 4 + row] + position // size]
        rows = [b.select(id == NO_ID, 0, id), position, block * push["n_kv_head"] * size + position % size, position + 1]
        for i, word in enumerate(rows):
            params[capacity * i + row] = word
