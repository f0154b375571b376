"""Attention over the paged f16 cache: grouped heads, causal by length, online softmax in f32; no score leaves a register.

One workgroup serves all `group` query heads of one (row, KV head), so that K and V are read once. Positions 0 … length - 1 of
a row lie in blocks of `block_size` cache slots, named by its block table; a row's length counts only its own and earlier
positions, which is all that causality needs. A row of length 0 is padding: its output is zero.

`direct(spec)` covers a row's whole length in one workgroup and writes the output. Where there are too few (row, KV head)
pairs to fill the device, `partial(spec)` gives `split` positions to a workgroup and `combine(spec)` merges. lavapipe has as
many workers as threads: with two, `direct` is right for any model of two KV heads or more, and saves a dispatch. A GPU that
decodes one long sequence wants the split.

Schedules ("lanes" is the subgroup size):
- "lane_row" (lavapipe): one subgroup a workgroup, texel reads, values pass between lanes by constant-lane shuffles only.
  Scores: a lane owns a position. Output: a lane owns 8 dims.
- "lane_chunk" (GPUs): several subgroups a workgroup, each with its own positions; queries in shared memory; 16-byte reads
  from storage buffers, neighbouring lanes reading neighbouring chunks of V; a reduction through shared memory at the end.

Sources: online softmax arXiv 1805.02867, FlashAttention arXiv 2205.14135, PagedAttention arXiv 2309.06180.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Any, Literal

from vkllm_codegen import Block, Buffer, Kernel, Value, Var, f32, f32x4, kernel, read, texel, u32, u32x4, write
from vkllm_codegen.errors import KernelError

LOWEST = -1.0e30
"""Stands for "no score yet": finite, so that no difference of two of them is NaN."""


@dataclass(frozen=True)
class AttentionSpec:
    """The shape and the schedule of one attention kernel; every field makes a new module.

    head_dim: a multiple of 8; group: query heads a KV head; block_size: cache slots a block; lanes: subgroup size;
    split: positions a workgroup of `partial`; tile: positions a turn of lane_row, a multiple of lanes (0: lanes; with twice as
    many a group of 7 runs 15 % faster on lavapipe, after twice the compile time); subgroups: a workgroup of lane_chunk.
    """

    head_dim: int
    group: int
    block_size: int = 32
    lanes: int = 8
    split: int = 512
    schedule: Literal["lane_row", "lane_chunk"] = "lane_row"
    tile: int = 0
    subgroups: int = 4

    def __post_init__(self) -> None:
        if self.head_dim % 8 or self.head_dim <= 0 or self.group <= 0:
            raise KernelError(
                f"attention of head_dim {self.head_dim}, group {self.group}", hint="head_dim must be a multiple of 8"
            )
        if self.split % max(self.turn, self.block_size) or self.turn % self.lanes:
            raise KernelError(
                f"attention with split {self.split}, block_size {self.block_size}, tile {self.turn}, lanes {self.lanes}",
                hint="split must be a multiple of block_size and of tile, tile a multiple of lanes",
            )

    @property
    def turn(self) -> int:
        """Positions a subgroup takes at a time."""
        return self.tile or self.lanes

    @property
    def chunks(self) -> int:
        """16-byte chunks (8 dims in f16) of one K or V row."""
        return self.head_dim // 8

    @property
    def name(self) -> str:
        """The part of kernel names that tells the specs apart."""
        shape = f"d{self.head_dim}_g{self.group}_b{self.block_size}_s{self.lanes}_t{self.turn}_p{self.split}"
        return f"{self.schedule}_{shape}" + (f"_n{self.subgroups}" if self.schedule == "lane_chunk" else "")

    @property
    def invocations(self) -> int:
        """The workgroup size of `direct` and `partial`."""
        return self.lanes * (self.subgroups if self.schedule == "lane_chunk" else 1)

    @property
    def shared_nbytes(self) -> int:
        """Shared memory of a workgroup: the queries, and every subgroup's state and values."""
        floats = self.group * self.head_dim + self.subgroups * self.group * (self.head_dim + 2)
        return 4 * floats if self.schedule == "lane_chunk" else 0

    def fitted(self, max_shared_bytes: int, max_invocations: int) -> AttentionSpec:
        """The same with as many subgroups a workgroup as a device's limits allow, 8 at most.

        Raises: KernelError: not even one fits.
        """
        for subgroups in (8, 4, 2, 1):
            spec = replace(self, subgroups=subgroups)
            if spec.shared_nbytes <= max_shared_bytes and spec.invocations <= max_invocations:
                return spec
        least = replace(self, subgroups=1).shared_nbytes
        raise KernelError(
            f"attention, {self.group} heads of {self.head_dim}, needs {least} bytes of shared memory of {max_shared_bytes}",
            hint='use schedule="lane_row", which needs none',
        )

    def n_split(self, n_position: int) -> int:
        """Workgroups of `partial` a (row, KV head) that cover `n_position` positions."""
        return -(-n_position // self.split)

    def scratch_nbytes(self, n_row: int, n_kv_head: int, n_split: int) -> int:
        """Size of the partial results, f32 [n_row, n_kv_head, n_split, group, 2 + head_dim]: (max, sum, weighted values)."""
        return 4 * n_row * n_kv_head * n_split * self.group * (2 + self.head_dim)


def direct(spec: AttentionSpec) -> Kernel:
    """q f32 [T, n_head * head_dim] → out f32 of the same shape, each row over its whole length. Dispatch: (1, n_kv_head, T).

    Bindings: q (texel f32x4), k, v (lane_row: texel u32x4; lane_chunk: storage), block_table, params, out (storage).
    Push: n_token (T of the params buffer), n_kv_head.
    """
    return _attention(spec, direct=True)


def partial(spec: AttentionSpec) -> Kernel:
    """The same over `split` positions a workgroup, into the scratch buffer `out`. Dispatch: (n_split, n_kv_head, T).

    Workgroups beyond a row's length write nothing: n_split may be the recording's fixed maximum.
    """
    return _attention(spec, direct=False)


@cache
def _attention(spec: AttentionSpec, direct: bool) -> Kernel:
    name = f"attention_{'direct' if direct else 'partial'}_{spec.name}"
    body, rows = (_lane_row, texel(u32x4)) if spec.schedule == "lane_row" else (_lane_chunk, read(u32x4))

    @kernel(
        q=texel(f32x4),
        k=rows,
        v=rows,
        block_table=texel(u32),
        params=read(u32),
        out=write(f32),
        push={"n_token": u32, "n_kv_head": u32},
        local_size=spec.invocations,
        name=name,
    )
    def attention(
        b: Block,
        q: Buffer,
        k: Buffer,
        v: Buffer,
        block_table: Buffer,
        params: Buffer,
        out: Buffer,
        *,
        n_token: Value,
        n_kv_head: Value,
    ) -> None:
        head, row = b.workgroup_id(1), b.workgroup_id(2)
        length = params[n_token * 3 + row]
        first = b.const(u32, 0) if direct else b.workgroup_id(0) * spec.split
        last = length if direct else b.min(first + spec.split, length)
        paged = _Cache(b, spec, k, v, block_table, head, n_kv_head, params[n_token * 4 + row])
        body(b, spec, q, paged, _Result(b, spec, out, row * n_kv_head + head, first < length, direct), first, last)

    return attention


@dataclass(frozen=True)
class _Cache:
    """Where the K and V rows of one (row, KV head) lie."""

    b: Block
    spec: AttentionSpec
    k: Buffer
    v: Buffer
    block_table: Buffer
    head: Value
    n_kv_head: Value
    table_start: Value

    def block(self, position: Value) -> Value:
        """The first cache slot of the block that holds `position`."""
        return self.block_table[self.table_start + position // self.spec.block_size] * self.spec.block_size

    def chunk(self, slot: Value) -> Value:
        """Index of the first 16-byte chunk of a slot's K or V row."""
        return (slot * self.n_kv_head + self.head) * self.spec.chunks


@dataclass(frozen=True)
class _Result:
    """Where a workgroup's results go: the output itself, or its place in the scratch buffer; `used`: it has positions."""

    b: Block
    spec: AttentionSpec
    out: Buffer
    pair: Value
    used: Value
    direct: bool

    def store(self, g: Value | int, dim: Value, value: Value, total: Value) -> None:
        """One dim of head `g`; `total` is the sum of the weights."""
        if self.direct:
            share = self.b.select(self.used, value / total, 0.0)
            self.out[(self.pair * self.spec.group + g) * self.spec.head_dim + dim] = share
        else:
            self.out[self._base(g) + 2 + dim] = value

    def store_state(self, g: Value | int, highest: Value, total: Value) -> None:
        """The largest score (in log2 units) and the sum of weights of head `g`; nothing when `direct`."""
        if not self.direct:
            self.out[self._base(g)] = highest
            self.out[self._base(g) + 1] = total

    def _base(self, g: Value | int) -> Value:
        place = self.pair * self.b.num_workgroups(0) + self.b.workgroup_id(0)
        return (place * self.spec.group + g) * (self.spec.head_dim + 2)


@dataclass(frozen=True)
class _Head:
    """The running state of one query head: largest score, this lane's part of the sum of weights, weighted values."""

    highest: Var
    total: Var
    values: list[Var]

    @classmethod
    def fresh(cls, b: Block, n_value: int) -> _Head:
        return cls(b.var(f32, LOWEST), b.var(f32, 0.0), [b.var(f32, 0.0) for _ in range(n_value)])

    def update(self, b: Block, highest: Value, scores: Sequence[Value], valid: Sequence[Value]) -> list[Value]:
        """Move to the new largest score; returns the weights 2^(score - highest), zero where not valid.

        A NaN stays one: lavapipe's exp2 makes 0 of it.
        """
        before, now = self.highest.get(), b.max(self.highest.get(), highest)
        keep = b.exp2(before - now)
        below = [score - now for score in scores]
        powers = [b.select(distance <= 0.0, b.exp2(distance), distance) for distance in below]
        weights = [b.select(ok, power, 0.0) for ok, power in zip(valid, powers, strict=True)]
        self.highest.set(now)
        self.total.set(reduce(operator.add, weights, self.total.get() * keep))
        for value in self.values:
            value.set(value.get() * keep)
        return weights


def _score_scale(spec: AttentionSpec) -> float:
    """Scores are in log2 units: exp2 is the cheaper exponential."""
    return math.log2(math.e) / math.sqrt(spec.head_dim)


def _halves(b: Block, words: Value) -> list[Value]:
    """The 8 f16 of one chunk, widened."""
    pairs = [b.unpack_half2x16(words[i]) for i in range(4)]
    return [pair[i] for pair in pairs for i in range(2)]


# -- lane_row ---------------------------------------------------------------------------------------------------------------


def _lane_row(b: Block, spec: AttentionSpec, q: Buffer, cache: _Cache, result: _Result, first: Value, last: Value) -> None:
    """One subgroup: tiles of `turn` positions, `turn / lanes` registers of scores a head."""
    lane, registers = b.subgroup_lane(), range(spec.turn // spec.lanes)
    queries = _lane_queries(b, spec, q, lane, result.pair)
    owner = _Owner.of(b, spec, lane)
    heads = [_Head.fresh(b, 8 * owner.n_chunk) for _ in range(spec.group)]

    with b.range(first, last, step=spec.turn) as base:
        positions = [base + (r * spec.lanes) + lane for r in registers]
        valid = [position < last for position in positions]
        slots = _slots(b, spec, cache, base, [b.min(position, last - 1) for position in positions])
        scores = _lane_scores(b, spec, cache, slots, queries)
        weights = []
        for head, own in zip(heads, scores, strict=True):
            masked = [b.select(ok, score, LOWEST) for score, ok in zip(own, valid, strict=True)]
            weights.append(head.update(b, _across(b, b.max, reduce(b.max, masked), spec.lanes), own, valid))
        for r in registers:
            _lane_values(b, cache, owner, slots[r], [own[r] for own in weights], heads)

    with nullcontext() if result.direct else b.when(result.used):
        for g, head in enumerate(heads):
            total = _across(b, operator.add, head.total.get(), spec.lanes)
            result.store_state(g, head.highest.get(), total)
            owner.store(g, [value.get() for value in head.values], total, result)


def _slots(b: Block, spec: AttentionSpec, cache: _Cache, base: Value, positions: list[Value]) -> list[Value]:
    """Cache slots of positions in the tile that starts at `base`; one look-up where a tile lies in one block."""
    if spec.block_size % spec.turn == 0:
        block = cache.block(base)
        return [block + position % spec.block_size for position in positions]
    return [cache.block(position) + position % spec.block_size for position in positions]


def _lane_queries(b: Block, spec: AttentionSpec, q: Buffer, lane: Value, pair: Value) -> list[list[Value]]:
    """[group][texels of a head spread over the lanes] of f32x4, scaled; dim d is component d % 4 of lane (d / 4) % lanes."""
    n_texel = spec.head_dim // 4
    queries = []
    for g in range(spec.group):
        start = (pair * spec.group + g) * n_texel
        offsets = [lane + j if j + spec.lanes <= n_texel else b.min(lane + j, n_texel - 1) for j in range(0, n_texel, spec.lanes)]
        queries.append([q[start + offset] * _score_scale(spec) for offset in offsets])
    return queries


def _lane_scores(
    b: Block, spec: AttentionSpec, cache: _Cache, slots: list[Value], queries: list[list[Value]]
) -> list[list[Value]]:
    """[group][register] scores of this lane's positions."""
    scores: list[list[Value]] = [[b.const(f32, 0.0) for _ in slots] for _ in queries]
    starts = [cache.chunk(slot) for slot in slots]
    for chunk in range(spec.chunks):
        keys = [_halves(b, cache.k[start + chunk]) for start in starts]
        for i in range(8):
            texel_index, part = divmod(chunk * 8 + i, 4)
            for g, query in enumerate(queries):
                factor = b.subgroup_shuffle(query[texel_index // spec.lanes][part], texel_index % spec.lanes)
                scores[g] = [score + key[i] * factor for score, key in zip(scores[g], keys, strict=True)]
    return scores


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

    def store(self, g: int, values: list[Value], total: Value, result: _Result) -> None:
        """Add up the subsets and store the dims that this lane owns."""
        lane = self.b.subgroup_lane()
        if self.n_subset > 1:
            values = [self._over_subsets(value) for value in values]
        for j in range(self.n_chunk):
            with self.b.when(lane + j * self.spec.lanes < self.spec.chunks):
                for i in range(8):
                    result.store(g, self.chunk[j] * 8 + i, values[8 * j + i], total)

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


def _lane_values(b: Block, cache: _Cache, owner: _Owner, slot: Value, weights: list[Value], heads: list[_Head]) -> None:
    """Add `lanes` positions' weighted V rows, a lane its own dims."""
    sums = [[value.get() for value in head.values] for head in heads]
    for step in range(owner.spec.lanes // owner.n_subset):
        start = cache.chunk(owner.spread(slot, step))
        rows = [value for chunk in owner.chunk for value in _halves(b, cache.v[start + chunk])]
        for g, weight in enumerate(weights):
            factor = owner.spread(weight, step)
            sums[g] = [total + factor * value for total, value in zip(sums[g], rows, strict=True)]
    for head, own in zip(heads, sums, strict=True):
        for var, total in zip(head.values, own, strict=True):
            var.set(total)


def _across(b: Block, combine: Callable[[Value, Value], Value], value: Value, lanes: int) -> Value:
    """Combine a value over all lanes by constant-lane shuffles; every lane gets the result."""
    return reduce(combine, [b.subgroup_shuffle(value, source) for source in range(lanes)])


# -- lane_chunk -------------------------------------------------------------------------------------------------------------


def _lane_chunk(b: Block, spec: AttentionSpec, q: Buffer, cache: _Cache, result: _Result, first: Value, last: Value) -> None:
    """Several subgroups, each taking `lanes` positions a turn; all go round the loop equally often."""
    lane, subgroup, n_dim = b.subgroup_lane(), b.subgroup_id(), spec.group * spec.head_dim
    invocations = spec.invocations
    queries = b.shared(f32x4, n_dim // 4)
    with b.range(b.local_index(), n_dim // 4, step=invocations) as i:
        queries[i] = q[result.pair * (n_dim // 4) + i] * _score_scale(spec)
    b.barrier("the queries are staged")

    n_subset, n_chunk = max(1, spec.lanes // spec.chunks), -(-spec.chunks // spec.lanes)
    subset = lane // spec.chunks if n_chunk == 1 else b.const(u32, 0)
    chunks = [lane % spec.chunks] if n_chunk == 1 else [b.min(lane + j * spec.lanes, spec.chunks - 1) for j in range(n_chunk)]
    heads = [_Head.fresh(b, 8 * n_chunk) for _ in range(spec.group)]

    with b.range(first, last, step=invocations) as base:
        position = base + subgroup * spec.lanes + lane
        valid, bounded = position < last, b.min(position, last - 1)
        slot = cache.block(bounded) + bounded % spec.block_size
        scores = _shared_scores(b, spec, cache, slot, queries)
        weights = []
        for head, score in zip(heads, scores, strict=True):
            highest = b.subgroup_max(b.select(valid, score, LOWEST))
            weights += head.update(b, highest, [score], [valid])
        sums = [[value.get() for value in head.values] for head in heads]
        for step in range(0, spec.lanes, n_subset):
            source = b.min(subset + step, spec.lanes - 1)
            mine = (subset < n_subset) & (subset + step < spec.lanes)
            start = cache.chunk(b.subgroup_shuffle(slot, source))
            rows = [value for chunk in chunks for value in _halves(b, cache.v[start + chunk])]
            for g, weight in enumerate(weights):
                factor = b.select(mine, b.subgroup_shuffle(weight, source), 0.0)
                sums[g] = [total + factor * value for total, value in zip(sums[g], rows, strict=True)]
        for head, own in zip(heads, sums, strict=True):
            for var, total in zip(head.values, own, strict=True):
                var.set(total)

    _merge_subgroups(b, spec, heads, n_subset, chunks, result)


def _shared_scores(b: Block, spec: AttentionSpec, cache: _Cache, slot: Value, queries: Any) -> list[Value]:
    """[group] scores of this lane's position, the queries read from shared memory (all lanes the same address)."""
    scores = [b.const(f32, 0.0) for _ in range(spec.group)]
    start = cache.chunk(slot)
    for chunk in range(spec.chunks):
        key = _halves(b, cache.k[start + chunk])
        for g in range(spec.group):
            for half in range(2):
                query = queries[g * (spec.head_dim // 4) + chunk * 2 + half]
                for i in range(4):
                    scores[g] = b.fma(key[4 * half + i], query[i], scores[g])
    return scores


def _merge_subgroups(
    b: Block, spec: AttentionSpec, heads: list[_Head], n_subset: int, chunks: list[Value], result: _Result
) -> None:
    """Bring the subgroups of a workgroup to one largest score a head, add them up, store."""
    lane, subgroup, invocations = b.subgroup_lane(), b.subgroup_id(), spec.invocations
    state = b.shared(f32, 2 * spec.subgroups * spec.group)
    values = b.shared(f32, spec.subgroups * spec.group * spec.head_dim)
    for g, head in enumerate(heads):
        total = b.subgroup_add(head.total.get())
        with b.when(lane == 0):
            state[(subgroup * spec.group + g) * 2] = head.highest.get()
            state[(subgroup * spec.group + g) * 2 + 1] = total
        for j, chunk in enumerate(chunks):
            for i in range(8):
                own = head.values[8 * j + i].get()
                sources = (
                    [b.min(lane % spec.chunks + t * spec.chunks, spec.lanes - 1) for t in range(n_subset)] if n_subset > 1 else []
                )
                value = reduce(operator.add, [b.subgroup_shuffle(own, source) for source in sources]) if sources else own
                with b.when(lane + j * spec.lanes < spec.chunks):
                    values[(subgroup * spec.group + g) * spec.head_dim + chunk * 8 + i] = value
    b.barrier("every subgroup's state and values are in shared memory")

    with nullcontext() if result.direct else b.when(result.used):
        for g in range(spec.group):
            states = [(state[(s * spec.group + g) * 2], state[(s * spec.group + g) * 2 + 1]) for s in range(spec.subgroups)]
            highest = reduce(b.max, [top for top, _ in states])
            shares = [b.exp2(top - highest) for top, _ in states]
            total = reduce(operator.add, [share * part for share, (_, part) in zip(shares, states, strict=True)])
            with b.when(b.local_index() == 0):
                result.store_state(g, highest, total)
            with b.range(b.local_index(), spec.head_dim, step=invocations) as dim:
                parts = [share * values[(s * spec.group + g) * spec.head_dim + dim] for s, share in enumerate(shares)]
                result.store(g, dim, reduce(operator.add, parts), total)


# -- combine ----------------------------------------------------------------------------------------------------------------


@cache
def combine(spec: AttentionSpec) -> Kernel:
    """Merge the partial results of every (row, head) into out f32 [T, n_head * head_dim]. Dispatch: (n_head, T, 1).

    Bindings: partials (storage f32: the scratch buffer), params, out. Push: n_token, n_split (grid of `partial`), n_head.
    One subgroup a head: lane = dim; a head's splits one after the other.
    """
    owned = range(0, spec.head_dim, spec.lanes)

    @kernel(
        partials=read(f32),
        params=read(u32),
        out=write(f32),
        push={"n_token": u32, "n_split": u32, "n_head": u32},
        local_size=spec.lanes,
        name=f"attention_combine_{spec.name}",
    )
    def merge(b: Block, partials: Buffer, params: Buffer, out: Buffer, *, n_token: Value, n_split: Value, n_head: Value) -> None:
        head, row, lane = b.workgroup_id(0), b.workgroup_id(1), b.local_id(0)
        used = (params[n_token * 3 + row] + (spec.split - 1)) // spec.split
        dims = [b.min(lane + first, spec.head_dim - 1) for first in owned]
        merged = _Head.fresh(b, len(dims))
        with b.range(0, used) as split:
            place = (row * (n_head // spec.group) + head // spec.group) * n_split + split
            start = (place * spec.group + head % spec.group) * (spec.head_dim + 2)
            before, now = merged.highest.get(), b.max(merged.highest.get(), partials[start])
            keep, share = b.exp2(before - now), b.exp2(partials[start] - now)
            merged.highest.set(now)
            merged.total.set(merged.total.get() * keep + partials[start + 1] * share)
            for value, dim in zip(merged.values, dims, strict=True):
                value.set(value.get() * keep + partials[start + 2 + dim] * share)
        total = merged.total.get()
        for first, value, dim in zip(owned, merged.values, dims, strict=True):
            with b.when(lane + first < spec.head_dim):
                out[(row * n_head + head) * spec.head_dim + dim] = b.select(used > 0, value.get() / total, 0.0)

    return merge
