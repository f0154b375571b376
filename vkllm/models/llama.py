"""Llama (2, 3, 3.1, 3.2, SmolLM, TinyLlama), Mistral and Mixtral: pre-norm attention and SwiGLU, or a mixture of them.

Mistral's window, Llama 3.1's rope factors and Mixtral's experts come from the file. Source: arXiv 2302.13971, 2310.06825,
2401.04088, 2407.21783.
"""

from __future__ import annotations

from collections.abc import Collection

from vkllm.config import ModelConfig
from vkllm.models.decoder import Decoder
from vkllm.plan import Graph


def graph(c: ModelConfig, tensors: Collection[str]) -> Graph:
    d = Decoder(c, tensors)
    for i in range(c.n_layer):
        d.attention(i)
        if c.n_expert:
            d.experts(i)
        else:
            d.mlp(i)
    return d.finish()
