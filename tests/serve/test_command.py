"""`vkllm serve` as a process: it listens, loads again, stops when asked to; a killed one leaves nothing to repair."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed")

ASK = {"model": "pet", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 200, "stream": True}
HEADERS = {"Authorization": "Bearer sesame"}


def test_kill_start_again_load_again_and_stop_gracefully(device: object, serving: Any, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sesame\n")
    options = ("--api-key-file", str(key), "--alias", "pet")
    texts = []
    for ends in (False, True):
        with (
            serving(*options, *([] if ends else ["--log-prompts"])) as server,
            httpx.stream("POST", f"{server.url}/v1/completions", json=ASK, headers=HEADERS, timeout=60) as reply,
        ):
            lines = (line for line in reply.iter_lines() if line)
            texts.append(json.loads(next(lines)[6:])["choices"][0]["text"])
            if not ends:
                _prompts_are_logged(server)
                os.kill(server.process.pid, signal.SIGKILL)
                continue
            os.kill(server.process.pid, signal.SIGHUP)
            server.wait_for_log("pet serves, loaded")
            os.kill(server.process.pid, signal.SIGTERM)
            assert list(lines)[-1] == "data: [DONE]", "a running stream may finish"
            assert server.process.wait(timeout=60) == 0
    assert texts[0] == texts[1]


def _prompts_are_logged(server: Any) -> None:
    """Where that was asked for."""
    ask = ASK | {"prompt": "the hidden badger", "max_tokens": 3, "stream": False}
    said = httpx.post(f"{server.url}/v1/completions", json=ask, headers=HEADERS, timeout=60).json()["choices"][0]["text"]
    server.wait_for_log("the hidden badger")
    assert json.dumps([said]) in server.log() and "sesame" not in server.log()


def test_the_log_holds_neither_prompts_nor_keys(device: object, serving: Any) -> None:
    secret, key = "the hidden badger", "sesame-open"
    headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "my-id.1"}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": secret}], "max_tokens": 5}
    with serving("--api-key", key, "--log-format", "json", "--log-level", "debug") as server:
        with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
            replies = [
                client.post("/v1/chat/completions", json=chat),
                client.post("/v1/chat/completions", content=f'{{"model": "{secret}'),
                client.post("/v1/chat/completions", json=chat | {"messages": [{"role": secret, "content": secret}]}),
                client.post("/v1/completions", json={"model": secret, "prompt": secret}),
                client.post("/v1/embeddings", json={"model": "tiny", "input": secret}),
                client.post("/tokenize", json={"content": secret}),
                client.get(f"/v1/models/{secret}"),
                client.get(f"/{secret}?key={key}"),
                client.get("/v1/models", headers={"Authorization": f"Bearer {key}{secret}", "X-Request-Id": f"{secret} {key}"}),
            ]
        assert [r.status_code for r in replies] == [200, 400, 400, 404, 200, 200, 404, 404, 401]
        assert replies[0].headers["X-Request-Id"] == "my-id.1" and replies[-1].headers["X-Request-Id"].startswith("req_")
        _over_a_socket(server.url, key, chat)
        server.process.terminate()
        server.process.wait(timeout=60)
        text = server.log()
    assert secret not in text and "badger" not in text and key not in text
    lines = [json.loads(line) for line in text.splitlines()]
    requests = [line for line in lines if line["logger"] == "vkllm.serve.requests"]
    first = requests[0]
    assert (first["request_id"], first["route"], first["status"]) == ("my-id.1", "/v1/chat/completions", 200)
    assert (first["model"], first["completion_tokens"], first["client_gone"]) == ("tiny", 5, False)
    assert first["finish_reason"] == "length" and first["prompt_tokens"] > 5 and first["cached_tokens"] == 0
    assert 0 <= first["queue_s"] <= first["ttft_s"] <= first["total_s"]
    assert [line["error"] for line in requests[1:3]] == ["invalid_json", "invalid_value"]
    assert [line["route"] for line in requests if line["method"] == "WS"] == ["/v1/stream"]


def _over_a_socket(url: str, key: str, chat: dict[str, Any]) -> None:
    client = pytest.importorskip("websockets.sync.client", reason="websockets is not installed")
    url = f"{url.replace('http', 'ws')}/v1/stream?key={key}"
    with client.connect(url, additional_headers={"Authorization": f"Bearer {key}"}) as ws:
        ws.send(json.dumps({"id": "x", "request": chat}))
        while "finish_reason" not in json.loads(ws.recv(timeout=60)):
            pass


def test_the_key_comes_from_one_place(monkeypatch: Any, tmp_path: Path) -> None:
    from vkllm.errors import ConfigError
    from vkllm.serve.command import key_from

    monkeypatch.setenv("VKLLM_API_KEY", "of the environment")
    assert key_from(None, None) == "of the environment"
    assert key_from("given", None) == "given"
    (tmp_path / "key").write_text("\n")
    with pytest.raises(ConfigError):
        key_from(None, tmp_path / "key")


def test_an_unknown_form_of_log_is_refused() -> None:
    from vkllm.errors import ConfigError
    from vkllm.serve.command import configure_logs

    for form, level in (("xml", "info"), ("json", "loud")):
        with pytest.raises(ConfigError):
            configure_logs(form, level, False)


def test_a_hang_up_of_the_terminal_stops_the_server(monkeypatch: Any) -> None:
    """SIGHUP loads again; but where it comes because the terminal was closed, nobody wants the server any more."""
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    from vkllm.serve import server as module
    from vkllm.serve.options import Address

    asked: list[float] = []
    for before, after, stops in ((True, False, True), (True, True, False), (False, False, False)):
        monkeypatch.setattr(module, "_has_terminal", lambda before=before: before)
        server = module.Server(None, Address(port=0), hang_up=lambda: asked.append(time.time()))
        monkeypatch.setattr(module, "_has_terminal", lambda after=after: after)
        server._on_hang_up()
        assert server._server.should_exit == stops
        server._socket.close()
    assert len(asked) == 2
