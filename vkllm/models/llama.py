"""Llama (2, 3, 3.1, 3.2, SmolLM, TinyLlama): pre-norm attention and SwiGLU. Source: arXiv 2302.13971, 2407.21783."""

from __future__ import annotations

from collections.abc import Collection

from vkllm.config import ModelConfig
from vkllm.plan import Argmax, Attention, Embed, Graph, GraphBuilder, Linear, Part, Qkv


def graph(c: ModelConfig, tensors: Collection[str]) -> Graph:
    """The graph of a dense decoder. Biases, an untied head and rope factors are used where the file has them."""
    g = GraphBuilder(c)
    n_q, n_kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim

    def part(stem: str, n_row: int, n_col: int) -> Part:
        bias = f"{stem}.bias"
        return Part(f"{stem}.weight", n_row, n_col, bias if bias in tensors else None)

    x, q, attn, ffn = g.buffer("x", c.n_embd), g.buffer("q", n_q), g.buffer("attn", n_q), g.buffer("ffn", c.n_ff)
    logits = g.buffer("logits", c.n_vocab, per_output=True)

    embedding = part("token_embd", c.n_vocab, c.n_embd)
    g.add(Embed("token_embd", embedding, y=x))
    for i in range(c.n_layer):
        b = f"blk.{i}"
        qkv = (part(f"{b}.attn_q", n_q, c.n_embd), part(f"{b}.attn_k", n_kv, c.n_embd), part(f"{b}.attn_v", n_kv, c.n_embd))
        g.add(Qkv(f"{b}.qkv", i, x, y=q, parts=qkv, norm=f"{b}.attn_norm.weight"))
        g.add(Attention(f"{b}.attn", i, q, y=attn))
        g.add(Linear(f"{b}.attn_output", attn, x, (part(f"{b}.attn_output", c.n_embd, n_q),), "residual"))
        gate_up = (part(f"{b}.ffn_gate", c.n_ff, c.n_embd), part(f"{b}.ffn_up", c.n_ff, c.n_embd))
        g.add(Linear(f"{b}.ffn_gate_up", x, ffn, gate_up, "swiglu", norm=f"{b}.ffn_norm.weight"))
        g.add(Linear(f"{b}.ffn_down", ffn, x, (part(f"{b}.ffn_down", c.n_embd, c.n_ff),), "residual"))
    head = part("output", c.n_vocab, c.n_embd) if "output.weight" in tensors else embedding
    g.add(Linear("output", x, logits, (head,), norm="output_norm.weight", gather=True))
    g.add(Argmax("argmax", logits))
    return g.build(rope_factors="rope_freqs.weight" if "rope_freqs.weight" in tensors else None)
