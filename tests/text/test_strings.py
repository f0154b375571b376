"""Strings kept as bytes: they behave as the list that they stand for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vkllm.vocab.strings import Strings, find

TEXTS = st.lists(st.text(st.sampled_from("ab Ġé\udcff"), max_size=4), max_size=20)


@given(TEXTS)
def test_they_are_a_sequence(texts: list[str]) -> None:
    strings = Strings.of(texts)
    assert len(strings) == len(texts)
    assert list(strings) == [strings[i] for i in range(len(texts))] == strings[:] == texts
    assert strings == texts and strings == Strings.of(texts)
    assert strings != [*texts, "a"] and (not texts or strings != [*texts[:-1], "other"])
    assert strings[::-2] == texts[::-2] and (not texts or strings[-1] == texts[-1])


@given(TEXTS, TEXTS)
def test_find(texts: list[str], some: list[str]) -> None:
    wanted = set(some)
    expected = [(i, text) for i, text in enumerate(texts) if text in wanted]
    assert list(find(Strings.of(texts), wanted)) == list(find(texts, wanted)) == expected
