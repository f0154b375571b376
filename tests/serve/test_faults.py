"""What goes wrong below or outside of the server: a clear answer each time, and it goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from vkllm import LLMEngine, RuntimeConfig, SamplingParams
from vkllm.batching import BatchEngine
from vkllm.chain import Output, Rows
from vkllm.errors import DeviceLostError, OutOfDeviceMemoryError

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
for needed in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install 'vkllm[serve,test]'")

TEXT = {"model": "tiny", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 30}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Who is a cat?"}], "temperature": 0, "max_tokens": 8}
ENDLESS = (
    "{% if messages[0].content == 'evil' %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}"
    "{{ messages[0].content }}"
)


@pytest.fixture
def faulty(single: LLMEngine) -> Iterator[tuple[Any, BatchEngine, Any]]:
    """A client of a server of its own, the engine, and the host of its model. Large bodies are allowed."""
    from vkllm.serve.app import create_app, served
    from vkllm.serve.host import ModelHost
    from vkllm.serve.metrics import Metrics
    from vkllm.serve.options import Address, ServerOptions
    from vkllm.serve.server import Server

    def load(path: str) -> BatchEngine:
        return BatchEngine(LLMEngine.init_model(path, RuntimeConfig(n_ctx=512, n_seq=4)), revive=True)

    batch, options = load("tiny"), ServerOptions("tiny", max_body=16 << 20, template_s=1.0)
    host = ModelHost(served(batch, options), load)
    server = Server(create_app(host, options, Metrics()), Address(port=0), stop_s=5.0)
    server.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client:
        yield client, batch, host
    server.stop()


def failing(forward: Callable[[Rows], Output], error: Exception, when: Callable[[int, int], bool]) -> Callable[[Rows], Output]:
    """`forward`, which fails when `when(step, rows)` says so."""
    steps = count()

    def step(rows: Rows) -> Output:
        if when(next(steps), len(rows.token_ids)):
            raise error
        return forward(rows)

    return step


def stream(client: Any, **fields: Any) -> tuple[str, list[dict[str, Any]]]:
    """The text of a stream, and its errors."""
    lines = client.post("/v1/completions", json=TEXT | {"stream": True} | fields).text.split("\n\n")
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(c["text"] for e in events for c in e.get("choices", ()))
    return text, [e["error"] for e in events if "error" in e]


def test_a_device_lost_during_a_stream(faulty: Any, single: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    client, batch, _ = faulty
    expected = single.generate(TEXT["prompt"], SamplingParams(temperature=0.0, max_tokens=30))
    lost = failing(batch.engine.chain.forward, DeviceLostError("the device was lost"), lambda step, n_row: step == 6)
    monkeypatch.setattr(batch.engine.chain, "forward", lost)
    assert stream(client) == (expected, []), "it is opened again, and the stream goes on as if nothing had been"
    assert batch.stats.n_revived == 1
    lost = failing(batch.engine.chain.forward, DeviceLostError("the device was lost"), lambda step, n_row: step >= 6)
    monkeypatch.setattr(batch.engine.chain, "forward", lost)
    with monkeypatch.context() as gone:
        gone.setattr("vkllm.batching.open_device", lambda selector: (_ for _ in ()).throw(DeviceLostError("gone")))
        text, [error] = stream(client)
    assert expected.startswith(text) and error["code"] == "DeviceLostError"
    assert client.get("/health").status_code == 503 and client.get("/health").json()["status"] == "failed"
    refused = client.post("/v1/completions", json=TEXT)
    assert refused.status_code == 503 and refused.headers["Retry-After"]
    assert client.post("/admin/reload").status_code == 200, "the way back without a restart"
    assert stream(client) == (expected, []) and client.get("/health").json()["status"] == "ready"


def test_out_of_memory_on_admission(faulty: Any, single: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a large step does not fit, smaller ones do; where none does, the request is refused, and others go on."""
    client, batch, _ = faulty
    expected = single.generate(TEXT["prompt"], SamplingParams(temperature=0.0, max_tokens=30))
    full, forward = OutOfDeviceMemoryError("out of device memory"), batch.engine.chain.forward
    with monkeypatch.context() as tight:
        tight.setattr(batch.engine.chain, "forward", failing(forward, full, lambda step, n_row: n_row > 2))
        assert stream(client) == (expected, [])
    with monkeypatch.context() as tight:
        tight.setattr(batch.engine.chain, "forward", failing(forward, full, lambda step, n_row: True))
        refused = client.post("/v1/completions", json=TEXT)
    assert (
        refused.status_code == 503 and refused.headers["Retry-After"] and "no memory left" in refused.json()["error"]["message"]
    )
    assert stream(client) == (expected, []) and batch.pool.n_free == batch.pool.n_block


