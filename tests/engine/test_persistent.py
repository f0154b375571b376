"""Layers in one dispatch: the bits of an op a dispatch, waits where they are needed, and a way back when waiting is given up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import Shape, write_model
from test_architectures import CASES, MadeUpFile, logits
from test_chain import Recorder

from vkllm import LLMEngine, RuntimeConfig, SamplingParams
from vkllm.chain import ModelChain, Rows, Span
from vkllm.errors import ConfigError
from vkllm.files import resolve_model
from vkllm.files.gguf import GGUFFile
from vkllm.kv_cache import BlockPool, BlockTable
from vkllm.persistent import COUNTERS, MAX_TURNS, SYNC, Part, Patience, merged
from vkllm.schedule import Barrier, Dispatch, Touch, order, unordered_hazards
from vkllm.vk import MINIMUM_LIMITS, Device, DeviceLimits

ROOM = replace(MINIMUM_LIMITS, max_storage_buffers=32, max_texel_buffers=64)
IDS = [int(i) for i in np.random.default_rng(2).integers(0, 130, 40)]


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the driver, for all that asks how many there are; the driver itself has read its settings long ago."""
    monkeypatch.setenv("LP_NUM_THREADS", "2")


@pytest.fixture(scope="module")
def tiny() -> Iterator[GGUFFile]:
    with GGUFFile.open(resolve_model("tiny")) as file:
        yield file


# -- plans


def decode(file: GGUFFile, limits: DeviceLimits = ROOM, **options: Any) -> tuple[ModelChain, list[Dispatch]]:
    """A chain on the null device, and the dispatches of one decode step, an op in each."""
    chain = Recorder(file, RuntimeConfig(n_ctx=256, **options), "cpu", limits).chain
    return chain, [d for op in chain.graph.ops for d in chain._lower.dispatches(op, 1, 1)]


@pytest.mark.parametrize("activations", ["f32", "int8"])
def test_a_layer_is_a_dispatch(tiny: GGUFFile, activations: str) -> None:
    chain, _ = decode(tiny, activations=activations)
    assert (chain.dispatches_per_layer, chain.dispatches_per_token) == (1, chain.graph.config.n_layer + 4)
    assert chain._record(1, 1).runs, "and each op has one where nothing is to be merged"
    assert SYNC not in chain._record(1, 1).buffers


@pytest.mark.parametrize("activations", ["f32", "int8"])
def test_a_stage_waits_where_it_must_and_only_there(tiny: GGUFFile, activations: str) -> None:
    """From what each stage is bound to: independent of how the waits were placed."""
    chain, dispatches = decode(tiny, activations=activations)
    found = chain._lower.merged(dispatches)
    layers = [d for d in found.dispatches if SYNC in d.buffers]
    assert len(layers) == chain.graph.config.n_layer
    for layer in layers:
        assert layer.kernel.recipe is not None
        parts: Sequence[Part] = layer.kernel.recipe.args[1]  # type: ignore[assignment]
        commands: list[Part | None] = [c for part in parts for c in ([None, part] if part.waits else [part])]
        for i, hazards in ((i, hazards_without(layer, commands, i)) for i in range(-1, len(commands))):
            if i < 0:
                assert not hazards
            elif commands[i] is None:
                assert hazards, f"the wait at {i} orders nothing"


def hazards_without(layer: Dispatch, commands: Sequence[Part | None], left_out: int) -> list[tuple[int, int]]:
    """Conflicts of stages, None standing for a wait, if one command were not there."""

    def touches(part: Part | None) -> list[Touch]:
        assert part is not None
        accesses = [b.access for b in part.recipe.make().bindings]
        names = [layer.buffers[number] for number in part.bindings]
        return [Touch(hash(name), 0, 1, access) for name, access in zip(names, accesses, strict=True)]  # type: ignore[arg-type]

    some = [c for i, c in enumerate(commands) if i != left_out]
    return unordered_hazards(some, lambda c: c is None, touches)


def test_dispatches_do_not_share_counters(tiny: GGUFFile) -> None:
    chain, dispatches = decode(tiny)
    found = chain._lower.merged(dispatches)
    firsts = [int.from_bytes(d.push[:4], "little") for d in found.dispatches if SYNC in d.buffers]
    assert firsts[0] == COUNTERS
    n_wait = [sum(isinstance(step, Barrier) for step in order(run)[:-1]) for run in runs(dispatches)]
    assert [after - first for first, after in zip(firsts, [*firsts[1:], found.n_sync], strict=True)] == n_wait


def runs(dispatches: list[Dispatch]) -> list[list[Dispatch]]:
    """By layer."""
    layers = sorted({d.op.split(".")[1] for d in dispatches if d.op.startswith("blk.")})
    return [[d for d in dispatches if d.op.startswith(f"blk.{layer}.")] for layer in layers]


