"""gpt-oss: experts in every layer, windows in every other one, attention sinks, biases, YaRN. Source: arXiv 2508.10925."""

from __future__ import annotations

from collections.abc import Collection

from vkllm.config import ModelConfig
from vkllm.models.decoder import Decoder
from vkllm.plan import Graph


def graph(c: ModelConfig, tensors: Collection[str]) -> Graph:
    d = Decoder(c, tensors)
    for i in range(c.n_layer):
        d.attention(i, sinks=True)
        d.experts(
            i, "swiglu_oai", norm="post_attention_norm", softmax_first=False
        )  # despite its name the norm before the experts
    return d.finish()
