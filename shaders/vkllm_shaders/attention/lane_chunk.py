"""The schedule for GPUs: several subgroups a workgroup, queries in shared memory, 16-byte reads from storage buffers."""

from __future__ import annotations

import operator
from contextlib import nullcontext
from functools import reduce
from typing import Any

from vkllm_codegen import Block, Buffer, Value, f32, f32x4, u32
from vkllm_shaders.attention.result import Result
from vkllm_shaders.attention.rows import CHUNK_DIMS, Rows
from vkllm_shaders.attention.softmax import LOWEST, Head, Highest, capped, query_scale
from vkllm_shaders.attention.span import Span
from vkllm_shaders.attention.spec import AttentionSpec


def lane_chunk(b: Block, spec: AttentionSpec, q: Buffer, rows: Rows, result: Result, span: Span) -> None:
    """Several subgroups, each taking `lanes` positions a turn; all go round the loop equally often."""
    lane, subgroup, n_dim = b.subgroup_lane(), b.subgroup_id(), spec.group * spec.head_dim
    invocations = spec.invocations
    queries = b.shared(f32x4, n_dim // 4)
    with b.range(b.local_index(), n_dim // 4, step=invocations) as i:
        queries[i] = q[result.pair * (n_dim // 4) + i] * query_scale(spec)
    b.barrier("the queries are staged")

    n_subset, n_chunk = max(1, spec.lanes // spec.chunks), -(-spec.chunks // spec.lanes)
    subset = lane // spec.chunks if n_chunk == 1 else b.const(u32, 0)
    chunks = [lane % spec.chunks] if n_chunk == 1 else [b.min(lane + j * spec.lanes, spec.chunks - 1) for j in range(n_chunk)]
    heads = [Head.fresh(b, CHUNK_DIMS * n_chunk) for _ in range(spec.group)]
    tops = [Highest.fresh(b) for _ in heads]

    with b.range(span.first, span.last, step=invocations) as base:
        position = base + subgroup * spec.lanes + lane
        valid, bounded = span.holds(position), span.bounded(position)
        place = rows.block(bounded) + bounded % spec.block_size
        scores = _scores(b, spec, rows, place, queries)
        weights = []
        for head, top, score in zip(heads, tops, scores, strict=True):
            now = top.update(b, b.subgroup_max(b.select(valid, score, LOWEST)))
            weights += head.update(b, now, [score], [valid])
        sums = [[value.get() for value in head.values] for head in heads]
        scales = rows.scales(rows.v, rows.start(place))
        for step in range(0, spec.lanes, n_subset):
            source = b.min(subset + step, spec.lanes - 1)
            mine = (subset < n_subset) & (subset + step < spec.lanes)
            start = rows.start(b.subgroup_shuffle(place, source))
            own = rows.own_scales(chunks, [b.subgroup_shuffle(scale, source) for scale in scales])
            values = rows.values(rows.v, start, chunks, own)
            for g, weight in enumerate(weights):
                factor = b.select(mine, b.subgroup_shuffle(weight, source), 0.0)
                sums[g] = [total + factor * value for total, value in zip(sums[g], values, strict=True)]
        for head, totals in zip(heads, sums, strict=True):
            for var, total in zip(head.values, totals, strict=True):
                var.set(total)

    _merge_subgroups(b, spec, heads, tops, n_subset, chunks, result)


def _scores(b: Block, spec: AttentionSpec, rows: Rows, place: Value, queries: Any) -> list[Value]:
    """[group] scores of this lane's position, the queries read from shared memory (all lanes the same address)."""
    totals: list[Value] = []
    start = rows.start(place)
    scales = rows.scales(rows.k, start)
    for part, first in enumerate(range(0, spec.head_dim, rows.scaled_dims)):
        products = _products(b, rows, start, queries, range(first, first + rows.scaled_dims))
        if scales:
            products = [b.fma(p, scales[part], totals[g]) if part else p * scales[part] for g, p in enumerate(products)]
        totals = products
    return capped(b, spec, totals)


def _products(b: Block, rows: Rows, start: Value, queries: Any, dims: range) -> list[Value]:
    """[group] sums over `dims` of query times key."""
    spec = rows.spec
    sums = [b.const(f32, 0.0) for _ in range(spec.group)]
    for first in dims[:: rows.texel_dims]:
        key = rows.key(start, first)
        for g in range(spec.group):
            for quarter in range(rows.texel_dims // 4):
                query = queries[g * (spec.head_dim // 4) + first // 4 + quarter]
                for i in range(4):
                    sums[g] = b.fma(key[4 * quarter + i], query[i], sums[g])
    return sums


def _merge_subgroups(
    b: Block, spec: AttentionSpec, heads: list[Head], tops: list[Highest], n_subset: int, chunks: list[Value], result: Result
) -> None:
    """Bring the subgroups of a workgroup to one largest score a head, add them up, store."""
    lane, subgroup, invocations = b.subgroup_lane(), b.subgroup_id(), spec.invocations
    state = b.shared(f32, 2 * spec.subgroups * spec.group)
    values = b.shared(f32, spec.subgroups * spec.group * spec.head_dim)
    for g, (head, top) in enumerate(zip(heads, tops, strict=True)):
        total = b.subgroup_add(head.total.get())
        with b.when(lane == 0):
            state[(subgroup * spec.group + g) * 2] = top.var.get()
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
            divisor = result.finish(g, highest, total)
            with b.range(b.local_index(), spec.head_dim, step=invocations) as dim:
                parts = [share * values[(s * spec.group + g) * spec.head_dim + dim] for s, share in enumerate(shares)]
                result.store(g, dim, reduce(operator.add, parts), divisor)
