"""The graph of one forward pass: fused ops in execution order.

A graph is what a chain records and what the numpy reference executes, so both run the same ops on the same names.
It does not know how many rows (tokens) run, on which device, or how weights are quantized.

Every activation is a *row buffer*: f32 [n_row, n_col], one row a token. The KV cache is two buffers a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from vkllm.config import ModelConfig, RopeScaling

Epilogue = Literal["store", "residual", "swiglu", "geglu"]
ExpertEpilogue = Literal["store", "swiglu", "swiglu_oai"]


@dataclass(frozen=True, slots=True)
class RowBuffer:
    """An activation, f32 [n_row * rows_per_token, n_col]. `per_output`: one row a requested logits row instead of one a token."""

    name: str
    n_col: int
    per_output: bool = False
    rows_per_token: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """One weight matrix [n_row, n_col], and its bias [n_row] if it has one. Names are the file's tensors.

    `rows_of`: the matrix is rows first … first + n_row - 1 of a tensor with so many: (first, total). `n_expert`: the tensor is
    [n_expert, n_row, n_col], the bias [n_expert, n_row].
    """

    weight: str
    n_row: int
    n_col: int
    bias: str | None = None
    rows_of: tuple[int, int] | None = None
    n_expert: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor in the file."""
        n_row = self.rows_of[1] if self.rows_of else self.n_row
        return (self.n_expert, n_row, self.n_col) if self.n_expert else (n_row, self.n_col)

    @property
    def rows(self) -> slice:
        """The part's rows, of the tensor's with all experts one below the other."""
        if self.n_expert:
            return slice(0, self.n_expert * self.n_row)
        first = self.rows_of[0] if self.rows_of else 0
        return slice(first, first + self.n_row)


@dataclass(frozen=True, slots=True)
class Embed:
    """y[t] = weight[token[t]] * scale."""

    name: str
    part: Part
    y: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Linear:
    """y = epilogue((norm(x) @ weightᵀ + bias) * scale).

    `store`: y = …, or softcap * tanh(… / softcap) where there is one; `residual`: y += …; `swiglu`, `geglu`: parts are
    (gate, up) and y = silu(gate) * up, or gelu(gate) * up with the tanh approximation.
    `gather`: logits rows; row i reads x[output_row[i]].
    """

    name: str
    x: str
    y: str
    parts: tuple[Part, ...]
    epilogue: Epilogue = "store"
    norm: str | None = None
    gather: bool = False
    scale: float = 1.0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class Qkv:
    """q, k, v = norm(x) @ weightᵀ + bias; RoPE on q and k; q is kept, k and v go to this layer's cache.

    `head_norms`: RMS norms of (q, k) over each head, before RoPE. `rope`: which of the graph's tables.
    """

    name: str
    layer: int
    x: str
    y: str
    parts: tuple[Part, Part, Part]
    norm: str
    head_norms: tuple[str, str] | None = None
    rope: str = "rope"


@dataclass(frozen=True, slots=True)
class Attention:
    """y = softmax(q kᵀ * scale) v over the cached positions of each row's sequence, causal, grouped heads.

    `window`: only so many last positions (0: all). `sinks`: a logit for each head that only adds to the softmax's denominator.
    Scale and softcap of the scores are the configuration's.
    """

    name: str
    layer: int
    q: str
    y: str
    window: int = 0
    sinks: str | None = None


@dataclass(frozen=True, slots=True)
class NormAdd:
    """y += norm(x)."""

    name: str
    x: str
    y: str
    norm: str


@dataclass(frozen=True, slots=True)
class Route:
    """The `n_expert_used` best experts of each token, from the router's logits: ids (u32) and weights, both [n_row, n_used].

    `softmax_first`: weights are the softmax over all experts, divided by the chosen ones' sum if `normalized`; else the softmax
    over the chosen.
    """

    name: str
    logits: str
    ids: str
    y: str
    softmax_first: bool = True
    normalized: bool = True


