"""Activations in 8 bits, once for all workgroups of the matrix products that read them; what matmul does for itself in decode.

To the bit: the same integers and scales, and the same sum of squares for the norm, as matmul gets in its loop, so that a row's
result does not depend on how many rows there are. Which values share a scale, and the order of the sum, are those of a format's
steps (Format.texel): `sixteenths` for the formats that take 16 weights of each quarter of half a block, else as they lie.

Source: ggml's Q8_0, with f32 scales; llama.cpp quantizes activations likewise.
"""

from __future__ import annotations

from functools import cache

from vkllm_codegen import Block, Buffer, Kernel, Value, f32, f32x4, i32, texel, trace, u32, write
from vkllm_codegen.errors import KernelError
from vkllm_shaders.formats import SLOTS, format_of
from vkllm_shaders.sums import tree_sum

GROUP = 8  # texels (32 values) that share a scale
SCALE_ROWS = 4  # rows whose scales lie side by side


def in_sixteenths(fmt: str) -> bool:
    """Does a format's step take 16 weights of each quarter of half a block?"""
    return bool(format_of(fmt).texel(0, 4) != 4)


@cache
def quantize(norm: bool, sixteenths: bool = False, lanes: int = 8) -> Kernel:
    """v = x, or x * norm_w; q = round(v / scale), scale = max|v| / 127 of 32 values. Dispatch: (n_row, 1, 1).

    Bindings:
        x       f32x4 texels [n_row, x_stride], zero from n_col to the next multiple of 64 floats
        norm_w  f32x4 texels [n_col], padded like x: finite there; only with norm
        q       u32 [n_row, n_texel]: four signed bytes a word
        scales  f32 [n_row / 4, n_texel / 8, 4]: those of four rows side by side; two for each step of 64 values
        norms   f32 [n_row]: 1 / sqrt(mean(x²) + eps), which belongs to the result; only with norm
    Push: x_stride: texels a row of x; n_texel: n_col / 4, rounded up to whole steps, or chunks of 256 where `sixteenths`; with
        norm: n_col, eps.
    The largest bits of |v| are taken as integers, so that NaN and infinity win and reach the result through the scale.
    """
    if lanes % GROUP or SLOTS % lanes:
        raise KernelError(f"quantize with {lanes} lanes", hint=f"expected {GROUP} or {SLOTS}")
    bindings = {"x": texel(f32x4)} | ({"norm_w": texel(f32x4)} if norm else {}) | {"q": write(u32), "scales": write(f32)}
    bindings |= {"norms": write(f32)} if norm else {}
    push = dict.fromkeys(("x_stride", "n_texel"), u32) | ({"n_col": u32, "eps": f32} if norm else {})
    layout = format_of("Q6_K" if sixteenths else "Q8_0")
    steps = layout.steps

    def body(b: Block, bufs: dict[str, Buffer], given: dict[str, Value]) -> None:
        row, lane, n_texel = b.workgroup_id(0), b.subgroup_lane(), given["n_texel"]
        start, squares = row * given["x_stride"], b.var(f32, 0.0)
        with b.range(0, n_texel // SLOTS) as step:
            chunk = step // steps * (steps * SLOTS)
            raw, places = [], []
            for first in range(0, SLOTS, lanes):
                places.append(chunk + layout.texel(step % steps, lane + first))
                raw.append(bufs["x"][start + places[-1]])
            if norm:
                squares.add(tree_sum([v[i] * v[i] for v in raw for i in range(4)]))
            for i, (v, at) in enumerate(zip(raw, places, strict=True)):
                v = v * bufs["norm_w"][at] if norm else v
                most = _largest_of_group(b, v, lane, lanes)
                bufs["q"][row * n_texel + at] = as_bytes(rounded(b, v, inverse_scale(b, most)))
                with b.when(lane % GROUP == 0):
                    group = step * (SLOTS // GROUP) + (i * lanes + lane) // GROUP
                    place = (row // SCALE_ROWS) * (n_texel // GROUP) + group
                    bufs["scales"][place * SCALE_ROWS + row % SCALE_ROWS] = most * SCALE
        if norm:
            total = tree_sum([b.subgroup_shuffle(squares.get(), source) for source in range(lanes)])
            with b.when(lane == 0):
                bufs["norms"][row] = b.rsqrt(total / given["n_col"].to(f32) + given["eps"])

    name = f"quantize_s{lanes}" + ("_norm" if norm else "") + ("_sixteenths" if sixteenths else "")
    return trace(name, bindings, push, {}, lanes, body)


def _largest_of_group(b: Block, v: Value, lane: Value, lanes: int) -> Value:
    """f32: the largest |component| over this lane's group."""
    mine, most = largest_bits(b, v), b.const(f32, 0.0)
    for first in range(0, lanes, GROUP):
        found = largest_over_lanes(b, mine, first)
        most = found if first == 0 else b.select(lane < first, most, found)
    return most


# The arithmetic of 8 bits, for this kernel and for matmul's own loop: both must round alike.

SCALE = 1.0 / 127.0


def largest_bits(b: Block, v: Value) -> Value:
    """u32 bits of the largest |component|."""
    bits = [v[c].bitcast(u32) & 0x7FFFFFFF for c in range(4)]
    return b.max(b.max(bits[0], bits[1]), b.max(bits[2], bits[3]))


def largest_over_lanes(b: Block, bits: Value, first: int) -> Value:
    """f32: the largest of the GROUP lanes from `first` on."""
    found = [b.subgroup_shuffle(bits, lane) for lane in range(first, first + GROUP)]
    while len(found) > 1:
        found = [b.max(p, q) for p, q in zip(found[::2], found[1::2], strict=True)]
    return found[0].bitcast(f32)


def inverse_scale(b: Block, largest: Value) -> Value:
    """What makes integers of up to ±127; 0 where all are 0."""
    return b.select(largest > 0.0, 127.0 / largest, 0.0)


def rounded(b: Block, v: Value, inverse: Value) -> list[Value]:
    """i32: the four components in units of the scale."""
    return [b.round(v[c] * inverse).to(i32) for c in range(4)]


def as_bytes(q: list[Value]) -> Value:
    """u32: four integers as signed bytes."""
    u = [(v & 0xFF).bitcast(u32) for v in q]
    return (u[0] | (u[1] << 8)) | ((u[2] << 16) | (u[3] << 24))
