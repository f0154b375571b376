"""Gemma 2 and 3: GeGLU, norms before and after each step, windows in most layers. Gemma 2 caps scores and logits; Gemma 3 norms q
and k instead. Embeddings are multiplied by sqrt(n_embd). Source: arXiv 2408.00118, 2503.19786.
"""

from __future__ import annotations

from collections.abc import Collection
from math import sqrt

from vkllm.config import ModelConfig
from vkllm.models.decoder import Decoder
from vkllm.plan import Graph


def graph(c: ModelConfig, tensors: Collection[str]) -> Graph:
    d = Decoder(c, tensors, embedding_scale=sqrt(c.n_embd))
    for i in range(c.n_layer):
        d.attention(i, head_norms=c.arch == "gemma3", post_norm="post_attention_norm")
        d.mlp(i, "geglu", post_norm="post_ffw_norm")
    return d.finish()
