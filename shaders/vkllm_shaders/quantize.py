"""Activations in 8 bits, once for all workgroups of the matrix products that read them; what matmul does for itself in decode.

Source: ggml's Q8_0, with f32 scales; llama.cpp quantizes activations likewise.
"""

from __future__ import annotations

from functools import cache

from vkllm_codegen import Block, Buffer, Kernel, Value, f32, f32x4, i32, texel, trace, u32, write
from vkllm_codegen.errors import KernelError

GROUP = 8  # texels (32 values) that share a scale
SCALE_ROWS = 4  # rows whose scales lie side by side


@cache
def quantize(norm: bool, lanes: int = 8) -> Kernel:
    """v = x, or RMSNorm(x) * norm_w; q = round(v / scale), scale = max|v| / 127 of 32 values. Dispatch: (n_row, 1, 1).

    Bindings:
        x       f32x4 texels [n_row, x_stride], zero from n_col to the next multiple of 64 floats
        norm_w  f32x4 texels [n_col], padded like x: finite there; only with norm
        q       u32 [n_row, n_texel]: four signed bytes a word
        scales  f32 [n_row / 4, n_texel / 8, 4]: those of four rows side by side
    Push: x_stride: texels a row of x; n_texel: n_col / 4, rounded up to a multiple of 16; with norm: n_col, eps.
    The largest bits of |v| are taken as integers, so that NaN and infinity win and reach the result through the scale.
    """
    if lanes % GROUP:
        raise KernelError(f"quantize with {lanes} lanes", hint=f"expected a multiple of {GROUP}")
    bindings = {"x": texel(f32x4)} | ({"norm_w": texel(f32x4)} if norm else {}) | {"q": write(u32), "scales": write(f32)}
    push = dict.fromkeys(("x_stride", "n_texel"), u32) | ({"n_col": u32, "eps": f32} if norm else {})

    def body(b: Block, bufs: dict[str, Buffer], given: dict[str, Value]) -> None:
        row, lane, n_texel = b.workgroup_id(0), b.subgroup_lane(), given["n_texel"]
        start = row * given["x_stride"] + lane
        factor = _rms(b, bufs["x"], start, given, lanes) if norm else None
        with b.range(0, n_texel, step=lanes) as i:
            v = bufs["x"][start + i]
            if factor is not None:
                v = v * bufs["norm_w"][lane + i] * factor
            bits = [v[c].bitcast(u32) & 0x7FFFFFFF for c in range(4)]
            largest = b.max(b.max(bits[0], bits[1]), b.max(bits[2], bits[3]))
            most = b.const(f32, 0.0)
            for first in range(0, lanes, GROUP):
                found = [b.subgroup_shuffle(largest, source) for source in range(first, first + GROUP)]
                while len(found) > 1:
                    found = [b.max(p, q) for p, q in zip(found[::2], found[1::2], strict=True)]
                most = found[0].bitcast(f32) if first == 0 else b.select(lane < first, most, found[0].bitcast(f32))
            inverse = b.select(most > 0.0, 127.0 / most, 0.0)
            u = [(b.round(v[c] * inverse).to(i32) & 0xFF).bitcast(u32) for c in range(4)]
            bufs["q"][row * n_texel + (i + lane)] = (u[0] | (u[1] << 8)) | ((u[2] << 16) | (u[3] << 24))
            with b.when(lane % GROUP == 0):
                group = (row // SCALE_ROWS) * (n_texel // GROUP) + (i + lane) // GROUP
                bufs["scales"][group * SCALE_ROWS + row % SCALE_ROWS] = most * (1.0 / 127.0)

    return trace(f"quantize_s{lanes}" + ("_norm" if norm else ""), bindings, push, {}, lanes, body)


def _rms(b: Block, x: Buffer, start: Value, given: dict[str, Value], lanes: int) -> Value:
    """1 / sqrt(mean(x²) + eps) of the row."""
    squares = b.var(f32, 0.0)
    with b.range(0, given["n_texel"], step=lanes) as i:
        v = x[start + i]
        squares.add((v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3]))
    total = squares.get()
    parts = [b.subgroup_shuffle(total, source) for source in range(lanes)]
    while len(parts) > 1:
        parts = [p + q for p, q in zip(parts[::2], parts[1::2], strict=True)]
    return b.rsqrt(parts[0] / given["n_col"].to(f32) + given["eps"])
