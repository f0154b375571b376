"""Calls in a text, however it is cut; and conversations for templates that know no tools."""

from __future__ import annotations

import pytest

pytest.importorskip("llguidance", reason="llguidance is not installed")

from vkllm.serve.tools import CallFinder, told

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TEXTS = {
    f"Well, {CALL}\n{CALL}": ("Well, ", 2),
    CALL: ("", 1),
    "No <tool> here": ("No <tool> here", 0),
    'I <tool_call>{"name": "g", "arguments": {}}</tool_call>': ('I <tool_call>{"name": "g", "arguments": {}}</tool_call>', 0),
    "cut <tool_call>{": ("cut <tool_call>{", 0),
    "ends <tool": ("ends <tool", 0),
}


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("text", TEXTS)
def test_calls_are_found_however_the_text_is_cut(text: str, size: int) -> None:
    finder = CallFinder(frozenset({"f"}), required=False)
    content = "".join([finder.push(text[i : i + size]) for i in range(0, len(text), size)])
    rest, calls = finder.finish()
    assert (content + rest, len(calls)) == TEXTS[text]
    assert all(c["function"] == {"name": "f", "arguments": '{"x": 1}'} for c in calls)


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
