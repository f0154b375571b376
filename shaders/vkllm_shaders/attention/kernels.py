"""The three kernels: `direct`, or `partial` and `combine`."""

from __future__ import annotations

from functools import cache

from vkllm_codegen import Block, Buffer, Kernel, Value, f32, f32x4, read, texel, trace, u32, u32x2, u32x4, write
from vkllm_codegen.errors import KernelError
from vkllm_shaders.attention.lane_chunk import lane_chunk
from vkllm_shaders.attention.lane_row import lane_row
from vkllm_shaders.attention.result import Records, Result
from vkllm_shaders.attention.rows import Rows
from vkllm_shaders.attention.softmax import Head, Highest, with_sink
from vkllm_shaders.attention.span import Span, lowest_position
from vkllm_shaders.attention.spec import AttentionSpec


def direct(spec: AttentionSpec) -> Kernel:
    """q f32 [T, n_head * head_dim] → out f32 of the same shape, each row over all that it sees. Dispatch: (1, n_kv_head, T).

    Bindings: q (texel f32x4), k, v (lane_row: texel u32x4; lane_chunk: storage), block_table, params, with sinks: sinks
    (f32 [n_head]), out (storage), with records: record (u32x2, the same rows in 8 bits: records.py). k and v are
    [n_block, n_kv_head, block_size] rows of cache_row_nbytes bytes.
    Push: n_token (T of the params buffer), n_kv_head, with windowed: window (0: all positions are seen), with records: n_group
        (groups of a row: n_head * head_dim / 32).
    """
    return _attention(spec, direct=True)


def partial(spec: AttentionSpec) -> Kernel:
    """The same over `split` positions a workgroup, into the scratch buffer `out`. Dispatch: (n_split, n_kv_head, T).

    Workgroups that hold nothing a row sees write nothing: n_split may be the recording's fixed maximum. Sinks are left to
    `combine`, and not bound.
    """
    _without_records(spec)
    return _attention(spec, direct=False)


@cache
def _attention(spec: AttentionSpec, direct: bool) -> Kernel:
    body, bulk = (lane_row, texel(u32x4)) if spec.schedule == "lane_row" else (lane_chunk, read(u32x4))
    bindings = {"q": texel(f32x4), "k": bulk, "v": bulk, "block_table": texel(u32), "params": read(u32)}
    bindings |= ({"sinks": read(f32)} if spec.sinks and direct else {}) | {"out": write(f32)}
    bindings |= {"record": write(u32x2)} if spec.records else {}

    def attention(b: Block, bufs: dict[str, Buffer], push: dict[str, Value]) -> None:
        params, n_token, n_kv_head = bufs["params"], push["n_token"], push["n_kv_head"]
        head, row = b.workgroup_id(1), b.workgroup_id(2)
        length = params[n_token * 3 + row]
        lowest = lowest_position(b, length, push["window"]) if spec.windowed else None
        span = (Span.whole if direct else Span.split)(b, spec, length, lowest)
        rows = Rows(b, spec, bufs["k"], bufs["v"], bufs["block_table"], head, n_kv_head, params[n_token * 4 + row])
        pair = row * n_kv_head + head
        used = span.first < (span.last if spec.windowed else length)
        records = Records(bufs["record"], row, push["n_group"]) if spec.records else None
        result = Result(b, spec, bufs["out"], pair, head, used, direct, bufs.get("sinks"), records)
        body(b, spec, bufs["q"], rows, result, span)

    push = {"n_token": u32, "n_kv_head": u32} | ({"window": u32} if spec.windowed else {})
    push |= {"n_group": u32} if spec.records else {}
    name = f"attention_{'direct' if direct else 'partial'}_{spec.name}"
    return trace(name, bindings, push, {}, spec.invocations, attention)


@cache
def combine(spec: AttentionSpec) -> Kernel:
    """Merge the partial results of every (row, head) into out f32 [T, n_head * head_dim]. Dispatch: (n_head, T, 1).

    Bindings: partials (storage f32: the scratch buffer), params, with sinks: sinks (f32 [n_head]), out.
    Push: n_token, n_split (grid of `partial`), n_head, with windowed: window.
    One subgroup a head: lane = dim; a head's splits one after the other, those outside the window left out.
    """
    _without_records(spec)
    bindings = {"partials": read(f32), "params": read(u32)} | ({"sinks": read(f32)} if spec.sinks else {})

    def merge(b: Block, bufs: dict[str, Buffer], push: dict[str, Value]) -> None:
        _merge_splits(b, spec, bufs, push)

    push = {"n_token": u32, "n_split": u32, "n_head": u32} | ({"window": u32} if spec.windowed else {})
    return trace(f"attention_combine_{spec.name}", bindings | {"out": write(f32)}, push, {}, spec.lanes, merge)


def _without_records(spec: AttentionSpec) -> None:
    if spec.records:
        raise KernelError("attention in splits that writes records", hint="only `direct` writes them: make the others without")


def _merge_splits(b: Block, spec: AttentionSpec, bufs: dict[str, Buffer], push: dict[str, Value]) -> None:
    partials, n_head, owned = bufs["partials"], push["n_head"], range(0, spec.head_dim, spec.lanes)
    head, row, lane = b.workgroup_id(0), b.workgroup_id(1), b.local_id(0)
    length = bufs["params"][push["n_token"] * 3 + row]
    used = (length + (spec.split - 1)) // spec.split
    first_used = lowest_position(b, length, push["window"]) // spec.split if spec.windowed else 0
    dims = [b.min(lane + first, spec.head_dim - 1) for first in owned]
    highest, merged = Highest.fresh(b), Head.fresh(b, len(dims))
    with b.range(first_used, used) as split:
        place = (row * (n_head // spec.group) + head // spec.group) * push["n_split"] + split
        start = (place * spec.group + head % spec.group) * (spec.head_dim + 2)
        now, keep = highest.update(b, partials[start])
        share = b.exp2(partials[start] - now)
        merged.total.set(merged.total.get() * keep + partials[start + 1] * share)
        for value, dim in zip(merged.values, dims, strict=True):
            value.set(value.get() * keep + partials[start + 2 + dim] * share)
    total = merged.total.get()
    if spec.sinks:
        total = with_sink(b, bufs["sinks"][head], highest.var.get(), total)
    for first, value, dim in zip(owned, merged.values, dims, strict=True):
        with b.when(lane + first < spec.head_dim):
            bufs["out"][(row * n_head + head) * spec.head_dim + dim] = b.select(used > 0, value.get() / total, 0.0)
