"""From an op to dispatches: which kernels, on which buffers, over which grid, for this device's schedule.

Two schedules from the same kernel definitions: "lane_row" (CPU-type devices: one subgroup a workgroup, texel streams, a lane owns
rows) and "lane_chunk" (GPUs: a subgroup shares a row group and adds up at the end). Kernels say by name what they bind and
push; this module knows what those names mean for each op.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vkllm.config import RuntimeConfig
from vkllm.errors import ConfigError, UnsupportedQuantError
from vkllm.expand import device_nbytes, device_type
from vkllm.files.model_file import ModelFile
from vkllm.kernel_cache import CompiledKernel, KernelCache
from vkllm.packing import Matrix
from vkllm.persistent import Merged, holds_a_layer, merged
from vkllm.plan import (
    Argmax,
    Attention,
    Combine,
    Embed,
    ExpertLinear,
    Graph,
    Linear,
    MatrixOp,
    NormAdd,
    Op,
    Part,
    Qkv,
    Route,
    parts_of,
)
from vkllm.plan.records import plan_records
from vkllm.schedule import Dispatch
from vkllm.tuned import Choices, driver_threads, multiplies_wide, product_shapes, tuned
from vkllm.vk import DeviceInfo, DeviceLimits
from vkllm.vk.types import Format as TexelFormat
from vkllm_codegen import Binding as KernelBinding
from vkllm_codegen import f32, f32x4, u32, u32x4
from vkllm_shaders.attention import AttentionSpec, cache_row_nbytes, combine, direct, partial
from vkllm_shaders.embed import embed, embed_codes
from vkllm_shaders.embed import groups as embed_groups
from vkllm_shaders.experts import RouteSpec, TileSpec, combine_groups, route, tiles
from vkllm_shaders.experts import combine as combine_experts
from vkllm_shaders.formats import Layout, row_order
from vkllm_shaders.gemm import GemmSpec, fitted, gemm
from vkllm_shaders.heads import HeadSpec, heads
from vkllm_shaders.matmul import OWN_BINDINGS, OWN_PUSH, MatmulSpec, alike, matmul, matmul_pair, pair_groups
from vkllm_shaders.records import GROUP, LANES, n_group, record_nbytes, squares_stride
from vkllm_shaders.rmsnorm import rmsnorm_add
from vkllm_shaders.sample import SampleSpec, argmax, top_k
from vkllm_shaders.to_records import to_records

SMALL_MODEL_BYTES = 64 << 20
MULTI_STEP = 8  # decode steps in one submit of a GPU, where a step takes little longer than a submit
PREFILL_CPU, PREFILL_GPU = 64, 512  # tokens of a prompt in a step: of a CPU what fits its caches, of a GPU what fills it
MAX_OUTPUT = 64  # rows of logits in a step, where there are not more sequences
FILLING = 256  # workgroups of attention that keep a GPU busy without splits
ROW_ALIGN = 64  # floats: rows of activations are padded to whole steps of the matrix kernels
TEXEL_FORMATS: dict[object, TexelFormat] = {u32: "r32ui", f32: "r32f", u32x4: "rgba32ui", f32x4: "rgba32f"}

# Rough throughput by kind of device, only for bounding submits: (bytes a µs, multiply-adds a µs).
RATES = {"cpu": (8e3, 2e4), "integrated": (3e4, 2e5)}
DISCRETE_RATE = (3e5, 2e6)


def texel_format(binding: KernelBinding) -> TexelFormat | None:
    """How a kernel's binding views its buffer: a texel format, or None for a storage buffer."""
    return None if binding.kind == "storage" else TEXEL_FORMATS[binding.dtype]


@dataclass(frozen=True)
class Product:
    """A matrix product before it is a dispatch: what it binds and pushes by name, and the packed rows of its matrix.

    `tiled`: the GEMM that does it instead, where there are rows enough and the schedule has one."""

    spec: MatmulSpec
    tiled: GemmSpec | None
    n_packed: int
    buffers: dict[str, str]
    push: dict[str, int | float]
    cost_us: float

    @property
    def turns(self) -> int:
        """Turns of a workgroup's loops, at most, if it is not tiled."""
        return self.spec.turns(int(self.push["n_chunk"]))


