"""WebSocket /v1/stream: prompts in and tokens out over one connection, any number at a time, each cancelled at any time.

The client sends {"id": text, "request": {…}} with the fields of /v1/chat/completions (it has messages) or of /v1/completions, or
{"id": text, "cancel": true}. The server sends {"id", "index", "text"} for every piece, then {"id", "index", "finish_reason",
"usage"} for every choice; or {"id", "error"}, after which nothing more comes for that id.

Every prompt counts for the rate limit, and is a line in the log. A message may be as long as a body of HTTP. A connection on
which nothing is asked and nothing runs is closed after a while.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Annotated, Any

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import Field

from vkllm.batching import CancelledRequestError
from vkllm.serve import replies
from vkllm.serve.calls import Call, request_id
from vkllm.serve.gate import Rates, address_of
from vkllm.serve.replies import ApiError, parse
from vkllm.serve.runs import Run
from vkllm.serve.schemas import ChatRequest, CompletionRequest, Strict

MAX_OPEN = 64
ROUTE = "/v1/stream"
Asked = ChatRequest | CompletionRequest
Begin = Callable[[Call, Asked], Awaitable[Run]]


class Command(Strict):
    """What a client sends."""

    id: Annotated[str, Field(min_length=1, max_length=128)]
    request: dict[str, Any] | None = None
    cancel: bool = False


class Duplex:
    """One connection. `begin` turns a request into a run that ends with its call; `idle_s`: close it after so long."""

    def __init__(self, ws: WebSocket, begin: Begin, rates: Rates, *, idle_s: float, log_prompts: bool = False) -> None:
        self._ws, self._begin, self._rates, self._idle_s, self._log_prompts = ws, begin, rates, idle_s, log_prompts
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._left = False

    async def serve(self) -> None:
        """Until the client leaves; what still runs then is cancelled."""
        await self._ws.accept()
        try:
            while (text := await self._next()) is not None:
                await self._take(text)
            await self._ws.close(1000, "idle")
        except (WebSocketDisconnect, KeyError, RuntimeError):  # it left, or sent bytes
            pass
        finally:
            self._left = True
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _next(self) -> str | None:
        """The next message; None where none has come for long, and nothing runs."""
        while True:
            try:
                return await asyncio.wait_for(self._ws.receive_text(), self._idle_s)
            except TimeoutError:
                if not self._tasks:
                    return None

    async def _take(self, text: str) -> None:
        name: str | None = None
        try:
            command = parse(text, Command)
            name = command.id
            if command.cancel:
                if name in self._tasks:
                    self._tasks[name].cancel()
                return
            if name in self._tasks or len(self._tasks) >= MAX_OPEN:
                raise ApiError(400, f"the id {name!r} is in use, or {MAX_OPEN} requests are open", param="id")
            self._rates.check(address_of(self._ws.scope))
            self._tasks[name] = asyncio.create_task(self._run(name, command.request or {}))
            self._tasks[name].add_done_callback(lambda _, name=name: self._tasks.pop(name, None))  # type: ignore[misc]
        except ApiError as error:
            await self._ws.send_json({"id": name, **error.body})

    async def _run(self, name: str, fields: dict[str, Any]) -> None:
        call = Call(request_id(), "WS", ROUTE, 200, self._log_prompts)
        try:
            await self._answer(name, fields, call)
        except asyncio.CancelledError:
            call.error, call.client_gone = "cancelled", self._left
            await self._fail(name, CancelledRequestError("the request was cancelled"))
        except (WebSocketDisconnect, RuntimeError):
            call.client_gone = True
        except Exception as error:
            reply = await self._fail(name, error)
            call.status, call.error = reply.status, reply.code or type(error).__name__
        finally:
            call.close()

    async def _answer(self, name: str, fields: dict[str, Any], call: Call) -> None:
        run = await self._begin(call, self._request(fields))
        async for index, event in run.events():
            if event.text:
                await self._ws.send_json({"id": name, "index": index, "text": event.text})
            if event.result is not None:
                end = {"finish_reason": event.result.finish_reason, "usage": replies.usage([event.result.usage], 1)}
                await self._ws.send_json({"id": name, "index": index, **end})
        call.note_text(reply=[r.text for r in run.finished()])

    async def _fail(self, name: str, error: Exception) -> ApiError:
        reply = ApiError.of(error)
        with suppress(WebSocketDisconnect, RuntimeError):  # the client has left
            await self._ws.send_json({"id": name, **reply.body})
        return reply

    @staticmethod
    def _request(fields: dict[str, Any]) -> Asked:
        model: type[Asked] = ChatRequest if "messages" in fields else CompletionRequest
        asked: Asked = parse(json.dumps(fields), model)
        wrong: Sequence[str] = [n for n in ("stream", "stream_options", "logprobs", "tools") if fields.get(n)]
        if wrong:
            raise ApiError(400, f"the field {wrong[0]} is not supported here", param=wrong[0], code="unsupported_field")
        return asked
