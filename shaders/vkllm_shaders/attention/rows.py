"""Where the K and V rows of one (row, KV head) lie in the paged cache, and how they are read: f16, or Q8_0 with its scales.

The cache is [block, KV head, position in the block]: the rows of one head follow one another, as they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vkllm_codegen import Block, Buffer, Value, f32, i32
from vkllm_shaders.attention.spec import SCALE_DIMS, AttentionSpec, scale_texels

CHUNK_DIMS = 8
SCALE_CHUNKS = SCALE_DIMS // CHUNK_DIMS


@dataclass(frozen=True)
class Rows:
    """The K and V rows of one (row, KV head), counted over all heads and blocks."""

    b: Block
    spec: AttentionSpec
    k: Buffer
    v: Buffer
    block_table: Buffer
    head: Value
    n_kv_head: Value
    table_start: Value

    def block(self, position: Value) -> Value:
        """The first cache row, for this head, of the block that holds `position`."""
        block = self.block_table[self.table_start + position // self.spec.block_size]
        return (block * self.n_kv_head + self.head) * self.spec.block_size

    def start(self, row: Value) -> Value:
        """Index of the first 16-byte texel of a K or V row."""
        return row * self.spec.row_texels

    @property
    def scaled_dims(self) -> int:
        """Dims that share a scale: all of them in f16, which has none."""
        return SCALE_DIMS if self.spec.cache == "q8_0" else self.spec.head_dim

    @property
    def texel_dims(self) -> int:
        """Dims of one texel."""
        return 16 if self.spec.cache == "q8_0" else CHUNK_DIMS

    def key(self, start: Value, dim: int) -> list[Value]:
        """The `texel_dims` numbers from `dim` on of a K row; in Q8_0 before they are scaled."""
        words = self.k[start + (scale_texels(self.spec.head_dim, self.spec.cache) + dim // self.texel_dims)]
        if self.spec.cache == "f16":
            return _halves(self.b, words)
        return [value for i in range(4) for value in _signed_bytes(words[i])]

    def scales(self, cache: Buffer, start: Value) -> list[Value]:
        """The scales of a row of K or V, one for `scaled_dims` dims; none in f16."""
        texels = [cache[start + i] for i in range(scale_texels(self.spec.head_dim, self.spec.cache))]
        n_scale = self.spec.head_dim // SCALE_DIMS if texels else 0
        return [texels[i // 4][i % 4].bitcast(f32) for i in range(n_scale)]

    def values(self, cache: Buffer, start: Value, chunks: Sequence[Value], scales: Sequence[Value]) -> list[Value]:
        """The 8 numbers of each chunk of a row of K or V. `scales`: in Q8_0 those of the chunks."""
        if self.spec.cache == "f16":
            return [value for chunk in chunks for value in _halves(self.b, cache[start + chunk])]
        first = start + scale_texels(self.spec.head_dim, self.spec.cache)
        return [
            value * scale
            for chunk, scale in zip(chunks, scales, strict=True)
            for word in self._half_texel(cache[first + (chunk >> 1)], chunk)
            for value in _signed_bytes(word)
        ]

    def own_scales(self, chunks: Sequence[Value], scales: Sequence[Value]) -> list[Value]:
        """Of a row's scales, those of a lane's chunks (one of them all, or the j-th of `lanes` times j …); none in f16."""
        own = []
        for j, chunk in enumerate(chunks if scales else ()):
            first = j * self.spec.lanes
            last = self.spec.chunks if len(chunks) == 1 else min(first + self.spec.lanes, self.spec.chunks)
            candidates = range(first // SCALE_CHUNKS, (last - 1) // SCALE_CHUNKS + 1)
            scale = scales[candidates[0]]
            for i in candidates[1:]:
                scale = self.b.select(chunk // SCALE_CHUNKS == i, scales[i], scale)
            own.append(scale)
        return own

    def _half_texel(self, words: Value, chunk: Value) -> list[Value]:
        upper = (chunk & 1) == 1
        return [self.b.select(upper, words[i + 2], words[i]) for i in range(2)]


def _halves(b: Block, words: Value) -> list[Value]:
    """The 8 f16 of one texel, widened."""
    pairs = [b.unpack_half2x16(words[i]) for i in range(4)]
    return [pair[i] for pair in pairs for i in range(2)]


def _signed_bytes(word: Value) -> list[Value]:
    """The four signed bytes of a word as f32."""
    shifted = [word << (24 - 8 * i) if i < 3 else word for i in range(4)]
    return [(bits.bitcast(i32) >> 24).to(f32) for bits in shifted]
