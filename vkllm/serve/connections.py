"""Connections that are opened and left: each has some seconds to ask for something, and there is a limit to how many may wait."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from vkllm.serve.replies import ApiError


def protocol(max_connections: int, patience_s: float) -> type[H11Protocol]:
    """uvicorn's HTTP protocol with these limits."""

    body = json.dumps(ApiError(503, f"{max_connections} connections are open", code="overloaded").body).encode()
    head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    refusal = head.encode() + b"Retry-After: 1\r\nConnection: close\r\n\r\n" + body

    class Limited(H11Protocol):
        """One connection."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._patience = self.loop.call_later(patience_s, self._give_up)
            if len(self.connections) > max_connections:
                transport.write(refusal)
                transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            self._patience.cancel()
            super().connection_lost(exc)

        def _give_up(self) -> None:
            if self.cycle is None:  # it has not asked for anything yet
                cast(asyncio.Transport, self.transport).close()

    return Limited
