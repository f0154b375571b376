"""The policy of speculation: drafts are what followed before, and are made where they pay."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vkllm.config import MAX_DRAFT, RuntimeConfig, speculate_of
from vkllm.errors import ConfigError
from vkllm.speculation import LONGEST, SUFFIXES, Bid, Chances, DraftPlanner, History, Speculator, StepCosts, size_of

TOKENS = st.lists(st.integers(0, 3), max_size=60)


def last_start(ids: list[int]) -> int | None:
    """By looking everywhere: where what followed the longest suffix last begins."""
    for n in SUFFIXES:
        for start in range(len(ids) - 1, n - 1, -1):
            if ids[start - n : start] == ids[-n:]:
                return start
    return None


def runs(ids: list[int]) -> set[tuple[int, ...]]:
    return {tuple(ids[i : i + n]) for n in SUFFIXES for i in range(len(ids) - n + 1)}


@given(TOKENS)
def test_a_match_is_the_last_occurrence_of_the_longest_suffix(ids: list[int]) -> None:
    history = History(ids)
    assume(len({history.slot(run) for run in runs(ids)}) == len(runs(ids)))
    match = history.match()
    assert (match.start if match else None) == last_start(ids)


@given(TOKENS, st.integers(1, 20), st.sampled_from([1, 3, 64]))
def test_a_match_is_true_however_small_the_table(ids: list[int], n: int, n_slot: int) -> None:
    history = History(ids, n_slot)
    if match := history.match():
        assert 0 < match.start < len(ids) and min(SUFFIXES) <= match.length <= LONGEST
        assert ids[match.start - match.length : match.start] == ids[-match.length :]
        draft = history.draft(match, n)
        assert len(draft) == n and draft[: len(ids) - match.start] == ids[match.start : match.start + n]


def test_a_loop_goes_on() -> None:
    history = History([9, 1, 2, 3, 1, 2, 3])
    match = history.match()
    assert match is not None and history.draft(match, 7) == [1, 2, 3, 1, 2, 3, 1]


@given(st.lists(st.booleans(), max_size=100), st.integers(2, LONGEST))
def test_chances_follow_what_happens(seen: list[bool], length: int) -> None:
    chances = Chances()
    before = chances.of(length)
    for right in seen:
        last = chances.of(length)
        chances.learn(length, right)
        assert 0.0 < chances.of(length) < 1.0
        assert (chances.of(length) >= last - 0.02) if right else (chances.of(length) <= last + 0.02)
    if len(seen) >= 20 and len(set(seen)) == 1:
        assert abs(chances.of(length) - seen[0]) < 0.1
    assert Chances().of(length) == before


def test_a_speculator_learns_also_while_it_drafts_nothing() -> None:
    right, wrong, dice = Speculator([1, 2, 3, 4] * 3), Speculator([1, 2, 3, 4] * 3), random.Random(1)
    before = right.chance
    for i in range(8):
        right.draft(0)
        right.push(1 + i % 4)
    assert right.chance > before
    for i in range(200):
        wrong.draft(i % 3)
        wrong.push(dice.randint(1, 4))
    while not wrong.chance:
        wrong.push(dice.randint(1, 4))
    assert wrong.chance < 0.5


def measured(planner: DraftPlanner, cost: dict[int, float]) -> DraftPlanner:
    """A planner that knows what steps cost, and that all sizes are exact."""
    for n_row, seconds in cost.items():
        planner.costs.observe(n_row, seconds)
        planner.costs.observe(n_row, seconds)
        planner.checked(n_row, True)
    return planner


COSTS = st.lists(st.floats(1.0, 3.0), min_size=4, max_size=4)
BIDS = st.lists(st.builds(Bid, st.floats(0.0, 0.99), st.integers(0, 40)), min_size=1, max_size=5)


@given(COSTS, BIDS, st.integers(1, 20))
def test_the_best_lengths_are_the_best(factors: list[float], bids: list[Bid], limit: int) -> None:
    cost, total = {1: 1.0}, 1.0
    for i, factor in enumerate(factors):
        cost[2 << i] = total = total * factor
    planner = measured(DraftPlanner("auto", 64), cost)
    lengths = planner.lengths(bids, limit)

    def tokens(k: int, bid: Bid) -> float:
        return sum(bid.chance**i for i in range(k + 1))

    def rate(ks: list[int]) -> float:
        return sum(map(tokens, ks, bids)) / cost[min(size_of(len(bids) + sum(ks)), 16)]

    assert all(0 <= k <= bid.room for k, bid in zip(lengths, bids, strict=True))
    assert not sum(lengths) or sum(lengths) + len(bids) <= min(limit, MAX_DRAFT + 1)
    none = [0] * len(bids)
    assert lengths == none or rate(lengths) >= 1.05 * rate(none) * 0.999
    if len(bids) == 1:
        others = range(min(bids[0].room, limit - 1, MAX_DRAFT) + 1)
        assert rate(lengths) >= max(rate([k]) for k in others) / 1.0501


@given(BIDS, st.integers(1, MAX_DRAFT), st.integers(1, 20))
def test_a_fixed_length_keeps_within_room_and_rows(bids: list[Bid], n: int, limit: int) -> None:
    lengths = DraftPlanner(n, 64).lengths(bids, limit)
    assert all(0 <= k <= min(n, b.room) and (k == 0 or b.chance > 0) for k, b in zip(lengths, bids, strict=True))
    assert not sum(lengths) or sum(lengths) + len(bids) <= min(limit, MAX_DRAFT + 1)


def test_off_and_a_single_row_draft_nothing() -> None:
    assert not DraftPlanner("off", 64).on and not DraftPlanner("auto", 1).on
    assert DraftPlanner("off", 64).lengths([Bid(0.99, 100)]) == [0]


def test_an_unchecked_size_is_tried_by_one_sequence_with_much_to_come() -> None:
    planner = DraftPlanner("auto", 64)
    assert planner.lengths([Bid(0.95, 200)]) == [1]  # the smallest first
    assert planner.lengths([Bid(0.95, 10)]) == [0]
    assert planner.lengths([Bid(0.95, 200)] * 2) == [0, 0]
    planner.checked(2, True)
    assert not planner.unchecked(2) and planner.unchecked(4)
    assert planner.lengths([Bid(0.95, 200)]) == [3]
    planner.checked(4, False)
    assert planner.lengths([Bid(0.95, 200)]) == [1]
    assert not DraftPlanner(3, 64).unchecked(4)


def test_costs_are_averages_and_come_back_from_a_bad_time() -> None:
    costs = StepCosts()
    expected = costs.ratio(4, 1)
    costs.observe(4, 100.0)  # the first compiles
    assert costs.ratio(4, 1) == expected
    for n, seconds in ((1, 1.0), (1, 1.0), (3, 9.0)):
        costs.observe(n, seconds)
    assert costs.ratio(4, 1) == 9.0
    costs.observe(4, 900.0)  # a hiccup
    assert 9.0 < costs.ratio(4, 1) < 10.0
    for _ in range(1000):
        costs.observe(1, 1.0)
    assert abs(costs.ratio(4, 1) - expected) < 0.1


@pytest.mark.parametrize("text", ["auto", "off", "1", "15"])
def test_options(text: str) -> None:
    assert str(RuntimeConfig(speculate=speculate_of(text)).speculate) == text


@pytest.mark.parametrize("text", ["on", "0", "16", "-1", "", "1.5"])
def test_options_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="speculate"):
        RuntimeConfig(speculate=speculate_of(text))
