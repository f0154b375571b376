"""Speculative decoding on real models: whatever is drafted, right or wrong, the tokens are those without."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vkllm import LLMEngine, RuntimeConfig, SamplingParams
from vkllm.chain import Output, Rows, Span
from vkllm.config import MAX_DRAFT, Activations, Speculate
from vkllm.diff import nmse
from vkllm.errors import NonFiniteError
from vkllm.speculation import DraftPlanner, Speculator
from vkllm.vk import Device, list_devices

TEXT = "Once upon a time there was a small dog. The small dog lived near the river. The small dog"
GREEDY = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
SEEDED = replace(GREEDY, temperature=0.6, seed=11)
PENALTIES = replace(GREEDY, temperature=0.9, seed=5, repetition_penalty=1.1, frequency_penalty=0.1, top_k=0)
REPEATS = replace(GREEDY, repetition_penalty=0.5, penalty_last_n=-1, max_tokens=100)  # what was said is said again
BIASED = replace(GREEDY, logit_bias={300: 2.0}, presence_penalty=0.2)


def open_engine(model: str | Path = "tiny", **options: object) -> LLMEngine:
    if not list_devices():
        pytest.skip("no Vulkan device: install mesa-vulkan-drivers")
    return LLMEngine.init_model(model, RuntimeConfig(n_ctx=256, **options))  # type: ignore[arg-type]


def speculating(engine: LLMEngine, mode: Speculate) -> LLMEngine:
    """The same engine with another policy."""
    engine.planner = DraftPlanner(mode, engine.chain.capacity)
    return engine


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with open_engine() as engine:
        yield engine


class Guesses(Speculator):
    """Drafts of which some are right: the tokens that are known to come, with mistakes."""

    def __init__(self, coming: Sequence[int], seed: int) -> None:
        super().__init__([])
        self.coming, self.dice, self.n = coming, random.Random(seed), 1

    @property
    def chance(self) -> float:
        return 0.9

    def draft(self, n: int) -> list[int]:
        right = self.coming[self.n : self.n + n]
        return [t if self.dice.random() < 0.8 else (t + 1) % 2000 for t in right] + [7] * (n - len(right))

    def push(self, token_id: int) -> None:
        self.n += 1


def compare(
    engine: LLMEngine,
    params: SamplingParams,
    monkeypatch: pytest.MonkeyPatch,
    prompt: str = TEXT,
    lengths: tuple[int, ...] = (1, 2, 3, 6, 11),
) -> None:
    """Tokens with drafts that are partly right, and with real ones, equal those without."""
    expected = speculating(engine, "off").generate_result(prompt, params)
    assert (expected.usage.drafted_tokens, expected.usage.accepted_tokens) == (0, 0)
    real = speculating(engine, lengths[-1]).generate_result(prompt, params)
    assert (real.token_ids, real.text, real.finish_reason) == (expected.token_ids, expected.text, expected.finish_reason)
    for seed, n in enumerate(lengths):
        monkeypatch.setattr("vkllm.engine.Speculator", lambda ids, s=seed: Guesses(expected.token_ids, s))
        engine.forget()
        found = speculating(engine, n).generate_result(prompt, params)
        monkeypatch.undo()
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text), f"drafts of {n}"
        assert 0 < found.usage.accepted_tokens < found.usage.drafted_tokens
        assert found.usage.completion_tokens == expected.usage.completion_tokens
        assert len(engine._cached) <= found.usage.prompt_tokens + len(found.token_ids)


@pytest.mark.parametrize("params", [GREEDY, SEEDED, PENALTIES, BIASED], ids=["greedy", "seeded", "penalties", "biased"])
def test_tokens_equal_those_without(engine: LLMEngine, params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(engine, params, monkeypatch)


@pytest.mark.parametrize("options", [{"activations": "int8"}, {"schedule": "lane_chunk"}, {"cache_type": "q8_0"}], ids=str)
def test_also_with_other_kernels(options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(**options) as engine:
        for params in (GREEDY, SEEDED):
            compare(engine, params, monkeypatch)


@pytest.mark.parametrize(("kind", "activations"), [("f32", "f32"), ("q4_0", "int8")])
def test_also_on_another_model(
    shared_data: Path, kind: str, activations: Activations, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine(shared_data / "stories260K" / f"stories260K-{kind}.gguf", activations=activations) as engine:
        for params in (GREEDY, SEEDED):
            exact = activations == "f32" or device.info.kind == "cpu"  # int8 on GPUs: with more rows a near tie turns
            lengths = (1, 2, 3, 6, 11) if exact else (1,)
            compare(engine, replace(params, max_tokens=100), monkeypatch, "Once upon a time", lengths)


@pytest.mark.parametrize("activations", ["f32", "int8"])
def test_auto_takes_only_sizes_that_change_no_bit(activations: Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(activations=activations) as engine:
        expected = speculating(engine, "off").generate_result(TEXT, SEEDED)
        ids = engine.tokenizer.encode(TEXT)[:16]
        one, sizes = engine.logits(ids, step=True), (2, 4, 8, 16)
        equal = [bool((_chunked(engine, ids, n) == one).all()) for n in sizes]
        monkeypatch.setattr("vkllm.engine.Speculator", lambda prompt: RightGuesses(expected.token_ids, 0))
        monkeypatch.setattr("vkllm.speculation.FIRST_STEPS", 0)
        speculating(engine, "auto")
        engine.forget()
        for _ in range(2):
            found = engine.generate_result(TEXT, SEEDED)
            assert found.token_ids == expected.token_ids
        largest = 1 << ([*equal, False].index(False))
        assert engine.planner.n_row <= largest < 2 * engine.planner.n_row or largest == 16
        assert (found.usage.accepted_tokens > 0) == (largest > 1)


def test_logits_of_several_rows_are_nearly_those_of_one(engine: LLMEngine) -> None:
    """Kernels for 1, 2 and 4 rows may add in another order, and a key or value may be rounded the other way in the f16 cache."""
    ids = engine.tokenizer.encode(TEXT)[:16]
    one = engine.logits(ids, step=True)
    for n in (2, 4, 8):
        assert nmse(_chunked(engine, ids, n), one) < 1e-6


def _chunked(engine: LLMEngine, ids: list[int], n: int) -> NDArray[np.float32]:
    """Logits of every position, from steps of n rows."""
    with engine.scratch_sequence(len(ids)) as table:
        spans = [Span(ids[s : s + n], s, table, n_output=len(ids[s : s + n])) for s in range(0, len(ids), n)]
        return np.concatenate([engine.chain.forward(Rows.of(span)).logits() for span in spans])


def test_a_text_that_repeats_takes_fewer_steps(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, steps = engine.chain.forward, [0]

    def counted(rows: Rows) -> Output:
        steps[0] += 1
        return forward(rows)

    monkeypatch.setattr(engine.chain, "forward", counted)
    ids = engine.tokenizer.encode(TEXT)
    result = speculating(engine, 7).generate_result(ids * 2, REPEATS)
    assert result.usage.accepted_tokens >= 20
    assert steps[0] < 100 - result.usage.accepted_tokens + 5
    assert result.usage.drafted_tokens <= 7 * steps[0]


def test_ends_inside_a_draft(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end token, a stop string and the most tokens count wherever in a draft they come, and what is cached stays true."""
    expected = speculating(engine, "off").generate_result(TEXT, GREEDY)
    text, ids = expected.text, expected.token_ids
    monkeypatch.setattr("vkllm.engine.Speculator", lambda prompt: RightGuesses(ids, 0))
    for params in (
        *(replace(GREEDY, max_tokens=n) for n in (1, 2, 3, 9, 10)),
        replace(GREEDY, stop_ids=(ids[9],)),
        replace(GREEDY, stop=(text[20:26],)),
        replace(SEEDED, temperature=0.0, presence_penalty=1e-9, stop=(text[20:26],)),
    ):
        without = speculating(engine, "off").generate_result(TEXT, params)
        found = speculating(engine, 6).generate_result(TEXT, params)
        assert (found.token_ids, found.text, found.finish_reason) == (without.token_ids, without.text, without.finish_reason)
        follow_up = speculating(engine, "off").generate_result([*engine.tokenizer.encode(TEXT), *found.token_ids], params)
        engine.forget()
        assert follow_up.token_ids == engine.generate_result([*engine.tokenizer.encode(TEXT), *found.token_ids], params).token_ids