def test_a_prompt_of_ten_megabytes(faulty: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, batch, _ = faulty
    encode, long = batch.tokenizer.encode, "word " * (2 << 20)

    def guarded(text: str, *options: Any, **more: Any) -> list[int]:
        assert len(text) < len(long), "it is refused before it is tokenized"
        return encode(text, *options, **more)

    monkeypatch.setattr(batch.tokenizer, "encode", guarded)
    for url, body in (
        ("/v1/completions", TEXT | {"prompt": long}),
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": long}]}),
        ("/v1/completions", TEXT | {"prompt": [7] * 300_000}),
    ):
        refused = client.post(url, json=body)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    key = {"Authorization": f"Bearer {server.key}"}
    with httpx.Client(base_url=server.url, headers=key, timeout=60) as strict:
        declared = strict.post("/v1/completions", content=iter([b"x" * (1 << 20)] * 10))
        assert declared.status_code == 413 and declared.json()["error"]["code"] == "request_too_large"
    assert client.post("/v1/completions", json=TEXT).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'{"model": "tiny", "prompt": ',
        b"[" * 50_000,
        b'{"model": "tiny", "prompt": "x", "logit_bias": ' + b'{"1":' * 10_000 + b"1" + b"}" * 10_001,
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": [1e3]}',
        b'{"model": "tiny", "prompt": [-1]}',
        b'{"model": "tiny", "prompt": [' + b"9" * 5000 + b"]}",
        b'{"model": "tiny", "prompt": "x", "prompt": {"a": 1}}',
        b'\x00\x01\x02{"model": "tiny"}',
        b'{"model": "tiny", "prompt": "\\ud800\\u0000", "max_tokens": "1"}',
    ],
    ids=range(14),
)
def test_malformed_bodies(server: Any, body: bytes) -> None:
    reply = httpx.post(
        f"{server.url}/v1/completions", content=body, headers={"Authorization": f"Bearer {server.key}"}, timeout=60
    )
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error", reply.text
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_strange_but_sound_bodies(server: Any) -> None:
    for fields in (
        {"prompt": "a\u0000b\U0001f600"},
        {"seed": 10**300},
        {"max_tokens": 10**30, "stop": "."},
        {"logit_bias": {"7": -100}},
    ):
        body, key = TEXT | fields, {"Authorization": f"Bearer {server.key}"}
        assert httpx.post(f"{server.url}/v1/completions", json=body, headers=key, timeout=60).status_code == 200, fields


def test_a_hostile_template(faulty: Any) -> None:
    from vkllm.serve.render import TemplateWorker

    client, _, host = faulty
    host.current.close_template()
    host.current.template = TemplateWorker(ENDLESS, "", "", 1.0)
    refused = client.post("/v1/chat/completions", json=CHAT | {"messages": [{"role": "user", "content": "evil"}]})
    assert refused.status_code == 400 and "chat template" in refused.json()["error"]["message"]
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_a_bug_of_ours_is_a_vague_answer(faulty: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    client, _, host = faulty
    monkeypatch.setattr(type(host.current), "jobs", lambda *_: (_ for _ in ()).throw(KeyError("the hidden badger")))
    with caplog.at_level(logging.ERROR):
        reply = client.post("/v1/completions", json=TEXT)
    assert reply.status_code == 500 and reply.json()["error"]["message"] == "internal error"
    assert any("KeyError" in record.getMessage() for record in caplog.records)
    assert client.get("/health").status_code == 200