def test_what_does_not_fit_stays_apart(tiny: GGUFFile) -> None:
    """Too few buffers, loops that would end too early or that nobody can count, kernels that share memory."""
    chain, dispatches = decode(tiny)
    kernels, layer = chain._lower._kernels, runs(dispatches)[0]

    def n(some: list[Dispatch], limits: DeviceLimits = ROOM) -> int:
        return len(merged(some, kernels, 2, limits).dispatches)

    assert n(layer) == 1
    assert 1 < n(layer, replace(ROOM, max_storage_buffers=8)) < len(layer)
    assert 1 < n(layer, replace(ROOM, max_texel_buffers=8)) < len(layer)
    assert n([replace(d, turns=MAX_TURNS // 2) for d in layer]) == len(layer)
    assert n([layer[0], replace(layer[1], turns=None), *layer[2:]]) == 3
    assert n([layer[0], replace(layer[1], kernel=replace(layer[1].kernel, stage_size=0)), *layer[2:]]) == 3
    assert n([replace(d, op="output") for d in layer]) == len(layer), "no layer"
    assert n(layer[:2] + runs(dispatches)[1][2:]) == 2, "two layers"


def test_a_layer_with_nothing_to_bind_for_what_it_leaves_out_has_its_own_kernel(tiny: GGUFFile) -> None:
    """Although all of its stages are another one's too."""
    chain, dispatches = decode(tiny)
    first, second, *_ = runs(dispatches)
    found = merged(first + second[-2:], chain._lower._kernels, 2, ROOM).dispatches
    assert [d.op for d in found] == ["blk.0", "blk.1"]
    assert found[0].kernel.name != found[1].kernel.name


def test_only_where_a_cpu_has_threads_and_room(tiny: GGUFFile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode(tiny)[0].dispatches_per_layer == 1
    assert decode(tiny, persistent="off")[0].dispatches_per_layer == 5
    assert decode(tiny, MINIMUM_LIMITS)[0].dispatches_per_layer == 5
    assert Recorder(tiny, RuntimeConfig(n_ctx=256), "discrete", ROOM).chain._lower.n_together == 1
    assert decode(tiny, schedule="lane_chunk")[0]._lower.n_together == 1
    monkeypatch.setenv("LP_NUM_THREADS", "1")
    assert decode(tiny)[0].dispatches_per_layer == 5


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="persistent"):
        RuntimeConfig(persistent="on")  # type: ignore[arg-type]


# -- patience


def test_patience() -> None:
    """Each time it is given up, twice as many steps go without, up to a bound; a while that goes well makes it as at first."""
    patience = Patience()

    def pause() -> int:
        """Steps until the next try."""
        return next(i for i in range(10_000) if patience.ready())

    assert pause() == 0
    waited = []
    for _ in range(12):
        patience.told(gave_up=True)
        waited.append(pause() + 1)
    assert waited == [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 4096, 4096]
    for _ in range(Patience.WHILE):
        assert patience.ready()
        patience.told(gave_up=False)
    patience.told(gave_up=True)
    assert pause() + 1 == 8


# -- on a device


@pytest.mark.parametrize("activations", ["f32", "int8"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_same_bits(name: str, activations: str, device: Device) -> None:
    if device.info.kind != "cpu":
        pytest.skip("persistent kernels are for CPUs")
    file = MadeUpFile(replace(CASES[name], kind="Q8_0") if activations == "int8" else CASES[name])
    one, other = (logits(device, file, IDS, 16, activations=activations, persistent=p) for p in ("auto", "off"))
    np.testing.assert_array_equal(one, other)


MIXES = (  # the first key that a name contains counts
    {"blk.0.ffn_down": "Q4_0", "blk.2.ffn_down": "Q4_0", "": "Q8_0"},
    {"blk.1.attn_v": "Q4_0", "blk.1.ffn_down": "Q5_0", "blk.3.attn_v": "Q4_0", "": "Q8_0"},
    {"blk.1.attn_output": "Q8_0", "blk.2.attn_q": "F16", "": "F32"},
)


@pytest.mark.parametrize("types", MIXES, ids=str)
def test_layers_of_several_types_share_a_kernel(types: dict[str, str], tmp_path: Path, device: Device) -> None:
    """Each leaves out the stages of others, and its bits are those of an op a dispatch."""
    if device.info.kind != "cpu":
        pytest.skip("persistent kernels are for CPUs")
    path = write_model(tmp_path / "mixed.gguf", Shape("llama", n_layer=4, n_head=4, head_dim=32, n_ff=160, types=types))
    runtime = RuntimeConfig(n_ctx=64, activations="f32" if types[""] == "F32" else "int8")
    with LLMEngine.init_model(path, runtime) as one, LLMEngine.init_model(path, replace(runtime, persistent="off")) as other:
        ids = [int(i) for i in np.random.default_rng(3).integers(0, one.config.n_vocab, 12)]
        np.testing.assert_array_equal(one.logits(ids, step=True), other.logits(ids, step=True))
        layers = [d for d in one.chain._decode_dispatches() if SYNC in d.buffers]
    assert len(layers) == 4
    assert len({d.kernel.name for d in layers}) == 1
    assert len({d.push[4:] for d in layers}) > 1, "they want different stages"


@pytest.mark.parametrize("multi_step", [1, 3])
def test_a_step_that_was_given_up_is_run_again(multi_step: int, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More workgroups than threads wait for one another in vain."""
    if device.info.kind != "cpu":
        pytest.skip("persistent kernels are for CPUs")
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    runtime = RuntimeConfig(n_ctx=128, multi_step=multi_step, speculate="off")
    told: list[bool] = []
    monkeypatch.setattr(Patience, "told", lambda self, gave_up: told.append(gave_up))
    with (
        LLMEngine.init_model("tiny", runtime) as engine,
        LLMEngine.init_model("tiny", replace(runtime, persistent="off")) as plain,
    ):
        engine.chain._lower.n_together = 4096
        found, wanted = (e.generate_result("Once upon a time", params).token_ids for e in (engine, plain))
    assert found == wanted
    assert told
    assert all(told)


def test_a_pause_goes_without(device: Device) -> None:
    if device.info.kind != "cpu":
        pytest.skip("persistent kernels are for CPUs")
    with LLMEngine.init_model("tiny", RuntimeConfig(n_ctx=128)) as engine:
        chain, table = engine.chain, BlockTable(32)
        BlockPool(chain.n_block, 32).extend(table, 100)
        for position in range(3):
            chain._patience.told(gave_up=True)
            chain.forward(Rows.of(Span([5], position, table, n_output=1)))
        assert set(chain._recorded) == {(1, 1, False, 1, False)}
