"""WebSocket /v1/stream: several prompts at once, cancelled one by one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vkllm import LLMEngine, SamplingParams

client = pytest.importorskip("websockets.sync.client", reason="websockets is not installed")

LONG = {"model": "tiny", "prompt": "The cat", "max_tokens": 450, "logit_bias": {"2047": -100, "2045": -100}}
SHORT = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}


def connect(server: Any, key: str) -> Any:
    return client.connect(f"{server.url.replace('http', 'ws')}/v1/stream", additional_headers={"Authorization": f"Bearer {key}"})


def test_two_prompts_and_a_cancellation(server: Any, single: LLMEngine) -> None:
    with connect(server, server.key) as ws:
        ws.send(json.dumps({"id": "long", "request": LONG}))
        ws.send(json.dumps({"id": "short", "request": SHORT}))
        text, ended = "", {}
        while "long" not in ended:
            said = json.loads(ws.recv(timeout=60))
            if "error" in said or "finish_reason" in said:
                ended[said["id"]] = said
            elif said["id"] == "short":
                text += said["text"]
            if said["id"] == "short" and "short" in ended:
                ws.send(json.dumps({"id": "long", "cancel": True}))
        assert text == single.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=12))
        assert ended["short"]["usage"]["completion_tokens"] <= 12 and "error" in ended["long"]
        for bad in ("{", '{"id": "x", "request": {"model": "tiny", "prompt": "Hi", "best_of": 2}}', '{"id": "x", "request": {}}'):
            ws.send(bad)
            assert json.loads(ws.recv(timeout=60))["error"]["type"] == "invalid_request_error"
        ws.send(json.dumps({"id": "left", "request": LONG}))
        ws.recv(timeout=60)
    server.quiet()  # the client left: nothing runs any more


def test_the_key_and_the_page_that_opens_it(server: Any) -> None:
    from websockets.exceptions import InvalidStatus

    with pytest.raises(InvalidStatus):
        connect(server, "wrong")
    url, key = f"{server.url.replace('http', 'ws')}/v1/stream", {"Authorization": f"Bearer {server.key}"}
    with pytest.raises(InvalidStatus):
        client.connect(url, additional_headers=key, origin="http://evil.example")
    with client.connect(url, additional_headers=key, origin=server.url):
        pass


def test_limits(session_server: Any) -> None:
    """Messages are as long as bodies of HTTP; every prompt counts for the rate; who asks for nothing is let go."""
    from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK

    from vkllm.serve.app import create_app
    from vkllm.serve.metrics import Metrics
    from vkllm.serve.options import Address, ServerOptions
    from vkllm.serve.server import Server

    options = ServerOptions("tiny", max_body=4096, rate=5, idle_s=0.3)
    running = Server(create_app(session_server.batch, options, Metrics()), Address(port=0), stop_s=5.0, max_message=4096)
    running.start()
    url = f"ws://127.0.0.1:{running.port}/v1/stream"
    try:
        with client.connect(url) as ws:
            for i in range(5):
                ws.send(json.dumps({"id": str(i), "request": SHORT | {"max_tokens": 1}}))
            ended = [said for said in (json.loads(ws.recv(timeout=60)) for _ in range(10)) if "finish_reason" in said]
            assert len(ended) == 5
            ws.send(json.dumps({"id": "x", "request": SHORT}))
            assert json.loads(ws.recv(timeout=60))["error"]["code"] == "rate_limit_exceeded"
            with pytest.raises(ConnectionClosedOK):
                ws.recv(timeout=60)
        with client.connect(url) as ws, pytest.raises(ConnectionClosedError, match="1009"):
            ws.send("x" * 5000)
            ws.recv(timeout=60)
    finally:
        running.stop()
