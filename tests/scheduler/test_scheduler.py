"""The scheduler and the block pool: whatever arrives, nothing leaks, nobody starves, and equal beginnings are shared."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vkllm.errors import CacheFullError
from vkllm.kv_cache import BlockPool, BlockTable, block_names
from vkllm.scheduler import Scheduler, Sequence

SIZE = 4


def step(scheduler: Scheduler, limit: int | None = None, token: int = 7) -> list[tuple[int, int]]:
    """Run one planned step: (ticket, rows) of every chunk."""
    chunks = scheduler.plan(limit)
    scheduler.computed(chunks)
    for c in chunks:
        if c.samples:
            scheduler.append(c.sequence, token)
    return [(c.sequence.ticket, c.n_token) for c in chunks]


class Machine(RuleBasedStateMachine):
    """Random arrivals, steps with random limits, ends and losses of the cache, beside a model of who owns and wrote what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, SIZE)
        self.scheduler = Scheduler(self.pool, n_row=8, n_seq=4, n_mixed=3)
        self.goals: dict[Sequence, int] = {}
        self.slots: dict[int, tuple[int, ...]] = {}  # what was written to each slot: all tokens up to it

    @rule(common=st.integers(0, 16), own=st.lists(st.integers(0, 2), min_size=1, max_size=12), n=st.integers(1, 8))
    def arrive(self, common: int, own: list[int], n: int) -> None:
        ids = [5] * common + own
        if len(ids) + n > self.scheduler.n_token_max:
            with pytest.raises(CacheFullError):
                self.scheduler.add([1] * 33)
            return
        self.goals[self.scheduler.add(ids)] = len(ids) + n

    @precondition(lambda self: self.goals)
    @rule(limit=st.none() | st.integers(1, 8))
    def step(self, limit: int | None) -> None:
        chunks = self.scheduler.plan(limit)
        assert chunks, "something can always run"
        assert sum(c.n_token for c in chunks) <= (limit or 8)
        assert len({c.sequence for c in chunks}) == len(chunks) <= 4
        decoding = [c for c in chunks if c.n_token == 1 and c.samples]
        assert not decoding or sum(c.n_token for c in chunks if c not in decoding) <= 3
        for c in chunks:
            ids = c.sequence.token_ids
            for p in range(c.start, c.start + c.n_token):
                self.slots[c.sequence.table.slot(p)] = tuple(ids[: p + 1])
        for c in chunks:  # a step reads what it and earlier ones wrote: nobody else's tokens
            for p in range(c.start + c.n_token):
                assert self.slots[c.sequence.table.slot(p)] == tuple(c.sequence.token_ids[: p + 1])
        self.scheduler.computed(chunks)
        for c in chunks:
            if c.samples:
                self.scheduler.append(c.sequence, len(c.sequence.token_ids) % 3)
                if len(c.sequence.token_ids) == self.goals[c.sequence]:
                    self.scheduler.remove(c.sequence)
                    del self.goals[c.sequence]

    @precondition(lambda self: self.goals)
    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        sequence = list(self.goals)[which % len(self.goals)]
        self.scheduler.remove(sequence)
        assert not sequence.table.blocks
        del self.goals[sequence]

    @rule()
    def lose_the_cache(self) -> None:
        self.scheduler.restart()
        self.slots.clear()

    @invariant()
    def every_block_has_its_owners(self) -> None:
        owners = Counter(block for s in self.goals for block in s.table.blocks)
        pool = self.pool
        assert [owners[b] for b in range(pool.n_block)] == pool._n_owner
        unowned = [*pool._free, *pool._idle]
        assert sorted(unowned) == [b for b in range(pool.n_block) if not owners[b]], "leaked, or owned and free"
        for s in self.goals:
            full = s.n_computed // SIZE
            assert all(owners[b] == 1 for b in s.table.blocks[full:]), "a block that is still written is shared"

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.goals:
                break
            self.step(None)
        assert not self.goals, "all finish"
        assert self.pool.n_free == self.pool.n_block


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase


def test_names_depend_on_all_tokens_before() -> None:
    a, b = block_names([1, 2, 3, 4, 5, 6, 7, 8, 9], SIZE), block_names([0, 2, 3, 4, 5, 6, 7, 8], SIZE)
    assert len(a) == 2 and a[1] != b[1]
    assert block_names([1, 2, 3, 4, 5, 6, 7, 8], SIZE, a[:1]) == a


def test_least_recently_used_blocks_go_first() -> None:
    pool, tables = BlockPool(3, SIZE), [BlockTable(SIZE) for _ in range(3)]
    names = block_names(range(12), SIZE)
    for table, name in zip(tables, names, strict=True):
        pool.extend(table, SIZE)
        pool.publish(table.blocks[0], name)
    for table in (tables[1], tables[0], tables[2]):
        pool.free(table)
    again = BlockTable(SIZE)
    pool.share(again, pool.find(names[:1]))
    pool.free(again)  # block 0 was used last
    pool.extend(again, 2 * SIZE)
    assert [bool(pool.find([n])) for n in names] == [True, False, False]


def test_a_second_prompt_with_the_same_beginning_skips_it() -> None:
    scheduler = Scheduler(BlockPool(16, SIZE), n_row=16, n_seq=4)
    first = scheduler.add([*range(9), 1])
    twin = scheduler.add([*range(9), 2])
    assert step(scheduler) == [(0, 10)]  # the twin waits for the blocks that are being computed
    assert step(scheduler) == [(0, 1), (1, 2)]
    assert (first.n_cached, twin.n_cached) == (0, 8)
    assert first.table.blocks[:2] == twin.table.blocks[:2]
    scheduler.remove(first)
    scheduler.remove(twin)
    late = scheduler.add([*range(8)])
    assert step(scheduler) == [(2, 4)]  # never all of a prompt: its last row gives the logits
    assert late.n_cached == 4


def test_prompts_are_bounded_beside_running_streams_and_short_ones_are_not_held_up() -> None:
    scheduler = Scheduler(BlockPool(64, SIZE), n_row=16, n_seq=4, n_mixed=8)
    scheduler.add([1])
    step(scheduler)
    scheduler.add([2] * 50)
    scheduler.add([3] * 6)
    assert step(scheduler) == [(0, 1), (1, 4), (2, 4)]
    assert step(scheduler) == [(0, 1), (1, 6), (2, 2)]
    assert step(scheduler) == [(0, 1), (2, 1), (1, 8)]


def test_the_youngest_gives_way_and_loses_nothing() -> None:
    scheduler = Scheduler(BlockPool(5, SIZE), n_row=16, n_seq=2)
    old, young = scheduler.add([1] * 6), scheduler.add([2] * 6)
    while not young.n_preempted:
        step(scheduler)
        assert len(old.token_ids) < 20
    kept = list(young.token_ids)
    assert young in scheduler.waiting and not young.table.blocks
    scheduler.remove(old)
    step(scheduler)
    assert young.token_ids[: len(kept)] == kept and len(young.token_ids) == len(kept) + 1


def test_a_limit_of_one_row_serves_everybody() -> None:
    scheduler = Scheduler(BlockPool(64, SIZE), n_row=8, n_seq=4)
    for i in range(3):
        scheduler.add([i] * 3)
    served = Counter(ticket for _ in range(60) for ticket, _ in step(scheduler, limit=1))
    assert min(served.values()) >= 15
