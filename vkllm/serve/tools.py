"""Tools: told to the model by its template (or by a system message of ours), and calls found in what it says.

Models write calls in three styles; which one, their template and vocabulary tell:

- hermes (Qwen, Hermes, and whoever is told by us): <tool_call>{"name": …, "arguments": {…}}</tool_call>
- mistral: [TOOL_CALLS][{"name": …, "arguments": {…}}, …], or later [TOOL_CALLS]name[ARGS]{…}
- llama (3.x): the whole reply is {"name": …, "parameters": {…}}, several with ; between; perhaps <|python_tag|> before it

Where a call is required, a grammar lets nothing pass but the JSON of a call of a known tool, whose arguments follow the tool's
schema.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vkllm.tokenizer import Tokenizer

OPEN, CLOSE = "<tool_call>", "</tool_call>"
INSTRUCTION = (
    "You may call these functions, given as JSON:\n{tools}\n"
    f'To call one, answer with {OPEN}{{{{"name": "...", "arguments": {{{{...}}}}}}}}{CLOSE} and nothing else.'
)
CALLS, ARGS, CALL_ID, PYTHON_TAG = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"
_NAMED = re.compile(r"\s*([A-Za-z0-9_.-]{1,64})(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")
_JSON = json.JSONDecoder()
Tool = Mapping[str, Any]
Calls = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How a model writes calls: `open` begins one, and `close` ends it where there is such a mark. Without `open` the whole text
    is a call, or none of it. `marks`: control tokens that belong to the text, because calls are written with them."""

    open: str | None
    close: str | None = None
    marks: frozenset[int] = frozenset()


HERMES = CallStyle(OPEN, CLOSE)


def style_of(tokenizer: Tokenizer) -> CallStyle:
    """The style that a model was trained on."""
    template = tokenizer.chat_template or ""
    if "tools" not in template:  # we tell it how
        return HERMES
    if mistral := _control(tokenizer, CALLS, ARGS, CALL_ID):
        return CallStyle(CALLS, None, mistral)
    if OPEN not in template and (PYTHON_TAG in template or "ipython" in template):
        return CallStyle(None, None, _control(tokenizer, PYTHON_TAG))
    return HERMES


def _control(tokenizer: Tokenizer, first: str, *more: str) -> frozenset[int]:
    """The ids of control tokens with these texts; none where the first does not exist."""
    ids = [tokenizer.encode(text, add_special=False, parse_special=True) for text in (first, *more)]
    found = [i[0] if len(i) == 1 and tokenizer.is_special(i[0]) else None for i in ids]
    return frozenset(i for i in found if i is not None) if found[0] is not None else frozenset()


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
    """Splits the text of a choice into content and calls; what is certain streams on. What is no call of a known tool is content.

    `required`: the text is one call, as `call_schema` has it.
    """

    def __init__(self, names: frozenset[str], *, required: bool = False, style: CallStyle = HERMES) -> None:
        self._names, self._style = names, CallStyle(None) if required else style
        self._rest = ""  # not yet content, nor a call
        self._blank = ""
        self._n_call, self._no_call = 0, False

    def push(self, text: str) -> tuple[str, Calls]:
        """The content and the calls that are now certain."""
        self._rest += text
        if self._style.open is None:
            self._no_call = self._no_call or not _may_be_json(self._rest)
            return (self._all_of_rest() if self._no_call else "", [])
        content = ""
        calls: Calls = []
        while (found := self._next_call()) is not None:
            content, calls = content + found[0], calls + found[1]
        return content + self._certain(), calls

    def finish(self) -> tuple[str, Calls]:
        """The rest of both."""
        opening, rest = self._style.open, self._all_of_rest()
        if opening is None:
            calls = [] if self._no_call else self._calls(rest)
            return ("" if calls else rest.removeprefix(PYTHON_TAG), calls)
        before, *pieces = rest.split(opening)
        content, calls = self._content(before), []
        for piece in pieces:
            found = self._split("", opening, piece, "")
            content, calls = content + found[0], calls + found[1]
        return content, calls

    def _all_of_rest(self) -> str:
        rest, self._rest = self._rest, ""
        return rest

    def _next_call(self) -> tuple[str, Calls] | None:
        """Cut the next complete call out of the rest, with the content before it; None where there is none."""
        opening, close = self._style.open, self._style.close
        assert opening is not None
        start = self._rest.find(opening)
        end = self._rest.find(close, start) if close and start >= 0 else -1
        if close is None or end < 0:
            return None
        before, piece = self._rest[:start], self._rest[start + len(opening) : end]
        self._rest = self._rest[end + len(close) :]
        return self._split(before, opening, piece, close)

    def _split(self, before: str, opening: str, piece: str, close: str) -> tuple[str, Calls]:
        """Content, then a piece between two marks: a call, or content too."""
        calls = self._calls(piece)
        content = self._content(before if calls else f"{before}{opening}{piece}{close}")
        self._n_call += len(calls)
        return content, calls

    def _certain(self) -> str:
        """Cut off the rest what is content: all that comes before a mark, or the beginning of one."""
        opening = self._style.open
        assert opening is not None
        end = self._rest.find(opening)
        if end < 0:
            n_open = (n for n in range(min(len(opening) - 1, len(self._rest)), 0, -1) if self._rest.endswith(opening[:n]))
            end = len(self._rest) - next(n_open, 0)
        content, self._rest = self._rest[:end], self._rest[end:]
        return self._content(content)

    def _content(self, text: str) -> str:
        """White space between and after calls is dropped: it is kept back until something else follows."""
        if not self._n_call:
            return text
        text = self._blank + text
        said = text.rstrip()
        self._blank = text[len(said) :]
        return said

    def _calls(self, text: str) -> Calls:
        """The calls that a text consists of; none where any of it is something else."""
        values = [_openai(value, self._names) for value in _values(text)]
        calls = [call for call in values if call is not None]
        return calls if len(calls) == len(values) else []


def _may_be_json(text: str) -> bool:
    """Could a text that begins like this be a call as a whole?"""
    begun = text.lstrip()
    return begun.startswith(("{", PYTHON_TAG)) or PYTHON_TAG.startswith(begun)


def _values(text: str) -> Iterator[Any]:
    """The JSON values of a text with calls, those with a name before them as {"name", "arguments"}; None where it has more."""
    text = text.replace(PYTHON_TAG, "", 1).strip()
    while text:
        named = _NAMED.match(text)
        start = named.end() if named else 0
        try:
            value, end = _JSON.raw_decode(text, start)
        except (ValueError, RecursionError):
            yield None
            return
        if named:
            value = {"name": named[1], "arguments": value}
        yield from value if isinstance(value, list) and value else (value,)
        text = text[end:].lstrip(" \t\r\n;")


def _openai(call: Any, names: frozenset[str]) -> dict[str, Any] | None:
    """A call in OpenAI's shape; None where it is no call of a known tool."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or call["name"] not in names:
        return None
    arguments = call.get("arguments", call.get("parameters"))
    if not isinstance(arguments, dict):
        return None
    function = {"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
