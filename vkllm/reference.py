"""The oracle executor: the same graph, run by numpy on dequantized weights. Slow, plain, and right.

It shares with the device path the graph, the file and the RoPE table, and nothing else: weights are expanded by the `gguf`
library, sums run in float32 BLAS (float64 on request), softmax and norms in float64. Like the device it keeps k and v in f16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vkllm.files.model_file import ModelFile
from vkllm.plan import Argmax, Attention, Combine, Embed, ExpertLinear, Graph, Linear, NormAdd, Part, Qkv, Route
from vkllm.rope import rope_table
from vkllm.weights import dequantized, vector

Array = NDArray[np.floating]
Watch = Callable[[str, Array], None]


class ReferenceExecutor:
    """Runs one sequence. `forward` may be called with one token or many: positions go on from call to call."""

    def __init__(
        self,
        graph: Graph,
        file: ModelFile,
        *,
        n_ctx: int = 4096,
        dtype: type[np.floating] = np.float32,
        cache_bytes: int = 3 << 30,
    ) -> None:
        self.graph, self.file, self.dtype = graph, file, dtype
        vectors = {name: vector(file, name) for name in graph.vectors()}
        self._rope = {
            name: rope_table(table, graph.config.rope_dim, n_ctx, vectors).astype(np.float64)
            for name, table in graph.ropes.items()
        }
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
                buffers[op.y] = (self._weight(op.part)[list(token_ids)] * op.scale).astype(self.dtype)
            elif isinstance(op, Qkv):
                buffers[op.y] = self._qkv(op, buffers[op.x])
            elif isinstance(op, Attention):
                buffers[op.y] = self._attention(op, buffers[op.q])
            elif isinstance(op, Linear):
                buffers[op.y] = self._linear(op, buffers)
            elif isinstance(op, NormAdd):
                buffers[op.y] = buffers[op.y] + self._norm(buffers[op.x], op.norm)
            elif isinstance(op, Route):
                buffers[op.ids], buffers[op.y] = self._route(op, buffers[op.logits])
            elif isinstance(op, ExpertLinear):
                buffers[op.y] = self._experts(op, buffers)
            elif isinstance(op, Combine):
                buffers[op.y] = buffers[op.y] + np.einsum("ts,tsn->tn", buffers[op.weights], buffers[op.x]).astype(self.dtype)
            if watch and not isinstance(op, Argmax):
                watch(op.name, buffers[op.y].reshape(-1, buffers[op.y].shape[-1]))
        self.n_past += len(token_ids)
        return buffers[self.graph.logits]

    def _weight(self, part: Part) -> Array:
        """The matrix [n_row, n_col], of experts [n_expert, n_row, n_col]; the tensor is kept while there is room."""
        weight = self._weights.get(part.weight)
        if weight is None:
            weight = dequantized(self.file, part.weight).astype(self.dtype, copy=False)
            if weight.nbytes <= self._room:
                self._room -= weight.nbytes
                self._weights[part.weight] = weight
        return weight if part.n_expert else weight[part.rows]

    def _bias(self, part: Part) -> Array | float:
        if part.bias is None:
            return 0.0
        bias: Array = vector(self.file, part.bias).astype(self.dtype)
        return bias.reshape(part.n_expert, -1) if part.n_expert else bias[part.rows]

    def _norm(self, x: Array, name: str | None) -> Array:
        if name is None:
            return x
        wide = x.astype(np.float64)
        scale = 1.0 / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + self.graph.config.rms_norm_eps)
        normed: Array = (wide * scale * vector(self.file, name)).astype(self.dtype)
        return normed

    def _matmul(self, x: Array, part: Part) -> Array:
        y: Array = x @ self._weight(part).T
        return y + self._bias(part)

    def _linear(self, op: Linear, buffers: dict[str, Array]) -> Array:
        x = self._norm(buffers[op.x], op.norm)
        if op.epilogue in ("swiglu", "geglu"):
            gate, up = (self._matmul(x, part) for part in op.parts)
            return (_gated(op.epilogue, gate.astype(np.float64), up.astype(np.float64))).astype(self.dtype)
        y = self._matmul(x, op.parts[0]) * self.dtype(op.scale)
        if op.softcap:
            y = op.softcap * np.tanh(y / op.softcap)
        return buffers[op.y] + y if op.epilogue == "residual" else y

    def _route(self, op: Route, logits: Array) -> tuple[Any, Array]:
        """Ids and weights of the best experts, best first, ties to the lower id: [n_token, n_used] each."""
        wide = logits.astype(np.float64)
        ids = np.argsort(-wide, axis=-1, kind="stable")[:, : self.graph.config.n_expert_used]
        chosen = np.take_along_axis(wide, ids, axis=-1)
        weights = np.exp(chosen - wide.max(axis=-1, keepdims=True))
        if op.softmax_first and not op.normalized:
            weights /= np.exp(wide - wide.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True)
        else:
            weights /= weights.sum(axis=-1, keepdims=True)
        return ids, weights.astype(self.dtype)

    def _experts(self, op: ExpertLinear, buffers: dict[str, Array]) -> Array:
        """[n_token, n_used, n_row]; an expert's weights meet all of its tokens at once."""
        ids = buffers[op.ids]
        x = self._norm(buffers[op.x], op.norm)
        x = x[:, None].repeat(ids.shape[1], axis=1) if x.ndim == 2 else x
        y = np.empty((*ids.shape, op.parts[0].n_row), self.dtype)
        for e in np.unique(ids):
            mine = ids == e
            outs = [x[mine] @ self._weight(p)[e].T + (self._bias(p)[e] if p.bias else 0.0) for p in op.parts]  # type: ignore[index]
            y[mine] = outs[0] if op.epilogue == "store" else _gated(op.epilogue, *(out.astype(np.float64) for out in outs))
        return y

    def _rotate(self, x: Array, rope: str) -> Array:
        """RoPE on [n_token, n_head, head_dim], at the positions that follow the cache; dims from rope_dim on stay."""
        c = self.graph.config
        table = self._rope[rope][self.n_past : self.n_past + x.shape[0], None]
        cos, sin = table[..., 0], table[..., 1]
        out, half = x.astype(np.float64), c.rope_dim // 2
        if c.rope_pairing == "half":
            a, b = slice(None, half), slice(half, c.rope_dim)
        else:
            a, b = slice(0, c.rope_dim, 2), slice(1, c.rope_dim, 2)
        out[..., a] = x[..., a] * cos - x[..., b] * sin
        out[..., b] = x[..., a] * sin + x[..., b] * cos
        return out.astype(self.dtype)

    def _qkv(self, op: Qkv, x: Array) -> Array:
        c, n = self.graph.config, x.shape[0]
        normed = self._norm(x, op.norm)
        q, k, v = (self._matmul(normed, part).reshape(n, -1, c.head_dim) for part in op.parts)
        if op.head_norms:
            q, k = self._norm(q, op.head_norms[0]), self._norm(k, op.head_norms[1])
        self._k[op.layer] = np.concatenate([self._k[op.layer], self._rotate(k, op.rope).astype(np.float16)])
        self._v[op.layer] = np.concatenate([self._v[op.layer], v.astype(np.float16)])
        return self._rotate(q, op.rope).reshape(n, -1)

    def _attention(self, op: Attention, q: Array) -> Array:
        c, n = self.graph.config, q.shape[0]
        group = c.n_head // c.n_kv_head
        heads = q.reshape(n, c.n_kv_head, group, c.head_dim).astype(np.float64)
        k, v = self._k[op.layer].astype(np.float64), self._v[op.layer].astype(np.float64)
        scores = np.einsum("nkgd,pkd->kgnp", heads, k) * (c.attention_scale or c.head_dim**-0.5)
        if c.attn_softcap:
            scores = c.attn_softcap * np.tanh(scores / c.attn_softcap)
        distance = self.n_past + np.arange(n)[:, None] - np.arange(k.shape[0])
        scores = np.where((distance >= 0) & (distance < (op.window or np.inf)), scores, -np.inf)
        highest = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        if op.sinks:
            total += np.exp(vector(self.file, op.sinks).astype(np.float64).reshape(c.n_kv_head, group, 1, 1) - highest)
        weights /= total
        out: Array = np.einsum("kgnp,pkd->nkgd", weights, v).reshape(n, -1).astype(self.dtype)
        return out


def _gated(epilogue: str, gate: Array, up: Array) -> Array:
    """The products of gated MLPs, in float64."""
    if epilogue == "geglu":
        inner = np.sqrt(2.0 / np.pi) * (gate + 0.044715 * gate**3)
        return np.asarray(0.5 * gate * (1.0 + np.tanh(inner)) * up)
    if epilogue == "swiglu_oai":
        gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
        return np.asarray(gate / (1.0 + np.exp(-1.702 * gate)) * (up + 1.0))
    return np.asarray(gate / (1.0 + np.exp(-gate)) * up)
