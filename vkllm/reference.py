"""The oracle executor: the same graph, run by numpy on dequantized weights. Slow, plain, and right.

It shares with the device path the graph, the file and the RoPE table, and nothing else: weights are expanded by the `gguf`
library, sums run in float32 BLAS (float64 on request), softmax and norms in float64. Like the device it keeps k and v in f16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from vkllm.files.gguf import GGUFFile
from vkllm.plan import Argmax, Attention, Embed, Graph, Linear, Part, Qkv
from vkllm.rope import rope_table
from vkllm.weights import dequantized, vector

Array = NDArray[np.floating]
Watch = Callable[[str, Array], None]


class ReferenceExecutor:
    """Runs one sequence. `forward` may be called with one token or many: positions go on from call to call."""

    def __init__(
        self,
        graph: Graph,
        file: GGUFFile,
        *,
        n_ctx: int = 4096,
        dtype: type[np.floating] = np.float32,
        cache_bytes: int = 3 << 30,
    ) -> None:
        self.graph, self.file, self.dtype = graph, file, dtype
        factors = vector(file, graph.rope_factors) if graph.rope_factors else None
        self._rope = rope_table(graph.config, n_ctx, factors).astype(np.float64)
        self._weights: dict[str, Array] = {}
        self._room = cache_bytes
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        c = self.graph.config
        empty = np.zeros((0, c.n_kv_head, c.head_dim), np.float16)
        self._k, self._v = [empty] * c.n_layer, [empty] * c.n_layer
        self.n_past = 0

    def forward(self, token_ids: Sequence[int], *, watch: Watch | None = None) -> Array:
        """Logits of every token, [n_token, n_vocab]. `watch(op name, output)` sees each op's output as it is made."""
        buffers: dict[str, Array] = {}
        for op in self.graph.ops:
            if isinstance(op, Embed):
                buffers[op.y] = self._weight(op.part)[list(token_ids)].astype(self.dtype)
            elif isinstance(op, Qkv):
                buffers[op.y] = self._qkv(op, buffers[op.x])
            elif isinstance(op, Attention):
                buffers[op.y] = self._attention(op, buffers[op.q])
            elif isinstance(op, Linear):
                buffers[op.y] = self._linear(op, buffers)
            if watch and not isinstance(op, Argmax):
                watch(op.name, buffers[op.y])
        self.n_past += len(token_ids)
        return buffers[self.graph.logits]

    def _weight(self, part: Part) -> Array:
        """The matrix [n_row, n_col], kept while there is room."""
        if part.weight in self._weights:
            return self._weights[part.weight]
        weight: Array = dequantized(self.file, part.weight).astype(self.dtype, copy=False)
        if weight.nbytes <= self._room:
            self._room -= weight.nbytes
            self._weights[part.weight] = weight
        return weight

    def _norm(self, x: Array, name: str | None) -> Array:
        if name is None:
            return x
        wide = x.astype(np.float64)
        scale = 1.0 / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + self.graph.config.rms_norm_eps)
        normed: Array = (wide * scale * vector(self.file, name)).astype(self.dtype)
        return normed

    def _matmul(self, x: Array, part: Part) -> Array:
        y: Array = x @ self._weight(part).T
        return y + vector(self.file, part.bias).astype(self.dtype) if part.bias else y

    def _linear(self, op: Linear, buffers: dict[str, Array]) -> Array:
        x = self._norm(buffers[op.x], op.norm)
        if op.epilogue == "swiglu":
            gate, up = (self._matmul(x, part) for part in op.parts)
            wide = gate.astype(np.float64)
            return (wide / (1.0 + np.exp(-wide)) * up).astype(self.dtype)
        y = self._matmul(x, op.parts[0])
        return buffers[op.y] + y if op.epilogue == "residual" else y

    def _rotate(self, x: Array) -> Array:
        """RoPE on [n_token, n_head, head_dim], at the positions that follow the cache."""
        table = self._rope[self.n_past : self.n_past + x.shape[0], None]
        cos, sin = table[..., 0], table[..., 1]
        out = np.empty(x.shape, np.float64)
        half = x.shape[-1] // 2
        a, b = (
            (slice(None, half), slice(half, None))
            if self.graph.config.rope_pairing == "half"
            else (slice(None, None, 2), slice(1, None, 2))
        )
        out[..., a] = x[..., a] * cos - x[..., b] * sin
        out[..., b] = x[..., a] * sin + x[..., b] * cos
        return out.astype(self.dtype)

    def _qkv(self, op: Qkv, x: Array) -> Array:
        c, n = self.graph.config, x.shape[0]
        normed = self._norm(x, op.norm)
        q, k, v = (self._matmul(normed, part) for part in op.parts)
        k = self._rotate(k.reshape(n, c.n_kv_head, c.head_dim))
        self._k[op.layer] = np.concatenate([self._k[op.layer], k.astype(np.float16)])
        self._v[op.layer] = np.concatenate([self._v[op.layer], v.reshape(n, c.n_kv_head, c.head_dim).astype(np.float16)])
        return self._rotate(q.reshape(n, c.n_head, c.head_dim)).reshape(n, -1)

    def _attention(self, op: Attention, q: Array) -> Array:
        c, n = self.graph.config, q.shape[0]
        group = c.n_head // c.n_kv_head
        heads = q.reshape(n, c.n_kv_head, group, c.head_dim).astype(np.float64)
        k, v = self._k[op.layer].astype(np.float64), self._v[op.layer].astype(np.float64)
        scores = np.einsum("nkgd,pkd->kgnp", heads, k) / np.sqrt(c.head_dim)
        allowed = np.arange(k.shape[0]) <= self.n_past + np.arange(n)[:, None]
        scores = np.where(allowed, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out: Array = np.einsum("kgnp,pkd->nkgd", weights, v).reshape(n, -1).astype(self.dtype)
        return out
