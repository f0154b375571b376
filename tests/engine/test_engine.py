"""Whole models on the device: text against another program's, logits against the numpy reference, and what must be refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vkllm import LLMEngine, RuntimeConfig, SamplingParams
from vkllm.config import Activations
from vkllm.diff import diff, nmse
from vkllm.errors import ConfigError, ContextTooLongError, NonFiniteError, RequestError
from vkllm.files import resolve_model
from vkllm.files.gguf import GGUFFile
from vkllm.reference import ReferenceExecutor
from vkllm.vk import list_devices, open_device

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    if not list_devices():
        pytest.skip("no Vulkan device: install mesa-vulkan-drivers")
    with LLMEngine.init_model("tiny", RuntimeConfig(n_ctx=256)) as engine:
        yield engine


def stories(shared_data: Path, kind: str) -> LLMEngine:
    return LLMEngine.init_model(shared_data / "stories260K" / f"stories260K-{kind}.gguf", RuntimeConfig(n_ctx=256))


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_greedy_continuations_of_another_program(shared_data: Path, device: object, kind: str) -> None:
    expected = json.loads((shared_data / "stories260K" / "expected.json").read_text())["continuations"]
    with stories(shared_data, kind) as engine:
        for prompt, text in expected.items():
            n = 129 - len(engine.tokenizer.encode(prompt))  # 128 steps after BOS
            assert (prompt + engine.generate(prompt, SamplingParams(temperature=0.0, max_tokens=n))).strip() == text.strip()


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_greedy_tokens_of_the_reference(shared_data: Path, device: object, kind: str) -> None:
    with stories(shared_data, kind) as engine:
        ids = engine.tokenizer.encode("Once upon a time")
        found = engine.generate_result(ids, SamplingParams(temperature=0.0, max_tokens=60)).token_ids
        reference = ReferenceExecutor(engine.graph, engine.file, n_ctx=256)
        logits = reference.forward(ids)
        for token in found:
            assert token == int(np.argmax(logits[-1]))
            logits = reference.forward([token])


def test_logits_of_prefill_and_of_single_steps(engine: LLMEngine) -> None:
    ids = engine.tokenizer.encode("Once upon a time there was a small dog who lived near the river. " * 6)[:80]
    expected = ReferenceExecutor(engine.graph, engine.file, n_ctx=256).forward(ids)
    assert len(ids) == 80  # more than one chunk
    for values in (engine.logits(ids), engine.logits(ids[:24], step=True)):
        assert values.dtype == np.float32
        assert nmse(values, expected[: len(values)]) < 1e-6


@pytest.mark.parametrize("activations", ["f32", "int8"])
def test_the_schedule_for_gpus_gives_the_same_numbers(engine: LLMEngine, activations: Activations) -> None:
    ids = engine.tokenizer.encode("Once upon a time there was a small dog who lived near the river. " * 3)[:40]
    expected = ReferenceExecutor(engine.graph, engine.file, n_ctx=256).forward(ids)
    runtime = RuntimeConfig(n_ctx=1024, schedule="lane_chunk", activations=activations)  # 1024: attention is split
    with LLMEngine.init_model("tiny", runtime) as gpu:
        for values in (gpu.logits(ids), gpu.logits(ids[:5], step=True)):
            assert nmse(values, expected[: len(values)]) < (1e-6 if activations == "f32" else 1e-2)


def test_a_matrix_larger_than_a_storage_buffer_may_be(engine: LLMEngine) -> None:
    """On the GPU schedule it is read through a texel view; here the embedding and head of `tiny` are made too large by decree."""
    expected = engine.generate_result("Once upon a time", GREEDY).token_ids
    with GGUFFile.open(resolve_model("tiny")) as file, open_device() as device:
        device.limits = replace(device.limits, max_storage_buffer_range=550_000)
        device.info = replace(device.info, limits=device.limits)
        small = LLMEngine(file, device, RuntimeConfig(n_ctx=256, schedule="lane_chunk"))
        dispatches = small.chain._decode_dispatches()
        assert {d.op for d in dispatches if d.kernel.name.startswith(("embed", "matmul")) and "large" in d.kernel.name} == {
            "token_embd",
            "output",
        }
        assert small.generate_result("Once upon a time", GREEDY).token_ids == expected


def test_memory_that_is_not_mapped_gives_the_same_tokens(engine: LLMEngine) -> None:
    """The staging path that discrete GPUs take: weights uploaded in slabs, results read back."""
    expected = engine.generate_result("Once upon a time", GREEDY).token_ids
    with GGUFFile.open(resolve_model("tiny")) as file, open_device(force_unmapped=True) as device:
        unmapped = LLMEngine(file, device, RuntimeConfig(n_ctx=256))
        assert not unmapped.chain._buffers["x"].mapped
        assert unmapped.generate_result("Once upon a time", GREEDY).token_ids == expected


def test_int8_activations_are_near_the_reference(engine: LLMEngine) -> None:
    ids = engine.tokenizer.encode("Once upon a time there was a small dog")
    expected = ReferenceExecutor(engine.graph, engine.file, n_ctx=256).forward(ids)
    with LLMEngine.init_model("tiny", RuntimeConfig(n_ctx=256, activations="int8")) as quantized:
        error = nmse(quantized.logits(ids), expected)
    assert 1e-9 < error < 1e-2


def test_diff_finds_nothing_in_a_right_engine_and_the_op_in_a_wrong_one(engine: LLMEngine) -> None:
    ids = engine.tokenizer.encode("The capital of France is")
    assert diff(engine, ids, limit=1e-6).first_divergence is None
    norm = engine.chain._buffers["blk.2.ffn_norm.weight"]
    right = norm.read()
    norm.write(np.full(engine.config.n_embd, 3.0, np.float32))
    try:
        wrong = diff(engine, ids, limit=1e-6).first_divergence
    finally:
        norm.write(right)
    assert wrong is not None
    assert wrong.op == "blk.2.ffn_gate_up"


def test_non_finite_values_name_their_layer(engine: LLMEngine) -> None:
    norm = engine.chain._buffers["blk.1.attn_norm.weight"]
    right = norm.read()
    norm.write(np.full(1, np.inf, np.float32))
    try:
        with pytest.raises(NonFiniteError, match=r"blk\.1\.qkv") as caught:
            engine.generate("Once upon a time", GREEDY)
        assert caught.value.layer == "blk.1.qkv"
    finally:
        norm.write(right)
        engine.forget()
    assert engine.generate("Once upon a time", GREEDY)


def test_stream_adds_up_to_the_result(engine: LLMEngine) -> None:
    events = list(engine.stream("Once upon a time", GREEDY))
    result = events[-1].result
    assert result is not None
    assert "".join(e.text for e in events) == result.text
    assert [e.result for e in events[:-1]] == [None] * (len(events) - 1)
    assert result.usage.completion_tokens == len(result.token_ids) <= 24
    assert result.timings.decode_tok_s > 0


def test_a_seed_repeats_and_another_does_not(engine: LLMEngine) -> None:
    def tokens(seed: int) -> tuple[int, ...]:
        params = SamplingParams(temperature=1.5, seed=seed, max_tokens=24, ignore_eos=True)
        return engine.generate_result("Once upon a time", params).token_ids

    assert tokens(1) == tokens(1)
    assert len({tokens(seed) for seed in range(4)}) > 1


def test_the_cached_prefix_changes_nothing(engine: LLMEngine) -> None:
    engine.forget()
    fresh = engine.generate_result("Once upon a time there was", GREEDY)
    again = engine.generate_result("Once upon a time there was", GREEDY)
    assert fresh.usage.cached_tokens == 0
    assert again.usage.cached_tokens == fresh.usage.prompt_tokens - 1
    assert again.token_ids == fresh.token_ids


def test_stop_strings_end_before_themselves(engine: LLMEngine) -> None:
    text = engine.generate("Once upon a time", GREEDY)
    word = text.split()[3]
    result = engine.generate_result("Once upon a time", SamplingParams(temperature=0.0, max_tokens=24, stop=(word,)))
    assert result.finish_reason == "stop"
    assert result.text == text[: text.index(word)]


def test_stop_ids_and_the_length(engine: LLMEngine) -> None:
    ids = engine.generate_result("Once upon a time", GREEDY).token_ids
    stopped = engine.generate_result("Once upon a time", SamplingParams(temperature=0.0, max_tokens=24, stop_ids=(ids[5],)))
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == ids[: ids.index(ids[5])]
    short = engine.generate_result("Once upon a time", SamplingParams(temperature=0.0, max_tokens=3))
    assert (short.token_ids, short.finish_reason) == (ids[:3], "length")


def test_penalties_and_bias_reach_the_sampler(engine: LLMEngine) -> None:
    first = engine.generate_result("Once upon a time", GREEDY).token_ids[0]
    banned = SamplingParams(temperature=0.0, max_tokens=1, logit_bias={first: -100.0}, ignore_eos=True)
    assert engine.generate_result("Once upon a time", banned).token_ids[0] != first


def test_a_full_context_ends_by_length(engine: LLMEngine) -> None:
    ids = [5] * 250
    result = engine.generate_result(ids, SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True))
    assert (len(result.token_ids), result.finish_reason) == (6, "length")


def test_what_is_refused(engine: LLMEngine) -> None:
    with pytest.raises(RequestError, match="empty"):
        engine.generate([])
    with pytest.raises(RequestError, match="vocabulary"):
        engine.generate([engine.config.n_vocab])
    with pytest.raises(ContextTooLongError, match="256"):
        engine.generate([1] * 257)
    with pytest.raises(ConfigError, match="n_ctx"):
        LLMEngine.init_model("tiny", RuntimeConfig(n_ctx=10**6))
