"""The recorded chain on the null device: every hazard ordered, every barrier needed, nothing recorded twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from vkllm.chain import ModelChain, Rows, Span
from vkllm.config import Activations, ModelConfig, RuntimeConfig
from vkllm.errors import ConfigError, RequestError, UnsupportedModelError
from vkllm.files import resolve_model
from vkllm.files.gguf import GGUFFile
from vkllm.kernel_cache import pipeline_of
from vkllm.kv_cache import BlockPool, BlockTable
from vkllm.models import build_graph
from vkllm.schedule import Access, Dispatch, Touch, unordered_hazards
from vkllm.vk import MINIMUM_LIMITS, BarrierCommand, BufferLike, Command, DeviceLimits, DispatchCommand, NullDevice

EIGHT_LANES = replace(MINIMUM_LIMITS, subgroup_size=8)


@dataclass(frozen=True)
class HostRead:
    """The host reads results after a replay."""

    buffers: tuple[BufferLike, ...]


class Recorder:
    """A model on the null device, and what its chain recorded."""

    def __init__(self, file: GGUFFile, runtime: RuntimeConfig, kind: str, limits: DeviceLimits = MINIMUM_LIMITS) -> None:
        device = NullDevice(limits=limits)
        device.info = replace(device.info, kind=kind)  # type: ignore[arg-type]
        self.device = device
        graph = build_graph(ModelConfig.from_gguf(file), file.tensors)
        self.chain = ModelChain(device, graph, file, runtime)  # type: ignore[arg-type]
        self.table = BlockTable(runtime.block_size)
        BlockPool(self.chain.n_block, runtime.block_size).extend(self.table, 200)

    def forward(self, n: int, start: int = 0) -> None:
        """One step of n rows. The null device computes nothing: token 0 comes out."""
        self.chain.forward(Rows.of(Span([1] * n, start, self.table, n_output=1)))

    def decode(self, start: int = 0) -> None:
        """Several steps of one row in one submit."""
        self.chain.decode(Rows.of(Span([1], start, self.table, n_output=1)))

    def commands(self) -> list[Command | HostRead]:
        """Everything recorded, in order of submission, and the host's look at the result; twice, as two replays in a row."""
        results = tuple(self.chain._buffers[name] for name in ("argmax", "logits"))
        once = [c for r in self.device.recordings for c in r.commands] + [HostRead(results)]
        return once + once

    def access(self) -> dict[int, tuple[Access, ...]]:
        """Accesses of each pipeline's bindings, by the pipeline's identity."""
        steps = [s for r in self.chain._recorded.values() for run in r.runs for s in run if isinstance(s, Dispatch)]
        return {id(pipeline_of(self.chain.device, s.kernel)): tuple(b.access for b in s.kernel.bindings) for s in steps}


def touches(access: dict[int, tuple[Access, ...]], command: Command | HostRead) -> list[Touch]:
    """The byte ranges of a recorded dispatch, from what was bound: independent of how barriers were placed."""
    if isinstance(command, HostRead):
        return [Touch(id(b), 0, b.nbytes, "read") for b in command.buffers]
    assert isinstance(command, DispatchCommand)
    pairs = zip(command.bindings, access[id(command.pipeline)], strict=True)
    return [Touch(id(b.buffer), b.offset, b.offset + b.size, a) for b, a in pairs]


@pytest.fixture(scope="module")
def tiny() -> Iterator[GGUFFile]:
    with GGUFFile.open(resolve_model("tiny")) as file:
        yield file


@pytest.mark.parametrize(("kind", "activations"), [("cpu", "f32"), ("cpu", "int8"), ("discrete", "f32")])
@pytest.mark.parametrize("n_row", [0, 1, 8])
def test_no_hazard_is_unordered_and_no_barrier_is_superfluous(
    tiny: GGUFFile, kind: str, activations: Activations, n_row: int
) -> None:
    """Of steps of so many rows; 0: of three of one row behind one another."""
    runtime = RuntimeConfig(n_ctx=256, submit_ms=1e9, activations=activations, multi_step=3)
    recorder = Recorder(tiny, runtime, kind, EIGHT_LANES)
    if n_row:
        recorder.forward(n_row)
    else:
        recorder.decode()
    commands, access = recorder.commands(), recorder.access()

    def hazards(some: list[Command | HostRead]) -> list[tuple[int, int]]:
        return unordered_hazards(some, lambda c: isinstance(c, BarrierCommand), lambda c: touches(access, c))

    assert hazards(commands) == []
    barriers = [i for i, c in enumerate(commands[:-1]) if isinstance(c, BarrierCommand)]
    assert barriers
    for i in barriers:
        assert hazards(commands[:i] + commands[i + 1 :]), f"the barrier at {i} orders nothing"


