"""Tools: told to the model by its template (or by a system message of ours), and calls found in what it says.

A call is written as Hermes and Qwen do: <tool_call>{"name": …, "arguments": {…}}</tool_call>. Where a call is required, a grammar
lets nothing pass but the JSON of a call of a known tool, whose arguments follow the tool's schema.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from vkllm.sampler import StopMatcher

OPEN, CLOSE = "<tool_call>", "</tool_call>"
INSTRUCTION = (
    "You may call these functions, given as JSON:\n{tools}\n"
    f'To call one, answer with {OPEN}{{{{"name": "...", "arguments": {{{{...}}}}}}}}{CLOSE} and nothing else.'
)
Tool = Mapping[str, Any]


def call_schema(tools: Sequence[Tool], name: str | None = None) -> dict[str, Any]:
    """The JSON schema of a call of one of the tools, or of the one that is named."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": f["name"]}, "arguments": f.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for f in (tool["function"] for tool in tools)
        if name in (None, f["name"])
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def told(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """A conversation for a template that knows no tools: they are in a system message, calls and results in the text."""
    plain = [dict(m) for m in messages]
    for m in plain:
        if calls := m.pop("tool_calls", None):
            m["content"] = (m["content"] or "") + "".join(f"{OPEN}{json.dumps(c['function'])}{CLOSE}" for c in calls)
        if m["role"] == "tool":
            m["role"], m["content"] = "user", f"<tool_response>{m['content']}</tool_response>"
    if not tools:
        return plain
    text = INSTRUCTION.format(tools="\n".join(json.dumps(tool["function"]) for tool in tools))
    if plain[0]["role"] == "system":
        return [{"role": "system", "content": f"{plain[0]['content']}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


class CallFinder:
    """Splits the text of a choice into content, which streams on, and calls, which are complete at the end."""

    def __init__(self, names: frozenset[str], *, required: bool) -> None:
        self._names, self._required = names, required
        self._tag = StopMatcher((OPEN,))
        self._text, self._n_content = "", 0

    def push(self, text: str) -> str:
        """The part of the content that is now certain."""
        self._text += text
        content = "" if self._required else self._tag.push(text)[0]
        self._n_content += len(content)
        return content

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest of the content, and the calls. What is no call of a known tool is content."""
        rest = self._text[self._n_content :]
        pieces = [rest] if self._required else [p.partition(CLOSE)[0] for p in rest.split(OPEN)[1:]]
        calls = [self._call(piece) for piece in pieces]
        found = [c for c in calls if c is not None]
        return ("", found) if found and len(found) == len(calls) else (rest, [])

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            call = json.loads(text)
        except ValueError:
            return None
        if not isinstance(call, dict) or call.get("name") not in self._names or not isinstance(call.get("arguments"), dict):
            return None
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        function = {"name": call["name"], "arguments": arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
