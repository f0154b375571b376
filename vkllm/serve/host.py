"""Which model serves: one at a time, and another one after a reload, without dropping what runs.

A request holds a lease on the model that it began with. A reload loads the new model beside the old one; new requests go to it
from then on, and the old one is closed when its last lease ends. With `drain` the old one goes first: no new work is taken until
the new one is there. All methods belong to the event loop; loading and closing run in threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from time import perf_counter
from typing import Any, Literal

from vkllm.batching import BatchEngine, BatchStats
from vkllm.errors import CapacityError, DeviceError, OutOfDeviceMemoryError, VkllmError
from vkllm.kv_cache import BlockPool
from vkllm.serve.models import Served
from vkllm.serve.options import model_name
from vkllm.serve.replies import ApiError

log = logging.getLogger("vkllm.serve")
Loader = Callable[[str], BatchEngine]
"""Loads a model file, or a packaged model, and starts its engine. Called in a thread."""
Health = Literal["ready", "degraded", "tripped", "loading", "failed"]
"""ready: full speed; degraded: paced; tripped: too hot; loading: no model yet; failed: no model, or its device is lost."""


class LoadingError(CapacityError):
    """No model serves now: another one is being loaded, or that has failed."""


@dataclass(frozen=True, slots=True)
class Reloaded:
    """A reload that went well. `n_running`: requests that were still on the model before."""

    model_id: str
    previous: str
    load_s: float
    n_running: int


class ModelHost:
    """Holds the model that serves. Without a `load` it cannot be changed, and stays its owner's."""

    def __init__(self, first: Served, load: Loader | None = None) -> None:
        self.current: Served | None = first
        self.pacer = first.batch.pacer
        self._last, self._load = first, load
        self._live = {first}
        self._task: asyncio.Task[Reloaded] | None = None
        self._closers: set[asyncio.Task[None]] = set()  # one for each model that is on its way out
        self._loop: asyncio.AbstractEventLoop | None = None
        self._load_s, self._stopping = first.batch.engine.load_s, False
        self._ended = BatchStats()  # the totals of models that are closed

    # -- for requests ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def lease(self) -> Iterator[Served]:
        """The model that serves now; it is kept until the end. Raises: LoadingError."""
        served = self.current
        if served is None:
            if not self.loading:
                raise LoadingError("no model is loaded: the last reload failed", hint="POST /admin/reload")
            error = LoadingError("another model is being loaded", hint="try again later")
            error.retry_after_s = self.retry_after_s
            raise error
        served.n_lease += 1
        served.idle.clear()
        try:
            yield served
        finally:
            served.n_lease -= 1
            if not served.n_lease:
                served.idle.set()

    @property
    def loading(self) -> bool:
        """Is a model being loaded?"""
        return self._task is not None and not self._task.done()

    @property
    def retry_after_s(self) -> float:
        """While no model serves: about when to ask again."""
        return max(1.0, self._load_s)

    def health(self) -> tuple[Health, float | None]:
        """What /health says, and where that is no: in how many seconds to ask again, if that is known."""
        if self.current is None:
            return ("loading", self.retry_after_s) if self.loading else ("failed", None)
        batch = self.current.batch
        if batch.failure is not None:
            return "failed", None
        limit = batch.pacer.batch_limit if batch.pacer else None
        if limit == 0:
            return "tripped", batch.pacer.retry_after_s if batch.pacer else None
        return "ready" if limit is None or limit >= batch.scheduler.n_row else "degraded", None

    # -- for metrics: as one BatchEngine shows them -----------------------------------------------------------------------------

    @property
    def pool(self) -> BlockPool:
        """The cache of the newest model."""
        return (self.current or self._last).batch.pool

    @property
    def stats(self) -> BatchStats:
        """Totals of all models since the start, and what those that are loaded do now."""
        total = BatchStats()
        for stats in (self._ended, *(served.batch.stats for served in list(self._live))):
            _add(total, stats)
        return total

    # -- changing it ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """The event loop runs: make the first model's template ready; from now on `reload_soon` works."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._last.start)

    def reload_soon(self) -> None:
        """Load the same file again; only the log says how it went. From any thread, and from signal handlers."""

        def begin() -> None:
            task = asyncio.ensure_future(self.reload())
            task.add_done_callback(lambda t: t.cancelled() or t.exception())  # it is logged already

        if self._loop is not None:
            with suppress(RuntimeError):  # the server has stopped
                self._loop.call_soon_threadsafe(begin)

    async def reload(self, model: str | None = None, alias: str | None = None, *, drain: bool = False) -> Reloaded:
        """Load `model`, or the file of the one that serves again. It goes on where the caller is cancelled.

        `alias`: its name for clients; default: as before for the same file, otherwise of the file.
        Raises: ApiError: 409: a reload is running already; others: it failed, and the model before serves on.
        """
        if self._load is None:
            raise ApiError(501, "this server was not started by `vkllm serve`: it cannot load models", code="unsupported")
        if self.loading:
            log.warning("a reload is running already; this one is not begun")
            raise ApiError(409, "a reload is running already", code="reload_running")
        path = model or self._last.path
        name = alias or (self._last.model_id if path == self._last.path else model_name(path))
        self._task = asyncio.create_task(self._reload(path, name, drain))
        return await asyncio.shield(self._task)

    async def _reload(self, path: str, name: str, drain: bool) -> Reloaded:
        old, n_running = self.current, self.current.n_lease if self.current else 0
        if drain and old is not None:
            log.info("%s takes no more work; %d requests finish first", old.model_id, n_running)
            self.current = None
            await old.idle.wait()
            await self._close(old)
        if self._stopping:
            raise LoadingError("the server stops")
        started = perf_counter()
        try:
            new = await asyncio.to_thread(self._loaded, path, name, self._last.template_s)
        except Exception as error:
            raise await self._failed(error, path, drained=drain or old is None) from None
        self._load_s = perf_counter() - started
        previous, self.current, self._last = self._last.model_id, new, new
        log.info("%s serves, loaded in %.1f s; %d requests finish on the model before", name, self._load_s, n_running)
        if not drain and old is not None:
            self._start_closing(old)
        return Reloaded(name, previous, self._load_s, 0 if drain else n_running)

    def _loaded(self, path: str, name: str, template_s: float) -> Served:
        assert self._load is not None
        batch = self._load(path)
        try:
            served = Served(batch, name, path, template_s)
            served.start()
            self._live.add(served)
            return served
        except BaseException:
            batch.close()
            batch.engine.close()
            raise

    async def _failed(self, error: Exception, path: str, *, drained: bool) -> ApiError:
        """Log a failure. Where the old model is gone, it is loaded again."""
        old = self._last
        reply = failure(error, drained=drained)
        log.error("loading failed: %s", reply.message, exc_info=None if isinstance(error, VkllmError) else error)
        if drained:
            try:
                self.current = self._last = await asyncio.to_thread(self._loaded, old.path, old.model_id, old.template_s)
            except Exception as again:
                log.error("loading %s again failed: %s", old.model_id, failure(again, drained=True).message)
                reply.message += f"; loading {old.model_id!r} again failed too, so no model serves"
                return reply
        log.info("%s serves on", old.model_id)
        reply.message += f"; {old.model_id!r} serves on"
        return reply

    def _start_closing(self, old: Served) -> None:
        async def close() -> None:
            await old.idle.wait()
            await self._close(old)

        task = asyncio.create_task(close())
        self._closers.add(task)
        task.add_done_callback(self._closers.discard)

    async def _close(self, old: Served) -> None:
        await asyncio.to_thread(old.close)
        self._live.discard(old)
        _add(self._ended, old.batch.stats)
        log.info("%s is closed, its memory is free", old.model_id)

    async def close(self) -> None:
        """The server stops: wait for what loads, and close what we have loaded ourselves."""
        self._stopping = True
        for served in list(self._live):
            served.idle.set()  # what still has a lease was cut off
        if self._task is not None:
            with suppress(Exception, asyncio.CancelledError):
                await self._task
        await asyncio.gather(*self._closers)
        for served in list(self._live):
            await asyncio.to_thread(served.close if self._load else served.close_template)


def failure(error: Exception, *, drained: bool) -> ApiError:
    """What to answer to a load that failed."""
    if not isinstance(error, VkllmError):
        return ApiError(500, f"loading failed: {type(error).__name__}", code="internal_error")
    message = f"{error.message}; {error.hint}" if error.hint else error.message
    if isinstance(error, OutOfDeviceMemoryError):
        if not drained:
            message += "; both models do not fit at once: ?drain=true lets the old one go first"
        return ApiError(507, message, code="out_of_device_memory")
    return ApiError(500 if isinstance(error, DeviceError) else 400, message, code=type(error).__name__)


def _add(total: BatchStats, part: BatchStats) -> None:
    for field in fields(BatchStats):
        mine, more = getattr(total, field.name), getattr(part, field.name)
        if isinstance(mine, dict):
            for reason, n in list(more.items()):
                mine[reason] = mine.get(reason, 0) + n
        else:
            setattr(total, field.name, mine + more)


def info(served: Served) -> dict[str, Any]:
    """A model as /v1/models lists it."""
    return {"id": served.model_id, "object": "model", "created": served.created, "owned_by": "vkllm"}
