"""A loaded model as requests see it: from conversations and texts to token ids and jobs for its engine."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import time
from typing import Any

from vkllm.batching import BatchEngine
from vkllm.errors import ConfigError, ContextTooLongError
from vkllm.serve.grammar import Grammars
from vkllm.serve.render import TemplateWorker
from vkllm.serve.replies import ApiError
from vkllm.serve.runs import Job
from vkllm.serve.schemas import ChatRequest, CompletionRequest
from vkllm.serve.tools import CallStyle, call_schema, style_of, told


@dataclass(eq=False)
class Served:
    """One model. `path` is what it was loaded from; `n_lease` requests use it, and `idle` is set while there are none.

    Making one is slow (it prepares the vocabulary): not for the event loop.
    """

    batch: BatchEngine
    model_id: str
    path: str
    template_s: float = 2.0
    n_lease: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    created: int = field(default_factory=lambda: int(time()))

    def __post_init__(self) -> None:
        t = self.batch.tokenizer
        self.tokenizer, self.grammars = t, Grammars(t)
        self.style: CallStyle = style_of(t)
        self.template = TemplateWorker(t.chat_template, t.bos_token, t.eos_token, self.template_s) if t.chat_template else None
        self._longest_token = max(len(t.token_bytes(i)) for i in range(t.n_vocab))
        self.idle.set()

    def start(self) -> None:
        """Make its template's process ready. Slow."""
        if self.template is not None:
            self.template.start()

    def close_template(self) -> None:
        """End its template's process."""
        if self.template is not None:
            self.template.close()

    def close(self) -> None:
        """End it, and give the device's memory back. Slow."""
        self.close_template()
        self.batch.close()
        with suppress(Exception):  # a lost device may refuse
            self.batch.engine.close()
        gc.collect()

    def check_model(self, name: str) -> None:
        """Raises: ApiError: another model than ours is asked for."""
        if name != self.model_id:
            message = f"the model {name!r} does not exist; this server has {self.model_id!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_length(self, text: str) -> str:
        """Refuse, before tokenizing, a text that cannot fit: a token has only so many bytes.

        Raises: ContextTooLongError.
        """
        if len(text) > self.batch.n_ctx * self._longest_token:
            raise ContextTooLongError(
                f"the prompt has {len(text)} characters; the context holds {self.batch.n_ctx} tokens", hint="shorten it"
            )
        return text

    def chat_ids(self, request: ChatRequest) -> list[int]:
        """Token ids of a conversation. Slow: not for the event loop."""
        if self.template is None:
            raise ConfigError("the model has no chat template", hint="use /v1/completions, or an instruction-tuned model")
        messages, tools = [m.plain() for m in request.messages], request.offered
        if not self.template.knows_tools:
            messages, tools = told(messages, tools), []
        text = self.check_length(self.template.render(messages, tools or None))
        ids, bos = self.tokenizer.encode(text, add_special=False, parse_special=True), self.tokenizer.bos_id
        return [bos, *ids] if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos] else ids

    def encoded(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Token ids of each prompt. Slow: not for the event loop."""
        return [self.tokenizer.encode(self.check_length(p)) if isinstance(p, str) else p for p in prompts]

    def jobs(self, request: ChatRequest | CompletionRequest) -> list[Job]:
        """All choices of all prompts, prompt by prompt. Slow: not for the event loop."""
        prompts = [self.chat_ids(request)] if isinstance(request, ChatRequest) else self.encoded(request.prompts())
        form = request.response_format
        schema: dict[str, Any] | None = form.schema_of_text() if form else None
        shown: frozenset[int] = frozenset()
        if isinstance(request, ChatRequest) and request.must_call:
            schema = call_schema(request.offered, request.called_name)
        elif isinstance(request, ChatRequest) and request.offered:
            shown = self.style.marks
        return [
            Job(ids, request.params(i), None if schema is None else self.grammars.json(schema), shown=shown)
            for ids in prompts
            for i in range(request.n_choice)
        ]
