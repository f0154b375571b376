"""A model as data: the ops of one forward pass, in order, and the buffers between them. Knows no device."""

from vkllm.plan.graph import Argmax, Attention, Embed, Graph, GraphBuilder, Linear, Op, Part, Qkv, RowBuffer

__all__ = ["Argmax", "Attention", "Embed", "Graph", "GraphBuilder", "Linear", "Op", "Part", "Qkv", "RowBuffer"]
