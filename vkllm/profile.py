"""Where the time of a step goes: every dispatch and barrier by the device's own clock, and the host's work beside it.

A chain on a device that stamps the time after every command; nothing else about the chain changes. The stamps cost time
themselves (lavapipe ends the command before each one, and on GPUs neighbours overlap less), and there are no persistent kernels,
so a profile says what share each kernel has; how long a token takes, `vkllm bench` says.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from vkllm.chain import ModelChain, Output, Recorded, Rows, Span, Watch
from vkllm.config import ModelConfig, RuntimeConfig
from vkllm.errors import RequestError
from vkllm.files import open_model
from vkllm.files.model_file import ModelFile
from vkllm.kv_cache import BlockPool, BlockTable
from vkllm.memory import context_length
from vkllm.models import build_graph
from vkllm.plan import Attention, Embed, ExpertLinear, Linear
from vkllm.sampler import Sampler, SamplingParams
from vkllm.schedule import Barrier, Dispatch, Step
from vkllm.tokenizer import Tokenizer
from vkllm.vk import Binding, Buffer, Device, Pipeline, Recording
from vkllm.vk.device import choose_device, list_devices
from vkllm.vk.types import DeviceInfo
from vkllm_shaders.attention import cache_row_nbytes
from vkllm_shaders.formats import FORMATS

BARRIER = "barrier"


@dataclass(frozen=True, slots=True)
class Interval:
    """Something that took `us` µs from `start_us` on (from the start of the profile). `track`: "host" or "device".

    `nbytes`: weights, keys and values that a dispatch must read at least once; `flop`: multiplications and additions.
    """

    track: str
    name: str
    start_us: float
    us: float
    op: str = ""
    nbytes: int = 0
    flop: int = 0
    groups: tuple[int, int, int] = (0, 0, 0)

    @property
    def gb_s(self) -> float:
        """1e9 bytes a second."""
        return self.nbytes / self.us / 1e3 if self.us > 0 else 0.0

    @property
    def gflop_s(self) -> float:
        """1e9 operations a second."""
        return self.flop / self.us / 1e3 if self.us > 0 else 0.0

    @property
    def op_kind(self) -> str:
        """The op without the number of its layer."""
        return self.op.split(".", 2)[2] if self.op.startswith("blk.") else self.op


@dataclass(frozen=True, slots=True)
class ProfiledStep:
    """One forward step. `kind`: "prefill" or "decode"; `n_row` tokens, the last one at position `depth`."""

    kind: str
    n_row: int
    depth: int
    intervals: tuple[Interval, ...]

    @property
    def dispatches(self) -> list[Interval]:
        return [i for i in self.intervals if i.track == "device" and i.name != BARRIER]

    @property
    def wall_us(self) -> float:
        """From the first interval's start to the last one's end."""
        return max(i.start_us + i.us for i in self.intervals) - min(i.start_us for i in self.intervals)

    @property
    def kernel_us(self) -> float:
        """In kernels."""
        return sum(i.us for i in self.dispatches)

    @property
    def barrier_us(self) -> float:
        """In barriers."""
        return sum(i.us for i in self.intervals if i.track == "device" and i.name == BARRIER)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a summary: all dispatches of one op or kernel in a step. µs: the median over the steps."""

    name: str
    n_dispatch: int
    us: float
    share: float
    nbytes: int
    gb_s: float
    gflop_s: float


@dataclass(frozen=True, slots=True)
class Profile:
    """The profiled steps of a model on a device."""

    model: str
    device: str
    driver: str
    activations: str
    steps: tuple[ProfiledStep, ...]

    def of(self, kind: str) -> list[ProfiledStep]:
        """The steps of one kind."""
        return [step for step in self.steps if step.kind == kind]


