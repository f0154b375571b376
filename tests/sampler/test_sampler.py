"""The sampler against slow, obvious statements of what each option means."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vkllm.errors import NonFiniteError, RequestError
from vkllm.sampler import Sampler, SamplingParams, log_probabilities

OPEN: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
PLAIN = SamplingParams(**OPEN)


def some_logits() -> st.SearchStrategy[np.ndarray[Any, Any]]:
    """Small vectors with many equal values."""
    values = st.integers(-60, 60).map(lambda i: i / 4)
    return st.integers(1, 40).flatmap(lambda n: arrays(np.float32, n, elements=values))


def softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    e = np.exp(x.astype(np.float64) - x.max())
    return np.asarray(e / e.sum())


def ranked(logits: np.ndarray[Any, Any]) -> list[int]:
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


@given(logits=some_logits(), seed=st.integers(0, 1000))
def test_greedy_and_top_1_are_argmax_with_the_lowest_id(logits: np.ndarray[Any, Any], seed: int) -> None:
    best = ranked(logits)[0]
    for params in (SamplingParams(temperature=0.0), SamplingParams(top_k=1, seed=seed), SamplingParams(top_p=1e-9, seed=seed)):
        assert Sampler(params).sample(logits) == best


@given(
    logits=some_logits(),
    k=st.integers(0, 45),
    p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 0.9),
    temperature=st.floats(0.1, 3.0),
)
def test_distribution(logits: np.ndarray[Any, Any], k: int, p: float, min_p: float, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=k, top_p=p, min_p=min_p)
    ids, probabilities = Sampler(params).distribution(logits)
    assert abs(probabilities.sum() - 1) < 1e-9 and (probabilities >= 0).all() and len(set(ids.tolist())) == len(ids)
    kept = set(ids.tolist())
    # Whatever is kept is a head of the ranking.
    order = ranked(logits)
    assert kept == set(order[: len(kept)]) and len(kept) <= (k or len(logits))
    head = order[: k or len(logits)]
    chance = softmax(logits[head])
    inside = sum(1 for c in np.cumsum(chance)[: len(kept) - 1] if c < p - 1e-5)
    assert inside >= len(kept) - 1 - sum(1 for c in np.cumsum(chance) if abs(c - p) <= 1e-5)
    assert all(chance[i] >= min_p * chance[0] * (1 - 1e-5) for i in range(len(kept)))
    if k != 1:
        expected = softmax(logits[ids] / np.float32(temperature))
        np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("p", "kept"), [(0.1, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.999, 4), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_it(p: float, kept: int) -> None:
    logits = np.log(np.array([0.125, 0.5, 0.25, 0.125], np.float32))
    ids, _ = Sampler(SamplingParams(**OPEN | {"top_p": p})).distribution(logits)
    assert sorted(ids.tolist()) == sorted([1, 2, 0, 3][:kept])


def test_min_p() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.24, 0.16], np.float32))
    ids, _ = Sampler(SamplingParams(**OPEN | {"min_p": 0.3})).distribution(logits)
    assert sorted(ids.tolist()) == [1, 2, 3]


def test_a_wide_flat_distribution_is_ranked_in_full() -> None:
    logits = np.zeros(5000, np.float32)
    ids, _ = Sampler(SamplingParams(**OPEN | {"top_p": 0.9})).distribution(logits)
    assert ids.tolist() == list(range(4500))


def test_frequencies_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(SamplingParams(**OPEN, seed=3))
    counts = np.bincount([sampler.sample(logits) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2], atol=0.03)


@given(logits=some_logits(), seed=st.integers(0, 2**63))
@settings(max_examples=30)
def test_same_seed_same_tokens(logits: np.ndarray[Any, Any], seed: int) -> None:
    a, b = (Sampler(SamplingParams(**OPEN, seed=seed)) for _ in range(2))
    before = logits.copy()
    assert [a.sample(logits) for _ in range(8)] == [b.sample(logits) for _ in range(8)]
    assert (logits == before).all()


@given(logits=some_logits(), data=st.data(), greedy=st.booleans())
def test_bias_forces_and_bans(logits: np.ndarray[Any, Any], data: st.DataObject, greedy: bool) -> None:
    token = data.draw(st.integers(0, len(logits) - 1))
    base = OPEN | {"temperature": 0.0 if greedy else 1.0}
    huge = logits * np.float32(1000)
    assert Sampler(SamplingParams(**base, logit_bias={token: 100.0})).sample(huge) == token
    if len(logits) > 1:
        banned = Sampler(SamplingParams(**base, logit_bias={token: -100.0}))
        assert token not in {banned.sample(huge) for _ in range(5)}
        assert token not in banned.distribution(huge)[0]


def test_bias_adds() -> None:
    logits = np.array([1.0, 0.5, 0.0], np.float32)
    assert Sampler(SamplingParams(temperature=0.0, logit_bias={2: 1.5})).sample(logits) == 2


def test_bias_must_name_tokens_and_leave_one() -> None:
    logits = np.zeros(2, np.float32)
    with pytest.raises(RequestError, match="token 2"):
        Sampler(SamplingParams(logit_bias={2: 1.0})).sample(logits)
    with pytest.raises(RequestError, match="every token"):
        Sampler(SamplingParams(logit_bias={0: -100.0, 1: -100.0})).sample(logits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_are_an_error(bad: float, temperature: float) -> None:
    logits = np.zeros(9, np.float32)
    logits[4] = bad
    with pytest.raises(NonFiniteError, match="logit 4"):
        Sampler(SamplingParams(temperature=temperature)).sample(logits)


def penalized(logits: list[float], history: list[int], **options: Any) -> list[float]:
    """Logits after penalties, up to a constant, from the distribution."""
    _, p = Sampler(SamplingParams(**OPEN, **options)).distribution(np.array(logits, np.float32), history)
    return [float(x) for x in np.log(p) - np.log(p[-1])]


def test_penalties() -> None:
    logits, history = [2.0, -2.0, 1.0, 0.0], [0, 1, 1, 99]
    assert penalized(logits, history, repetition_penalty=2.0) == pytest.approx([1.0, -4.0, 1.0, 0.0], abs=1e-5)
    assert penalized(logits, history, presence_penalty=0.5) == pytest.approx([1.5, -2.5, 1.0, 0.0], abs=1e-5)
    assert penalized(logits, history, frequency_penalty=0.5) == pytest.approx([1.5, -3.0, 1.0, 0.0], abs=1e-5)
    assert penalized(logits, history, frequency_penalty=0.5, penalty_last_n=2) == pytest.approx([2.0, -2.5, 1.0, 0.0], abs=1e-5)
    assert penalized(logits, history, frequency_penalty=0.5, penalty_last_n=-1) == pytest.approx([1.5, -3.0, 1.0, 0.0], abs=1e-5)
    assert penalized(logits, history, frequency_penalty=0.5, penalty_last_n=0) == pytest.approx(logits, abs=1e-5)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6, 1e6])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    params = SamplingParams(**OPEN | {"temperature": temperature}, seed=0)
    ids, p = Sampler(params).distribution(np.array([-1e30, 5.0, 4.0, 1e30], np.float32))
    assert np.isfinite(p).all() and p.sum() == pytest.approx(1) and ids[np.argmax(p)] == 3


@pytest.mark.parametrize(
    ("options", "greedy"),
    [
        ({"temperature": 0.0}, True),
        ({"top_k": 1}, True),
        ({}, False),
        ({"temperature": 0.0, "logit_bias": {1: 1.0}}, False),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, False),
        ({"temperature": 0.0, "repetition_penalty": 1.1, "penalty_last_n": 0}, True),
        ({"temperature": 0.0, "logprobs": 3}, False),
    ],
)
def test_is_greedy(options: dict[str, Any], greedy: bool) -> None:
    assert Sampler(SamplingParams(**options)).is_greedy is greedy


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("inf")},
        {"penalty_last_n": -2},
        {"seed": -1},
        {"max_tokens": -1},
        {"stop": "text"},
        {"stop": ("",)},
        {"stop": None},
        {"stop_ids": ("x",)},
        {"stop_ids": (-1,)},
        {"stop_ids": 5},
        {"logit_bias": [5]},
        {"logit_bias": {1: 101.0}},
        {"logit_bias": {-1: 1.0}},
    ],
)
def test_impossible_parameters_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        SamplingParams(**options)


def test_log_probabilities() -> None:
    logits = np.log(np.array([0.25, 0.5, 0.25], np.float32)) + np.float32(3)
    own, top = log_probabilities(logits, 2, 2)
    assert own == pytest.approx(np.log(0.25), abs=1e-6)
    assert [i for i, _ in top] == [1, 0] and top[0][1] == pytest.approx(np.log(0.5), abs=1e-6)
    assert log_probabilities(logits, 0, 0)[1] == []


def test_is_quick_over_a_large_vocabulary() -> None:
    """3 ms on a quiet machine (the best of 20 here, with room for a busy one)."""
    logits = (np.random.default_rng(0).standard_normal(152_000) * 3).astype(np.float32)
    sampler = Sampler(SamplingParams(seed=0, repetition_penalty=1.1))
    times = []
    for _ in range(20):
        started = time.perf_counter()
        sampler.sample(logits, range(1000))
        times.append(time.perf_counter() - started)
    assert min(times) < 0.01
