"""What decoder-only transformers have in common, as the steps of which an architecture's file is a list.

Every step reads the residual stream `x` and adds to it. Tensors have GGUF's names; biases, fused matrices (`attn_qkv`, gate and
up in one `ffn_up`) and an untied head are used where the file has them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from vkllm.config import ModelConfig
from vkllm.plan import (
    Argmax,
    Attention,
    Combine,
    Embed,
    ExpertLinear,
    Graph,
    GraphBuilder,
    Linear,
    NormAdd,
    Part,
    Qkv,
    RopeTable,
    Route,
)


class Decoder:
    """Builds the graph of a decoder: `attention` and `mlp` or `experts` for each layer, then `finish`."""

    def __init__(self, config: ModelConfig, tensors: Collection[str], *, embedding_scale: float = 1.0) -> None:
        c = self.config = config
        self._tensors, self._g = tensors, GraphBuilder(c)
        self._x = self._g.buffer("x", c.n_embd)
        self._embedding = self._part("token_embd", c.n_vocab, c.n_embd)
        self._g.add(Embed("token_embd", self._embedding, self._x, embedding_scale * c.embedding_scale))

    def attention(self, i: int, *, head_norms: bool = False, sinks: bool = False, post_norm: str | None = None) -> None:
        """x += attn_output(attention(norm(x))). `head_norms`: of q and k; `post_norm`: of what is added."""
        c, g, b = self.config, self._g, f"blk.{i}"
        n_q, n_kv, window = c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.window(i)
        q, attn = g.buffer("q", n_q), g.buffer("attn", n_q)
        stems = (f"{b}.attn_q", f"{b}.attn_k", f"{b}.attn_v")
        parts = self._fused(f"{b}.attn_qkv", stems, (n_q, n_kv, n_kv), c.n_embd)
        norms = (f"{b}.attn_q_norm.weight", f"{b}.attn_k_norm.weight") if head_norms else None
        rope = "rope_local" if window and c.rope_theta_local else "rope"
        g.add(Qkv(f"{b}.qkv", i, self._x, q, (parts[0], parts[1], parts[2]), f"{b}.attn_norm.weight", norms, rope))
        g.add(Attention(f"{b}.attn", i, q, attn, window, f"{b}.attn_sinks.weight" if sinks else None))
        self._add_to_residual(f"{b}.attn_output", attn, self._part(f"{b}.attn_output", c.n_embd, n_q), post_norm)

    def mlp(self, i: int, gate: Literal["swiglu", "geglu"] = "swiglu", *, post_norm: str | None = None) -> None:
        """x += down(gate(norm(x)) * up(norm(x)))."""
        c, g, b = self.config, self._g, f"blk.{i}"
        ffn = g.buffer("ffn", c.n_ff)
        if f"{b}.ffn_gate.weight" in self._tensors:
            parts = tuple(self._part(f"{b}.{stem}", c.n_ff, c.n_embd) for stem in ("ffn_gate", "ffn_up"))
        else:
            parts = self._slices(f"{b}.ffn_up", (c.n_ff, c.n_ff), c.n_embd)
        g.add(Linear(f"{b}.ffn_gate_up", self._x, ffn, parts, gate, norm=f"{b}.ffn_norm.weight"))
        self._add_to_residual(f"{b}.ffn_down", ffn, self._part(f"{b}.ffn_down", c.n_embd, c.n_ff), post_norm)

    def experts(
        self, i: int, gate: Literal["swiglu", "swiglu_oai"] = "swiglu", *, norm: str = "ffn_norm", softmax_first: bool = True
    ) -> None:
        """x += the weighted sum of what a token's experts make of norm(x); a router chooses them."""
        c, g, b, norm = self.config, self._g, f"blk.{i}", f"blk.{i}.{norm}.weight"
        n_used, n_ff = c.n_expert_used, c.n_ff_expert
        router, ids, weights = g.buffer("router", c.n_expert), g.buffer("expert_ids", n_used), g.buffer("expert_weights", n_used)
        hidden = g.buffer("expert_ffn", n_ff, rows_per_token=n_used)
        out = g.buffer("expert_out", c.n_embd, rows_per_token=n_used)
        g.add(Linear(f"{b}.ffn_gate_inp", self._x, router, (self._part(f"{b}.ffn_gate_inp", c.n_expert, c.n_embd),), norm=norm))
        g.add(Route(f"{b}.route", router, ids, weights, softmax_first, c.expert_weights_norm))
        gate_up = (self._experts(f"{b}.ffn_gate_exps", n_ff, c.n_embd), self._experts(f"{b}.ffn_up_exps", n_ff, c.n_embd))
        g.add(ExpertLinear(f"{b}.ffn_gate_up_exps", self._x, hidden, ids, gate_up, gate, norm))
        down = self._experts(f"{b}.ffn_down_exps", c.n_embd, n_ff)
        g.add(ExpertLinear(f"{b}.ffn_down_exps", hidden, out, ids, (down,)))
        g.add(Combine(f"{b}.combine", out, weights, self._x))

    def finish(self) -> Graph:
        """The head, the greedy choice, and RoPE's tables."""
        c, g = self.config, self._g
        logits = g.buffer("logits", c.n_vocab, per_output=True)
        head = self._part("output", c.n_vocab, c.n_embd) if "output.weight" in self._tensors else self._embedding
        scale, norm = 1.0 / c.logit_scale, "output_norm.weight"
        g.add(Linear("output", self._x, logits, (head,), norm=norm, gather=True, scale=scale, softcap=c.final_softcap))
        g.add(Argmax("argmax", logits))
        ropes = {"rope": self._rope()}
        if c.rope_theta_local:
            ropes["rope_local"] = RopeTable(c.rope_theta_local)
        used = {op.rope for op in g.ops if isinstance(op, Qkv)}
        return g.build({name: table for name, table in ropes.items() if name in used})

    def _rope(self) -> RopeTable:
        c = self.config
        short, long = (f"rope_factors_{which}.weight" for which in ("short", "long"))
        if short in self._tensors or c.rope_scaling.kind == "longrope":
            return RopeTable(c.rope_theta, c.rope_scaling, short, long)
        return RopeTable(c.rope_theta, c.rope_scaling, "rope_freqs.weight" if "rope_freqs.weight" in self._tensors else None)

    def _add_to_residual(self, name: str, x: str, part: Part, post_norm: str | None) -> None:
        g, scale = self._g, self.config.residual_scale
        if post_norm is None:
            g.add(Linear(name, x, self._x, (part,), "residual", scale=scale))
            return
        out = g.buffer("out", self.config.n_embd)
        g.add(Linear(name, x, out, (part,)))
        layer = name.rsplit(".", 1)[0]
        g.add(NormAdd(f"{layer}.{post_norm}", out, self._x, f"{layer}.{post_norm}.weight"))

    def _part(self, stem: str, n_row: int, n_col: int) -> Part:
        return Part(f"{stem}.weight", n_row, n_col, self._bias(stem))

    def _experts(self, stem: str, n_row: int, n_col: int) -> Part:
        return Part(f"{stem}.weight", n_row, n_col, self._bias(stem), n_expert=self.config.n_expert)

    def _bias(self, stem: str) -> str | None:
        return f"{stem}.bias" if f"{stem}.bias" in self._tensors else None

    def _fused(self, fused: str, stems: tuple[str, ...], n_rows: tuple[int, ...], n_col: int) -> tuple[Part, ...]:
        """Matrices that a file may hold as one, one below the other."""
        if f"{fused}.weight" in self._tensors:
            return self._slices(fused, n_rows, n_col)
        return tuple(self._part(stem, n_row, n_col) for stem, n_row in zip(stems, n_rows, strict=True))

    def _slices(self, stem: str, n_rows: tuple[int, ...], n_col: int) -> tuple[Part, ...]:
        firsts, total = [sum(n_rows[:i]) for i in range(len(n_rows))], sum(n_rows)
        return tuple(
            Part(f"{stem}.weight", n_row, n_col, self._bias(stem), rows_of=(first, total))
            for first, n_row in zip(firsts, n_rows, strict=True)
        )
