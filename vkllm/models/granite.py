"""Granite 3 (dense): Llama's graph with scales on embedding, attention, residual and logits, from the configuration."""

from vkllm.models.llama import graph

__all__ = ["graph"]
