"""Connections that are opened and left, and clients that do not read: the others are served."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed")

ENDLESS = {"logit_bias": {"2047": -100, "2045": -100}}  # the end tokens of `tiny` are never drawn


@contextmanager
def limited(batch: Any, **limits: Any) -> Iterator[int]:
    """Another server over the same engine, with these limits on connections; its port."""
    from vkllm.serve.app import create_app
    from vkllm.serve.metrics import Metrics
    from vkllm.serve.options import Address, ConnectionLimits, ServerOptions
    from vkllm.serve.server import Server

    app = create_app(batch, ServerOptions("tiny"), Metrics())
    server = Server(app, Address(port=0), stop_s=5.0, limits=ConnectionLimits(**limits))
    server.start()
    try:
        yield server.port
    finally:
        server.stop()


def test_connections_that_are_opened_and_left(session_server: Any) -> None:
    with limited(session_server.batch, most=20, patience_s=1.0) as port:
        left = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(40)]
        try:
            answers = [s.recv(1000) for s in left[:20]]
            assert all(a.startswith(b"HTTP/1.1 503") and b"20 connections" in a for a in answers), "the oldest make room"
            assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=30).status_code == 200
            assert left[20].recv(1000).startswith(b"HTTP/1.1 503"), "and the next one made room for us"
            assert [s.recv(1000) for s in left[21:]] == [b""] * 19, "closed after a second"
        finally:
            for s in left:
                s.close()


def test_where_all_are_busy_a_new_connection_is_refused(server: Any) -> None:
    ask = json.dumps({"model": "tiny", "prompt": "Once", "max_tokens": 400, "stream": True} | ENDLESS).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(ask)}\r\n\r\n".encode()
    with limited(server.batch, most=1) as port, socket.create_connection(("127.0.0.1", port), timeout=10) as busy:
        busy.sendall(head + ask)
        assert busy.recv(10) == b"HTTP/1.1 2"
        with socket.create_connection(("127.0.0.1", port), timeout=10) as new:
            assert new.recv(1000).startswith(b"HTTP/1.1 503")
    server.quiet()


def test_a_request_that_never_gets_complete(session_server: Any) -> None:
    """A byte now and then keeps no connection open."""
    with limited(session_server.batch, most=20, patience_s=0.5) as port:
        whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
            slow.sendall(whole)
            reply = b""
            while not reply.endswith(b"}"):
                reply += slow.recv(1000)
            slow.sendall(whole[:5])
            assert slow.recv(1000) == b"", "closed, though it has begun a second request"


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
