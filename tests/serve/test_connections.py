"""Connections that are opened and left, and clients that do not read: the others are served."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed")


def test_connections_that_are_opened_and_left(session_server: Any) -> None:
    from vkllm.serve.app import ServerOptions, create_app
    from vkllm.serve.command import Address, Server
    from vkllm.serve.metrics import Metrics

    app = create_app(session_server.batch, ServerOptions("tiny"), Metrics())
    server = Server(app, Address(port=0), stop_s=5.0, max_connections=20, patience_s=1.0)
    server.start()
    left = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(40)]
    try:
        answers = [s.recv(1000) for s in left[20:]]
        assert all(a.startswith(b"HTTP/1.1 503") for a in answers)
        assert [s.recv(1000) for s in left[:20]] == [b""] * 20, "closed after a second"
        assert httpx.get(f"http://127.0.0.1:{server.port}/health", timeout=30).status_code == 200
    finally:
        for s in left:
            s.close()
        server.stop()


def test_a_client_that_stops_reading_holds_up_nobody(server: Any) -> None:
    fields = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 400, "stream": True, "n": 8, "logprobs": 20}
    body = json.dumps(fields | {"logit_bias": {"2047": -100, "2045": -100}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        deaf.sendall(head.encode() + body)
        while not server.batch.stats.n_running:
            time.sleep(0.005)
        ask = {"model": "tiny", "prompt": "Hi", "max_tokens": 3}
        reply = httpx.post(
            f"{server.url}/v1/completions", json=ask, headers={"Authorization": f"Bearer {server.key}"}, timeout=60
        )
        assert reply.status_code == 200
        server.quiet()  # its tokens are generated, and its blocks free, though nobody reads


def test_a_limit_of_requests_a_minute(session_server: Any) -> None:
    from vkllm.serve.app import ServerOptions, create_app
    from vkllm.serve.command import Address, Server
    from vkllm.serve.metrics import Metrics

    server = Server(create_app(session_server.batch, ServerOptions("tiny", rate=5), Metrics()), Address(port=0), stop_s=5.0)
    server.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client:
        replies = [client.get("/v1/models") for _ in range(7)]
        assert [r.status_code for r in replies] == [200] * 5 + [429] * 2
        assert 1 <= int(replies[-1].headers["Retry-After"]) <= 60 and replies[-1].json()["error"]["type"] == "rate_limit_error"
        assert client.get("/health").status_code == 200
    server.stop()