class Lowering:
    """Turns a graph's ops into dispatches for one device. Pure: it allocates nothing."""

    def __init__(self, graph: Graph, file: ModelFile, device: DeviceInfo, runtime: RuntimeConfig, n_ctx: int) -> None:
        c, limits = graph.config, device.limits
        lane_row = device.kind == "cpu" if runtime.schedule == "auto" else runtime.schedule == "lane_row"
        self.graph, self.runtime, self.n_ctx = graph, runtime, n_ctx
        self.prefill_chunk = runtime.prefill_chunk or (PREFILL_CPU if device.kind == "cpu" else PREFILL_GPU)
        self.capacity = max(self.prefill_chunk, runtime.n_seq)
        self.max_output = min(self.capacity, max(MAX_OUTPUT, runtime.n_seq))
        self.multi_step = (1 if device.kind == "cpu" else MULTI_STEP) if runtime.multi_step == "auto" else runtime.multi_step
        self._types = {part.weight: device_type(file.tensors[part.weight].type) for part in graph.parts()}
        self._choices = tuned(device, product_shapes(graph, self._types), lane_row)
        self.lanes, rows = self._choices.lanes or limits.subgroup_size, self._choices.rows
        self.layout = Layout("lane_row", self.lanes, rows) if lane_row else Layout("lane_chunk", 1, rows)
        self._limits, self._rate = limits, RATES.get(device.kind, DISCRETE_RATE)
        # Workgroups of a persistent kernel: those that run at the same time.
        wanted = lane_row and device.kind == "cpu" and runtime.persistent == "auto" and self._choices.dispatches == "layer"
        self.n_together = driver_threads() if wanted and holds_a_layer(limits) else 1
        self._kernels = KernelCache()
        self._row_order = cache(row_order)  # layers share them

        # Whether QKV products can turn heads and fill the cache themselves; norms of heads always take a dispatch of their own.
        self.fuses_heads = runtime.cache_type == "f16" and c.rope_dim == c.head_dim
        n_byte = sum(device_nbytes(file.tensors[name]) for name in self._types)
        if lane_row and self.lanes != LANES:
            self.activations: Literal["f32", "int8"] = _only_f32(runtime.activations, self.lanes)
        else:
            self.activations = _activations(runtime.activations, self._choices.activations, n_byte)
        self._by_op = {op.name: tuple(self._matrices_of(op)) for op in graph.ops if isinstance(op, MatrixOp)}
        self.matrices: tuple[Matrix, ...] = tuple({m.name: m for ms in self._by_op.values() for m in ms}.values())

        spec = AttentionSpec(
            c.head_dim,
            c.n_head // c.n_kv_head,
            runtime.block_size,
            self.lanes,
            schedule="lane_row" if lane_row else "lane_chunk",
            cache=runtime.cache_type,
            scale=c.attention_scale,
            softcap=c.attn_softcap,
            tile=self._choices.attention_tile,
            split=max(self._choices.split, runtime.block_size),
        )
        self._attention = spec if lane_row else spec.fitted(limits.max_shared_bytes, limits.max_workgroup_invocations)
        self.n_split = 1 if lane_row else spec.n_split(n_ctx)
        self._sample = SampleSpec(lanes=self.lanes)
        self._records = plan_records(graph, self._reads_records, self._can_record)

    # -- buffers --------------------------------------------------------------------------------------------------------------

    def stride(self, name: str) -> int:
        """Floats from row to row of a row buffer. Only rows that matrix kernels write are padded."""
        n_col = self._n_qkv if name == "qkv" else self.graph.buffers[name].n_col
        return _whole_steps(n_col) if name in self._padded() else n_col

    @property
    def _n_qkv(self) -> int:
        c = self.graph.config
        return (c.n_head + 2 * c.n_kv_head) * c.head_dim

    def _padded(self) -> set[str]:
        """Row buffers that only embed, norm and matrix kernels touch: they take a stride."""
        dense = {self.graph.logits}
        for op in self.graph.ops:
            dense |= {op.q, op.y} if isinstance(op, Attention) else {op.ids, op.y} if isinstance(op, Route) else set()
        return set(self.graph.buffers) - dense | {"qkv"}

    def buffer_bytes(self, n_block: int) -> dict[str, int]:
        """Every buffer but weights, vectors and parameters, with its size; the KV cache has `n_block` blocks."""
        c, n = self.graph.config, self.capacity
        sizes = {
            name: ((self.max_output if buffer.per_output else n * buffer.rows_per_token) * self.stride(name) + ROW_ALIGN) * 4
            for name, buffer in self.graph.buffers.items()
        }
        for op in self.graph.ops:
            if isinstance(op, Qkv):
                sizes |= dict.fromkeys((f"k.{op.layer}", f"v.{op.layer}"), n_block * self.block_nbytes)
                sizes |= {} if self._fused(op, n) else {"qkv": (n * self.stride("qkv") + ROW_ALIGN) * 4}
        if self.n_split > 1:
            sizes["partials"] = self._attention.scratch_nbytes(min(n, -(-FILLING // c.n_kv_head)), c.n_kv_head, self.n_split)
        for op in self._readers():
            buffer, n_col = self.graph.buffers[op.x], op.parts[0].n_col
            n_x = n * buffer.rows_per_token
            for name in (_record_name(op), _record_name(op, gathered=True)) if _gathers(op) else (_record_name(op),):
                sizes[name] = max(sizes.get(name, 0), record_nbytes(n_x, n_col))
                sizes[_squares_name(name)] = n_x * squares_stride(n_col) * 4
        if self._tiles_experts(n_y := n * c.n_expert_used) and c.n_expert:
            n_tile = self._expert_tiles.n_tile(n_y)
            sizes |= {"tile_experts": n_tile * 4, "tile_rows": n_tile * self._expert_tiles.tile * 4}
        sizes |= dict.fromkeys(self.graph.ropes, self.n_ctx * c.rope_dim * 4)
        return sizes | {
            "block_table": self.runtime.n_seq * -(-self.n_ctx // self.runtime.block_size) * 4,  # shared blocks count for each
            "candidates": self._sample.candidates_nbytes(self.max_output, c.n_vocab),
            "argmax": self.max_output * 16 * self.multi_step,
        }

    def zeroed(self) -> set[str]:
        """Buffers whose padding is read, so that it must not hold NaN."""
        squares = {_squares_name(_record_name(op, gathered)) for op in self._readers() for gathered in (False, True)}
        return {"qkv", *self.graph.buffers} - {self.graph.logits} | squares

    def _readers(self) -> Iterator[Linear | Qkv | ExpertLinear]:
        """The ops that read records."""
        for op in self.graph.ops:
            if isinstance(op, Linear | Qkv | ExpertLinear) and op.name in self._records.origins:
                yield op

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block of a layer's keys (or values)."""
        c, runtime = self.graph.config, self.runtime
        return runtime.block_size * c.n_kv_head * cache_row_nbytes(c.head_dim, runtime.cache_type)

    def _in_pairs(self, op: Qkv) -> bool:
        """Are the weights packed so that matrix kernels can turn heads and fill the cache?"""
        return self.fuses_heads and op.head_norms is None

    def _fused(self, op: Qkv, n_row: int) -> bool:
        """Do they do it in a step of `n_row` rows?"""
        return self._in_pairs(op) and self._saves_dispatches(n_row)

    def _saves_dispatches(self, n_row: int) -> bool:
        """Are longer kernels worth fewer dispatches? On CPUs with one row, if its layers are not in persistent kernels: in tiled
        ones turning the heads was more code than the loop before it, and as slow."""
        return self.layout.kind == "lane_chunk" or (n_row == 1 and self.n_together == 1)

    def vector_values(self, vectors: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """What to upload as vectors: norm weights as they are, biases in the row order of their packed matrices."""
        biases = {part.bias for part in self.graph.parts()}
        factors = {name for table in self.graph.ropes.values() for name in (table.factors, table.long_factors)}
        values = {name: value for name, value in vectors.items() if name not in biases | factors}
        for matrix in self.matrices:
            bias = matrix.bias(vectors)
            if bias is not None:
                values[_bias_name(matrix)] = bias
        return values

    def _matrices_of(self, op: MatrixOp) -> Iterator[Matrix]:
        """An op's weights as packed matrices: neighbours of one type share a buffer and a dispatch."""
        if isinstance(op, Qkv):
            epilogue = "qkv" if self._in_pairs(op) else "store"
            for _, same in groupby(op.parts, key=lambda part: self._types[part.weight]):
                yield self._matrix(tuple(same), epilogue)
            return
        parts = parts_of(op)
        if len({self._types[part.weight] for part in parts}) > 1:
            names = ", ".join(f"{part.weight} is {self._types[part.weight]}" for part in parts)
            raise UnsupportedQuantError(f"{names}; the fused kernel needs one type", hint="re-quantize with one type for both")
        yield self._matrix(parts, "store" if len(parts) == 1 else "swiglu")

    def _matrix(self, parts: tuple[Part, ...], epilogue: str) -> Matrix:
        c, fmt = self.graph.config, self._types[parts[0].weight]
        layout = self._choices.layout(fmt, self.layout.kind == "lane_row", self.lanes, self.activations == "int8")
        order = self._row_order(epilogue, layout, tuple(p.n_row for p in parts), c.head_dim, c.rope_pairing)
        return Matrix.of(parts, fmt, layout, order)

    # -- dispatches -----------------------------------------------------------------------------------------------------------

    def dispatches(self, op: Op, n_row: int, n_out: int) -> list[Dispatch]:
        """The dispatches of one op for a recording of `n_row` rows and `n_out` rows of logits (0: none are wanted)."""
        if isinstance(op, Embed):
            return [self._embed(op, n_row)]
        if isinstance(op, Qkv):
            return self._qkv(op, n_row)
        if isinstance(op, Attention):
            return self._attend(op, n_row)
        if isinstance(op, Linear):
            return self._linear(op, n_row, n_out) if n_out or not op.gather else []
        if isinstance(op, NormAdd):
            return [self._norm_add(op, n_row)]
        if isinstance(op, Route):
            return self._route(op, n_row)
        if isinstance(op, ExpertLinear):
            return self._experts(op, n_row)
        if isinstance(op, Combine):
            return [self._combine(op, n_row)]
        return self._greedy(op, n_out) if n_out else []

    def steps(self, n_row: int, n_step: int) -> list[Dispatch]:
        """The dispatches of decode steps one after another, in which the greedy token of each row begins the next step."""
        once = [d for op in self.graph.ops if not isinstance(op, Argmax) for d in self.dispatches(op, n_row, n_row)]
        (greedy,) = (op for op in self.graph.ops if isinstance(op, Argmax))
        return [d for i in range(n_step) for d in (*once, *self._greedy(greedy, n_row, i, n_step))]

    def merged(self, dispatches: Iterable[Dispatch]) -> Merged:
        """The same work with each layer's dispatches in persistent kernels, as far as they go together."""
        return merged(dispatches, self._kernels, self.n_together, self._limits)

    def output_of(self, op_name: str) -> str | None:
        """The row buffer that an op writes; None for the greedy choice."""
        op = next(op for op in self.graph.ops if op.name == op_name)
        return None if isinstance(op, Argmax) else op.y

    def _make(
        self,
        op: Op,
        kernel: CompiledKernel,
        buffers: Mapping[str, str],
        push: Mapping[str, int | float],
        groups: tuple[int, int, int],
        cost_us: float,
        turns: int | None = None,
    ) -> Dispatch:
        """A dispatch of a kernel that finds what it binds and pushes by name."""
        data = kernel.pack_push(**{name: push[name] for name, _, _ in kernel.push})
        return Dispatch(op.name, kernel, tuple(buffers[b.name] for b in kernel.bindings), data, groups, cost_us, turns)

    def _embed(self, op: Embed, n_row: int) -> Dispatch:
        (matrix,) = self._by_op[op.name]
        push = {"n_chunk": matrix.n_chunk, "x_stride": self.stride(op.y) // 4, "n_group": n_group(matrix.n_col)}
        buffers = {"w": matrix.name, "x": op.y, "params": "params"}
        if matrix.layout.kind == "lane_pair":
            told, more = self._writes(op, n_row)
            buffers, push = buffers | told, push | more
            kernel = self._kernels.get(embed_codes, matrix.fmt, op.scale, bool(told))
        else:
            kernel = self._kernels.get(embed, matrix.fmt, self.layout, self._large(matrix), op.scale)
        return self._make(op, kernel, buffers, push, embed_groups(matrix.fmt, matrix.layout, matrix.n_col, n_row), 20.0)

    # -- records: activations in 8 bits ------------------------------------------------------------------------------------------

    def _reads_records(self, op: Linear | Qkv | ExpertLinear) -> bool:
        return any(matrix.layout.kind == "lane_pair" for matrix in self._by_op[op.name])

    def _can_record(self, op: Op, norm: str | None) -> bool:
        """Can `op` write the record of its result for a reader with this norm?"""
        if self.layout.kind != "lane_row" or self.lanes != LANES:
            return False
        if isinstance(op, Attention):
            return norm is None and self.n_split == 1 and self.graph.config.head_dim % GROUP == 0
        if not isinstance(op, Embed | Linear) or self._by_op[op.name][0].layout.kind != "lane_pair":
            return False
        if isinstance(op, Embed):
            return norm is not None
        whole = op.parts[0].n_row % GROUP == 0
        return whole and ((op.epilogue == "residual" and norm is not None) or (op.epilogue == "swiglu" and norm is None))

    def _writes(self, op: Op, n_row: int) -> tuple[dict[str, str], dict[str, int]]:
        """What `op` binds and pushes to write the record of its result; nothing where a dispatch of its own does it."""
        if op.name not in self._records.writers or isinstance(op, Argmax) or not _records_itself(op, n_row):
            return {}, {}
        norm, groups = self._records.writers[op.name], n_group(self.graph.buffers[op.y].n_col)
        record = f"{op.y} in 8 bits"
        stride = squares_stride(self.graph.buffers[op.y].n_col)
        buffers = {"record": record} | ({"norm_w": norm, "squares": _squares_name(record)} if norm else {})
        return buffers, {"n_group": groups, "squares_stride": stride}

    def _own_record(self, op: Linear | Qkv | ExpertLinear, n_row: int) -> bool:
        """Does a dispatch of its own make the record that `op` reads?"""
        origin = self._records.origins.get(op.name)
        return origin == "dispatch" or not (origin is None or origin == "earlier" or _records_itself(origin, n_row))

    def _record(self, op: Linear | Qkv | ExpertLinear, n_row: int, n_out: int = 0) -> list[Dispatch]:
        """That dispatch, if there is one. `n_out`: for logits, the rows that are wanted."""
        if not self._own_record(op, n_row):
            return []
        gathers, n_col = _gathers(op) and n_row > 1, op.parts[0].n_col
        record = _record_name(op, gathers)
        buffers = {"x": op.x, "norm_w": op.norm or "", "params": "params", "record": record, "squares": _squares_name(record)}
        push = {"x_stride": self.stride(op.x) // 4, "n_group": n_group(n_col), "squares_stride": squares_stride(n_col)}
        push |= {"capacity": n_row}
        rows = n_out if gathers else n_row * self.graph.buffers[op.x].rows_per_token
        kernel = self._kernels.get(to_records, op.norm is not None, gathers)
        return [self._make(op, kernel, buffers, push, (rows, 1, 1), 10.0 + rows, n_group(n_col))]

    def _matmul(
        self,
        op: Linear | Qkv | ExpertLinear,
        matrix: Matrix,
        spec: MatmulSpec,
        n_row: int,
        buffers: dict[str, str],
        push: dict[str, int | float],
        n_grid: int = 0,
        record: str = "",
    ) -> Dispatch:
        """One matrix product. `n_grid`: rows that the grid is for, where that is not `n_row`; `record`: as for _product."""
        return self._one(op, self._product(op, matrix, spec, n_row, buffers, push, record), n_grid or n_row)

    def _one(self, op: Linear | Qkv | ExpertLinear, product: Product, n_row: int) -> Dispatch:
        """A product as a dispatch of its own."""
        kernel = self._kernels.get(gemm, product.tiled) if product.tiled else self._kernels.get(matmul, product.spec)
        groups = (product.tiled or product.spec).groups(product.n_packed, n_row)
        return self._make(op, kernel, product.buffers, product.push, groups, product.cost_us, product.turns)

    def _pair(self, op: Qkv, first: Product, second: Product, n_row: int) -> Dispatch:
        """Two products of one x, of two formats, in one dispatch."""
        own_buffers = {f"{name}_2": second.buffers[name] for name in OWN_BINDINGS}
        own_push = {f"{name}_2": second.push[name] for name in OWN_PUSH}
        groups = pair_groups(first.spec, second.spec, (first.n_packed, second.n_packed), n_row)
        n_first = first.spec.groups(first.n_packed, n_row)[first.spec.row_axis]
        kernel = self._kernels.get(matmul_pair, first.spec, second.spec)
        push = first.push | own_push | {"n_first": n_first}
        cost_us, turns = first.cost_us + second.cost_us, first.turns + second.turns
        return self._make(op, kernel, first.buffers | own_buffers, push, groups, cost_us, turns)

    def _product(
        self,
        op: Linear | Qkv | ExpertLinear,
        matrix: Matrix,
        spec: MatmulSpec,
        n_row: int,
        buffers: dict[str, str],
        push: dict[str, int | float],
        record: str = "",
    ) -> Product:
        """What all matrix kernels have in common, beside the `buffers` and `push` of an op's own. `record`: of x, where that is
        not the one of all its rows."""
        buffers |= {"w": matrix.name, "x": op.x, "params": "params", "bias": _bias_name(matrix)} | (
            {"norm_w": op.norm} if op.norm else {}
        )
        n_packed = self._n_packed(matrix)
        push |= {"n_chunk": matrix.n_chunk, "n_group": matrix.layout.n_group(n_packed), "n_token": n_row}
        push |= {"n_col": matrix.n_col, "x_stride": self.stride(op.x) // 4, "eps": self.graph.config.rms_norm_eps}
        if spec.from_records:
            record = record or _record_name(op)
            buffers |= {"x": record, "squares": _squares_name(record)}
            push |= {"x_stride": n_group(matrix.n_col), "squares_stride": squares_stride(matrix.n_col) // 4}
        bytes_a_us, macs_a_us = self._rate
        tiled = gemm_of(spec, n_row, self._limits, self._choices)
        nbytes = matrix.nbytes * n_packed // len(matrix.order) * -(-n_row // (tiled.tokens if tiled else spec.tile))
        cost_us = max(nbytes / bytes_a_us, matrix.n_row * matrix.n_col * n_row / macs_a_us)
        return Product(spec, tiled, n_packed, buffers, push, cost_us)

    def _spec(
        self,
        op: Linear | Qkv | ExpertLinear,
        matrix: Matrix,
        epilogue: str,
        n_row: int,
        gather: bool = False,
        records: bool = False,
    ) -> MatmulSpec:
        experts, layout = isinstance(op, ExpertLinear), matrix.layout
        n_group, n_alike = layout.n_group(self._n_packed(matrix)), n_row  # rows of y that the same weights make
        if experts:
            n_alike = self._expert_tiles.tile if self._tiles_experts(n_row) else 1
        wide = multiplies_wide(matrix.fmt, layout, n_alike, self._limits)
        tile = n_alike if experts else self._choices.tile_of(layout, n_row, wide)
        of_heads = epilogue in ("qkv", "pairs")
        return MatmulSpec(
            fmt=matrix.fmt,
            layout=layout,
            tile=tile,
            experts=experts,
            norm=op.norm is not None,
            bias=any(part.bias for part in matrix.parts),
            epilogue=epilogue,  # type: ignore[arg-type]
            activations="f32" if layout.kind == "lane_row" else self.activations,
            gather=gather,
            large=self._large(matrix),
            side_by_side=self._choices.groups_of(matrix.fmt, layout, tile, n_group, 2 if records and epilogue == "swiglu" else 1),
            wide=wide,
            records=records,
            scale=op.scale if isinstance(op, Linear) else 1.0,
            softcap=op.softcap if isinstance(op, Linear) else 0.0,
            rope_pairing=self.graph.config.rope_pairing if of_heads else "interleaved",
            head_dim=self.graph.config.head_dim if of_heads else 0,
            subgroup=self.lanes,
        )

    def _n_packed(self, matrix: Matrix) -> int:
        """Packed rows, of one expert."""
        return len(matrix.order) // max(1, matrix.parts[0].n_expert)

    def _large(self, matrix: Matrix) -> bool:
        """Must the GPU schedule read this matrix through a texel view, because no storage buffer reaches that far?"""
        return self.layout.kind == "lane_chunk" and matrix.nbytes > self._limits.max_storage_buffer_range

    def _linear(self, op: Linear, n_row: int, n_out: int) -> list[Dispatch]:
        (matrix,) = self._by_op[op.name]
        rows = n_out if op.gather else n_row
        push: dict[str, int | float] = {"n_row": op.parts[0].n_row, "y_stride": self.stride(op.y), "first_row": 0}
        told, more = self._writes(op, n_row)
        buffers = {"y": op.y} | {f"y_{name}": buffer for name, buffer in told.items()}
        push |= {"capacity": n_row} | {f"y_{name}": value for name, value in more.items()}
        gathers, recorded = op.gather and n_row > 1, self._own_record(op, n_row)
        spec = self._spec(op, matrix, op.epilogue, rows, gathers and not recorded, bool(told))
        record = _record_name(op, gathers and recorded)
        return [*self._record(op, n_row, n_out), self._matmul(op, matrix, spec, rows, buffers, push, record=record)]

    def _qkv(self, op: Qkv, n_row: int) -> list[Dispatch]:
        """One dispatch for matrices of up to two types, and one for the heads where the matrix kernels do not do their work."""
        products = [self._qkv_product(op, matrix, n_row) for matrix in self._by_op[op.name]]
        dispatches = self._record(op, n_row)
        together = len(products) == 2 and alike(products[0].spec, products[1].spec) and not products[0].tiled
        if together and self._saves_dispatches(n_row):
            dispatches.append(self._pair(op, products[0], products[1], n_row))
        else:
            dispatches += [self._one(op, product, n_row) for product in products]
        return dispatches if self._fused(op, n_row) else [*dispatches, self._heads(op, n_row)]

    def _qkv_product(self, op: Qkv, matrix: Matrix, n_row: int) -> Product:
        c = self.graph.config
        first = sum(p.n_row for p in op.parts[: op.parts.index(matrix.parts[0])])
        push: dict[str, int | float] = {"first_row": first, "n_row": matrix.n_row}
        if not self._fused(op, n_row):
            push |= {"y_stride": self.stride("qkv")}
            spec = self._spec(op, matrix, "pairs" if self._in_pairs(op) else "store", n_row)
            return self._product(op, matrix, spec, n_row, {"y": "qkv"}, push)
        push |= {"capacity": n_row, "n_head": c.n_head, "n_kv_head": c.n_kv_head, "block_size": self.runtime.block_size}
        buffers = {"q": op.y, "k": f"k.{op.layer}", "v": f"v.{op.layer}", "rope": op.rope}
        return self._product(op, matrix, self._spec(op, matrix, "qkv", n_row), n_row, buffers, push)

    def _heads(self, op: Qkv, n_row: int) -> Dispatch:
        """Norm, rotate and keep the heads of a finished QKV product."""
        c = self.graph.config
        spec = HeadSpec(c.head_dim, c.rope_dim, c.rope_pairing, op.head_norms is not None, self.runtime.cache_type, self.lanes)
        q_norm, k_norm = op.head_norms or ("", "")
        buffers = {"qkv": "qkv", "q_norm": q_norm, "k_norm": k_norm, "rope": op.rope, "params": "params"}
        buffers |= {"q": op.y, "k": f"k.{op.layer}", "v": f"v.{op.layer}"}
        push: dict[str, int | float] = {"n_head": c.n_head, "n_kv_head": c.n_kv_head, "x_stride": self.stride("qkv") // 4}
        push |= {"block_size": self.runtime.block_size, "capacity": n_row, "eps": c.rms_norm_eps}
        groups = (c.n_head + 2 * c.n_kv_head, n_row, 1)
        return self._make(op, self._kernels.get(heads, spec), buffers, push, groups, 10.0 + n_row, c.head_dim)

    def _route(self, op: Route, n_row: int) -> list[Dispatch]:
        """Choose the experts; where many rows choose, put those of one expert together in tiles."""
        c, softmax_of = self.graph.config, "all" if op.softmax_first and not op.normalized else "used"
        spec = RouteSpec(c.n_expert, c.n_expert_used, softmax_of, self.lanes)  # type: ignore[arg-type]
        buffers = {"logits": op.logits, "ids": op.ids, "weights": op.y}
        push = {"x_stride": self.stride(op.logits)}
        chosen = self._make(op, self._kernels.get(route, spec), buffers, push, (n_row, 1, 1), 10.0, c.n_expert_used)
        n_y = n_row * c.n_expert_used
        if not self._tiles_experts(n_y):
            return [chosen]
        buffers = {"ids": op.ids, "experts": "tile_experts", "rows": "tile_rows"}
        push = {"n_row": n_y, "n_tile": self._expert_tiles.n_tile(n_y)}
        return [chosen, self._make(op, self._kernels.get(tiles, self._expert_tiles), buffers, push, (1, 1, 1), 10.0)]

    @property
    def _expert_tiles(self) -> TileSpec:
        return TileSpec(self.graph.config.n_expert, lanes=self.lanes)

    def _tiles_experts(self, n_y: int) -> bool:
        """Are there so many rows of experts' results that an expert has more than one on average?"""
        return n_y > 2 * self.graph.config.n_expert

    def _experts(self, op: ExpertLinear, n_row: int) -> list[Dispatch]:
        """A row of y for each token and each of its experts."""
        (matrix,) = self._by_op[op.name]
        n_used = self.graph.config.n_expert_used
        n_share = n_used // self.graph.buffers[op.x].rows_per_token  # rows of y that read the same row of x
        push: dict[str, int | float] = {"n_row": op.parts[0].n_row, "y_stride": self.stride(op.y), "first_row": 0}
        push |= {"n_share": n_share}
        n_y = n_row * n_used
        spec, buffers = self._spec(op, matrix, op.epilogue, n_y), {"y": op.y, "ids": op.ids}
        if not self._tiles_experts(n_y):
            return [*self._record(op, n_row), self._matmul(op, matrix, spec, n_y, buffers, push)]
        buffers |= {"ids": "tile_experts", "rows": "tile_rows"}
        n_grid = self._expert_tiles.n_tile(n_y) * spec.tile
        return [*self._record(op, n_row), self._matmul(op, matrix, spec, n_y, buffers, push, n_grid)]

    def _combine(self, op: Combine, n_row: int) -> Dispatch:
        n_col = self.graph.buffers[op.y].n_col
        kernel = self._kernels.get(combine_experts, self.graph.config.n_expert_used, self.layout.kind)
        push = {"n_texel": -(-n_col // 4), "x_stride": self.stride(op.x) // 4, "y_stride": self.stride(op.y) // 4}
        buffers = {"x": op.x, "weights": op.weights, "y": op.y}
        return self._make(op, kernel, buffers, push, combine_groups(n_col, n_row), 10.0)

    def _norm_add(self, op: NormAdd, n_row: int) -> Dispatch:
        push: dict[str, int | float] = {
            "n_row": n_row,
            "n_col": self.graph.buffers[op.x].n_col,
            "eps": self.graph.config.rms_norm_eps,
        }
        push |= {"x_stride": self.stride(op.x), "y_stride": self.stride(op.y)}
        buffers = {"x": op.x, "y": op.y, "w": op.norm}
        return self._make(op, self._kernels.get(rmsnorm_add), buffers, push, (n_row, 1, 1), 10.0 + n_row)

    def _attend(self, op: Attention, n_row: int) -> list[Dispatch]:
        """One dispatch where rows and heads fill the device; else the positions are split as well, and merged by a second."""
        told, more = self._writes(op, n_row)
        c = self.graph.config
        spec = replace(self._attention, windowed=bool(op.window), sinks=op.sinks is not None, records=bool(told))
        buffers = {"q": op.q, "k": f"k.{op.layer}", "v": f"v.{op.layer}", "block_table": "block_table", "params": "params"}
        buffers |= {"sinks": op.sinks} if op.sinks else {}
        push = {"n_token": n_row, "n_kv_head": c.n_kv_head, "window": op.window}
        cost_us = 2 * n_row * c.n_head * c.head_dim * min(op.window or self.n_ctx, self.n_ctx) / self._rate[1]
        if self.n_split == 1 or n_row * c.n_kv_head >= FILLING:
            kernel = self._kernels.get(direct, spec)
            groups, turns = (1, c.n_kv_head, n_row), self.n_ctx // spec.turn + 1
            return [self._make(op, kernel, buffers | told | {"out": op.y}, push | more, groups, cost_us, turns)]
        parts, merge = self._kernels.get(partial, spec), self._kernels.get(combine, spec)
        merging = {"partials": "partials", "params": "params", "out": op.y} | ({"sinks": op.sinks} if op.sinks else {})
        counts = {"n_token": n_row, "n_split": self.n_split, "n_head": c.n_head, "window": op.window}
        return [
            self._make(op, parts, buffers | {"out": "partials"}, push, (self.n_split, c.n_kv_head, n_row), cost_us),
            self._make(op, merge, merging, counts, (c.n_head, n_row, 1), 10.0),
        ]

    def _greedy(self, op: Argmax, n_out: int, step: int = 0, n_step: int = 1) -> list[Dispatch]:
        """The greedy tokens of a step; of the first of several also the rows of the next one."""
        n_vocab = self.graph.config.n_vocab
        n_segment = self._sample.n_segment(n_vocab)
        find = self._make(
            op,
            self._kernels.get(top_k, self._sample),
            {"logits": op.logits, "candidates": "candidates"},
            {"n_vocab": n_vocab},
            (n_segment, n_out, 1),
            50.0,
        )
        merge = self._make(
            op,
            self._kernels.get(argmax, self._sample, n_step > 1),
            {"candidates": "candidates", "result": "argmax", "block_table": "block_table", "params": "params"},
            {
                "n_segment": n_segment,
                "first_row": step * n_out,
                "capacity": n_out,
                "block_size": self.runtime.block_size,
                "n_kv_head": self.graph.config.n_kv_head,
                "more": int(step + 1 < n_step),
            },
            (n_out, 1, 1),
            10.0,
        )
        return [find, merge]


def gemm_of(spec: MatmulSpec, n_row: int, limits: DeviceLimits, choices: Choices) -> GemmSpec | None:
    """The GEMM that does a product of so many rows on a device of these limits, where one does."""
    if choices.dequantize == "registers":
        return None
    shapes = limits.coop_shapes if {"coopmat", "memory_model"} <= limits.features else ()
    return fitted(spec, n_row, limits.max_shared_bytes, limits.max_workgroup_invocations, shapes)


def _activations(wanted: str, faster: Literal["f32", "int8"], weight_bytes: int) -> Literal["f32", "int8"]:
    """What "auto" means: int8 where it was measured to be faster, which is lavapipe, and where time goes into weights at all.

    Below SMALL_MODEL_BYTES a step is made of dispatches, so int8 would cost exactness and gain nothing.
    """
    if wanted == "auto":
        return faster if weight_bytes >= SMALL_MODEL_BYTES else "f32"
    return "int8" if wanted == "int8" else "f32"


def _only_f32(wanted: str, lanes: int) -> Literal["f32"]:
    """ "auto" on a device without integer products. Raises: ConfigError: int8 was asked for."""
    if wanted == "int8":
        raise ConfigError(
            f"activations int8 on a CPU with subgroups of {lanes}; its integer products need {LANES}",
            hint="choose auto or f32, or set LP_NATIVE_VECTOR_WIDTH=256 for lavapipe",
        )
    return "f32"


def _bias_name(matrix: Matrix) -> str:
    return f"bias of {matrix.name}"


def _whole_steps(n_col: int) -> int:
    """Columns in whole steps of the matrix kernels."""
    return -(-n_col // ROW_ALIGN) * ROW_ALIGN


def _records_itself(writer: Op, n_row: int) -> bool:
    """Does an op that can write the record of its result do so in a step of `n_row` rows?

    A record costs little beside the products of many rows, and tiled kernels have no registers to spare for it.
    """
    return n_row == 1 or isinstance(writer, Attention | Embed)


def _gathers(op: Linear | Qkv | ExpertLinear) -> bool:
    """Are only some rows of x multiplied?"""
    return isinstance(op, Linear) and op.gather


def _record_name(op: Linear | Qkv | ExpertLinear, gathered: bool = False) -> str:
    """The buffer of x in 8 bits: of all its rows, or of those whose logits are wanted."""
    return f"{op.x} in 8 bits" + (", gathered" if gathered else "")


def _squares_name(record: str) -> str:
    """The sums of squares that belong to a record."""
    return f"squares of {record}"
