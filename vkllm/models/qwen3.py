"""Qwen3: q and k are normed head by head; dense or (`qwen3moe`) a mixture of experts. Source: arXiv 2505.09388."""

from __future__ import annotations

from collections.abc import Collection

from vkllm.config import ModelConfig
from vkllm.models.decoder import Decoder
from vkllm.plan import Graph


def graph(c: ModelConfig, tensors: Collection[str]) -> Graph:
    d = Decoder(c, tensors)
    for i in range(c.n_layer):
        d.attention(i, head_norms=True)
        if c.n_expert:
            d.experts(i)
        else:
            d.mlp(i)
    return d.finish()