class TimedRecording(Recording):
    """Stamps the time at its start and after every dispatch and barrier, and notes when the host submitted and waited."""

    def __init__(self, device: ProfiledDevice, n_step: int) -> None:
        super().__init__(device, "profile", n_step + 1)
        self.steps: tuple[Step, ...] = ()
        self._owner = device
        super().timestamp()

    def timestamp(self) -> int:
        """What others ask for (DEBUG=2) is not noted: all room is ours."""
        return 0

    def dispatch(self, pipeline: Pipeline, bindings: Sequence[Binding], groups: tuple[int, int, int], push: bytes = b"") -> None:
        super().dispatch(pipeline, bindings, groups, push)
        super().timestamp()

    def barrier(self) -> None:
        super().barrier()
        super().timestamp()

    def submit(self) -> None:
        with self._owner.span("submit"):
            super().submit()

    def wait(self, timeout_s: float = 60.0) -> None:
        with self._owner.span("wait"):
            super().wait(timeout_s)
        self._owner.ran.append(self)


class ProfiledDevice(Device):
    """A device whose recordings are timed while `n_step` is not 0. Keeps the host's spans and the recordings that ran."""

    def __init__(self, info: DeviceInfo) -> None:
        super().__init__(info)
        self.n_step = 0
        self.ran: list[TimedRecording] = []
        self.spans: list[tuple[str, float, float]] = []  # name, start and end in seconds

    def recording(self, name: str = "", timestamps: int = 0) -> Recording:
        return TimedRecording(self, self.n_step) if self.n_step else super().recording(name, timestamps)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Notes when the host does what is inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spans.append((name, start, time.perf_counter()))


class ProfiledChain(ModelChain):
    """A chain on a ProfiledDevice: `profiled` runs a step and tells what it was made of."""

    def __init__(self, device: ProfiledDevice, file: ModelFile, runtime: RuntimeConfig) -> None:
        self._timed = device
        super().__init__(device, build_graph(ModelConfig.from_gguf(file), file.tensors), file, runtime)
        self._ops = {op.name: op for op in self.graph.ops}
        self._matrix = {m.name: m for m in self._lower.matrices}

    def profiled(self, rows: Rows, kind: str, sampler: Sampler) -> tuple[int, ProfiledStep]:
        """Run one step and choose a token. Times are in µs since the first step's start."""
        self._timed.ran.clear()
        self._timed.spans.clear()
        output = self.forward(rows)
        token = 0
        if len(rows.output_rows):
            with self._timed.span("sample"):
                token = int(output.tokens[0]) if sampler.is_greedy else sampler.sample(output.logits()[0], [])
        return token, ProfiledStep(kind, len(rows.token_ids), int(rows.positions[-1]), tuple(self._intervals(rows)))

    def _intervals(self, rows: Rows) -> Iterator[Interval]:
        for name, start, end in self._timed.spans:
            yield Interval("host", name, start * 1e6, (end - start) * 1e6)
        waits = [(start, end) for name, start, end in self._timed.spans if name == "wait"]
        submits = [start for name, start, _ in self._timed.spans if name == "submit"]
        for recording, submitted, (_, done) in zip(self._timed.ran, submits, waits, strict=True):
            times = recording.timestamps_us()
            origin = max(submitted * 1e6, done * 1e6 - times[-1])  # the device's clock has another zero: it ended when we knew
            for step, (before, after) in zip(recording.steps, pairwise(times), strict=True):
                yield self._interval(step, origin + before, max(after - before, 0.0), rows)

    def _interval(self, step: Step, start_us: float, us: float, rows: Rows) -> Interval:
        if isinstance(step, Barrier):
            return Interval("device", BARRIER, start_us, us)
        nbytes, flop = self.work(step, rows)
        return Interval("device", step.kernel.name, start_us, us, step.op, nbytes, flop, step.groups)

    def work(self, step: Dispatch, rows: Rows) -> tuple[int, int]:
        """Bytes of weights, keys and values that a dispatch must read at least once, and its multiplications and additions."""
        op, c = self._ops[step.op], self.graph.config
        if isinstance(op, Attention):
            if f"k.{op.layer}" not in step.buffers:
                return 0, 0  # it merges the parts
            seen = [min(int(n), op.window or int(n)) for n in rows.lengths]
            row_nbytes = 2 * c.n_kv_head * cache_row_nbytes(c.head_dim, self.runtime.cache_type)
            return max(seen) * row_nbytes, 4 * c.n_head * c.head_dim * sum(seen)
        matrix = next((self._matrix[name] for name in step.buffers if name in self._matrix), None)
        if matrix is None:
            return 0, 0
        n_row = len(rows.output_rows) if isinstance(op, Linear) and op.gather else len(rows.token_ids)
        if isinstance(op, Embed):
            return n_row * FORMATS[matrix.fmt].row_bytes(matrix.n_col), 0
        if isinstance(op, ExpertLinear):
            n_pair, n_expert = n_row * c.n_expert_used, matrix.parts[0].n_expert
            one = matrix.nbytes // n_expert
            return one * min(n_pair, n_expert), 2 * matrix.n_row * matrix.n_col * n_pair
        return matrix.nbytes, 2 * matrix.n_row * matrix.n_col * n_row

    def forward(self, rows: Rows, watch: Watch | None = None) -> Output:
        with self._timed.span("step"):
            return super().forward(rows, watch)

    def _write_params(self, recorded: Recorded, rows: Rows) -> None:
        with self._timed.span("write parameters"):
            super()._write_params(recorded, rows)

    def _record_run(self, run: Sequence[Step], own: Mapping[str, Buffer]) -> Recording:
        self._timed.n_step = len(run)
        try:
            recording = super()._record_run(run, own)
        finally:
            self._timed.n_step = 0
        assert isinstance(recording, TimedRecording)
        recording.steps = tuple(run)
        return recording


