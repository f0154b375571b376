"""The schedule for lavapipe: one subgroup a workgroup, texel reads, constant-lane shuffles and exchanges.

A lane owns 8 dims (a chunk) of queries, K and V alike. K and V rows are read one after the other, so that a row's chunks lie in
neighbouring lanes; the sums over dims of as many positions as there are chunks are then added up across lanes by halves, which
leaves each lane with the score of a position of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce

from vkllm_codegen import Block, Buffer, Value, f32, u32
from vkllm_shaders.attention.result import Result
from vkllm_shaders.attention.rows import CHUNK_DIMS, Rows
from vkllm_shaders.attention.softmax import LOWEST, Head, Highest, capped, query_scale
from vkllm_shaders.attention.span import Span
from vkllm_shaders.attention.spec import AttentionSpec
from vkllm_shaders.records import over_lanes


def lane_row(b: Block, spec: AttentionSpec, q: Buffer, rows: Rows, result: Result, span: Span) -> None:
    """One subgroup: tiles of `turn` positions, `turn / lanes` registers of scores a head."""
    lane, registers = b.subgroup_lane(), range(spec.turn // spec.lanes)
    owner = _Owner.of(b, spec, lane)
    queries = [owner.query(q, result.pair * spec.group + g) for g in range(spec.group)]
    tops = _Tops(b, spec.group, spec.lanes)
    heads = [Head.fresh(b, CHUNK_DIMS * owner.n_chunk) for _ in range(spec.group)]

    with b.range(span.first, span.last, step=spec.turn) as base:
        positions = [base + (r * spec.lanes) + lane for r in registers]
        valid = [span.holds(position) for position in positions]
        places = _places(b, spec, rows, base, [span.bounded(position) for position in positions])
        by_register = [_scores(rows, owner, place, queries) for place in places]
        scores = [capped(b, spec, [own[g] for own in by_register]) for g in range(spec.group)]
        masked = [[b.select(ok, score, LOWEST) for score, ok in zip(own, valid, strict=True)] for own in scores]
        now = tops.update([reduce(b.max, own) for own in masked])
        weights = [head.update(b, top, own, valid) for head, top, own in zip(heads, now, scores, strict=True)]
        for r in registers:
            _add_values(rows, owner, places[r], [own[r] for own in weights], heads)

    with nullcontext() if result.direct else b.when(result.used):
        for g, head in enumerate(heads):
            total = _sum_of_lanes(b, head.total.get(), spec.lanes)
            top = tops.of(g)
            result.store_state(g, top, total)
            owner.store(g, [value.get() for value in head.values], result.finish(g, top, total), result)


def _places(b: Block, spec: AttentionSpec, rows: Rows, base: Value, positions: list[Value]) -> list[Value]:
    """Cache rows of positions in the tile that starts at `base`; one look-up where a tile lies in one block."""
    if spec.block_size % spec.turn == 0:
        block = rows.block(base)
        return [block + position % spec.block_size for position in positions]
    return [rows.block(position) + position % spec.block_size for position in positions]


class _Tops:
    """The largest scores of all heads: head g's in lane g of as many registers as that takes."""

    def __init__(self, b: Block, group: int, lanes: int) -> None:
        self.b, self.lanes = b, lanes
        self.highest = [Highest.fresh(b) for _ in range(0, group, lanes)]
        self.n_merged = min(1 << (group - 1).bit_length(), lanes)

    def update(self, scores: list[Value]) -> list[tuple[Value, Value]]:
        """Take in scores of every head, a position a lane. Returns: of every head what Head.update wants."""
        b, packed = self.b, []
        for i, highest in enumerate(self.highest):
            own = scores[i * self.lanes : (i + 1) * self.lanes]
            largest = _merged(b, b.max, own + [b.const(f32, LOWEST)] * (self.n_merged - len(own)))
            packed.append(highest.update(b, over_lanes(b, b.max, largest, self.lanes, self.n_merged)))
        return [(self._of(g, [now for now, _ in packed]), self._of(g, [keep for _, keep in packed])) for g in range(len(scores))]

    def of(self, g: int) -> Value:
        """Head g's largest score."""
        return self._of(g, [highest.var.get() for highest in self.highest])

    def _of(self, g: int, packed: list[Value]) -> Value:
        return self.b.subgroup_shuffle(packed[g // self.lanes], g % self.lanes)


@dataclass(frozen=True)
class _Owner:
    """Which dims a lane owns: `n_chunk` chunks of 8; or one, where the lanes make `n_subset` subsets that hold all chunks each.

    Of `lanes` positions a subset takes as many as it has lanes, position for position in one `step`.
    """

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

    @property
    def n_step(self) -> int:
        """Lanes of a subset, and positions that it takes."""
        return self.spec.lanes // self.n_subset

    def query(self, q: Buffer, head: Value) -> list[Value]:
        """This lane's dims of a head, scaled; zeros for those that another lane owns."""
        start, scale = head * (self.spec.head_dim // 4), query_scale(self.spec)
        dims = [q[start + chunk * 2 + i][j] * scale for chunk in self.chunk for i in range(2) for j in range(4)]
        if self.n_subset > 1 or self.spec.chunks % self.spec.lanes == 0:
            return dims
        lane = self.b.subgroup_lane()
        owned = [lane + j * self.spec.lanes < self.spec.chunks for j in range(self.n_chunk)]
        return [self.b.select(owned[i // CHUNK_DIMS], dim, 0.0) for i, dim in enumerate(dims)]

    def spread(self, value: Value, step: int) -> Value:
        """Of a value that lane = position holds, what this lane needs at `step`: its own subset's position."""
        if self.n_subset == self.spec.lanes:
            return value
        spread = self.b.subgroup_shuffle(value, step)
        for t in range(1, self.n_subset):
            spread = self.b.select(self.subset == t, self.b.subgroup_shuffle(value, t * self.n_step + step), spread)
        return spread

    def gathered(self, parts: list[Value]) -> Value:
        """Of parts[step], each lane's part of a sum over its subset, the whole sum that belongs to this lane's position."""
        return _merged(self.b, operator.add, parts)

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


def _rows_read(rows: Rows, owner: _Owner, place: Value, cache: Buffer) -> Iterator[list[Value]]:
    """This lane's dims of K or V rows, those of `lanes` positions, step by step."""
    scales = rows.scales(cache, rows.start(place))
    for step in range(owner.n_step):
        own = rows.own_scales(owner.chunk, [owner.spread(scale, step) for scale in scales])
        yield rows.values(cache, rows.start(owner.spread(place, step)), owner.chunk, own)


def _scores(rows: Rows, owner: _Owner, place: Value, queries: list[list[Value]]) -> list[Value]:
    """[group] products of the queries and the key of this lane's position."""
    parts: list[list[Value]] = [[] for _ in queries]
    for key in _rows_read(rows, owner, place, rows.k):
        for own, query in zip(parts, queries, strict=True):
            own.append(reduce(operator.add, [q * k for q, k in zip(query, key, strict=True)]))
    return [owner.gathered(own) for own in parts]


def _add_values(rows: Rows, owner: _Owner, place: Value, weights: list[Value], heads: list[Head]) -> None:
    """Add `lanes` positions' weighted V rows, a lane its own dims."""
    values = list(_rows_read(rows, owner, place, rows.v))
    for head, weight in zip(heads, weights, strict=True):  # head after head: the sums of one fit into registers
        totals = [var.get() for var in head.values]
        for step, row in enumerate(values):
            factor = owner.spread(weight, step)
            totals = [total + factor * value for total, value in zip(totals, row, strict=True)]
        for var, total in zip(head.values, totals, strict=True):
            var.set(total)


def _merged(b: Block, combine: Callable[[Value, Value], Value], parts: list[Value]) -> Value:
    """Of n parts, a power of two: lane l gets parts[l % n], combined over the aligned n lanes that l is one of.

    By halves: n - 1 exchanges, where one part after the other would take n log2(n).
    """
    distance = 1
    while len(parts) > 1:
        odd = (b.subgroup_lane() & distance) != 0
        parts = [
            combine(b.select(odd, late, early), b.subgroup_shuffle_xor(b.select(odd, early, late), distance))
            for early, late in zip(parts[::2], parts[1::2], strict=True)
        ]
        distance *= 2
    return parts[0]


def _sum_of_lanes(b: Block, value: Value, lanes: int) -> Value:
    """In the order of the lanes, by constant-lane shuffles; every lane gets the result."""
    return reduce(operator.add, [b.subgroup_shuffle(value, source) for source in range(lanes)])
