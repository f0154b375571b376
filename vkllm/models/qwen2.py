"""Qwen2 and Qwen2.5: Llama's graph with biases on q, k and v (the file brings them) and half-split RoPE. arXiv 2407.10671."""

from vkllm.models.llama import graph

__all__ = ["graph"]
