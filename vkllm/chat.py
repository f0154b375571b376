"""Chat templates: messages to a prompt. Templates come with model files, so they run in Jinja2's immutable sandbox.

The helpers (raise_exception, strftime_now, tojson, loop controls) are those that Hugging Face's templates expect. The sandbox
keeps a template from reaching out, not from taking its time: where that matters, render in a child (`vkllm.serve.render`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vkllm.errors import ConfigError, RequestError
from vkllm.tokenizer import Tokenizer

Message = Mapping[str, Any]
Renderer = Callable[[Sequence[Message]], str]
"""Messages to the prompt for the answer that follows them."""

MAX_REPEAT, MAX_INDENT = 100_000, 100


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja2's sandbox, which also refuses arithmetic that could fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not all(isinstance(v, int | float) or v is None for v in (left, right)):
            sizes = [v for v in (left, right) if isinstance(v, int)]
            if operator == "**" or any(n > MAX_REPEAT for n in sizes):
                raise jinja2.TemplateError(f"the sandbox refuses this use of {operator}")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, without the HTML escapes of Jinja2's own filter."""
    if indent is not None and not (isinstance(indent, int) and indent <= MAX_INDENT):
        raise jinja2.TemplateError(f"the sandbox refuses an indent of {indent!r}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@cache
def _environment() -> jinja2.Environment:
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return env


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def no_template() -> ConfigError:
    """The error for a model that cannot chat."""
    return ConfigError("the model has no chat template", hint="use `vkllm run`, or an instruction-tuned model")


def render(
    template: str | None,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """The prompt of a conversation. `messages`: {"role": "system" | "user" | "assistant" ..., "content": text}; the arguments of
    tool calls are objects, not text. `options`: a template's own variables, such as Qwen3's enable_thinking.

    Raises: ConfigError: the model has no template; RequestError: bad messages, or the template fails or refuses them.
    """
    if not template:
        raise no_template()
    if not messages or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
        raise RequestError(
            "messages must be a list of objects with a role", hint='for example [{"role": "user", "content": "Hi"}]'
        )
    values = {"messages": messages, "tools": tools, "bos_token": bos_token, "eos_token": eos_token}
    try:
        return _compiled(template).render({**(options or {}), **values}, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as e:
        raise RequestError(f"chat template: {e}", hint="check roles and their order against the model's template") from e
    except Exception as e:  # a template may raise whatever its expressions raise
        raise RequestError(f"chat template: {type(e).__name__}: {e}", hint="check the content of the messages") from e


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a rendered conversation: special tokens parsed, and BOS first where the model wants it (but once)."""
    ids = tokenizer.encode(prompt, add_special=False, parse_special=True)
    bos = tokenizer.bos_id
    return [bos, *ids] if tokenizer.add_bos and bos is not None and ids[:1] != [bos] else ids


def renderer(tokenizer: Tokenizer) -> Renderer:
    """`render` with the model's template and tokens, in this process."""

    def of_model(messages: Sequence[Message]) -> str:
        t = tokenizer
        return render(t.chat_template, messages, bos_token=t.bos_token, eos_token=t.eos_token)

    return of_model


class Conversation:
    """A chat with one user: `ask` gives the prompt's ids, `answered` takes the model's text.

    `render`: what applies the template, by default `renderer(tokenizer)`, which takes as long as the template likes.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None, render: Renderer | None = None) -> None:
        if not tokenizer.chat_template:
            raise no_template()
        self._tokenizer, self._render = tokenizer, render or renderer(tokenizer)
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = list(self._opening)

    def ask(self, text: str) -> list[int]:
        """Ids of the conversation so far with the user's next message. A question that was never answered is replaced."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()
        self.messages.append({"role": "user", "content": text})
        return prompt_ids(self._tokenizer, self._render(self.messages))

    def answered(self, text: str) -> None:
        """The model's answer to the last question."""
        self.messages.append({"role": "assistant", "content": text})

    def reset(self) -> None:
        """Forget all but the system prompt."""
        self.messages = list(self._opening)
