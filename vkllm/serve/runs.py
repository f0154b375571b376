"""The choices of one request in the engine, from its worker thread to the event loop. What a client does not read is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request

from vkllm.batching import BatchEngine, BatchEvent, Constraint, Handle
from vkllm.engine import GenerationResult
from vkllm.errors import VkllmError
from vkllm.sampler import SamplingParams

MAX_UNREAD = 4096
"""Events of one request that may wait for its client; of a stream with n = 8 the tokens of 512 steps."""


@dataclass(frozen=True, slots=True)
class Job:
    """One choice of a reply. `shown`: control tokens that are part of its text."""

    ids: list[int]
    params: SamplingParams
    constraint: Constraint | None = None
    embeds: bool = False
    shown: frozenset[int] = frozenset()


class ClientGoneError(Exception):
    """The client has closed its connection."""


class SlowClientError(VkllmError):
    """The client reads much slower than tokens come."""


class Run:
    """The jobs of one request in the engine. Ends all of them when it is closed. `awaited`: as BatchEngine.submit has it;
    `max_unread`: as MAX_UNREAD."""

    def __init__(
        self,
        batch: BatchEngine,
        jobs: Sequence[Job],
        request: Request | None = None,
        *,
        awaited: bool = True,
        max_unread: int = MAX_UNREAD,
    ) -> None:
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, BatchEvent | None]]()
        self.results: list[GenerationResult | None] = [None] * len(jobs)
        self._max_unread, self._cut_off = max_unread, False
        self._handles: list[Handle] = []
        self._watcher: asyncio.Task[None] | None = None
        try:
            for i, job in enumerate(jobs):
                options: dict[str, Any] = {
                    "constraint": job.constraint,
                    "embed": job.embeds,
                    "shown": job.shown,
                    "awaited": awaited,
                }
                self._handles.append(batch.submit(job.ids, job.params, **options, listener=partial(self._put, i)))
        except BaseException:
            self.close()
            raise
        if request is not None:
            self._watcher = asyncio.create_task(self._watch(request))

    def _put(self, index: int, event: BatchEvent) -> None:
        with suppress(RuntimeError):  # the server has stopped
            self._loop.call_soon_threadsafe(self._take, index, event)

    def _take(self, index: int, event: BatchEvent) -> None:
        if self._cut_off:
            return
        self._queue.put_nowait((index, event))
        if self._queue.qsize() > self._max_unread:
            self._cut_off = True
            while not self._queue.empty():
                self._queue.get_nowait()
            message = f"the reply was cut off: {self._max_unread} of its tokens were not read"
            self._queue.put_nowait((index, BatchEvent(error=SlowClientError(message, hint="read faster"))))
            for handle in self._handles:
                handle.cancel()

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait((0, None))

    async def events(self) -> AsyncIterator[tuple[int, BatchEvent]]:
        """All events of all jobs, as they come. Raises: what ended a job; ClientGoneError; SlowClientError."""
        n_open = len(self._handles)
        while n_open:
            index, event = await self._queue.get()
            if event is None:
                raise ClientGoneError
            if event.error is not None:
                raise event.error
            if event.result is not None:
                self.results[index] = event.result
                n_open -= 1
            yield index, event

    def finished(self) -> list[GenerationResult]:
        """The results, once all events have come."""
        return [r for r in self.results if r is not None]

    def facts(self) -> dict[str, Any]:
        """Tokens, waits in seconds and ends of all choices, for the log. The first choice that ran or spoke gives the waits."""
        progress = [h.progress for h in self._handles]
        reasons = [r.finish_reason if r else None for r in self.results]
        return {
            "prompt_tokens": sum(h.n_prompt for h in self._handles),
            "cached_tokens": sum(p.cached_tokens for p in progress),
            "completion_tokens": sum(p.completion_tokens for p in progress),
            "queue_s": _first(p.queue_s for p in progress),
            "ttft_s": _first(p.ttft_s for p in progress),
            "finish_reason": reasons[0] if len(set(reasons)) == 1 else reasons,
        }

    def close(self) -> None:
        """Cancel what still runs."""
        for handle, result in zip(self._handles, self.results, strict=False):
            if result is None:
                handle.cancel()
        if self._watcher is not None:
            self._watcher.cancel()


def _first(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return round(min(known), 6) if known else None
