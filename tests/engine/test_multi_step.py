"""Several decode steps in one submit: the tokens of single steps, and where there must be none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from random_models import Shape, write_model

from vkllm import LLMEngine, RuntimeConfig, SamplingParams
from vkllm.batching import BatchEngine
from vkllm.chain import ModelChain, Rows, Span
from vkllm.config import Schedule
from vkllm.errors import ConfigError, NonFiniteError
from vkllm.vk import list_devices

PROMPT = "Once upon a time there was a"
GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
ONE = RuntimeConfig(n_ctx=128, speculate="off", block_size=8, n_seq=3)


@pytest.fixture(scope="module", params=["lane_row", "lane_chunk"])
def engines(request: pytest.FixtureRequest) -> Iterator[tuple[LLMEngine, LLMEngine]]:
    """One step a submit, and four."""
    if not list_devices():
        pytest.skip("no Vulkan device: install mesa-vulkan-drivers")
    schedule: Schedule = request.param
    runtime = replace(ONE, schedule=schedule)
    with LLMEngine.init_model("tiny", runtime) as one, LLMEngine.init_model("tiny", replace(runtime, multi_step=4)) as four:
        yield one, four


@pytest.fixture
def submits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each submit of several gave."""
    found: list[int] = []
    decode = ModelChain.decode

    def watched(self: ModelChain, rows: Rows) -> Any:
        tokens = decode(self, rows)
        found.append(len(tokens))
        return tokens

    monkeypatch.setattr(ModelChain, "decode", watched)
    return found


def test_tokens_are_those_of_single_steps(engines: tuple[LLMEngine, LLMEngine], submits: list[int]) -> None:
    one, four = engines
    assert four.generate_result(PROMPT, GREEDY).token_ids == one.generate_result(PROMPT, GREEDY).token_ids
    assert submits == [4] * 7  # one token from the prompt, 28 in fours, one alone


def test_an_end_in_the_middle(engines: tuple[LLMEngine, LLMEngine], submits: list[int]) -> None:
    """What was computed behind it is forgotten: a prompt that goes on elsewhere finds a clean cache."""
    one, four = engines
    ids = one.generate_result(PROMPT, GREEDY).token_ids
    end = next(i for i in range(5, 30) if i % 4 in (2, 3) and ids[i] not in ids[:i])
    ending = replace(GREEDY, stop_ids=(ids[end],))
    found = four.generate_result(PROMPT, ending)
    assert (found.finish_reason, found.token_ids) == ("stop", ids[:end])
    longer = four.tokenizer.encode(PROMPT) + list(ids[: end - 1]) + [ids[0], ids[1]]
    assert four.generate_result(longer, GREEDY).token_ids == one.generate_result(longer, GREEDY).token_ids


def test_up_to_the_end_of_the_context(engines: tuple[LLMEngine, LLMEngine]) -> None:
    one, four = engines
    whole = replace(GREEDY, max_tokens=None)
    found = four.generate_result(PROMPT, whole)
    assert found.token_ids == one.generate_result(PROMPT, whole).token_ids
    assert len(found.token_ids) + len(four.tokenizer.encode(PROMPT)) == ONE.n_ctx


def test_not_where_somebody_waits_or_looks_at_logits(engines: tuple[LLMEngine, LLMEngine], submits: list[int]) -> None:
    _, four = engines
    assert [event.result for event in four.stream(PROMPT, GREEDY)][-1] is not None
    four.generate_result(PROMPT, replace(GREEDY, temperature=1.0, seed=1))
    with BatchEngine(four) as batch:
        batch.submit(PROMPT, GREEDY).result()
        batch.submit(PROMPT, replace(GREEDY, logprobs=1), awaited=False).result()
    assert submits == []


def test_in_a_batch(engines: tuple[LLMEngine, LLMEngine], submits: list[int]) -> None:
    """Streams of different ends side by side, one of them awaited for a while."""
    one, four = engines
    prompts = [PROMPT, "The dog went to the river and", "A cat"]
    wanted = [one.generate_result(p, replace(GREEDY, max_tokens=n)).token_ids for p, n in zip(prompts, (30, 17, 40), strict=True)]
    with BatchEngine(four) as batch:
        handles = [
            batch.submit(p, replace(GREEDY, max_tokens=n), awaited=n == 17) for p, n in zip(prompts, (30, 17, 40), strict=True)
        ]
        assert [h.result().token_ids for h in handles] == wanted
        assert batch.stats.completion_tokens == 30 + 17 + 40
        assert batch.stats.drafted_tokens == 0
        assert batch.pool.n_free == batch.pool.n_block
    assert submits and set(submits) == {4}


def test_non_finite_numbers_are_named(tmp_path: Any) -> None:
    """A token whose embedding is damaged: steps before it count, then the op is named."""
    if not list_devices():
        pytest.skip("no Vulkan device: install mesa-vulkan-drivers")
    path = tmp_path / "m.gguf"
    write_model(path, Shape("llama", n_layer=1))
    with LLMEngine.init_model(path, replace(ONE, multi_step=4)) as engine:
        good = engine.generate_result([1, 2, 3], replace(GREEDY, max_tokens=5)).token_ids
        decode = engine.chain.decode

        def damaged(rows: Rows) -> Any:
            return decode(rows)[:2]

        engine.chain.decode = damaged  # type: ignore[method-assign]
        engine.forget()
        assert engine.generate_result([1, 2, 3], replace(GREEDY, max_tokens=5)).token_ids == good
        norm = engine.chain._buffers["output_norm.weight"]
        norm.write(np.full(norm.nbytes // 4, np.nan, np.float32))
        engine.chain.decode = decode  # type: ignore[method-assign]
        with engine.scratch_sequence(16) as table:
            rows = Rows.of(Span([5], 0, table, n_output=1))
            assert len(engine.chain.decode(rows)) == 0
            with pytest.raises(NonFiniteError, match="output"):
                engine.chain.forward(rows)


@pytest.mark.parametrize("wrong", [0, -1, 65, True, "8"])
def test_a_wrong_number_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="multi_step"):
        RuntimeConfig(multi_step=wrong)
