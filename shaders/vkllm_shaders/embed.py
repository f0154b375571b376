"""Embedding lookup from a packed matrix: the same texels serve the lookup and, where a model ties them, the output projection."""

from __future__ import annotations

from functools import cache

from vkllm_codegen import Block, Buffer, Kernel, Value, f32x4, kernel, read, texel, u32, u32x4, write
from vkllm_shaders.formats import SLOTS, Layout, StepWeights, format_of

WORKGROUP = 32


def groups(fmt: str, n_col: int, n_token: int) -> tuple[int, int, int]:
    """Workgroups of a dispatch: an invocation takes a step of 64 weights of a token."""
    f = format_of(fmt)
    return -(-f.n_chunk(n_col) * f.steps // WORKGROUP), n_token, 1


@cache
def embed(fmt: str, layout: Layout, large: bool = False, scale: float = 1.0) -> Kernel:
    """x[t, :] = scale * row params[t] (the token id) of a matrix packed with row_order "store".

    Dispatch: groups(fmt, n_col, n_token).

    Bindings: w (u32x4; texel in lane_row or when `large`, storage in lane_chunk), params (u32), x (f32x4 [n_token, x_stride]).
    Push: n_chunk (chunks a row), x_stride (f32x4 a row of x). Columns past n_col, up to the chunk's end or x_stride, become zero.
    A token id beyond the matrix reads outside of it: check ids on the host.
    """
    f, rows, lanes = format_of(fmt), layout.rows, layout.lanes
    n_texel, n_head, n_body = f.n_texel(rows), f.n_head(rows), f.n_body(rows)
    bulk = texel if large or layout.kind == "lane_row" else read

    @kernel(
        w=bulk(u32x4),
        params=read(u32),
        x=write(f32x4),
        push={"n_chunk": u32, "x_stride": u32},
        local_size=WORKGROUP,
        name=f"embed_{f.name.lower()}_{layout.kind}_s{lanes}_r{rows}"
        + ("_large" if large else "")
        + (f"_scale{scale:.9g}" if scale != 1.0 else ""),
    )
    def embed_kernel(b: Block, w: Buffer, params: Buffer, x: Buffer, *, n_chunk: Value, x_stride: Value) -> None:
        at, t = b.global_id(0), b.workgroup_id(1)
        token = params[t]
        group, within = token // layout.group_rows, token % layout.group_rows
        row, lane = within // lanes, within % lanes
        chunk, step = at // f.steps, at % f.steps
        if layout.kind == "lane_row":
            base = (group * n_chunk + chunk) * (n_texel * lanes) + lane
            body = base + (step * n_body + n_head) * lanes
            stride, head_stride = b.const(u32, lanes), b.const(u32, lanes)
        else:
            start = group * (n_chunk * n_texel)
            base, body = start + chunk, start + n_chunk * n_head + at
            stride, head_stride = n_chunk * f.steps, n_chunk
        with b.when(at < n_chunk * f.steps):
            for r in range(rows):
                with b.when(row == r):
                    weights = StepWeights(f, b, lambda j: w[base + head_stride * j], lambda j: w[body + stride * j], rows, step)
                    for slot in range(SLOTS):
                        out = chunk * (f.chunk // 4) + f.texel(step, slot)
                        value = b.vec(*(weight(weights, r, slot, comp) for comp in range(4)))
                        with b.when(out < x_stride):
                            x[t * x_stride + out] = value if scale == 1.0 else value * scale

    return embed_kernel


def weight(w: StepWeights, r: int, slot: int, comp: int) -> Value:
    """One dequantized weight."""
    f, raw = w.fmt, w.raw(r, slot, comp)
    if not f.n_sub:
        return raw
    sub = slot * f.n_sub // SLOTS
    value = raw * 2.0 ** -f.exponent(r, comp) if f.exponent(r, comp) else raw
    value = (value - float(f.zero) if f.zero else value) * w.scale(r, sub)
    minimum = w.minimum(r, sub)
    return value if minimum is None else value - minimum