def test_a_bucket_is_recorded_once_and_replayed(tiny: GGUFFile) -> None:
    recorder = Recorder(tiny, RuntimeConfig(n_ctx=256), "cpu")
    for position in range(5):
        recorder.forward(1, start=position)
    assert len(recorder.device.recordings) == 1
    assert recorder.device.recordings[0].runs == 5
    recorder.forward(5)
    recorder.forward(7)
    assert len(recorder.device.recordings) == 2


@pytest.mark.parametrize("activations", ["f32", "int8"])
def test_dispatches_a_layer(tiny: GGUFFile, activations: Activations) -> None:
    """Of one row: who makes activations writes them in 8 bits too."""
    chain = Recorder(tiny, RuntimeConfig(n_ctx=256, activations=activations), "cpu", EIGHT_LANES).chain
    assert chain.activations == activations
    assert chain.dispatches_per_layer == 5
    assert chain.dispatches_per_token == 5 * chain.graph.config.n_layer + 4


def test_defaults_by_device(tiny: GGUFFile) -> None:
    """A GPU reads longer prompts at once, its attention splits positions only where rows and heads do not fill it, and it does
    several decode steps in a submit; no device keeps logits of whole prompts."""
    cpu, gpu = (Recorder(tiny, RuntimeConfig(), kind).chain for kind in ("cpu", "discrete"))
    assert (cpu.capacity, gpu.capacity) == (64, 512)
    assert (cpu.multi_step, gpu.multi_step) == (1, 8)
    assert cpu._buffers["logits"].nbytes == gpu._buffers["logits"].nbytes
    attention = {n: [d.kernel.name for op in gpu.graph.ops for d in gpu._lower.dispatches(op, n, 0)] for n in (1, 512)}
    assert any(name.startswith("attention_partial") for name in attention[1])
    assert any(name.startswith("attention_direct") for name in attention[512])
    assert not any(name.startswith("attention_partial") for name in attention[512])


def test_too_many_logits_are_refused(tiny: GGUFFile) -> None:
    chain, table = Recorder(tiny, RuntimeConfig(), "discrete").chain, BlockTable(32)
    BlockPool(chain.n_block, 32).extend(table, 80)
    with pytest.raises(RequestError, match="80 rows") as caught:
        chain.forward(Rows.of(Span([1] * 80, 0, table, n_output=80)))
    assert "64 at most" in caught.value.hint


@pytest.mark.parametrize("kind", ["cpu", "discrete"])
@pytest.mark.parametrize(
    "option, buffer",
    [({"cache_tokens": 1 << 20}, "k.0"), ({"prefill_chunk": (1 << 16) - 1}, "ffn"), ({"prefill_chunk": 1 << 16}, "65536 rows")],
)
def test_what_no_binding_reaches_is_refused_before_loading(
    tiny: GGUFFile, kind: str, option: dict[str, int], buffer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelChain, "_load", lambda *_: pytest.fail("it began to load"))
    with pytest.raises(ConfigError, match=buffer) as caught:
        Recorder(tiny, RuntimeConfig(n_ctx=256, **option), kind)  # type: ignore[arg-type]
    assert next(iter(option)) in caught.value.hint


@pytest.mark.parametrize("kind", ["cpu", "discrete"])
def test_a_matrix_that_no_view_reaches_is_refused_by_name(tiny: GGUFFile, kind: str) -> None:
    small = replace(MINIMUM_LIMITS, max_texel_elements=1 << 14, max_storage_buffer_range=1 << 18)  # the embedding has 2 MiB
    with pytest.raises(UnsupportedModelError, match=r"token_embd\.weight takes"):
        Recorder(tiny, RuntimeConfig(n_ctx=64, prefill_chunk=4), kind, small)


def test_int8_that_a_cpu_cannot_do_is_refused(tiny: GGUFFile) -> None:
    """On its own accord ("auto") it takes f32; asked for int8 it does not."""
    limits = replace(MINIMUM_LIMITS, subgroup_size=4)
    assert Recorder(tiny, RuntimeConfig(n_ctx=256), "cpu", limits).chain.activations == "f32"
    with pytest.raises(ConfigError, match="subgroups of 4") as caught:
        Recorder(tiny, RuntimeConfig(n_ctx=256, activations="int8"), "cpu", limits)
    assert "auto or f32" in caught.value.hint


def test_submits_are_bounded_in_time(tiny: GGUFFile) -> None:
    recorder = Recorder(tiny, RuntimeConfig(n_ctx=256, submit_ms=0.1), "cpu")
    recorder.forward(1)
    assert len(recorder.device.recordings) > 2


def test_bytes_a_token_count_a_tied_head(tiny: GGUFFile) -> None:
    chain = Recorder(tiny, RuntimeConfig(n_ctx=256), "cpu").chain
    assert "output.weight" not in tiny.tensors
    assert chain.bytes_per_token == sum(t.nbytes for t in tiny.tensors.values() if len(t.shape) == 2)
