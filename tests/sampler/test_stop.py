"""Stop strings: a stream in any pieces ends where the whole text would."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from vkllm.sampler import StopMatcher


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the stop string that is complete first; of several that end there, the longest."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    pieces=st.lists(st.text("ab\n", max_size=5)), stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3).map(tuple)
)
@example(pieces=["aab"], stops=("ab",))
@example(pieces=["ab", "ab", "aba"], stops=("ababa",))
@example(pieces=["abcd"], stops=("abcd", "bc"))
@example(pieces=["xab"], stops=("xab", "ab"))
def test_equals_cutting_the_whole_text(pieces: list[str], stops: tuple[str, ...]) -> None:
    matcher, seen, text = StopMatcher(stops), "", ""
    for piece in pieces:
        text += piece
        emitted, stopped = matcher.push(piece)
        seen += emitted
        expected, expected_stop = cut(text, stops)
        assert stopped == matcher.stopped == expected_stop
        assert expected.startswith(seen)
        if not stopped:  # never more withheld than could begin a stop string
            held = text[len(seen) :]
            assert not held or any(s.startswith(held) for s in stops)
    seen += matcher.finish()
    assert (seen, matcher.stopped) == cut(text, stops)


def test_without_stop_strings_nothing_is_withheld() -> None:
    matcher = StopMatcher()
    assert matcher.push("hello") == ("hello", False)
    assert matcher.finish() == ""


def test_after_the_stop_nothing_comes() -> None:
    matcher = StopMatcher(("END",))
    assert matcher.push("one E") == ("one ", False)
    assert matcher.push("ND two") == ("E"[:0], True)
    assert matcher.push("three") == ("", True)
    assert matcher.finish() == ""