class RightGuesses(Guesses):
    def draft(self, n: int) -> list[int]:
        return list(self.coming[self.n : self.n + n])


def test_a_full_context(engine: LLMEngine) -> None:
    ids = (engine.tokenizer.encode(TEXT) * 12)[:250]
    params = replace(GREEDY, max_tokens=100)
    expected = speculating(engine, "off").generate_result(ids, params)
    found = speculating(engine, MAX_DRAFT).generate_result(ids, params)
    assert found.token_ids == expected.token_ids
    assert (len(found.token_ids), found.finish_reason) == (6, "length")


def test_generations_that_take_turns(engine: LLMEngine) -> None:
    """Each displaces the other's cache between two tokens, also in the midst of a draft."""
    prompts = [TEXT, "The small dog and the small cat. The small dog and"]
    expected = [speculating(engine, "off").generate_result(p, replace(SEEDED, max_tokens=20)) for p in prompts]
    speculating(engine, 4)
    streams = [engine.stream(p, replace(SEEDED, max_tokens=20)) for p in prompts]
    found: dict[int, object] = {}
    while len(found) < 2:
        for i, stream in enumerate(streams):
            if i not in found and (event := next(stream)).result is not None:
                found[i] = event.result.token_ids
    assert [found[0], found[1]] == [e.token_ids for e in expected]


