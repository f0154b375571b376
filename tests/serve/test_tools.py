"""Calls in a text, in every style and however it is cut; which style a model has; conversations for templates without tools."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="llguidance is not installed")

from vkllm.serve.tools import HERMES, CallFinder, CallStyle, call_schema, style_of, told

MISTRAL, LLAMA = CallStyle("[TOOL_CALLS]"), CallStyle(None)
F = '{"name": "f", "arguments": {"x": 1}}'
CALL = f"<tool_call>\n{F}\n</tool_call>"
UNKNOWN = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
LIST = '{"name": ["f"], "arguments": {}}'
CASES = [  # style, text, its content, the number of calls in it
    (HERMES, f"Well, {CALL}\n{CALL}", "Well, ", 2),
    (HERMES, CALL, "", 1),
    (HERMES, f"<tool_call>{F}", "", 1),  # the end mark is missing
    (HERMES, f"{CALL} and {UNKNOWN}", f" and {UNKNOWN}", 1),
    (HERMES, "No <tool> here", "No <tool> here", 0),
    (HERMES, f"I {UNKNOWN}", f"I {UNKNOWN}", 0),
    (HERMES, f"<tool_call>{LIST}</tool_call>", f"<tool_call>{LIST}</tool_call>", 0),
    (HERMES, "cut <tool_call>{", "cut <tool_call>{", 0),
    (HERMES, "ends <tool", "ends <tool", 0),
    (HERMES, F, F, 0),
    (MISTRAL, f"[TOOL_CALLS] [{F}, {F}]", "", 2),
    (MISTRAL, f"Now [TOOL_CALLS]{F}", "Now ", 1),
    (MISTRAL, '[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]f[CALL_ID]a1b2[ARGS]{"x": 1}', "", 2),
    (MISTRAL, '[TOOL_CALLS]f{"x": 1}', "", 1),
    (MISTRAL, "[TOOL_CALLS] [{", "[TOOL_CALLS] [{", 0),
    (MISTRAL, "A list [1] of [TOOL", "A list [1] of [TOOL", 0),
    (LLAMA, '{"name": "f", "parameters": {"x": 1}}', "", 1),
    (LLAMA, '<|python_tag|>{"type": "function", "name": "f", "parameters": {"x": 1}}', "", 1),
    (LLAMA, '\n{"name": "f", "parameters": {"x": 1}}; {"name": "f", "parameters": {"x": 1}}', "", 2),
    (LLAMA, '{"name": "g", "parameters": {}}', '{"name": "g", "parameters": {}}', 0),
    (LLAMA, '{"name": "f", "parameters": {"x": 1}} it is', '{"name": "f", "parameters": {"x": 1}} it is', 0),
    (LLAMA, "<|python_tag|>print(1)", "print(1)", 0),
    (LLAMA, '{"a": 1}', '{"a": 1}', 0),
    (LLAMA, f"Hello {F}", f"Hello {F}", 0),
    (LLAMA, "{" * 5000, "{" * 5000, 0),
]


@pytest.mark.parametrize("size", [1, 3, 10_000])
@pytest.mark.parametrize(("style", "text", "content", "n_call"), CASES)
def test_calls_are_found_however_the_text_is_cut(style: CallStyle, text: str, content: str, n_call: int, size: int) -> None:
    finder = CallFinder(frozenset({"f"}), style=style)
    parts = [*(finder.push(text[i : i + size]) for i in range(0, len(text), size)), finder.finish()]
    calls = [call for _, found in parts for call in found]
    assert ("".join(said for said, _ in parts), len(calls)) == (content, n_call)
    assert all(c["function"] == {"name": "f", "arguments": '{"x": 1}'} for c in calls)
    assert len({c["id"] for c in calls}) == n_call


def test_text_and_calls_stream_as_soon_as_they_are_certain() -> None:
    finder = CallFinder(frozenset({"f"}))
    assert [finder.push("Well <to"), finder.push("morrow>")] == [("Well ", []), ("<tomorrow>", [])]
    content, calls = finder.push(f"!{CALL} <")
    assert content == "!" and len(calls) == 1, "a call comes with its end mark, not with the end of the reply"
    assert CallFinder(frozenset({"f"}), style=LLAMA).push("Hello") == ("Hello", [])


def test_a_required_call_is_the_whole_text() -> None:
    whole, cut = (CallFinder(frozenset({"f"}), required=True, style=MISTRAL) for _ in range(2))
    assert whole.push(F) == ("", [])
    content, [call] = whole.finish()
    assert content == "" and json.loads(call["function"]["arguments"]) == {"x": 1}
    assert cut.push(F[:-3]) == ("", []) and cut.finish() == (F[:-3], []), "cut off by max_tokens: no call"
    assert call_schema([{"function": {"name": "f"}}])["properties"]["name"] == {"const": "f"}


class Vocabulary:
    """As much of a tokenizer as a style depends on."""

    def __init__(self, template: str, *control: str) -> None:
        self.chat_template, self._control = template, control

    def encode(self, text: str, **_: Any) -> list[int]:
        return [self._control.index(text)] if text in self._control else [100, 101]

    def is_special(self, token_id: int) -> bool:
        return token_id < 100


@pytest.mark.parametrize(
    ("template", "control", "style"),
    [
        ("{{ tools }} <tool_call>", ("<|im_end|>",), HERMES),
        ("{{ messages }}", ("[TOOL_CALLS]",), HERMES),  # it is told by us how to call
        ("{{ tools }} [TOOL_CALLS]", ("[INST]", "[TOOL_CALLS]", "[ARGS]"), CallStyle("[TOOL_CALLS]", None, frozenset({1, 2}))),
        ('{{ tools }} "ipython" {"name": …}', ("<|python_tag|>",), CallStyle(None, None, frozenset({0}))),
        ("{{ tools }} ipython", (), CallStyle(None)),
        ("{{ tools }} something else", (), HERMES),
    ],
)
def test_template_and_vocabulary_tell_the_style(template: str, control: tuple[str, ...], style: CallStyle) -> None:
    assert style_of(Vocabulary(template, *control)) == style  # type: ignore[arg-type]


def test_a_template_without_tools_is_told() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "ok"},
    ]
    system, _, said, result = told(messages, tools)
    assert system["role"] == "system" and '{"name": "f"}' in system["content"]
    assert '<tool_call>{"name": "...", "arguments": {...}}</tool_call>' in system["content"]
    assert said["content"] == '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>' and "tool_calls" not in said
    assert result["role"] == "user" and "ok" in result["content"]
