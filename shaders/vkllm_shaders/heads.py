"""From a finished QKV product to queries and cache rows: RMSNorm of each head, RoPE, and the cache in f16 or Q8_0.

matmul.py's "qkv" epilogue does this within the product where it can: no norms, a rotation of whole heads, an f16 cache. This
kernel is for the rest. One subgroup does one head of one row, a lane four dims at a time. Nothing non-finite is hidden: the
largest bits of |x| are taken as integers, so that NaN and infinity win and reach the scale of a Q8_0 block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, reduce
from typing import Literal

from vkllm_codegen import Block, Buffer, Kernel, Value, f32, f32x4, i32, read, texel, trace, u32, write
from vkllm_codegen.errors import KernelError
from vkllm_shaders.attention import Cache, cache_row_nbytes
from vkllm_shaders.attention.spec import SCALE_DIMS, scale_texels
from vkllm_shaders.matmul.spec import NO_SLOT

BLOCK_TEXELS = SCALE_DIMS // 4


@dataclass(frozen=True)
class HeadSpec:
    """What one kernel does; every field makes a new module.

    head_dim: a multiple of 8; rope_dim: dims that turn, the others stay; rope_pairing: "interleaved" pairs (2i, 2i + 1), "half"
    pairs (i, i + rope_dim / 2); norm: RMSNorm of each q and k head before it is turned; cache: as in AttentionSpec;
    lanes: subgroup size.
    """

    head_dim: int
    rope_dim: int
    rope_pairing: Literal["interleaved", "half"]
    norm: bool = False
    cache: Cache = "f16"
    lanes: int = 8

    def __post_init__(self) -> None:
        if self.head_dim <= 0 or self.head_dim % 8:
            raise KernelError(f"heads of {self.head_dim} dims", hint="head_dim must be a multiple of 8")
        cache_row_nbytes(self.head_dim, self.cache)  # raises where the cache cannot hold them
        whole = 8 if self.rope_pairing == "half" else 4
        if not 0 < self.rope_dim <= self.head_dim or self.rope_dim % whole:
            raise KernelError(
                f'a rotation of {self.rope_dim} of {self.head_dim} dims, pairs "{self.rope_pairing}"',
                hint=f"rope_dim must be a multiple of {whole}, and no more than head_dim",
            )
        if self.lanes < 2 or self.lanes & (self.lanes - 1):
            raise KernelError(f"a subgroup of {self.lanes} lanes", hint="expected a power of two from 2 on")

    @property
    def name(self) -> str:
        parts = ["heads", f"d{self.head_dim}", f"{self.rope_pairing}{self.rope_dim}", f"s{self.lanes}"]
        return "_".join(parts + (["norm"] if self.norm else []) + (["q8"] if self.cache == "q8_0" else []))


@cache
def heads(spec: HeadSpec) -> Kernel:
    """The kernel of a spec. Dispatch: (n_head + 2 * n_kv_head, n_token, 1).

    Bindings, in this order:
        qkv     f32x4 texels [n_token, x_stride]: q heads, k heads, v heads, one behind the other
        q_norm, k_norm  f32x4 texels of f32 [head_dim]; only with norm
        rope    f32x4 texels of f32 [positions, rope_dim / 2, 2] of (cos, sin)
        params  u32 [6, capacity]: positions in row 1, cache rows of KV head 0 in row 2 (0xFFFFFFFF: none, only q is written)
        q       f32 [n_token, n_head * head_dim]
        k, v    u32 words of [n_block, n_kv_head, block_size] cache rows (attention.cache_row_nbytes): f16 pairs, or Q8_0:
                f32 scales max|x| / 127 of 32 dims each, padded with zeros to whole texels, then signed bytes, rounded to nearest
                even
    Push: n_head, n_kv_head, block_size, x_stride (texels a row of qkv), capacity, with norm: eps.
    Sources: RoFormer arXiv 2104.09864; RMSNorm arXiv 1910.07467; ggml's Q8_0 for the rounding.
    """
    bindings = {"qkv": texel(f32x4)} | (dict.fromkeys(("q_norm", "k_norm"), texel(f32x4)) if spec.norm else {})
    bindings |= {"rope": texel(f32x4), "params": read(u32), "q": write(f32), "k": write(u32), "v": write(u32)}
    push = dict.fromkeys(("n_head", "n_kv_head", "block_size", "x_stride", "capacity"), u32) | ({"eps": f32} if spec.norm else {})

    def body(b: Block, bufs: dict[str, Buffer], constants: dict[str, Value]) -> None:
        _Body(b, spec, bufs, constants).emit()

    return trace(spec.name, bindings, push, {}, spec.lanes, body)


class _Body:
    """The tracing of one kernel. A lane holds texel r * lanes + lane of the head in register r (four dims each)."""

    def __init__(self, b: Block, spec: HeadSpec, bufs: dict[str, Buffer], push: dict[str, Value]) -> None:
        self.b, self.spec, self.bufs, self.push = b, spec, bufs, push
        self.head, self.token, self.lane = b.workgroup_id(0), b.workgroup_id(1), b.subgroup_lane()
        self.n_texel = spec.head_dim // 4
        firsts = range(0, self.n_texel, spec.lanes)
        self.inside = [self.lane + first < self.n_texel for first in firsts]
        self.texels = [b.min(self.lane + first, self.n_texel - 1) for first in firsts]
        self.is_q = self.head < push["n_head"]
        self.is_v = self.head >= push["n_head"] + push["n_kv_head"]

    def emit(self) -> None:
        b, push, params = self.b, self.push, self.bufs["params"]
        start = self.token * push["x_stride"] + self.head * self.n_texel
        x = [self.bufs["qkv"][start + at] for at in self.texels]
        scale = self._norm_scale(x) if self.spec.norm else None
        position = params[push["capacity"] + self.token]
        values = [self._turned(at, x[r], start, position, scale) for r, at in enumerate(self.texels)]
        self._store_query(values)
        cache_row = params[push["capacity"] * 2 + self.token]
        packed = self._packed(values)
        row = cache_row + (self.head - push["n_head"]) % push["n_kv_head"] * push["block_size"]
        kept = ~self.is_q & (cache_row != NO_SLOT)
        for name, chosen in (("k", kept & ~self.is_v), ("v", kept & self.is_v)):
            with b.when(chosen):
                self._store_row(self.bufs[name], row, packed)

    # norm and rotation

    def _norm_scale(self, x: list[Value]) -> Value:
        """1 / sqrt(mean(x²) + eps) over the head."""
        squares = [v[0] * v[0] + v[1] * v[1] + (v[2] * v[2] + v[3] * v[3]) for v in x]
        mine = reduce(lambda a, c: a + c, [self.b.select(ok, s, 0.0) for ok, s in zip(self.inside, squares, strict=True)])
        return self.b.rsqrt(self.b.subgroup_add(mine) * (1.0 / self.spec.head_dim) + self.push["eps"])

    def _normed(self, at: Value, x: Value, scale: Value | None) -> Value:
        """A texel of q or k, normed where that is asked for; v passes through here and is dropped later."""
        if scale is None:
            return x
        weight_q, weight_k = self.bufs["q_norm"][at], self.bufs["k_norm"][at]
        parts = [self.b.select(self.is_q, weight_q[i], weight_k[i]) * x[i] * scale for i in range(4)]
        return self.b.vec(*parts)

    def _turned(self, at: Value, x: Value, start: Value, position: Value, scale: Value | None) -> list[Value]:
        """Four dims as they are kept: v unchanged, q and k normed and turned."""
        b, spec = self.b, self.spec
        own = self._normed(at, x, scale)
        inside = at < spec.rope_dim // 4
        within = at if spec.rope_dim == spec.head_dim else b.min(at, spec.rope_dim // 4 - 1)
        table = position * (spec.rope_dim // 4)
        turned = (
            self._turn_pairs(own, within, table)
            if spec.rope_pairing == "interleaved"
            else self._turn_halves(own, within, start, table, scale)
        )
        rotated = turned if spec.rope_dim == spec.head_dim else [b.select(inside, turned[i], own[i]) for i in range(4)]
        return [b.select(self.is_v, x[i], rotated[i]) for i in range(4)]

    def _turn_pairs(self, own: Value, at: Value, table: Value) -> list[Value]:
        """Pairs (2i, 2i + 1): both in one texel, as are their angles."""
        turn = self.bufs["rope"][table + at]
        return [
            value
            for i in (0, 2)
            for value in (own[i] * turn[i] - own[i + 1] * turn[i + 1], own[i] * turn[i + 1] + own[i + 1] * turn[i])
        ]

    def _turn_halves(self, own: Value, at: Value, start: Value, table: Value, scale: Value | None) -> list[Value]:
        """Pairs (i, i + rope_dim / 2): the others of four pairs are a texel half a rotation away."""
        b, half = self.b, self.spec.rope_dim // 8
        lower = at < half
        pair = b.select(lower, at, at - half)
        far = b.select(lower, at + half, pair)
        other = self._normed(far, self.bufs["qkv"][start + far], scale)
        turns = [self.bufs["rope"][table + pair * 2 + i] for i in range(2)]
        angles = [(turns[i // 2][i % 2 * 2], turns[i // 2][i % 2 * 2 + 1]) for i in range(4)]
        signed = [b.select(lower, -sin, sin) for _, sin in angles]
        return [own[i] * cos + other[i] * sin for i, ((cos, _), sin) in enumerate(zip(angles, signed, strict=True))]

    # results

    def _store_query(self, values: list[list[Value]]) -> None:
        at = (self.token * self.push["n_head"] + self.head) * self.spec.head_dim
        for ok, texel_at, four in zip(self.inside, self.texels, values, strict=True):
            with self.b.when(self.is_q & ok):
                for i, value in enumerate(four):
                    self.bufs["q"][at + texel_at * 4 + i] = value

    def _packed(self, values: list[list[Value]]) -> list[tuple[list[Value], Value | None]]:
        """Of each register the words that hold its four dims, and in Q8_0 the scale of its block."""
        b = self.b
        if self.spec.cache == "f16":
            return [([b.pack_half2x16(b.vec(*four[i : i + 2])) for i in (0, 2)], None) for four in values]
        packed: list[tuple[list[Value], Value | None]] = []
        for four, most in zip(values, self._block_largest(values), strict=True):
            inverse = b.select(most > 0.0, 127.0 / most, 0.0)
            numbers = [(b.round(value * inverse).to(i32) & 0xFF).bitcast(u32) for value in four]
            word = (numbers[0] | (numbers[1] << 8)) | ((numbers[2] << 16) | (numbers[3] << 24))
            packed.append(([word], most * (1.0 / 127.0)))
        return packed

    def _block_largest(self, values: list[list[Value]]) -> list[Value]:
        """Of each register the largest |x| of its block of 32 dims: 8 neighbouring texels."""
        b, lanes = self.b, self.spec.lanes
        mine = [reduce(b.max, [value.bitcast(u32) & 0x7FFFFFFF for value in four]) for four in values]
        together = max(1, BLOCK_TEXELS // lanes)  # registers that a block takes
        found = []
        for first in range(0, len(mine), together):
            most = reduce(b.max, mine[first : first + together])
            mask = 1
            while mask < min(lanes, BLOCK_TEXELS):
                most, mask = b.max(most, b.subgroup_shuffle_xor(most, mask)), mask * 2
            found += [most.bitcast(f32)] * together
        return found

    def _store_row(self, out: Buffer, row: Value, packed: list[tuple[list[Value], Value | None]]) -> None:
        """The words of one cache row, the scales with their padding before them."""
        b, n_scale_texel = self.b, scale_texels(self.spec.head_dim, self.spec.cache)
        start = row * (cache_row_nbytes(self.spec.head_dim, self.spec.cache) // 4)
        for ok, at, (words, scale) in zip(self.inside, self.texels, packed, strict=True):
            with b.when(ok):
                for i, word in enumerate(words):
                    out[start + n_scale_texel * 4 + at * len(words) + i] = word
            if scale is not None:
                with b.when(ok & (at % BLOCK_TEXELS == 0)):
                    out[start + at // BLOCK_TEXELS] = scale.bitcast(u32)
        n_scale = self.spec.head_dim // SCALE_DIMS
        if n_scale_texel * 4 > n_scale and n_scale_texel:
            with b.range(self.lane + n_scale, n_scale_texel * 4, step=self.spec.lanes) as padding:
                out[start + padding] = b.const(u32, 0)


__all__ = ["HeadSpec", "heads"]
