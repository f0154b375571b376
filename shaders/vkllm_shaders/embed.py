"""Embedding lookup from a packed matrix: the same texels serve the lookup and, where a model ties them, the output projection."""

from __future__ import annotations

from functools import cache

from vkllm_codegen import Block, Buffer, Kernel, Value, f32, f32x4, kernel, read, texel, trace, u32, u32x2, u32x4, write
from vkllm_shaders.formats import SLOTS, CodedWeights, Layout, StepWeights, code_order, coded_of, format_of
from vkllm_shaders.records import LANES, OWN, largest_of, n_group, scale_bits, squares_of, whole_numbers, write_record
from vkllm_shaders.sums import tree_sum

WORKGROUP = 32


def groups(fmt: str, layout: Layout, n_col: int, n_token: int) -> tuple[int, int, int]:
    """Workgroups of a dispatch: an invocation takes a step of a token."""
    f = format_of(fmt)
    n_step = n_group(n_col) if layout.kind == "lane_pair" else f.n_chunk(n_col) * f.steps
    return -(-n_step // WORKGROUP), n_token, 1


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


@cache
def embed_codes(fmt: str, scale: float = 1.0, records: bool = False) -> Kernel:
    """The same from a matrix of layout "lane_pair"; with `records` also the records of x times a norm's weights.

    Bindings: w (texel u32x4), params (u32), x (f32x4 [n_token, x_stride]); with records: norm_w (texel f32x4), record, squares.
    Push: n_chunk, x_stride, n_group (of 32 columns a row: steps to walk); with records: squares_stride (floats).
    """
    coded, layout = coded_of(fmt), Layout("lane_pair")
    order = code_order(coded.group)

    def body(b: Block, bufs: dict[str, Buffer], push: dict[str, Value]) -> None:
        at, t, w = b.global_id(0), b.workgroup_id(1), bufs["w"]
        token = bufs["params"][t]
        within = token % layout.group_rows
        row, lane = within % layout.rows, within // layout.rows  # a lane's rows are neighbours
        chunk, step = at // coded.steps, at % coded.steps
        base = (token // layout.group_rows * push["n_chunk"] + chunk) * (coded.n_texel * LANES) + lane
        first = base + (step * coded.n_body + coded.n_head) * LANES

        def head(j: int) -> Value:
            if not coded.carries:
                return w[base + j * LANES]
            tails = [w[base + (i * coded.n_body) * LANES] for i in range(2)]  # of the chunk's first two steps
            return b.vec(*(tail[i] for tail in tails for i in (2, 3)))

        def body_texel(j: int) -> Value:
            return w[first + coded.place(j) * LANES]

        with b.when(at < push["n_group"]):
            values = [b.var(f32, 0.0) for _ in order]  # in the order of codes
            for r in range(layout.rows):
                with b.when(row == r):
                    weights = CodedWeights(coded, b, head, body_texel, step)
                    for index, value in enumerate(values):
                        value.set(_weight_of_code(weights, r, index) * scale)
            by_place = {place: value.get() for place, value in zip(order, values, strict=True)}
            columns = [[by_place[q, j] for q in range(OWN)] for j in range(LANES)]  # of lane (lane ^ j)
            for j, own in enumerate(columns):
                bufs["x"][t * push["x_stride"] + at * LANES + (lane ^ j)] = b.vec(*own)
            if records:
                squares = [squares_of(own) for own in columns]
                bufs["squares"][t * push["squares_stride"] + at] = tree_sum(squares)
                norms = [bufs["norm_w"][at * LANES + (lane ^ j)] for j in range(LANES)]
                columns = [[v * norm[i] for i, v in enumerate(own)] for own, norm in zip(columns, norms, strict=True)]
                bits = scale_bits(b, largest_of(b, [v for own in columns for v in own]))
                whole = [whole_numbers(b, own, bits) for own in columns]
                total = tree_sum([v for own in whole for v in own])
                for j, numbers in enumerate(whole):
                    write_record(b, bufs["record"], (t, push["n_group"], at, lane ^ j), numbers, total, bits)

    bindings = {"w": texel(u32x4), "params": read(u32), "x": write(f32x4)}
    bindings |= {"norm_w": texel(f32x4), "record": write(u32x2), "squares": write(f32)} if records else {}
    names = ["n_chunk", "x_stride", "n_group"] + ["squares_stride"] * records
    name = f"embed_{fmt.lower()}_lane_pair" + (f"_scale{scale:.9g}" if scale != 1.0 else "") + ("_records" if records else "")
    return trace(name, bindings, dict.fromkeys(names, u32), {}, WORKGROUP, body)


def _weight_of_code(w: CodedWeights, r: int, index: int) -> Value:
    """One dequantized weight, by the number of its code."""
    sub, both = index // w.coded.group, w.both(r // 2, index)
    code = both >> 16 if r % 2 else both & 0xFFFF
    value = (code - w.coded.zero if w.coded.zero else code).to(f32) * w.scale(r, sub)
    return value - w.minimum(r, sub) if w.coded.minimum else value


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
