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
    queries = _queries(b, spec, q, lane, result.pair)
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
            total = _sum_of_lanes(b, head.total.get(), spec.lanes)
            result.store_state(g, head.highest.get(), total)
            owner.store(g, [value.get() for value in head.values], result.finish(g, head.highest.get(), total), result)


def _slots(b: Block, spec: AttentionSpec, rows: Rows, base: Value, positions: list[Value]) -> list[Value]:
    """Cache slots of positions in the tile that starts at `base`; one look-up where a tile lies in one block."""
    if spec.block_size % spec.turn == 0:
        block = rows.block(base)
        return [block + position % spec.block_size for position in positions]
    return [rows.block(position) + position % spec.block_size for position in positions]


def _queries(b: Block, spec: AttentionSpec, q: Buffer, lane: Value, pair: Value) -> list[list[Value]]:
    """[group][texels of a head spread over the lanes] of f32x4, scaled; dim d is component d % 4 of lane (d / 4) % lanes."""
    n_texel = spec.head_dim // 4
    queries = []
    for g in range(spec.group):
        start = (pair * spec.group + g) * n_texel
        offsets = [lane + j if j + spec.lanes <= n_texel else b.min(lane + j, n_texel - 1) for j in range(0, n_texel, spec.lanes)]
        queries.append([q[start + offset] * query_scale(spec) for offset in offsets])
    return queries


def _scores(b: Block, spec: AttentionSpec, rows: Rows, slots: list[Value], queries: list[list[Value]]) -> list[list[Value]]:
    """[group][register] scores of this lane's positions."""
    starts = [rows.start(slot) for slot in slots]
    scales = [rows.key_scales(start) for start in starts]
    totals: list[list[Value]] = []
    for part, first in enumerate(range(0, spec.head_dim, rows.scaled_dims)):
        products = _products(b, rows, starts, queries, range(first, first + rows.scaled_dims))
        if scales[0]:
            products = [[p * own[part] for p, own in zip(head, scales, strict=True)] for head in products]
        totals = (
            [[t + p for t, p in zip(*both, strict=True)] for both in zip(totals, products, strict=True)] if part else products
        )
    return [capped(b, spec, head) for head in totals]


def _products(b: Block, rows: Rows, starts: list[Value], queries: list[list[Value]], dims: range) -> list[list[Value]]:
    """[group][register] sums over `dims` of query times key."""
    lanes = rows.spec.lanes
    sums: list[list[Value]] = [[b.const(f32, 0.0) for _ in starts] for _ in queries]
    for first in dims[:: rows.texel_dims]:
        keys = [rows.key(start, first) for start in starts]
        for i in range(rows.texel_dims):
            texel_index, part = divmod(first + i, 4)
            for g, query in enumerate(queries):
                factor = b.subgroup_shuffle(query[texel_index // lanes][part], texel_index % lanes)
                sums[g] = [total + key[i] * factor for total, key in zip(sums[g], keys, strict=True)]
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


def _sum_of_lanes(b: Block, value: Value, lanes: int) -> Value:
    """In the order of the lanes, by constant-lane shuffles; every lane gets the result."""
    return reduce(operator.add, [b.subgroup_shuffle(value, source) for source in range(lanes)])