def profile(
    model: str,
    runtime: RuntimeConfig,
    *,
    prompt: str | None = None,
    depth: int = 16,
    n_decode: int = 8,
    sampling: SamplingParams | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Profile:
    """The last full prefill chunk of a prompt (text, or `depth` random tokens) and `n_decode` steps after it.

    What runs for the first time runs twice, and the second time counts: the first compiles. `tell` is told how far the prompt is.
    Raises: RequestError: an empty prompt, or one that does not fit; otherwise as LLMEngine.init_model.
    """
    file = open_model(model)
    try:
        config = ModelConfig.from_gguf(file)
        ids = _prompt_ids(file, config, prompt, depth)
        n_ctx = context_length(config, runtime.n_ctx or min(len(ids) + n_decode, config.n_ctx))
        if len(ids) + n_decode > n_ctx:
            raise RequestError(
                f"{len(ids)} + {n_decode} tokens do not fit {n_ctx} positions", hint="lower --depth, or raise --n-ctx"
            )
        device = ProfiledDevice(choose_device(list_devices(), runtime.device))
        try:
            chain = ProfiledChain(device, file, replace(runtime, n_ctx=n_ctx, persistent="off"))
            try:
                steps = _run(chain, ids, n_decode, Sampler(sampling or SamplingParams(temperature=0.0)), tell)
                name, info = config.name or model, device.info
                return Profile(name, info.name, info.driver_info, chain.activations, _from_zero(steps))
            finally:
                chain.close()
        finally:
            device.close()
    finally:
        file.close()


def _prompt_ids(file: ModelFile, config: ModelConfig, prompt: str | None, depth: int) -> list[int]:
    if prompt is None:
        return [int(i) for i in np.random.default_rng(1).integers(0, config.n_vocab, depth)]
    ids = Tokenizer.from_gguf(file.metadata).encode(prompt)
    if not ids:
        raise RequestError("the prompt is empty", hint="give a text of at least one token, or --depth N")
    return ids


def _run(
    chain: ProfiledChain, ids: list[int], n_decode: int, sampler: Sampler, tell: Callable[[str], None]
) -> list[ProfiledStep]:
    chunk, table = chain.prefill_chunk, BlockTable(chain.runtime.block_size)
    BlockPool(chain.n_block, chain.runtime.block_size).extend(table, len(ids) + n_decode)
    steps: list[ProfiledStep] = []
    token = 0
    counts = max(0, len(ids) // chunk - 1) * chunk  # the last full chunk, or the only one
    for start in range(0, len(ids), chunk):
        tell(f"prompt: {start} of {len(ids)} tokens")
        rows = Rows.of(Span(ids[start : start + chunk], start, table, n_output=int(start + chunk >= len(ids))))
        for _ in range(1 + (start == counts)):
            token, step = chain.profiled(rows, "prefill", sampler)
        if start == counts:
            steps.append(step)
    for i in range(n_decode):
        tell(f"decode: {i + 1} of {n_decode} steps")
        rows = Rows.of(Span([token], len(ids) + i, table, n_output=1))
        for _ in range(1 + (i == 0)):
            token, step = chain.profiled(rows, "decode", sampler)
        steps.append(step)
    return steps


def _from_zero(steps: Sequence[ProfiledStep]) -> tuple[ProfiledStep, ...]:
    """The same with the first interval at 0 µs."""
    zero = min(i.start_us for step in steps for i in step.intervals)
    return tuple(replace(step, intervals=tuple(replace(i, start_us=i.start_us - zero) for i in step.intervals)) for step in steps)


def summary(steps: Sequence[ProfiledStep], key: Callable[[Interval], str]) -> list[Row]:
    """Dispatches grouped by `key` (op_kind, kernel name), the largest share first. Steps must be of one kind."""
    groups: dict[str, list[list[Interval]]] = {}
    for step in steps:
        mine: dict[str, list[Interval]] = {}
        for dispatch in step.dispatches:
            mine.setdefault(key(dispatch), []).append(dispatch)
        for name, found in mine.items():
            groups.setdefault(name, []).append(found)
    times = {name: statistics.median(sum(d.us for d in found) for found in runs) for name, runs in groups.items()}
    total = sum(times.values()) or 1.0
    rows = [_row(name, runs[0], times[name], total) for name, runs in groups.items()]
    return sorted(rows, key=lambda row: -row.us)


def _row(name: str, found: Sequence[Interval], us: float, total_us: float) -> Row:
    nbytes, flop = sum(d.nbytes for d in found), sum(d.flop for d in found)
    rate = 1.0 / us / 1e3 if us > 0 else 0.0
    return Row(name, len(found), us, us / total_us, nbytes, nbytes * rate, flop * rate)


def trace_events(found: Profile) -> dict[str, object]:
    """The profile in the Trace Event Format (Chrome's, which Perfetto opens): one track for the host, one for the device.

    Source: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (JSON object format, "X" events).
    """
    tracks = {"host": 1, "device": 2}
    names = {"host": "host", "device": found.device}
    events: list[dict[str, object]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": f"vkllm: {found.model}"}}]
    events += [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": names[track]}} for track, tid in tracks.items()
    ]
    for step in found.steps:
        for i in step.intervals:
            shown = i.op or (f"{step.kind}, {step.n_row} rows, depth {step.depth}" if i.name == "step" else i.name)
            event = {"ph": "X", "name": shown, "cat": i.track, "pid": 1, "tid": tracks[i.track]}
            events.append(event | {"ts": round(i.start_us, 3), "dur": round(i.us, 3), "args": _arguments(i)})
    about = {"driver": found.driver, "activations": found.activations}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _arguments(i: Interval) -> dict[str, object]:
    """What a trace viewer shows of a dispatch."""
    if not i.op:
        return {}
    known: dict[str, object] = {"kernel": i.name, "workgroups": " × ".join(map(str, i.groups))}
    known |= {"bytes": i.nbytes, "GB/s": round(i.gb_s, 2)} if i.nbytes else {}
    return known | ({"GFLOP/s": round(i.gflop_s, 2)} if i.flop else {})
