"""The chain: a graph as recorded command buffers, replayed for every step.

For each number of rows (1 for decode, a few buckets for prefill) the dispatches are recorded once, with barriers only where two
conflict, and cut so that no submit runs long. What changes from step to step (token ids, positions, cache slots, lengths, block
tables) lies in a small parameter buffer that the host rewrites before each replay. On a CPU the layers of a single row are one
dispatch each (see persistent.py); a step in which one of them gave up is run again, an op a dispatch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vkllm import debug
from vkllm.config import RuntimeConfig
from vkllm.errors import NonFiniteError, RequestError
from vkllm.files.model_file import ModelFile
from vkllm.kernel_cache import pipeline_of
from vkllm.kernels import texel_format
from vkllm.kv_cache import BlockTable, first_rows
from vkllm.memory import fit
from vkllm.packing import load_weights
from vkllm.persistent import SYNC, Patience
from vkllm.plan import ExpertLinear, Graph, Linear, Qkv
from vkllm.rope import rope_table
from vkllm.schedule import Barrier, Dispatch, Step, cut, order
from vkllm.vk import Binding, Buffer, Device, Recording
from vkllm.weights import check_weights, vector, weight_bytes
from vkllm_codegen.persistent import GAVE_UP
from vkllm_shaders.matmul.spec import NO_SLOT

Watch = Callable[[str, NDArray[np.float32]], None]


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence, the first at position `start`; `table` must cover the last one. `n_output`: of how many
    of its last rows the logits are wanted."""

    token_ids: Sequence[int]
    start: int
    table: BlockTable
    n_output: int = 0


@dataclass(frozen=True, slots=True)
class Rows:
    """One step's rows: each is a token with its position, cache slot and the length of its sequence so far (itself included).

    u32 [n_row] each; `table_starts` is where a row's block table begins in `blocks`, all tables one behind the other.
    `output_rows` [n_output] lists the rows whose logits are wanted, in order.
    """

    token_ids: NDArray[np.uint32]
    positions: NDArray[np.uint32]
    slots: NDArray[np.uint32]
    lengths: NDArray[np.uint32]
    table_starts: NDArray[np.uint32]
    output_rows: NDArray[np.uint32]
    blocks: NDArray[np.uint32]

    @classmethod
    def of(cls, *spans: Span) -> Rows:
        """The rows of one or more spans, in their order: any mix of decoding sequences and prefill chunks."""
        columns: list[list[int]] = [[], [], [], [], []]
        outputs: list[int] = []
        blocks: list[int] = []
        for span in spans:
            n, first = len(span.token_ids), len(columns[0])
            positions = range(span.start, span.start + n)
            slots, lengths = [span.table.slot(p) for p in positions], [p + 1 for p in positions]
            for column, values in zip(columns, (span.token_ids, positions, slots, lengths, [len(blocks)] * n), strict=True):
                column.extend(values)
            outputs += range(first + n - span.n_output, first + n)
            blocks += span.table.blocks
        return cls(*(np.asarray(values, np.uint32) for values in (*columns, outputs, blocks)))


