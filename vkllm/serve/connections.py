"""Connections that are opened and left, or not read from: none of them keeps others out, or memory for long.

- A connection has some seconds to ask for something, at first and after each reply.
- There is a limit to how many are open. Beyond it the one goes that has waited longest without asking for anything; where all are
  busy, the new one is refused.
- Who does not read what is sent for some seconds is cut off.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from vkllm.serve.options import ConnectionLimits
from vkllm.serve.replies import ApiError

RESERVED_FILES = 128  # for the model, the device, sensors and libraries


@dataclass(slots=True)
class _Stall:
    """Cuts a connection off that does not take what is written to it."""

    stall_s: float
    _timer: asyncio.TimerHandle | None = None

    def begin(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> None:
        """The buffer is full."""
        self.end()
        self._timer = loop.call_later(self.stall_s, transport.abort)

    def end(self) -> None:
        """It is not full any more, or the connection is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


@dataclass(slots=True)
class _Waiting:
    """Connections that wait for a request, those first that have waited longest."""

    members: dict[Any, None] = field(default_factory=dict)

    def oldest(self) -> Any:
        return next(iter(self.members), None)


def http_protocol(limits: ConnectionLimits) -> type[H11Protocol]:
    """uvicorn's HTTP protocol with these limits; the limit on their number is one for all connections of this class."""
    waiting, refusal = _Waiting(), _refusal(limits.most)

    class Limited(H11Protocol):
        """One connection."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._patience: asyncio.TimerHandle | None = None
            self._stall = _Stall(limits.stall_s)
            self._wait()
            if len(self.connections) > limits.most:
                waiting.oldest()._refuse()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            self._stall.end()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()  # it has asked; a part of a request is not enough

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete and not self.transport.is_closing():
                self._wait()

        def handle_websocket_upgrade(self, event: Any) -> None:
            self._stop_waiting()
            super().handle_websocket_upgrade(event)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stall.begin(self.loop, self.transport)

        def resume_writing(self) -> None:
            self._stall.end()
            super().resume_writing()

        def _wait(self) -> None:
            self._stop_waiting()
            waiting.members[self] = None
            self._patience = self.loop.call_later(limits.patience_s, _leave, self.transport)

        def _stop_waiting(self) -> None:
            waiting.members.pop(self, None)
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

        def _refuse(self) -> None:
            """Say that there are too many, unless a reply has been sent already, and close."""
            self._stop_waiting()
            self.connections.discard(self)
            if self.cycle is None:
                self.transport.write(refusal)
            _leave(self.transport)

    return Limited


def websocket_protocol(limits: ConnectionLimits) -> type[WebSocketsSansIOProtocol]:
    """uvicorn's WebSocket protocol, which cuts off who does not read."""

    class Limited(WebSocketsSansIOProtocol):
        """One connection."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._stall = _Stall(limits.stall_s)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stall.end()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stall.begin(self.loop, self.transport)

        def resume_writing(self) -> None:
            self._stall.end()
            super().resume_writing()

    return Limited


def _leave(transport: asyncio.Transport) -> None:
    """Close; at once where that would wait for a client that does not read."""
    if transport.get_write_buffer_size():
        transport.abort()
    else:
        transport.close()


def _refusal(most: int) -> bytes:
    body = json.dumps(ApiError(503, f"{most} connections are open", code="overloaded").body).encode()
    head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Retry-After: 1\r\nConnection: close\r\n\r\n" + body


def allowed_connections(wanted: int, limit: Callable[[int], int] | None = None) -> int:
    """How many connections the process may have, at most `wanted`: raises its soft limit on open files as far as it can."""
    n_file = (limit or _raise_file_limit)(wanted + RESERVED_FILES)
    return max(1, min(wanted, n_file - RESERVED_FILES))


def _raise_file_limit(wanted: int) -> int:
    """Open files that are allowed from now on."""
    try:
        import resource
    except ImportError:  # not a POSIX system: no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    except (ValueError, OSError):
        return soft
    return raised
