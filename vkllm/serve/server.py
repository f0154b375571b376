"""uvicorn with our application, on a socket of ours and with our limits on connections."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

from vkllm.serve.options import Address, ConnectionLimits


class Server:
    """Serves `app` until `stop`, or a signal where it has the main thread. `stop_s`: how long running replies may go on then;
    `max_message`: bytes of a WebSocket message; `hang_up`: what SIGHUP does, unless it says that the terminal has gone: then the
    server stops."""

    def __init__(
        self,
        app: Any,
        address: Address,
        *,
        stop_s: float = 30.0,
        limits: ConnectionLimits | None = None,
        max_message: int = 4 << 20,
        hang_up: Callable[[], None] | None = None,
    ) -> None:
        import uvicorn

        from vkllm.serve.connections import http_protocol, websocket_protocol

        limits = limits or ConnectionLimits()
        self._socket = socket.create_server((address.host, address.port), backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=http_protocol(limits),
            ws=websocket_protocol(limits),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=round(2 * limits.patience_s) + 1,  # ours ends before
            timeout_graceful_shutdown=round(stop_s),
            h11_max_incomplete_event_size=64 << 10,
            ws_max_size=max_message,
        )
        self._server = uvicorn.Server(config)
        self._hang_up, self._had_terminal = hang_up, _has_terminal()
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serve in this thread. In the main thread SIGINT and SIGTERM stop it, and `run` returns."""
        before = self._signals() if threading.current_thread() is threading.main_thread() else {}
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signals(self) -> dict[int, Any]:
        """Set our handlers; returns those before. uvicorn has its own for SIGINT and SIGTERM, and raises them at its end."""
        before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
        if self._hang_up is not None and hasattr(signal, "SIGHUP"):
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._on_hang_up)
        return {int(number): handler for number, handler in before.items()}

    def _on_hang_up(self, *_: object) -> None:
        if self._had_terminal and not _has_terminal():
            self._server.should_exit = True
        elif self._hang_up is not None:
            self._hang_up()

    def start(self) -> None:
        """Serve in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="vkllm-http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No new connections; what runs may finish, up to the deadline."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()


def _has_terminal() -> bool:
    """Is stderr a terminal that still exists?"""
    try:
        return os.isatty(2)
    except OSError:
        return False
