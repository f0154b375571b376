"""Kernels that between them use the whole language, with inputs to run them on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vkllm_codegen import (
    Block,
    Buffer,
    Kernel,
    Value,
    boolean,
    coop,
    f16,
    f16x2,
    f16x4,
    f32,
    f32x4,
    i8,
    i8x4,
    i16,
    i32,
    i64,
    kernel,
    read,
    readwrite,
    texel,
    u8,
    u8x4,
    u16x2,
    u32,
    u32x2,
    u32x4,
    u64,
    write,
)

RNG = np.random.default_rng(1)


@dataclass
class Sample:
    """A kernel and one run of it. `tolerance` is relative, against a device."""

    kernel: Kernel
    buffers: dict[str, np.ndarray]
    push: dict[str, Any] = field(default_factory=dict)
    groups: tuple[int, int, int] = (1, 1, 1)
    tolerance: float = 1e-5


@kernel(
    x=read(f16, "n_row", "n_embd"),
    w=read(f32, "n_embd"),
    y=write(f16, "n_row", "n_embd"),
    push={"n_embd": u32, "eps": f32},
    spec={"WG": 64},
)
def rmsnorm(b: Block, x: Buffer, w: Buffer, y: Buffer, *, n_embd: Value, eps: Value, WG: Value) -> None:
    """y[r] = x[r] * rsqrt(mean(x[r]**2) + eps) * w. One workgroup per row r."""
    row, lane = b.workgroup_id(0), b.local_id(0)
    acc = b.var(f32, 0.0, name="acc")
    with b.range(lane, n_embd, step=WG) as i:
        v = x[row, i].to(f32)
        acc.set(acc.get() + v * v)
    scale = b.rsqrt(b.workgroup_reduce_add(acc.get()) / n_embd.to(f32) + eps)
    with b.range(lane, n_embd, step=WG) as i:
        y[row, i] = (x[row, i].to(f32) * scale * w[i]).to(f16)


@kernel(w=texel(u32x4), x=texel(f32x4), y=write(f32), push={"n_chunk": u32}, local_size=8)
def texel_dot(b: Block, w: Buffer, x: Buffer, y: Buffer, *, n_chunk: Value) -> None:
    """Lane = row: nibbles of a texel stream times x, which lanes share by constant-lane shuffles."""
    row, lane = b.workgroup_id(0), b.subgroup_lane()
    acc = b.var(f32, 0.0, name="acc")
    with b.range(0, n_chunk, unroll=2) as i:
        bits, mine = w[(row * n_chunk + i) * 8 + lane], x[i * 8 + lane]
        for word in range(4):
            for j in range(8):
                weight = (bits[word] & (15 << 4 * j)).to(f32) if j < 7 else (bits[word] >> 28).to(f32)
                scale = 2.0 ** (-4 * j) if j < 7 else 1.0
                acc.add(weight * (b.subgroup_shuffle(mine[j % 4], word * 2 + j // 4) * scale))
    y[row * 8 + lane] = acc.get()


@kernel(x=read(i32), counts=readwrite(u32), y=write(i32), push={"n": u32, "limit": i32}, local_size=16)
def control(b: Block, x: Buffer, counts: Buffer, y: Buffer, *, n: Value, limit: Value) -> None:
    """Branches, loops, breaks, private arrays, atomics."""
    i = b.global_id(0)
    table = b.array(i32, 4, name="table")
    for j in range(4):
        table[j] = j * j
    total = b.var(i32, 0, name="total")
    with b.when(i < n):
        with b.range(i, n, step=3, unroll=4) as j:
            with b.when(x[j] > limit):
                total.add(x[j])
            with b.otherwise():
                total.add(table[j % 4] - (x[j] // 3) + (x[j] % 5))
                with b.when((x[j] & 1) == 0):
                    total.add(1)
        steps = b.var(u32, 0, name="steps")
        with b.loop():
            b.break_if((steps.get() >= 7) | (total.get() < steps.get().to(i32)))
            steps.add(1)
            with b.when(steps.get() == 5):
                b.break_if(total.get() > 100)
        b.atomic_add(counts, steps.get(), 1)
        b.atomic_max(counts, 8, total.get().bitcast(u32) & 0xFFFF)
        b.atomic_min(counts, 9, i + 3)
        y[i] = total.get() * 8 + steps.get().to(i32)


@kernel(h=readwrite(f16), q=read(i8x4), u=read(u8), s=read(i16), y=write(f32), z=write(u32), packed=write(i8), local_size=8)
def narrow(b: Block, h: Buffer, q: Buffer, u: Buffer, s: Buffer, y: Buffer, z: Buffer, packed: Buffer) -> None:
    """8- and 16-bit types, bitcasts between them, packed products, half floats."""
    i = b.global_id(0)
    quad = q[i].to(i32)
    bits = q[i].bitcast(u32)
    half = h[i] * b.const(f16, 0.5) + h[i]
    h[i] = half
    pair = b.unpack_half2x16(b.pack_half2x16(b.vec(half.to(f32), 1.5)))
    y[i] = (quad.x + quad.y * quad.z - quad.w).to(f32) + pair.x * pair.y + u[i].to(f32) + s[i].to(f32)
    signed = b.bit_extract(bits.bitcast(i32), 8, 8).bitcast(u32)
    shorts = bits.bitcast(u16x2)
    halves = b.const(u32, 0x3C003800).bitcast(f16x2)
    back = b.vec(halves.y, halves.x).bitcast(u32)
    bytes_ = bits.bitcast(u8x4)
    wide = b.vec(bits, back).bitcast(f16x4)
    z[i] = (
        b.dot_i8(bits, bits).bitcast(u32)
        + b.dot_u8i8(bits, bits).bitcast(u32) * 3
        + signed
        + shorts.x.to(u32) * 5
        + back
        + bytes_.w.to(u32)
        + wide.z.to(f32).bitcast(u32)
        + b.vec(bits, signed).bitcast(u32x2).y
    )
    packed[i] = (quad.x * 3).to(i8)


@kernel(x=read(i32), y=write(u32x2), z=write(i32), local_size=8)
def wide(b: Block, x: Buffer, y: Buffer, z: Buffer) -> None:
    """64-bit integers: extended by sign and by zeros, cut, made of words and parted into them, moved between lanes."""
    i = b.global_id(0)
    v = x[i].to(i64)
    product = v * -0x1_0000_0003 + (v >> 3)
    fields = (b.vec(x[i].bitcast(u32), (x[i] * 7).bitcast(u32)).bitcast(u64) >> 5) & 0x000F_000F_000F_000F
    total = fields * product.bitcast(u64) + (x[i].bitcast(u32).to(u64) << 2)
    neighbour = b.subgroup_shuffle_xor(total, 1)
    folded = b.const(i64, -(1 << 40)).bitcast(u32x2).y.to(u64)  # by the compiler
    y[i] = b.select(product < -(1 << 38), neighbour ^ folded, ~total).bitcast(u32x2)
    z[i] = (total >> 32).to(i32) - neighbour.to(i32) + (v == -5).to(i64).to(i32)


@kernel(
    x=texel(f32x4, uniform=True),
    ids=texel(u32),
    h=texel(f16x4),
    y=write(f32x4),
    flags=write(u32),
    push={"scale": f32},
    local_size=8,
)
def vectors(b: Block, x: Buffer, ids: Buffer, h: Buffer, y: Buffer, flags: Buffer, *, scale: Value) -> None:
    """Vector arithmetic, uniform and scalar texel buffers, mathematics, selections."""
    i = b.global_id(0)
    v = x[ids[i]] * scale + h[i]
    safe = b.abs(v) + 0.25
    curve = b.sqrt(safe) + b.rsqrt(safe) + b.exp2(-safe) + b.exp(-safe) + b.log2(safe) + b.log(safe)
    curve = curve + b.sin(v) + b.cos(v) + b.tanh(v) + b.floor(v) + b.round(v) + b.clamp(v, -1.0, 1.0)
    mixed = b.select(v > 0.0, curve, b.fma(v, v, curve))
    dynamic = mixed.extract(i & 3)
    y[i] = b.vec(mixed.x, b.max(mixed.y, mixed.z), b.min(mixed.z, mixed.w), dynamic)
    odd = b.select((i & 1) == 1, v.x, b.const(f32, float("inf")))
    flags[i] = (b.isinf(odd) & ~b.isnan(odd)).to(u32) + 2 * (v.y != v.z).to(u32) + 4 * (v.x < v.y).to(boolean).to(u32)


@kernel(x=read(f32), y=write(f32), local_size=8)
def subgroup(b: Block, x: Buffer, y: Buffer) -> None:
    """Subgroup operations; sums are of small integers, so that every order gives the same."""
    i, lane = b.global_id(0), b.subgroup_lane()
    v = x[i]
    total = b.subgroup_add(v) + 10 * b.subgroup_max(v) + 100 * b.subgroup_min(v)
    moved = b.subgroup_shuffle(v, 3) + b.subgroup_shuffle(v, 7 - lane) * 2 + b.subgroup_shuffle_xor(v, 1) * 3
    votes = b.subgroup_any(v > 2.0).to(f32) + 2 * b.subgroup_all(v > -100.0).to(f32) + 4 * b.subgroup_elect().to(f32)
    y[i] = total + moved + votes + b.subgroup_broadcast(v, 5) * 7


@kernel(x=read(f32, 16, 16), y=write(f32, 16, 16), m=write(i32), local_size=(16, 4))
def shared_transpose(b: Block, x: Buffer, y: Buffer, m: Buffer) -> None:
    """Shared memory with two dimensions, a two-dimensional workgroup, a workgroup maximum."""
    tile = b.shared(f32, 16, 17, name="tile")
    col, first = b.local_id(0), b.local_id(1)
    for r in range(0, 16, 4):
        tile[first + r, col] = x[first + r, col]
    b.barrier("the tile is complete")
    for r in range(0, 16, 4):
        y[first + r, col] = tile[col, first + r]
    m[b.local_index()] = b.workgroup_reduce_max((x[first, col] * 8.0).to(i32))


def coop_gemm(size: int) -> Kernel:
    """c = a @ b with size × size tiles of f16, accumulated in f32; b goes through shared memory."""
    a_type, b_type, c_type = coop(f16, size, size, "a"), coop(f16, size, size, "b"), coop(f32, size, size, "acc")

    @kernel(a=read(f16), w=read(f16), c=write(f32), push={"k": u32, "n": u32}, local_size=8, name=f"coop_gemm_{size}")
    def gemm(b: Block, a: Buffer, w: Buffer, c: Buffer, *, k: Value, n: Value) -> None:
        tile = b.shared(f16, size * size, name="tile")
        acc = b.var(c_type, b.coop_fill(c_type, 0.0), name="acc")
        row, col = b.workgroup_id(0) * size, b.workgroup_id(1) * size
        with b.range(0, k, step=size) as i:
            with b.range(b.local_index(), size * size, step=8) as j:
                tile[j] = w[(i + j // size) * n + col + j % size]
            b.barrier("the tile is complete")
            left, right = b.coop_load(a, row * k + i, k, a_type), b.coop_load(tile, 0, size, b_type)
            acc.set(b.coop_mul_add(left, right, acc.get()))
            b.barrier("the tile has been read")
        b.coop_store(c, row * n + col, n, acc.get())

    return gemm


def _floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def _words(*shape: int) -> np.ndarray:
    return RNG.integers(0, 1 << 32, shape, dtype=np.uint32)


SAMPLES: dict[str, Sample] = {
    "rmsnorm": Sample(
        rmsnorm,
        {"x": _floats(5, 77).astype(np.float16), "w": _floats(77), "y": np.zeros((5, 77), np.float16)},
        {"n_embd": 77, "eps": 1e-5},
        (5, 1, 1),
        2e-3,
    ),
    "texel_dot": Sample(
        texel_dot,
        {"w": _words(3 * 5 * 8, 4), "x": _floats(5 * 8, 4), "y": np.zeros(24, np.float32)},
        {"n_chunk": 5},
        (3, 1, 1),
        1e-4,
    ),
    "control": Sample(
        control,
        {"x": RNG.integers(-50, 50, 37).astype(np.int32), "counts": np.full(10, 5, np.uint32), "y": np.zeros(48, np.int32)},
        {"n": 37, "limit": 10},
        (3, 1, 1),
    ),
    "narrow": Sample(
        narrow,
        {
            "h": _floats(16).astype(np.float16),
            "q": RNG.integers(-128, 128, (16, 4)).astype(np.int8),
            "u": RNG.integers(0, 256, 16).astype(np.uint8),
            "s": RNG.integers(-999, 999, 16).astype(np.int16),
            "y": np.zeros(16, np.float32),
            "z": np.zeros(16, np.uint32),
            "packed": np.zeros(16, np.int8),
        },
        groups=(2, 1, 1),
    ),
    "wide": Sample(
        wide,
        {
            "x": np.concatenate([[-5, 0, (1 << 31) - 1, -(1 << 31)], RNG.integers(-(1 << 31), 1 << 31, 12)]).astype(np.int32),
            "y": np.zeros((16, 2), np.uint32),
            "z": np.zeros(16, np.int32),
        },
        groups=(2, 1, 1),
    ),
    "vectors": Sample(
        vectors,
        {
            "x": _floats(16, 4),
            "ids": RNG.permutation(16).astype(np.uint32),
            "h": _floats(16, 4).astype(np.float16),
            "y": np.zeros((16, 4), np.float32),
            "flags": np.zeros(16, np.uint32),
        },
        {"scale": 1.25},
        (2, 1, 1),
        1e-3,  # Vulkan allows sin and cos an error of 2**-11
    ),
    "subgroup": Sample(
        subgroup, {"x": RNG.integers(-4, 5, 24).astype(np.float32), "y": np.zeros(24, np.float32)}, groups=(3, 1, 1)
    ),
    "shared_transpose": Sample(
        shared_transpose, {"x": _floats(16, 16), "y": np.zeros((16, 16), np.float32), "m": np.zeros(64, np.int32)}
    ),
    "coop_gemm_8": Sample(
        coop_gemm(8),
        {"a": _floats(16, 24).astype(np.float16), "w": _floats(24, 16).astype(np.float16), "c": np.zeros((16, 16), np.float32)},
        {"k": 24, "n": 16},
        (2, 2, 1),
    ),
}
