"""Connections that are opened and left, and clients that do not read: the others are served."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from vkllm import SamplingParams

httpx = pytest.importorskip("httpx", reason="httpx is not installed")

ENDLESS = {"logit_bias": {"2047": -100, "2045": -100}}  # the end tokens of `tiny` are never drawn


@contextmanager
def limited(batch: Any, body_s: float = 60.0, **limits: Any) -> Iterator[Any]:
    """Another server over the same engine, with these limits on connections, and small buffers in the kernel."""
    from vkllm.serve.app import create_app
    from vkllm.serve.metrics import Metrics
    from vkllm.serve.options import Address, ConnectionLimits, ServerOptions
    from vkllm.serve.server import Server

    app = create_app(batch, ServerOptions("tiny", body_s=body_s), Metrics())
    server = Server(app, Address(port=0), stop_s=5.0, limits=ConnectionLimits(**limits))
    server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def test_connections_that_are_opened_and_left(session_server: Any) -> None:
    with limited(session_server.batch, most=20, patience_s=1.0) as running:
        port = running.port
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
    with limited(server.batch, most=1) as running, socket.create_connection(("127.0.0.1", running.port), timeout=10) as busy:
        busy.sendall(head + ask)
        assert busy.recv(10) == b"HTTP/1.1 2"
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as new:
            assert new.recv(1000).startswith(b"HTTP/1.1 503")
    server.quiet()


def test_a_request_that_never_gets_complete(session_server: Any) -> None:
    """A byte now and then keeps no connection open."""
    with limited(session_server.batch, most=20, patience_s=0.5) as running:
        whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as slow:
            slow.sendall(whole)
            reply = b""
            while not reply.endswith(b"}"):
                reply += slow.recv(1000)
            slow.sendall(whole[:5])
            assert slow.recv(1000) == b"", "closed, though it has begun a second request"


def test_a_body_that_never_arrives(session_server: Any) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    with limited(session_server.batch, body_s=0.2) as running:
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as slow:
            slow.sendall(head)
            reply = b""
            while part := slow.recv(1000):
                reply += part
        assert reply.startswith(b"HTTP/1.1 408") and b"request_timeout" in reply


def deaf(port: int, **fields: Any) -> socket.socket:
    """A client that asks for a stream, and does not read it."""
    body = json.dumps({"model": "tiny", "prompt": "Once upon a time", "stream": True} | ENDLESS | fields).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return client


def test_a_client_that_stops_reading_holds_up_nobody_and_is_cut_off(server: Any) -> None:
    with limited(server.batch, stall_s=1.0) as running, deaf(running.port, max_tokens=400, n=4, logprobs=20) as client:
        while not server.batch.stats.n_running:
            time.sleep(0.005)
        ask = {"model": "tiny", "prompt": "Hi", "max_tokens": 3}
        url = f"http://127.0.0.1:{running.port}/v1/completions"
        assert httpx.post(url, json=ask, headers={"Connection": "close"}, timeout=60).status_code == 200
        while running._server.server_state.connections:
            time.sleep(0.01)
        server.quiet()
        client.settimeout(60)
        got = b""
        with suppress(ConnectionResetError):
            while part := client.recv(1 << 20):
                got += part
        assert got.startswith(b"HTTP/1.1 200") and b"[DONE]" not in got


def test_a_websocket_that_is_not_read_is_cut_off(server: Any) -> None:
    pytest.importorskip("websockets", reason="websockets is not installed")
    fields = {"model": "tiny", "prompt": "Once", "max_tokens": 400, "n": 32, "temperature": 2.0}
    text = json.dumps({"id": "x" * 128, "request": fields | ENDLESS}).encode()
    upgrade = "GET /v1/stream HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    with limited(server.batch, stall_s=0.5) as running, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", running.port))
        client.sendall(f"{upgrade}Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n".encode())
        assert client.recv(12) == b"HTTP/1.1 101"
        client.sendall(b"\x81\xfe" + len(text).to_bytes(2, "big") + bytes(4) + text)  # a text frame, masked with zeros
        while not server.batch.stats.n_running:
            time.sleep(0.005)
        while running._server.server_state.connections:
            time.sleep(0.01)
        server.quiet()


def test_what_is_not_read_is_bounded(server: Any) -> None:
    """The engine does not run ahead of a reader for ever: its request ends, and what waited is dropped."""
    from vkllm.serve.runs import Job, Run, SlowClientError

    async def ask() -> int:
        params = SamplingParams(max_tokens=400, logit_bias={2047: -100.0, 2045: -100.0})
        run = Run(server.batch, [Job([1, 2, 3], params)], max_unread=20)
        before = server.batch.stats.requests.get("cancelled", 0)
        while server.batch.stats.requests.get("cancelled", 0) == before:
            await asyncio.sleep(0.01)
        assert run._queue.qsize() == 1
        with pytest.raises(SlowClientError, match="20 of its tokens"):
            async for _ in run.events():
                pass
        run.close()
        return server.batch.stats.completion_tokens

    asyncio.run(ask())


N_LEFT = 10_000


def test_ten_thousand_connections_that_are_opened_and_left(device: object, serving: Any) -> None:
    """As many as this machine lets a process have, which is 10,000 on most."""
    resource = pytest.importorskip("resource", reason="no limits on open files to raise here")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else N_LEFT + 1000, hard))
    n = min(N_LEFT, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500)
    left: list[socket.socket] = []
    try:
        with serving("--max-connections", str(N_LEFT + 500)) as server:
            address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
            for _ in range(n):
                left.append(socket.create_connection(address, timeout=30))
            ask = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 3}
            assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
            assert httpx.post(f"{server.url}/v1/completions", json=ask, timeout=60).status_code == 200
            assert not any(said(s) for s in left), "nobody was refused"
            left[-1].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert left[-1].recv(12) == b"HTTP/1.1 200"
    finally:
        for s in left:
            s.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def said(client: socket.socket) -> bytes:
    """What the server has sent without being asked."""
    client.setblocking(False)
    try:
        return client.recv(100)
    except BlockingIOError:
        return b""
    finally:
        client.settimeout(30)


def test_the_limit_on_open_files_is_raised() -> None:
    from vkllm.serve.connections import RESERVED_FILES, allowed_connections

    asked: list[int] = []
    assert allowed_connections(10_000, lambda wanted: asked.append(wanted) or wanted) == 10_000  # type: ignore[func-returns-value]
    assert asked == [10_000 + RESERVED_FILES]
    assert allowed_connections(10_000, lambda wanted: 1024) == 1024 - RESERVED_FILES
    assert allowed_connections(10_000, lambda wanted: 64) == 1


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
