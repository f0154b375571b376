"""Replies of the engine over HTTP: whole, as server-sent events, and embeddings."""

from __future__ import annotations

import asyncio
import json
import logging
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from vkllm.batching import BatchEvent, TokenLogprob
from vkllm.sampler import SamplingParams
from vkllm.serve import replies
from vkllm.serve.calls import Call
from vkllm.serve.host import ModelHost
from vkllm.serve.models import Served
from vkllm.serve.replies import ApiError, Kind, Reply
from vkllm.serve.runs import ClientGoneError, Job, Run
from vkllm.serve.schemas import ChatRequest, CompletionRequest, EmbeddingRequest
from vkllm.serve.tools import CallFinder, Calls

log = logging.getLogger("vkllm.serve")
Asked = ChatRequest | CompletionRequest
Events = AsyncIterator[tuple[int, BatchEvent]]


async def begin(host: ModelHost, call: Call, asked: Asked | EmbeddingRequest, request: Request | None) -> tuple[Served, Run]:
    """Lease the model and submit the jobs of a request; both end with the call. Raises: ApiError, VkllmError: it is refused."""
    served = call.stack.enter_context(host.lease())
    call.note(model=served.model_id, stream=bool(getattr(asked, "stream", False)))
    served.check_model(asked.model)
    if isinstance(asked, EmbeddingRequest):
        call.note_text(prompt=asked.input)
        ids = await asyncio.to_thread(served.encoded, asked.prompts())
        jobs = [Job(i, SamplingParams(), embeds=True) for i in ids]
    else:
        call.note_text(prompt=asked.said())
        jobs = await asyncio.to_thread(served.jobs, asked)
    call.run = Run(served.batch, jobs, request, awaited=bool(getattr(asked, "stream", False)))
    call.stack.callback(call.run.close)
    return served, call.run


