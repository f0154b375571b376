"""The graph of one forward pass: fused ops in execution order.

A graph is what a chain records and what the numpy reference executes, so both run the same ops on the same names.
It does not know how many rows (tokens) run, on which device, or how weights are quantized.

Every activation is a *row buffer*: f32 [n_row, n_col], one row a token. The KV cache is two buffers a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from vkllm.config import ModelConfig

Epilogue = Literal["store", "residual", "swiglu"]


@dataclass(frozen=True, slots=True)
class RowBuffer:
    """An activation, f32 [n_row, n_col]. `per_output`: one row a requested logits row instead of one a token."""

    name: str
    n_col: int
    per_output: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One weight matrix [n_row, n_col] of a linear op, and its bias [n_row] if it has one. Names are the file's tensors."""

    weight: str
    n_row: int
    n_col: int
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class Embed:
    """y[t] = weight[token[t]]."""

    name: str
    part: Part
    y: str


@dataclass(frozen=True, slots=True)
class Linear:
    """y = epilogue(norm(x) @ weightᵀ + bias).

    `store`: y = …; `residual`: y += …; `swiglu`: parts are (gate, up) and y = silu(gate) * up.
    `gather`: logits rows; row i reads x[output_row[i]].
    """

    name: str
    x: str
    y: str
    parts: tuple[Part, ...]
    epilogue: Epilogue = "store"
    norm: str | None = None
    gather: bool = False


@dataclass(frozen=True, slots=True)
class Qkv:
    """q, k, v = norm(x) @ weightᵀ + bias; RoPE on q and k; q is kept, k and v go to this layer's cache (f16)."""

    name: str
    layer: int
    x: str
    y: str
    parts: tuple[Part, Part, Part]
    norm: str


@dataclass(frozen=True, slots=True)
class Attention:
    """y = softmax(q kᵀ / sqrt(head_dim)) v over the cached positions of each row's sequence, causal, grouped heads."""

    name: str
    layer: int
    q: str
    y: str


@dataclass(frozen=True, slots=True)
class Argmax:
    """The greedy token of each logits row, and the count of its non-finite logits."""

    name: str
    logits: str


Op = Embed | Linear | Qkv | Attention | Argmax


@dataclass(frozen=True, slots=True)
class Graph:
    """Ops in execution order. `layer_ends` maps an op's name to the residual stream that it completes (for `diff`)."""

    config: ModelConfig
    ops: tuple[Op, ...]
    buffers: dict[str, RowBuffer]
    rope_factors: str | None = None
    logits: str = "logits"
    residual: str = "x"

    def parts(self) -> Iterator[Part]:
        """Every weight matrix that the graph multiplies with, embedding first; a tied matrix appears twice."""
        for op in self.ops:
            if isinstance(op, Embed):
                yield op.part
            elif isinstance(op, Linear | Qkv):
                yield from op.parts

    def vectors(self) -> set[str]:
        """Names of the f32 vectors (norm weights, biases, rope factors)."""
        names = {op.norm for op in self.ops if isinstance(op, Linear | Qkv) and op.norm}
        names |= {part.bias for part in self.parts() if part.bias}
        return names | ({self.rope_factors} if self.rope_factors else set())


@dataclass
class GraphBuilder:
    """Collects ops and buffers; one call an op, so that an architecture reads as a list."""

    config: ModelConfig
    ops: list[Op] = field(default_factory=list)
    buffers: dict[str, RowBuffer] = field(default_factory=dict)

    def buffer(self, name: str, n_col: int, per_output: bool = False) -> str:
        """Declare a row buffer (again is fine: layers share their buffers) and return its name."""
        self.buffers[name] = RowBuffer(name, n_col, per_output)
        return name

    def add(self, op: Op) -> None:
        self.ops.append(op)

    def build(self, rope_factors: str | None = None) -> Graph:
        return Graph(self.config, tuple(self.ops), dict(self.buffers), rope_factors)
