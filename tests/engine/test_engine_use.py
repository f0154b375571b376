"""Engines as people use them: streams that take turns, threads, two engines, a closed one, prompts of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from vkllm import LLMEngine, RuntimeConfig, SamplingParams
from vkllm.errors import NonFiniteError, RequestError
from vkllm.vk import Device

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
ONCE, FRANCE = "Once upon a time", "The capital of France is"


@pytest.fixture(scope="module")
def engine(device: Device) -> Iterator[LLMEngine]:
    with LLMEngine.init_model("tiny", RuntimeConfig(n_ctx=64, prefill_chunk=4)) as engine:
        yield engine


def text_of(stream: Iterator[Any]) -> str:
    return "".join(event.text for event in stream)


def test_streams_may_take_turns(engine: LLMEngine) -> None:
    expected = engine.generate(ONCE, GREEDY)
    stream = engine.stream(ONCE, GREEDY)
    first = next(stream).text
    france = engine.generate(FRANCE, GREEDY)
    second = next(stream).text
    engine.logits([1, 2, 3])
    assert first + second + text_of(stream) == expected
    assert engine.generate(FRANCE, GREEDY) == france


def test_a_turn_changes_no_drawn_token(engine: LLMEngine) -> None:
    params = SamplingParams(temperature=1.2, seed=3, max_tokens=12, repetition_penalty=1.3, ignore_eos=True)
    expected = engine.generate(ONCE, params)
    stream = engine.stream(ONCE, params)
    text = next(stream).text
    engine.generate(FRANCE, GREEDY)
    assert text + text_of(stream) == expected


def test_threads_do_not_disturb_each_other(engine: LLMEngine) -> None:
    expected = {prompt: engine.generate(prompt, GREEDY) for prompt in (ONCE, FRANCE)}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: (prompt, engine.generate(prompt, GREEDY)), [ONCE, FRANCE] * 4))
    assert set(found) == set(expected.items())


def test_two_engines(engine: LLMEngine) -> None:
    expected = engine.generate(ONCE, GREEDY)
    with LLMEngine.init_model("tiny", RuntimeConfig(n_ctx=64)) as other:
        assert other.generate(ONCE, GREEDY) == expected
    assert engine.generate(ONCE, GREEDY) == expected


@pytest.mark.usefixtures("device")
def test_a_closed_engine_says_so() -> None:
    engine = LLMEngine.init_model("tiny", RuntimeConfig(n_ctx=64))
    stream = engine.stream(ONCE, GREEDY)
    next(stream)
    engine.close()
    engine.close()
    for use in (lambda: engine.generate(ONCE), lambda: engine.logits([1]), lambda: engine.prefill([1]), lambda: next(stream)):
        with pytest.raises(RequestError, match="closed"):
            use()


def test_prompts_of_ids(engine: LLMEngine) -> None:
    ids = engine.tokenizer.encode(ONCE)
    expected = engine.generate(ONCE, GREEDY)
    for prompt in (ids, tuple(ids), np.array(ids), np.array(ids, np.uint16)):
        assert engine.generate(prompt, GREEDY) == expected  # type: ignore[arg-type]
    assert engine.logits(np.array(ids)).shape == (len(ids), engine.config.n_vocab)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", [None, 5, b"text", "", [], [5.5], ["a"], [-1], [None]], ids=repr)
def test_other_prompts_are_refused(engine: LLMEngine, prompt: Any) -> None:
    with pytest.raises(RequestError):
        engine.generate(prompt, GREEDY)


@pytest.mark.parametrize("n_prompt, n_found", [(62, 2), (63, 1), (64, 0)])
def test_prompts_that_nearly_fill_the_context(engine: LLMEngine, n_prompt: int, n_found: int) -> None:
    result = engine.generate_result([5] * n_prompt, SamplingParams(temperature=0.0, ignore_eos=True))
    assert (len(result.token_ids), result.finish_reason) == (n_found, "length")


def test_non_finite_values_in_a_chunk_without_logits(engine: LLMEngine) -> None:
    """Only the first of several prefill chunks is damaged: by the embedding of one of its tokens."""
    embedding = engine.chain._buffers["token_embd.weight"]
    right = embedding.read()
    embedding.write(np.full(embedding.nbytes, 0xFF, np.uint8))
    try:
        engine.forget()
        with pytest.raises(NonFiniteError, match="token_embd"):
            engine.generate([5] * 12, GREEDY)
        assert not engine._cached  # the error came from the first chunk
    finally:
        embedding.write(right)
    assert engine.generate(ONCE, GREEDY)


OPEN = {"temperature": 1.3, "seed": 7, "max_tokens": 30, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "ignore_eos": True}


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 0.2}, {"seed": 8}, {"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.5}, {"repetition_penalty": 3.0},
        {"presence_penalty": 5.0}, {"frequency_penalty": 5.0}, {"logit_bias": {11: 100.0}}, {"max_tokens": 3},
    ],
    ids=str,
)  # fmt: skip
def test_each_sampling_option_reaches_the_tokens(engine: LLMEngine, option: dict[str, Any]) -> None:
    def tokens(options: dict[str, Any]) -> tuple[int, ...]:
        return engine.generate_result(ONCE, SamplingParams(**OPEN | options)).token_ids

    found = tokens(option)
    assert found != tokens({})
    assert found == tokens(option)


def test_stop_strings_across_tokens(engine: LLMEngine) -> None:
    text = engine.generate(ONCE, GREEDY)
    for start in range(1, len(text) - 7, 5):
        stop = text[start : start + 7]  # wherever tokens begin and end
        params = SamplingParams(temperature=0.0, max_tokens=12, stop=(stop,))
        events = list(engine.stream(ONCE, params))
        assert "".join(e.text for e in events) == text[: text.index(stop)]
        assert events[-1].result is not None and events[-1].result.finish_reason == "stop"


def test_a_stream_of_emoji_has_no_half_characters(engine: LLMEngine) -> None:
    """The sampler is made to say, token by token, what the vocabulary has only as bytes."""
    wanted = engine.tokenizer.encode("a😀é漢", add_special=False)
    assert len(wanted) == 10
    pieces, prompt = [], engine.tokenizer.encode(ONCE)
    decoder = engine.tokenizer.stream(prompt)
    for i, token in enumerate(wanted):
        params = SamplingParams(temperature=0.0, max_tokens=1, logit_bias={token: 100.0}, ignore_eos=True)
        assert engine.generate_result([*prompt, *wanted[:i]], params).token_ids == (token,)
        pieces.append(decoder.push(token))
    assert [p for p in pieces if p] == ["a", "😀", "é", "漢"]