@dataclass(frozen=True, slots=True)
class Output:
    """The greedy token of each output row and the count of its non-finite logits, u32 [n_output].

    `logits()`, valid until the next step: f32 [n_output, n_vocab].
    """

    tokens: NDArray[np.uint32]
    non_finite: NDArray[np.uint32]
    logits: Callable[[], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Recorded:
    """The command buffers of one bucket, what each holds, and the buffers that the host writes before they run: the parameters,
    and what persistent kernels count in, where there are any."""

    capacity: int
    buffers: Mapping[str, Buffer]
    recordings: tuple[Recording, ...]
    runs: tuple[tuple[Step, ...], ...]

    @property
    def params(self) -> Buffer:
        return self.buffers["params"]

    @property
    def gave_up(self) -> bool:
        """Did a persistent kernel of the last run give up, so that its results are worthless?"""
        return SYNC in self.buffers and bool(self.buffers[SYNC].read(4, GAVE_UP * 4, np.uint32)[0])

    def dispatches(self, run: int) -> list[Dispatch]:
        """The dispatches of one of the recordings."""
        return [step for step in self.runs[run] if isinstance(step, Dispatch)]


class ModelChain:
    """A model on a device: weights, cache, activations and the recorded chains of every bucket."""

    def __init__(self, device: Device, graph: Graph, file: ModelFile, runtime: RuntimeConfig) -> None:
        check_weights(graph, file)
        self.device, self.graph, self.runtime = device, graph, runtime
        available, _ = device.memory_budget()
        fitted = fit(graph, file, device.info, runtime, available)
        self._lower, self.n_block, self.n_ctx = fitted.lower, fitted.n_block, fitted.lower.n_ctx
        self.capacity, self.max_output = self._lower.capacity, self._lower.max_output
        self.prefill_chunk = self._lower.prefill_chunk
        self.activations = self._lower.activations
        multiplied = [part for op in graph.ops if isinstance(op, Linear | Qkv | ExpertLinear) for part in op.parts]
        used = graph.config.n_expert_used
        self.bytes_per_token = sum(weight_bytes(file, part) * (used if part.n_expert else 1) for part in multiplied)
        debug.log(debug.DEVICE, f"{device.info.name}, {self._lower.layout.kind}, activations {self.activations}")
        debug.log(
            debug.DEVICE,
            f"{fitted.needed / 2**20:.0f} MiB needed, {available / 2**20:.0f} MiB free; KV cache of {self.cache_tokens} tokens",
        )
        self._buffers: dict[str, Buffer] = {}
        self._recorded: dict[tuple[int, int, bool, int, bool], Recorded] = {}
        self._patience = Patience()
        padded = self._lower.zeroed()
        for name, nbytes in self._lower.buffer_bytes(self.n_block).items():
            self._buffers[name] = self._zeroed(name, nbytes) if name in padded else self._buffer(name, nbytes)
        self._load(file)

    def close(self) -> None:
        """Free all device memory of the model."""
        for recorded in self._recorded.values():
            for buffer in recorded.buffers.values():
                buffer.free()
        self._recorded.clear()
        for buffer in self._buffers.values():
            buffer.free()
        self._buffers.clear()

    @property
    def cache_tokens(self) -> int:
        """Positions of the KV cache, of all sequences together."""
        return self.n_block * self.runtime.block_size

    @property
    def dispatches_per_token(self) -> int:
        """Dispatches of one decode step."""
        return len(self._decode_dispatches())

    @property
    def dispatches_per_layer(self) -> float:
        """Of those, how many belong to a layer, on average."""
        return sum(d.op.startswith("blk.") for d in self._decode_dispatches()) / self.graph.config.n_layer

    def _decode_dispatches(self) -> list[Dispatch]:
        recorded = self._record(1, 1, persistent=self._lower.n_together > 1)
        return [d for i in range(len(recorded.runs)) for d in recorded.dispatches(i)]

    def forward(self, rows: Rows, watch: Watch | None = None) -> Output:
        """Run one step. `watch(op name, output f32 [n_row, n_col])` sees each op's output; it costs a submit an op.

        Raises: NonFiniteError: NaN or infinity in the result, naming the first op that made one; DeviceLostError.
        """
        output = self._step(rows, watch)
        if watch is None and not self._finite(rows, output):
            self._name_non_finite(rows)
        return output

    @property
    def logits_chunk(self) -> int:
        """Tokens of a prompt in a step where the logits of all of them are wanted."""
        return min(self.prefill_chunk, self.max_output)

    @property
    def multi_step(self) -> int:
        """How many steps `decode` does in one submit."""
        return self._lower.multi_step

    def decode(self, rows: Rows) -> NDArray[np.uint32]:
        """Greedy steps one after another in one submit, each row's token beginning the next: u32 [n, n_row], n ≤ `multi_step`.

        All rows want logits, and their block tables reach `multi_step` positions ahead. Steps from the first on that gave NaN
        or infinity are left out: `forward` names the op. Raises: DeviceLostError.
        """
        n_row, n_recorded = len(rows.token_ids), len(self._recorded)
        recorded = self._run(rows, self._bucket(n_row), self._bucket(n_row), self.multi_step)
        self._trim(n_recorded)
        greedy = self._buffers["argmax"].read(self.multi_step * recorded.capacity * 16, dtype=np.uint32)
        found = greedy.reshape(self.multi_step, recorded.capacity, 4)[:, :n_row]
        bad = np.flatnonzero(found[..., 2].any(axis=1))
        return found[: bad[0] if bad.size else self.multi_step, :, 0].copy()

    def _trim(self, n_recorded: int) -> None:
        """Give memory back where there were only so many recordings before: drivers compile a kernel when it first runs."""
        if len(self._recorded) > n_recorded:
            self.device.trim()

    def _step(self, rows: Rows, watch: Watch | None) -> Output:
        n_row, n_out = len(rows.token_ids), len(rows.output_rows)
        if n_out > self.max_output:
            raise RequestError(f"logits of {n_out} rows in one step", hint=f"ask for {self.max_output} at most, in smaller steps")
        capacity, n_recorded = self._bucket(n_row), len(self._recorded)
        most = min(capacity, self.max_output)
        self._run(rows, capacity, min(self._bucket(n_out), most), watch=watch)
        self._trim(n_recorded)
        greedy = self._buffers["argmax"].read(n_out * 16, dtype=np.uint32).reshape(n_out, 4)
        return Output(greedy[:, 0], greedy[:, 2], lambda: self._rows_of(self.graph.logits, n_out))

    def _run(self, rows: Rows, capacity: int, n_out: int, n_step: int = 1, watch: Watch | None = None) -> Recorded:
        """Run a bucket's recording on these rows; again without persistent kernels if one gave up."""
        apart = capacity > 1 or watch is not None or debug.LEVEL >= debug.DISPATCHES
        persistent = not apart and self._lower.n_together > 1 and self._patience.ready()
        recorded = self._record(capacity, n_out, watch is not None, n_step, persistent)
        self._replay(recorded, rows, watch)
        if persistent:
            self._patience.told(recorded.gave_up)
        if not recorded.gave_up:
            return recorded
        debug.log(debug.DEVICE, "a persistent kernel gave up waiting: the step is run again, an op a dispatch")
        recorded = self._record(capacity, n_out, n_step=n_step)
        self._replay(recorded, rows)
        return recorded

    def _replay(self, recorded: Recorded, rows: Rows, watch: Watch | None = None) -> None:
        self._write_params(recorded, rows)
        for i, recording in enumerate(recorded.recordings):
            recording.run()
            if debug.LEVEL >= debug.DISPATCHES:
                self._log_times(recorded.dispatches(i), recording)
            if watch is not None and (name := self._lower.output_of(op := recorded.dispatches(i)[-1].op)) is not None:
                buffer = self.graph.buffers[name]
                n_out, n_row = len(rows.output_rows), len(rows.token_ids)
                watch(op, self._rows_of(name, n_out if buffer.per_output else n_row * buffer.rows_per_token))

    def _log_times(self, dispatches: Sequence[Dispatch], recording: Recording) -> None:
        """µs and weight bandwidth of every dispatch of a recording's last run."""
        times = recording.timestamps_us()
        for step, (before, after) in zip(dispatches, pairwise(times), strict=True):
            nbytes = sum(m.nbytes for m in self._lower.matrices if m.name in step.buffers)
            us = max(after - before, 1e-3)
            debug.log(debug.DISPATCHES, f"{us:9.1f} µs {nbytes / us / 1e3:7.2f} GB/s  {step.op}: {step.kernel.name}")

    def hidden(self, n_row: int) -> NDArray[np.float32]:
        """The residual stream after the last layer, of the last step's first rows: f32 [n_row, n_embd]."""
        return self._rows_of(self.graph.residual, n_row)

    def _rows_of(self, name: str, n_row: int) -> NDArray[np.float32]:
        """The first rows of a row buffer, without the padding of its columns."""
        stride = self._lower.stride(name)
        flat = self._buffers[name].read(n_row * stride * 4, dtype=np.float32)
        return flat.reshape(n_row, stride)[:, : self.graph.buffers[name].n_col]

    def _finite(self, rows: Rows, output: Output) -> bool:
        """No NaN, no infinity? The device counts them in the logits; where none are wanted we look at the residual."""
        if len(rows.output_rows):
            return not output.non_finite.any()
        return bool(np.isfinite(self._rows_of(self.graph.residual, len(rows.token_ids))).all())

    def _name_non_finite(self, rows: Rows) -> None:
        """Run the step again, op by op (it writes the same cache entries), and name the first op with a non-finite output."""
        found: list[str] = []

        def look(op: str, y: NDArray[np.float32]) -> None:
            if not found and not np.isfinite(y).all():
                found.append(op)

        self._step(rows, look)
        op = found[0] if found else self.graph.logits
        raise NonFiniteError(
            f"{op} produced NaN or infinity",
            hint="run `vkllm diff` on this prompt: a damaged file, or a kernel that overflows",
            layer=op,
        )

    def _bucket(self, n: int) -> int:
        """The smallest recording that holds n rows: 1, 2, 4, 8, 16, … up to the capacity."""
        return min(1 << (n - 1).bit_length(), self.capacity) if n else 0

    def _write_params(self, recorded: Recorded, rows: Rows) -> None:
        t, n = recorded.capacity, len(rows.token_ids)
        params = np.zeros((6, t), np.uint32)
        params[2] = NO_SLOT  # of padding rows, which write no cache and read none
        cache_rows = first_rows(rows.slots, self.runtime.block_size, self.graph.config.n_kv_head)
        for field, values in enumerate((rows.token_ids, rows.positions, cache_rows, rows.lengths, rows.table_starts)):
            params[field, :n] = values
        params[5, : len(rows.output_rows)] = rows.output_rows
        recorded.params.write(params.reshape(-1))
        if SYNC in recorded.buffers:
            sync = recorded.buffers[SYNC]
            sync.write(np.zeros(sync.nbytes, np.uint8))
        self._buffers["block_table"].write(rows.blocks)

    def _record(self, capacity: int, n_out: int, watched: bool = False, n_step: int = 1, persistent: bool = False) -> Recorded:
        """The recording of a bucket; made at its first use. `watched`: cut after every op; `n_step`: steps behind one another;
        `persistent`: with layers in one dispatch."""
        key = (capacity, n_out, watched, n_step, persistent)
        if key not in self._recorded:
            self._recorded[key] = self._make_recording(*key)
        return self._recorded[key]

    def _make_recording(self, capacity: int, n_out: int, watched: bool, n_step: int, persistent: bool) -> Recorded:
        own = {"params": self._zeroed("params", 6 * capacity * 4)}
        if n_step > 1:
            dispatches = self._lower.steps(capacity, n_step)
        else:
            dispatches = [d for op in self.graph.ops for d in self._lower.dispatches(op, capacity, n_out)]
        if persistent:
            merged = self._lower.merged(dispatches)
            dispatches = merged.dispatches
            own |= {SYNC: self._zeroed(SYNC, merged.n_sync * 4)} if merged.n_sync else {}
        if watched:
            names = list(dict.fromkeys(d.op for d in dispatches))
            runs = [order(d for d in dispatches if d.op == name) for name in names]
        else:
            runs = cut(order(dispatches), self.runtime.submit_ms * 1000.0)
        first_uses = {id(d.kernel): d for d in dispatches}
        with ThreadPoolExecutor(os.cpu_count(), "compile") as pool:
            for _ in pool.map(lambda d: pipeline_of(self.device, d.kernel, self._lower.lanes), first_uses.values()):
                pass
        recordings = tuple(self._record_run(run, own) for run in runs)
        return Recorded(capacity, own, recordings, tuple(tuple(run) for run in runs))

    def _record_run(self, run: Sequence[Step], own: Mapping[str, Buffer]) -> Recording:
        timed = debug.LEVEL >= debug.DISPATCHES
        recording = self.device.recording(timestamps=len(run) + 1 if timed else 0)
        if timed:
            recording.timestamp()
        for step in run:
            if isinstance(step, Barrier):
                debug.log(debug.PLAN, "barrier")
                recording.barrier()
                continue
            debug.log(debug.PLAN, f"{step.op}: {step.kernel.name} {step.groups} on {', '.join(step.buffers)}")
            bindings = [
                Binding(own.get(name) or self._buffers[name], format=texel_format(b))
                for name, b in zip(step.buffers, step.kernel.bindings, strict=True)
            ]
            recording.dispatch(pipeline_of(self.device, step.kernel, self._lower.lanes), bindings, step.groups, step.push)
            if timed:
                recording.timestamp()
        recording.finish()
        return recording

    def _buffer(self, name: str, nbytes: int) -> Buffer:
        return self.device.buffer(nbytes, host=name in ("params", "block_table", "argmax", SYNC), name=name)

    def _zeroed(self, name: str, nbytes: int) -> Buffer:
        buffer = self._buffer(name, nbytes)
        buffer.write(np.zeros(nbytes, np.uint8))
        return buffer

    def _load(self, file: ModelFile) -> None:
        """Weights, vectors and the RoPE table, from the file to the device."""
        progress, cached = self.runtime.progress, self.runtime.weight_cache
        self._buffers |= load_weights(self.device, file, self._lower.matrices, progress=progress, cached=cached)
        vectors = {name: vector(file, name) for name in self.graph.vectors()}
        for name in file.tensors:  # reading a vector maps the pages round it, too
            file.release(name)
        for name, values in self._lower.vector_values(vectors).items():
            self._buffers[name] = self._zeroed(name, -(-values.nbytes // 256) * 256)
            self._buffers[name].write(values)
        for name, table in self.graph.ropes.items():
            self._buffers[name].write(rope_table(table, self.graph.config.rope_dim, self.n_ctx, vectors).reshape(-1))