@dataclass(frozen=True, slots=True)
class ExpertLinear:
    """For each token t and each of its experts e, at slot s: y[t, s] = epilogue(norm(x) @ weight[e]ᵀ + bias[e]).

    x has a row for each token, or for each token and slot. `swiglu_oai`: gate clamped to ≤ 7, up to ±7, then
    gate * sigmoid(1.702 gate) * (up + 1).
    """

    name: str
    x: str
    y: str
    ids: str
    parts: tuple[Part, ...]
    epilogue: ExpertEpilogue = "store"
    norm: str | None = None


@dataclass(frozen=True, slots=True)
class Combine:
    """y[t] += sum over slots s of weights[t, s] * x[t, s]."""

    name: str
    x: str
    weights: str
    y: str


@dataclass(frozen=True, slots=True)
class Argmax:
    """The greedy token of each logits row, and the count of its non-finite logits."""

    name: str
    logits: str


Op = Embed | Linear | Qkv | Attention | NormAdd | Route | ExpertLinear | Combine | Argmax
MatrixOp = Embed | Linear | Qkv | ExpertLinear


UNSCALED = RopeScaling()


@dataclass(frozen=True, slots=True)
class RopeTable:
    """One table of RoPE angles. `factors`: a vector [rope_dim / 2] that divides the frequencies; `long_factors`: instead of it,
    where the context is longer than the scaling's `n_ctx_original`."""

    theta: float
    scaling: RopeScaling = UNSCALED
    factors: str | None = None
    long_factors: str | None = None


@dataclass(frozen=True, slots=True)
class Graph:
    """Ops in execution order, the buffers between them, and RoPE tables by name."""

    config: ModelConfig
    ops: tuple[Op, ...]
    buffers: dict[str, RowBuffer]
    ropes: dict[str, RopeTable]
    logits: str = "logits"
    residual: str = "x"

    def parts(self) -> Iterator[Part]:
        """Every weight matrix that the graph multiplies with, embedding first; a tied matrix appears twice."""
        for op in self.ops:
            yield from parts_of(op)

    def vectors(self) -> dict[str, tuple[int, ...]]:
        """Every f32 vector of the graph and its shape: norm weights, biases, sinks, rope factors."""
        c, shapes = self.config, dict[str, tuple[int, ...]]()
        for op in self.ops:
            if isinstance(op, Linear | Qkv | ExpertLinear) and op.norm:
                shapes[op.norm] = (op.parts[0].n_col,)
            if isinstance(op, Qkv) and op.head_norms:
                shapes |= dict.fromkeys(op.head_norms, (c.head_dim,))
            if isinstance(op, Attention) and op.sinks:
                shapes[op.sinks] = (c.n_head,)
            if isinstance(op, NormAdd):
                shapes[op.norm] = (self.buffers[op.x].n_col,)
            shapes |= {part.bias: part.shape[:-1] for part in parts_of(op) if part.bias}
        for table in self.ropes.values():
            shapes |= {name: (c.rope_dim // 2,) for name in (table.factors, table.long_factors) if name}
        return shapes


def parts_of(op: Op) -> tuple[Part, ...]:
    """The weight matrices of an op."""
    if isinstance(op, Embed):
        return (op.part,)
    return op.parts if isinstance(op, Linear | Qkv | ExpertLinear) else ()


@dataclass
class GraphBuilder:
    """Collects ops and buffers; one call an op, so that an architecture reads as a list."""

    config: ModelConfig
    ops: list[Op] = field(default_factory=list)
    buffers: dict[str, RowBuffer] = field(default_factory=dict)

    def buffer(self, name: str, n_col: int, per_output: bool = False, rows_per_token: int = 1) -> str:
        """Declare a row buffer (again is fine: layers share their buffers) and return its name."""
        self.buffers[name] = RowBuffer(name, n_col, per_output, rows_per_token)
        return name

    def add(self, op: Op) -> None:
        self.ops.append(op)

    def build(self, ropes: dict[str, RopeTable]) -> Graph:
        return Graph(self.config, tuple(self.ops), dict(self.buffers), ropes)
