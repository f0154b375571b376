"""Barriers: enough of them, and none too many. Random dispatch lists are checked by brute force."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from vkllm.schedule import Barrier, Dispatch, Touch, cut, order, unordered_hazards


@dataclass(frozen=True)
class FakeBinding:
    access: str


@dataclass(frozen=True)
class FakeKernel:
    bindings: tuple[FakeBinding, ...]


def dispatch(uses: dict[str, str], cost_us: float = 10.0) -> Dispatch:
    """A dispatch that uses buffers as {name: access}."""
    kernel = FakeKernel(tuple(FakeBinding(access) for access in uses.values()))
    return Dispatch("op", kernel, tuple(uses), b"", (1, 1, 1), cost_us)  # type: ignore[arg-type]


uses = st.dictionaries(st.sampled_from("abcde"), st.sampled_from(["read", "write", "readwrite"]), min_size=1, max_size=4)
lists = st.lists(uses.map(dispatch), min_size=1, max_size=20)


def touches(step: object) -> list[Touch]:
    assert isinstance(step, Dispatch)
    return [Touch(ord(n), 0, 4, b.access) for n, b in zip(step.buffers, step.kernel.bindings, strict=True)]


def hazards(steps: list[object]) -> list[tuple[int, int]]:
    return unordered_hazards(steps, lambda s: isinstance(s, Barrier), touches)


@given(lists)
def test_no_hazard_is_left(dispatches: list[Dispatch]) -> None:
    steps = order(dispatches)
    assert [s for s in steps if isinstance(s, Dispatch)] == dispatches
    assert hazards(list(steps)) == []


@given(lists)
def test_every_barrier_is_needed(dispatches: list[Dispatch]) -> None:
    steps = order(dispatches)
    inner = [i for i, s in enumerate(steps[:-1]) if isinstance(s, Barrier)]
    for i in inner:
        assert hazards([*steps[:i], *steps[i + 1 :]])


def test_reads_need_no_barrier() -> None:
    steps = order([dispatch({"a": "read", "b": "write"}), dispatch({"a": "read", "c": "write"})])
    assert [type(s) for s in steps] == [Dispatch, Dispatch, Barrier]


def test_ranges_that_do_not_overlap_do_not_conflict() -> None:
    assert not Touch(1, 0, 16, "write").conflicts(Touch(1, 16, 32, "read"))
    assert Touch(1, 0, 17, "write").conflicts(Touch(1, 16, 32, "read"))
    assert not Touch(1, 0, 16, "read").conflicts(Touch(1, 0, 16, "read"))


@given(lists, st.floats(1.0, 200.0))
def test_cuts_keep_the_order_and_the_limit(dispatches: list[Dispatch], limit_us: float) -> None:
    steps = order(dispatches)
    runs = cut(steps, limit_us)
    assert [s for run in runs for s in run] == list(steps)
    for run in runs:
        assert isinstance(run[-1], Barrier)
        n_group = sum(isinstance(s, Barrier) for s in run)
        assert n_group == 1 or sum(s.cost_us for s in run if isinstance(s, Dispatch)) <= limit_us
