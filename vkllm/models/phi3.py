"""Phi-3 and Phi-4-mini: Llama's graph with fused QKV and gate-up matrices and long RoPE. arXiv 2404.14219, 2402.13753."""

from vkllm.models.llama import graph

__all__ = ["graph"]
