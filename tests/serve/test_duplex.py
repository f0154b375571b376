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


def test_the_key(server: Any) -> None:
    from websockets.exceptions import InvalidStatus

    with pytest.raises(InvalidStatus):
        connect(server, "wrong")
