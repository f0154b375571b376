"""The batch engine on a real model: in any mix, each request gets the tokens that it gets alone, and gives all blocks back."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from vkllm import LLMEngine, RuntimeConfig, SamplingParams
from vkllm.batching import BatchEngine, CancelledRequestError, Handle
from vkllm.chain import Output, Rows
from vkllm.errors import CapacityError, ContextTooLongError, DeviceLostError, NonFiniteError, RequestError, ThermalLimitError
from vkllm.vk import list_devices

TEXT = "Once upon a time there was a small dog who lived near the river. One day it met a cat, and they went to the hills. " * 3
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
ALONE = RuntimeConfig(n_ctx=256, prefill_chunk=32)
MANY = replace(ALONE, n_seq=6)


@pytest.fixture(scope="module")
def single() -> Iterator[LLMEngine]:
    if not list_devices():
        pytest.skip("no Vulkan device: install mesa-vulkan-drivers")
    with LLMEngine.init_model("tiny", ALONE) as engine:
        yield engine


@pytest.fixture(scope="module")
def engine(single: LLMEngine) -> Iterator[LLMEngine]:
    with LLMEngine.init_model("tiny", MANY) as engine:
        yield engine


@pytest.fixture
def batch(engine: LLMEngine) -> Iterator[BatchEngine]:
    with BatchEngine(engine) as batch:
        yield batch
    assert batch.pool.n_free == batch.pool.n_block, "blocks leaked"
    assert not batch.scheduler.running and not batch.scheduler.waiting


def quiet(batch: BatchEngine) -> None:
    """Wait until nothing runs."""
    for _ in range(500):
        if not batch.stats.n_running and not batch.stats.n_waiting:
            return
        time.sleep(0.01)
    raise AssertionError("something still runs")


@pytest.mark.parametrize(("n_block", "pause_s"), [(None, 0.05), (7, 0.0)])  # 7 blocks of 32: sequences must give way
def test_tokens_equal_those_of_single_runs(single: LLMEngine, engine: LLMEngine, n_block: int | None, pause_s: float) -> None:
    dice = random.Random(7)
    ids = single.tokenizer.encode(TEXT)
    jobs = [(ids[(a := dice.choice((0, 0, 5, 20))) : a + dice.randint(1, 100)], dice.randint(1, 60)) for _ in range(20)]
    with BatchEngine(engine, n_block=n_block) as batch:
        handles: list[tuple[Handle, list[int], int, bool]] = []
        for prompt, n in jobs:
            handle = batch.submit(prompt, SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True))
            cancelled = dice.random() < 0.25
            if cancelled:
                threading.Timer(dice.random() * 0.3, handle.cancel).start()
            handles.append((handle, prompt, n, cancelled))
            time.sleep(dice.random() * pause_s)
        for handle, prompt, n, cancelled in handles:
            found: list[int] = []
            for event in handle.events():
                found += event.token_ids
            expected = single.generate_result(prompt, SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True))
            if cancelled and event.error is not None:
                assert isinstance(event.error, CancelledRequestError)
                assert tuple(found) == expected.token_ids[: len(found)]
                continue
            assert event.result is not None
            assert event.result.token_ids == tuple(found) == expected.token_ids
            assert event.result.text == expected.text
            assert event.result.usage.prompt_tokens == len(prompt)
        quiet(batch)
        assert batch.pool.n_free == batch.pool.n_block


def test_in_int8_tokens_equal_those_of_single_runs(single: LLMEngine) -> None:
    """Rows share the words of a record in pairs, and only some of them have logits."""
    ids = single.tokenizer.encode(TEXT)
    prompts, runtime = [ids[a:b] for a, b in ((0, 50), (3, 4), (7, 40), (1, 34), (11, 30))], replace(MANY, activations="int8")
    with LLMEngine.init_model("tiny", replace(ALONE, activations="int8")) as alone:
        expected = [alone.generate_result(prompt, GREEDY).token_ids for prompt in prompts]
    with LLMEngine.init_model("tiny", runtime) as engine, BatchEngine(engine) as batch:
        handles = [batch.submit(prompt, GREEDY) for prompt in prompts]
        assert [handle.result().token_ids for handle in handles] == expected


def test_preempted_sequences_lose_nothing(single: LLMEngine, engine: LLMEngine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    with BatchEngine(engine, n_block=6) as batch:  # three streams of four blocks each
        handles = [batch.submit(prompt, params) for prompt in ("Once", "The dog", "A small cat")]
        found = [h.result().token_ids for h in handles]
        assert batch.stats.n_preempted > 0
    assert found == [single.generate_result(p, params).token_ids for p in ("Once", "The dog", "A small cat")]


def test_a_second_prompt_finds_the_first_in_the_cache(batch: BatchEngine, single: LLMEngine) -> None:
    ids = single.tokenizer.encode(TEXT)[:90]
    first, second = batch.submit(ids, GREEDY).result(), batch.submit(ids, GREEDY).result()
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 64)
    assert first.token_ids == second.token_ids == single.generate_result(ids, GREEDY).token_ids


def test_seeded_sampling_logprobs_and_stop_strings(batch: BatchEngine, single: LLMEngine) -> None:
    params = SamplingParams(seed=3, max_tokens=20, temperature=0.7, repetition_penalty=1.2)
    handles = [batch.submit("The little dog", params) for _ in range(3)]
    assert {h.result().text for h in handles} == {single.generate("The little dog", params)}
    text = single.generate("Once upon a time", GREEDY)
    stopped = batch.submit("Once upon a time", replace(GREEDY, stop=(text[10:13],))).result()
    assert (stopped.text, stopped.finish_reason) == (text[: text.find(text[10:13])], "stop")
    events = list(batch.submit("Once upon a time", replace(GREEDY, logprobs=2)).events())
    values = [v for e in events for v in e.logprobs]
    assert len(values) == 12 and all(v.top[0] == (v.token_id, v.logprob) and v.logprob <= 0 for v in values)


class Alternate:
    """A constraint: tokens 40 and 50 in turn, six of them."""

    def __init__(self) -> None:
        self.n = 0

    def allowed(self) -> NDArray[np.bool_]:
        mask = np.zeros(2048, np.bool_)
        mask[50 if self.n % 2 else 40] = True
        return mask

    def accept(self, token_id: int) -> bool:
        self.n += 1
        return self.n < 6


def test_a_constraint_decides(batch: BatchEngine) -> None:
    for temperature in (0.0, 1.0):
        result = batch.submit("Hi", SamplingParams(temperature=temperature), constraint=Alternate()).result()
        assert (result.token_ids, result.finish_reason) == ((40, 50) * 3, "stop")


def test_refusals(batch: BatchEngine, engine: LLMEngine) -> None:
    with pytest.raises(RequestError):
        batch.submit([])
    with pytest.raises(ContextTooLongError):
        batch.submit([1] * 257)
    assert batch.submit([1] * 256).result().finish_reason == "length"  # no room for a token
    with pytest.raises(RequestError):
        batch.submit("Hi", SamplingParams(logit_bias={5000: 1.0})).result()
    quiet(batch)
    with BatchEngine(engine, n_queue=0) as narrow:
        handles = [narrow.submit("Once", SamplingParams(max_tokens=100, ignore_eos=True)) for _ in range(6)]
        with pytest.raises(CapacityError):
            narrow.submit("Hi")
    assert all(isinstance([*h.events()][-1].error, CancelledRequestError) for h in handles)  # closed meanwhile
    with pytest.raises(CapacityError):
        narrow.submit("Hi")


def test_only_the_sequence_with_bad_numbers_ends(batch: BatchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = batch.engine.chain.forward

    def broken(rows: Rows) -> Output:
        if ((rows.token_ids == 13) & (rows.positions == 2)).any():
            raise NonFiniteError("blk.0.ffn_up produced NaN", layer="blk.0.ffn_up")
        return forward(rows)

    monkeypatch.setattr(batch.engine.chain, "forward", broken)
    good, bad = batch.submit([5, 6, 7], GREEDY), batch.submit([5, 6, 13], GREEDY)
    with pytest.raises(NonFiniteError):
        bad.result()
    assert good.result().finish_reason in ("stop", "length")


def test_a_lost_device_is_told_to_everybody(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = threading.Event()

    def lost(rows: Rows) -> Output:
        submitted.wait(10.0)
        raise DeviceLostError("the device was lost")

    with BatchEngine(engine) as batch:
        monkeypatch.setattr(engine.chain, "forward", lost)
        handles = [batch.submit("Hi") for _ in range(3)]
        submitted.set()
        for handle in handles:
            with pytest.raises((DeviceLostError, CapacityError)):
                handle.result()
        with pytest.raises(CapacityError):
            batch.submit("Hi")
        assert batch.pool.n_free == batch.pool.n_block


class SlowPacer:
    """Two rows a step, and rests."""

    batch_limit = 2
    retry_after_s = 7.0

    def __init__(self) -> None:
        self.busy: list[float] = []

    def pace(self, busy_s: float) -> float:
        self.busy.append(busy_s)
        return 0.02


def test_a_pacer_limits_rows_and_makes_the_device_rest(engine: LLMEngine, single: LLMEngine) -> None:
    pacer = SlowPacer()
    with BatchEngine(engine, pacer=pacer) as batch:
        texts = [h.result().text for h in [batch.submit(f"Once upon {i}", replace(GREEDY, max_tokens=4)) for i in "abc"]]
        assert batch.stats.rows <= 2 * batch.stats.steps
    assert texts == [single.generate(f"Once upon {i}", replace(GREEDY, max_tokens=4)) for i in "abc"]
    assert batch.stats.rest_s >= 0.019 * len(pacer.busy) > 0


def test_a_tripped_pacer_stops_the_device_and_refuses_work_until_it_recovers(engine: LLMEngine, single: LLMEngine) -> None:
    pacer = SlowPacer()
    with BatchEngine(engine, pacer=pacer) as batch:
        handle = batch.submit("Once upon a time", GREEDY)
        events = handle.events()
        ids = [*next(events).token_ids]
        pacer.batch_limit = 0
        time.sleep(0.2)
        steps = batch.stats.steps
        time.sleep(0.1)
        assert batch.stats.steps == steps
        with pytest.raises(ThermalLimitError) as refused:
            batch.submit("Hi")
        assert refused.value.retry_after_s == 7.0
        pacer.batch_limit = 2
        ids += [i for e in events for i in e.token_ids]
    assert tuple(ids) == single.generate_result("Once upon a time", GREEDY).token_ids


def test_a_lost_device_is_opened_again_and_nothing_is_lost(single: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["Once upon a time", "The dog", "A small cat"]
    with LLMEngine.init_model("tiny", MANY) as engine:
        forward, steps = engine.chain.forward, iter(range(1000))

        def lost(rows: Rows) -> Output:
            if next(steps) == 5:
                raise DeviceLostError("the device was lost")
            return forward(rows)

        monkeypatch.setattr(engine.chain, "forward", lost)
        with BatchEngine(engine, revive=True) as batch:
            found = [h.result().token_ids for h in [batch.submit(p, GREEDY) for p in prompts]]
            assert batch.stats.n_revived == 1 and batch.failure is None
            assert batch.submit("Hi", GREEDY).result().finish_reason in ("stop", "length")
            monkeypatch.setattr(batch.engine.chain, "forward", lambda rows: (_ for _ in ()).throw(DeviceLostError("again")))
            monkeypatch.setattr("vkllm.batching.open_device", lambda selector: (_ for _ in ()).throw(DeviceLostError("gone")))
            with pytest.raises(DeviceLostError):
                batch.submit("Hi", GREEDY).result()
            with pytest.raises(CapacityError):
                batch.submit("Hi")
    assert found == [single.generate_result(p, GREEDY).token_ids for p in prompts]


def test_a_small_cache_for_many(single: LLMEngine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompts = [TEXT[: 40 + 30 * i] for i in range(6)]
    with LLMEngine.init_model("tiny", replace(MANY, cache_tokens=250)) as engine, BatchEngine(engine) as batch:
        assert (batch.pool.n_block, batch.n_ctx) == (8, 256)
        found = [h.result().token_ids for h in [batch.submit(p, params) for p in prompts]]
    assert found == [single.generate_result(p, params).token_ids for p in prompts]