def test_a_stream_that_is_left_in_a_draft(engine: LLMEngine) -> None:
    expected = speculating(engine, "off").generate_result(TEXT, GREEDY)
    speculating(engine, 7)
    with closing(engine.stream(TEXT * 2, GREEDY)) as stream:  # type: ignore[type-var]
        for _ in range(9):
            next(stream)
    assert speculating(engine, "off").generate_result(TEXT, GREEDY).token_ids == expected.token_ids


def test_numbers_that_only_a_wrong_draft_spoils(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = speculating(engine, "off").generate_result(TEXT, REPEATS).token_ids
    forward, refused = engine.chain.forward, [0]

    def fragile(rows: Rows) -> Output:
        if len(rows.output_rows) > 1:
            refused[0] += 1
            raise NonFiniteError("blk.0.ffn_up produced NaN", layer="blk.0.ffn_up")
        return forward(rows)

    monkeypatch.setattr(engine.chain, "forward", fragile)
    result = speculating(engine, 4).generate_result(TEXT, REPEATS)
    assert result.token_ids == expected and refused[0] > 0
    assert result.usage.accepted_tokens == 0


def test_auto_drafts_where_rows_are_cheap_and_stops_where_they_are_not(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = {"now": 0.0, "per_row": 0.0}
    forward = engine.chain.forward

    def timed(rows: Rows) -> Output:
        clock["now"] += 1.0 + clock["per_row"] * (len(rows.token_ids) - 1)
        return forward(rows)

    monkeypatch.setattr(engine.chain, "forward", timed)
    monkeypatch.setattr("vkllm.engine.time.perf_counter", lambda: clock["now"])
    prompt, params = engine.tokenizer.encode(TEXT), replace(REPEATS, max_tokens=200)
    speculating(engine, "auto").generate_result(prompt, params)
    cheap = engine.generate_result(prompt, params)
    clock["per_row"] = 2.0  # a second row costs as much as two steps
    engine.generate_result(prompt, params)
    dear = engine.generate_result(prompt, params)
    assert cheap.usage.accepted_tokens > 20
    assert dear.usage.drafted_tokens < 0.2 * cheap.usage.drafted_tokens
    assert dear.token_ids == cheap.token_ids
