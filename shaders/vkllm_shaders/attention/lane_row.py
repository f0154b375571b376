"""The schedule for lavapipe: one subgroup a workgroup, texel reads, constant-lane shuffles."""

from __future__ import annotations

import operator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce

from vkllm_codegen import Block, Buffer, Value, f32, u32
from vkllm_shaders.attention.result import Result
from vkllm_shaders.attention.rows import CHUNK_DIMS, Rows
from vkllm_shaders.attention.softmax import LOWEST, Head, capped, query_scale
from vkllm_shaders.attention.span import Span
from vkllm_shaders.attention.spec import AttentionSpec
from vkllm_shaders.records import over_lanes


def lane_row(b: Block, spec: AttentionSpec, q: Buffer, rows: Rows, result: Result, span: Span) -> None:
    """One subgroup: tiles of `turn` positions, `turn / lanes` registers of scores a head."""
    lane, registers = b.subgroup_lane(), range(spec.turn // spec.lanes)
    queries = _Queries.of(b, spec, q, result.pair, rows.texel_dims)
    owner = _Owner.of(b, spec, lane)
    heads = [Head.fresh(b, CHUNK_DIMS * owner.n_chunk) for _ in range(spec.group)]

    with b.range(span.first, span.last, step=spec.turn) as base:
        positions = [base + (r * spec.lanes) + lane for r in registers]
        valid = [span.holds(position) for position in positions]
        slots = _slots(b, spec, rows, base, [span.bounded(position) for position in positions])
        scores = _scores(b, spec, rows, slots, queries)
        weights = []
        for head, own in zip(heads, scores, strict=True):
            masked = [b.select(ok, score, LOWEST) for score, ok in zip(own, valid, strict=True)]
            weights.append(head.update(b, over_lanes(b, b.max, reduce(b.max, masked), spec.lanes), own, valid))
        for r in registers:
            _add_values(rows, owner, slots[r], [own[r] for own in weights], heads)

    with nullcontext() if result.direct else b.when(result.used):
        for g, head in enumerate(heads):
            total = over_lanes(b, operator.add, head.total.get(), spec.lanes)
            result.store_state(g, head.highest.get(), total)
            owner.store(g, [value.get() for value in head.values], result.finish(g, head.highest.get(), total), result)


def _slots(b: Block, spec: AttentionSpec, rows: Rows, base: Value, positions: list[Value]) -> list[Value]:
    """Cache slots of positions in the tile that starts at `base`; one look-up where a tile lies in one block."""
    if spec.block_size % spec.turn == 0:
        block = rows.block(base)
        return [block + position % spec.block_size for position in positions]
    return [rows.block(position) + position % spec.block_size for position in positions]


@dataclass(frozen=True)
class _Queries:
    """The group's queries, scaled, spread over the lanes. K is read in texels of `width` dims, `lanes` texels a round.

    Where rounds are whole, lane l takes the texels of a round in the order l, l ^ 1, l ^ 2 …, and owns the query's dims of the
    first: what it needs next lies in the lane that it exchanges with, which takes one instruction. Elsewhere all lanes take the
    same texel, and dim d, component d % 4 of lane (d / 4) % lanes, is spread to all of them, which takes two.
    """

    b: Block
    lanes: int
    width: int
    exchanged: bool
    texels: list[list[Value]]  # [group], f32x4

    @classmethod
    def of(cls, b: Block, spec: AttentionSpec, q: Buffer, pair: Value, width: int) -> _Queries:
        lane, lanes, n_texel = b.subgroup_lane(), spec.lanes, spec.head_dim // 4
        exchanged = spec.cache == "f16" and spec.head_dim % (lanes * width) == 0
        if exchanged:
            each = width // 4
            offsets = [(lane + first) * each + i for first in range(0, n_texel // each, lanes) for i in range(each)]
        else:
            offsets = [lane + j if j + lanes <= n_texel else b.min(lane + j, n_texel - 1) for j in range(0, n_texel, lanes)]
        starts = [(pair * spec.group + g) * n_texel for g in range(spec.group)]
        texels = [[q[start + offset] * query_scale(spec) for offset in offsets] for start in starts]
        return cls(b, lanes, width, exchanged, texels)

    def texel(self, i: int) -> Value | int:
        """The number of the i-th texel of a K row that a lane reads."""
        first, j = i // self.lanes * self.lanes, i % self.lanes
        return (self.b.subgroup_lane() ^ j) + first if self.exchanged else i

    def factor(self, g: int, i: int, dim: int) -> Value:
        """What the i-th texel's number `dim` is multiplied with."""
        if self.exchanged:
            of_round = i // self.lanes * (self.width // 4)
            own, j = self.texels[g][of_round + dim // 4][dim % 4], i % self.lanes
            return self.b.subgroup_shuffle_xor(own, j) if j else own
        texel, part = divmod(i * self.width + dim, 4)
        return self.b.subgroup_shuffle(self.texels[g][texel // self.lanes][part], texel % self.lanes)


def _scores(b: Block, spec: AttentionSpec, rows: Rows, slots: list[Value], queries: _Queries) -> list[list[Value]]:
    """[group][register] scores of this lane's positions."""
    starts = [rows.start(slot) for slot in slots]
    scales = [rows.key_scales(start) for start in starts]
    totals: list[list[Value]] = []
    n_texel = rows.scaled_dims // rows.texel_dims
    for part in range(spec.head_dim // rows.scaled_dims):
        products = _products(b, rows, starts, queries, range(part * n_texel, (part + 1) * n_texel))
        if scales[0]:
            products = [[p * own[part] for p, own in zip(head, scales, strict=True)] for head in products]
        totals = (
            [[t + p for t, p in zip(*both, strict=True)] for both in zip(totals, products, strict=True)] if part else products
        )
    return [capped(b, spec, head) for head in totals]


def _products(b: Block, rows: Rows, starts: list[Value], queries: _Queries, texels: range) -> list[list[Value]]:
    """[group][register] sums of query times key over some texels of a row."""
    sums: list[list[Value]] = [[b.const(f32, 0.0) for _ in starts] for _ in queries.texels]
    for i in texels:
        keys = [rows.key(start, queries.texel(i)) for start in starts]
        for dim in range(rows.texel_dims):
            for g, own in enumerate(sums):
                factor = queries.factor(g, i, dim)
                sums[g] = [total + key[dim] * factor for total, key in zip(own, keys, strict=True)]
    return sums


@dataclass(frozen=True)
class _Owner:
    """Which dims a lane owns: `n_chunk` chunks of 8, or one chunk for every `n_subset`-th position (fewer chunks than lanes)."""

    b: Block
    spec: AttentionSpec
    n_chunk: int
    n_subset: int
    subset: Value
    chunk: list[Value]

    @classmethod
    def of(cls, b: Block, spec: AttentionSpec, lane: Value) -> _Owner:
        """Lanes beyond the last chunk repeat it and store nothing."""
        n_subset = spec.lanes // spec.chunks if spec.lanes % spec.chunks == 0 else 1
        n_chunk = -(-spec.chunks // spec.lanes)
        if n_subset > 1:
            return cls(b, spec, 1, n_subset, lane // spec.chunks, [lane % spec.chunks])
        own = [b.min(lane + j * spec.lanes, spec.chunks - 1) for j in range(n_chunk)]
        return cls(b, spec, n_chunk, 1, b.const(u32, 0), own)

    def spread(self, value: Value, step: int) -> Value:
        """Of a value that lane = position holds, what this lane needs at `step`: its own subset's position."""
        if self.n_subset == self.spec.lanes:
            return value
        source = step * self.n_subset
        spread = self.b.subgroup_shuffle(value, source)
        for t in range(1, self.n_subset):
            spread = self.b.select(self.subset == t, self.b.subgroup_shuffle(value, source + t), spread)
        return spread

    def store(self, g: int, values: list[Value], total: Value, result: Result) -> None:
        """Add up the subsets and store the dims that this lane owns."""
        lane = self.b.subgroup_lane()
        if self.n_subset > 1:
            values = [self._over_subsets(value) for value in values]
        for j, chunk in enumerate(self.chunk):
            owned = lane + j * self.spec.lanes < self.spec.chunks
            result.store_chunk(g, chunk, values[CHUNK_DIMS * j :][:CHUNK_DIMS], total, owned)

    def _over_subsets(self, value: Value) -> Value:
        """The sum over the lanes of this lane's chunk."""
        chunks, lanes = self.spec.chunks, self.spec.lanes
        sums = [
            reduce(operator.add, [self.b.subgroup_shuffle(value, source) for source in range(c, lanes, chunks)])
            for c in range(chunks)
        ]
        total = sums[0]
        for c in range(1, chunks):
            total = self.b.select(self.chunk[0] == c, sums[c], total)
        return total


def _add_values(rows: Rows, owner: _Owner, slot: Value, weights: list[Value], heads: list[Head]) -> None:
    """Add `lanes` positions' weighted V rows, a lane its own dims."""
    scales = rows.value_scales(rows.start(slot))
    values: list[list[Value]] = []  # of each step
    for step in range(owner.spec.lanes // owner.n_subset):
        start = rows.start(owner.spread(slot, step))
        own = rows.own_scales(owner.chunk, [owner.spread(scale, step) for scale in scales])
        values.append(rows.values(start, owner.chunk, own))
    for head, weight in zip(heads, weights, strict=True):  # head after head: the sums of one fit into registers
        totals = [var.get() for var in head.values]
        for step, row in enumerate(values):
            factor = owner.spread(weight, step)
            totals = [total + factor * value for total, value in zip(totals, row, strict=True)]
        for var, total in zip(head.values, totals, strict=True):
            var.set(total)
