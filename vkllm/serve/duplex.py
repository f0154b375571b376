"""WebSocket /v1/stream: prompts in and tokens out over one connection, any number at a time, each cancelled at any time.

The client sends {"id": text, "request": {…}} with the fields of /v1/chat/completions (it has messages) or of /v1/completions, or
{"id": text, "cancel": true}. The server sends {"id", "index", "text"} for every piece, then {"id", "index", "finish_reason",
"usage"} for every choice; or {"id", "error"}, after which nothing more comes for that id.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import Field

from vkllm.batching import CancelledRequestError
from vkllm.serve import replies
from vkllm.serve.replies import ApiError
from vkllm.serve.schemas import ChatRequest, CompletionRequest, Strict

MAX_OPEN = 64
Asked = ChatRequest | CompletionRequest


class Command(Strict):
    """What a client sends."""

    id: Annotated[str, Field(min_length=1, max_length=128)]
    request: dict[str, Any] | None = None
    cancel: bool = False


class Duplex:
    """One connection. `start` turns a request into a run of the engine; `parse` checks a message against a model."""

    def __init__(self, ws: WebSocket, start: Callable[[Asked], Any], parse: Callable[[str, Any], Any]) -> None:
        self._ws, self._start, self._parse = ws, start, parse
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        """Until the client leaves; what still runs then is cancelled."""
        await self._ws.accept()
        try:
            while True:
                await self._take(await self._ws.receive_text())
        except (WebSocketDisconnect, KeyError):  # it left, or sent bytes
            pass
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _take(self, text: str) -> None:
        name: str | None = None
        try:
            command: Command = self._parse(text, Command)
            name = command.id
            if command.cancel:
                if name in self._tasks:
                    self._tasks[name].cancel()
                return
            if name in self._tasks or len(self._tasks) >= MAX_OPEN:
                raise ApiError(400, f"the id {name!r} is in use, or {MAX_OPEN} requests are open", param="id")
            self._tasks[name] = asyncio.create_task(self._run(name, command.request or {}))
            self._tasks[name].add_done_callback(lambda _, name=name: self._tasks.pop(name, None))  # type: ignore[misc]
        except ApiError as error:
            await self._ws.send_json({"id": name, **error.body})

    async def _run(self, name: str, fields: dict[str, Any]) -> None:
        run = None
        try:
            asked: Asked = self._parse_request(fields)
            run = await self._start(asked)
            async for index, event in run.events():
                if event.text:
                    await self._ws.send_json({"id": name, "index": index, "text": event.text})
                if event.result is not None:
                    end = {"finish_reason": event.result.finish_reason, "usage": replies.usage([event.result.usage], 1)}
                    await self._ws.send_json({"id": name, "index": index, **end})
        except asyncio.CancelledError:
            await self._ws.send_json({"id": name, **ApiError.of(CancelledRequestError("the request was cancelled")).body})
        except (WebSocketDisconnect, RuntimeError):
            pass  # the client has left
        except Exception as error:
            await self._ws.send_json({"id": name, **ApiError.of(error).body})
        finally:
            if run is not None:
                run.close()

    def _parse_request(self, fields: dict[str, Any]) -> Asked:
        model: type[Asked] = ChatRequest if "messages" in fields else CompletionRequest
        asked: Asked = self._parse(json.dumps(fields), model)
        wrong: Sequence[str] = [n for n in ("stream", "stream_options", "logprobs", "tools") if fields.get(n)]
        if wrong:
            raise ApiError(400, f"the field {wrong[0]} is not supported here", param=wrong[0], code="unsupported_field")
        return asked