async def answer(host: ModelHost, request: Request, asked: Asked, kind: Kind) -> Response:
    """Run a request, and reply at once or as a stream. The status waits for the first event, so that errors have one."""
    call = Call.of(request.scope)
    served, run = await begin(host, call, asked, request)
    events = run.events()
    writer = Writer(served, run, asked, Reply(kind, served.model_id))
    try:
        first = await anext(events)
        if asked.stream:
            body = writer.stream(first, events, call)
            return StreamingResponse(body, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        whole = await writer.collect(first, events)
    except ClientGoneError:
        return Response(status_code=499)
    call.note_text(reply=[r.text for r in run.finished()])
    return JSONResponse(whole)


async def embed(host: ModelHost, request: Request, asked: EmbeddingRequest) -> Response:
    """The mean of the normed hidden states of each input, at unit length."""
    served, run = await begin(host, Call.of(request.scope), asked, request)
    found: dict[int, list[float] | str] = {}
    try:
        async for index, event in run.events():
            assert event.embedding is not None
            unit = event.embedding / max(float(np.linalg.norm(event.embedding)), 1e-12)
            as_text = asked.encoding_format == "base64"
            found[index] = b64encode(unit.astype("<f4").tobytes()).decode() if as_text else unit.tolist()
    except ClientGoneError:
        return Response(status_code=499)
    data = [{"object": "embedding", "index": i, "embedding": found[i]} for i in range(len(found))]
    n = sum(r.usage.prompt_tokens for r in run.finished())
    counts = {"prompt_tokens": n, "total_tokens": n}
    return JSONResponse({"object": "list", "data": data, "model": served.model_id, "usage": counts})


class Writer:
    """Turns the events of one request into OpenAI's replies."""

    def __init__(self, served: Served, run: Run, asked: Asked, reply: Reply) -> None:
        self._tokenizer, self._run, self._asked, self._reply = served.tokenizer, run, asked, reply
        self._with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        self._finders = [finder_of(asked, served) for _ in run.results]
        self._n_char, self._n_call = [0] * len(run.results), [0] * len(run.results)

    async def collect(self, first: tuple[int, BatchEvent], events: Events) -> dict[str, Any]:
        """The whole reply."""
        values: list[list[TokenLogprob]] = [[] for _ in self._run.results]
        values[first[0]] += first[1].logprobs
        async for index, event in events:
            values[index] += event.logprobs
        choices = []
        wanted = self._asked.params(0).logprobs is not None
        for i, result in enumerate(self._run.finished()):
            found = replies.logprobs(self._reply.kind, self._tokenizer, values[i]) if wanted else None
            finder, content = self._finders[i], result.text
            calls: Calls = []
            if finder is not None:
                (content, calls), (rest, more) = finder.push(result.text), finder.finish()
                content, calls = content + rest, calls + more
            choices.append(self._reply.choice(i, content, found, result.finish_reason, calls))
        return self._reply.message(choices, self._usage(), chunk=False)

    async def stream(self, first: tuple[int, BatchEvent], events: Events, call: Call) -> AsyncIterator[str]:
        """The reply as server-sent events. An error after the first chunk becomes the last event."""
        try:
            if self._reply.kind == "chat":
                for i in range(len(self._run.results)):
                    yield self._delta(i, {"role": "assistant", "content": ""})
            if text := self._piece(*first):
                yield text
            async for index, event in events:
                if text := self._piece(index, event):
                    yield text
            if self._with_usage:
                yield self._chunk([], self._usage())
            yield "data: [DONE]\n\n"
            call.note_text(reply=[r.text for r in self._run.finished()])
        except ClientGoneError:
            return
        except Exception as error:
            call.error = type(error).__name__
            log.warning("a stream failed: %s", type(error).__name__)
            yield f"data: {json.dumps(ApiError.of(error).body, ensure_ascii=False)}\n\n"

    def _piece(self, index: int, event: BatchEvent) -> str:
        """The chunks that one event gives."""
        reason = event.result.finish_reason if event.result else None
        finder, text = self._finders[index], event.text
        calls: Calls = []
        if finder is not None:
            text, calls = finder.push(text)
            if reason:
                rest, more = finder.finish()
                text, calls = text + rest, calls + more
        out = ""
        if text or event.logprobs:
            found = None
            if event.logprobs:
                found = replies.logprobs(self._reply.kind, self._tokenizer, event.logprobs, self._n_char[index])
            self._n_char[index] += len(text)
            out = self._delta(index, {"content": text}, found)
        for found_call in calls:
            out += self._call_deltas(index, found_call)
        if reason:
            out += self._delta(index, {}, None, "tool_calls" if self._n_call[index] else reason)
        return out

    def _call_deltas(self, index: int, call: dict[str, Any]) -> str:
        """A call as OpenAI streams it: its head with empty arguments, then the arguments."""
        number, function = self._n_call[index], call["function"]
        self._n_call[index] += 1
        head = {"index": number, **call, "function": {**function, "arguments": ""}}
        rest = {"index": number, "function": {"arguments": function["arguments"]}}
        return "".join(self._delta(index, {"tool_calls": [part]}) for part in (head, rest))

    def _delta(self, index: int, delta: dict[str, Any], found: dict[str, Any] | None = None, reason: str | None = None) -> str:
        return self._chunk([self._reply.delta(index, delta, found, reason)])

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        body = self._reply.message(choices, usage, chunk=True)
        if self._with_usage and usage is None:
            body["usage"] = None
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def _usage(self) -> dict[str, Any]:
        return replies.usage([r.usage for r in self._run.finished()], self._asked.n_choice)


def finder_of(asked: Asked, served: Served) -> CallFinder | None:
    """What looks for calls in the text of one choice, where there are tools."""
    if not isinstance(asked, ChatRequest) or not asked.offered:
        return None
    names = frozenset(t["function"]["name"] for t in asked.offered)
    return CallFinder(names, required=asked.must_call, style=served.style)
