"""Speculation in the batch engine: drafts, right and wrong ones, change no token of any stream, and nothing false is shared."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import pytest
from test_batching import Alternate

from vkllm import LLMEngine, RuntimeConfig, SamplingParams
from vkllm.batching import BatchEngine
from vkllm.chain import Output, Rows
from vkllm.config import Speculate
from vkllm.errors import NonFiniteError, OutOfDeviceMemoryError
from vkllm.kv_cache import BlockPool
from vkllm.scheduler import Scheduler
from vkllm.speculation import DraftPlanner, Speculator
from vkllm.vk import list_devices

GREEDY = SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)
PARAMS = [
    GREEDY,
    replace(GREEDY, temperature=0.6, seed=3),
    replace(GREEDY, temperature=0.9, seed=4, repetition_penalty=1.1, logprobs=2),
    replace(GREEDY, repetition_penalty=0.5, penalty_last_n=-1),
]
PROMPTS = ["Once upon a time there was a small dog", "The cat", "One day", "A girl and a boy went to the river"]


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    if not list_devices():
        pytest.skip("no Vulkan device: install mesa-vulkan-drivers")
    with LLMEngine.init_model("tiny", RuntimeConfig(n_ctx=256, n_seq=4, block_size=8)) as engine:
        yield engine


def plan(engine: LLMEngine, mode: Speculate) -> None:
    engine.planner = DraftPlanner(mode, engine.chain.capacity)


class Guesses(Speculator):
    """Drafts from the tokens that come without speculation, with mistakes."""

    known: ClassVar[list[list[int]]] = []

    def __init__(self, token_ids: list[int]) -> None:
        super().__init__([])
        self.coming = next(k for k in self.known if k[: len(token_ids)] == token_ids)
        self.n, self.dice = len(token_ids), random.Random(len(token_ids))

    @property
    def chance(self) -> float:
        return 0.9

    def draft(self, n: int) -> list[int]:
        return [t if self.dice.random() < 0.8 else 9 for t in self.coming[self.n : self.n + n]]

    def push(self, token_id: int) -> None:
        self.n += 1


@pytest.fixture
def expected(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The tokens of each prompt with its parameters, alone and without speculation; guesses know them."""
    plan(engine, "off")
    with BatchEngine(engine) as batch:
        found = [batch.submit(*job).result().token_ids for job in zip(PROMPTS, PARAMS, strict=True)]
    Guesses.known = [[*engine.tokenizer.encode(p), *ids] for p, ids in zip(PROMPTS, found, strict=True)]
    monkeypatch.setattr("vkllm.batching.Speculator", Guesses)
    return found


@pytest.mark.parametrize(("n", "n_block"), [(1, None), (3, None), (7, None), (3, 12)])  # 12 blocks: streams give way
def test_tokens_equal_those_without(engine: LLMEngine, expected: list[tuple[int, ...]], n: int, n_block: int | None) -> None:
    plan(engine, n)
    with BatchEngine(engine, n_block=n_block) as batch:
        alone = batch.submit(PROMPTS[0], PARAMS[0]).result()
        handles = [batch.submit(*job) for job in zip(PROMPTS, PARAMS, strict=True)]
        results = [h.result() for h in handles]
        assert [r.token_ids for r in results] == expected
        assert alone.token_ids == expected[0] and 0 < alone.usage.accepted_tokens < alone.usage.drafted_tokens
        usages = [alone.usage, *(r.usage for r in results)]
        assert batch.stats.accepted_tokens == sum(u.accepted_tokens for u in usages)
        assert batch.stats.drafted_tokens == sum(u.drafted_tokens for u in usages)
        assert batch.stats.completion_tokens == sum(u.completion_tokens for u in usages)
        assert batch.pool.n_free == batch.pool.n_block
        if n_block:
            assert batch.stats.n_preempted > 0


def test_what_is_shared_afterwards_is_true(engine: LLMEngine, expected: list[tuple[int, ...]]) -> None:
    """A later prompt that begins with the completion finds its blocks, and none with a rejected token."""
    plan(engine, 7)
    prompt = [*engine.tokenizer.encode(PROMPTS[0]), *expected[0]]
    with BatchEngine(engine) as batch:
        batch.submit(PROMPTS[0], PARAMS[0]).result()
        plan(engine, "off")
        again = batch.submit(prompt, GREEDY).result()
        assert again.usage.cached_tokens >= (len(prompt) - 9) // 8 * 8
        batch.pool.forget()
        assert batch.submit(prompt, GREEDY).result().token_ids == again.token_ids


def test_auto_changes_nothing_and_stays_off_for_many(engine: LLMEngine, expected: list[tuple[int, ...]]) -> None:
    plan(engine, "auto")
    engine.planner.costs.ratio = lambda n_row, n_base: 1.0  # type: ignore[method-assign]
    with BatchEngine(engine) as batch:
        assert batch.submit(PROMPTS[0], PARAMS[0]).result().token_ids == expected[0]
        drafted = batch.stats.drafted_tokens
        assert [h.result().token_ids for h in [batch.submit(*job) for job in zip(PROMPTS, PARAMS, strict=True)]] == expected
    assert drafted > 0 or engine.planner.n_row == 1


@pytest.mark.parametrize("error", [NonFiniteError("NaN", layer="x"), OutOfDeviceMemoryError("full")], ids=["nan", "memory"])
def test_a_step_that_fails_with_drafts_runs_without(
    engine: LLMEngine, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    forward, failed = engine.chain.forward, [0]

    def fragile(rows: Rows) -> Output:
        if len(rows.output_rows) > 1:
            failed[0] += 1
            raise error
        return forward(rows)

    plan(engine, 3)
    monkeypatch.setattr(engine.chain, "forward", fragile)
    with BatchEngine(engine) as batch:
        assert batch.submit(PROMPTS[0], PARAMS[0]).result().token_ids == expected[0]
        assert failed[0] > 0 and batch.stats.accepted_tokens == 0
        assert batch.scheduler.n_row == engine.chain.capacity


def test_a_constrained_request_is_not_drafted_for(engine: LLMEngine) -> None:
    plan(engine, 3)
    with BatchEngine(engine) as batch:
        result = batch.submit([40, 50] * 6, GREEDY, constraint=Alternate()).result()
    assert (result.token_ids, result.usage.drafted_tokens) == ((40, 50) * 3, 0)


def test_rows_of_drafts_count_against_a_pacers_limit(engine: LLMEngine, expected: list[tuple[int, ...]]) -> None:
    class Pacer:
        batch_limit = 2
        retry_after_s = 1.0

        def pace(self, busy_s: float) -> float:
            return 0.0

    plan(engine, 7)
    with BatchEngine(engine, pacer=Pacer()) as batch:
        assert batch.submit(PROMPTS[0], PARAMS[0]).result().token_ids == expected[0]
        assert batch.stats.drafted_tokens > 0 and batch.stats.rows <= 2 * batch.stats.steps


def test_places_are_reserved_only_where_nobody_else_needs_them() -> None:
    scheduler = Scheduler(BlockPool(4, 8), n_row=8, n_seq=2)
    sequence = scheduler.add(range(7))
    scheduler.computed(scheduler.plan())
    scheduler.append(sequence, 7)
    scheduler.plan()
    assert scheduler.reserve(sequence, 0) == 0
    assert scheduler.reserve(sequence, 8) == 8  # position 7 is the step's own: a second block
    assert scheduler.reserve(sequence, 24) == 8  # that would take all
    assert scheduler.reserve(sequence, 16) == 16
    assert scheduler.pool.n_free == 1
    scheduler.remove(sequence)
    assert scheduler.pool.n_free == 4
