"""Another model while streams run: they finish on the old one, new requests get the new one; nothing is lost when that fails."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vkllm import LLMEngine, RuntimeConfig, SamplingParams
from vkllm.batching import BatchEngine
from vkllm.files import resolve_model

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
for needed in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install 'vkllm[serve,test]'")

RUNTIME = RuntimeConfig(n_ctx=512, n_seq=4)
LONG = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 300, "temperature": 0, "stream": True}
SHORT = {"prompt": "The cat", "max_tokens": 8, "temperature": 0}


@dataclass
class Reloading:
    """A server that can load other models, and the file of one. `opened`: what was loaded; `runtime` is for the next load; while
    `may_load` is not set, a load waits."""

    client: Any
    host: Any
    other: Path
    opened: list[BatchEngine] = field(default_factory=list)
    runtime: RuntimeConfig = RUNTIME
    may_load: threading.Event = field(default_factory=threading.Event)

    def load(self, path: str) -> BatchEngine:
        self.may_load.wait(60)
        self.opened.append(BatchEngine(LLMEngine.init_model(path, self.runtime)))
        return self.opened[-1]

    def reload(self, **body: Any) -> Any:
        drain = body.pop("drain", None)
        return self.client.post("/admin/reload", json=body, params={"drain": drain} if drain else None)

    def ask(self, model: str, **fields: Any) -> Any:
        return self.client.post("/v1/completions", json={"model": model} | SHORT | fields)

    def models(self) -> list[str]:
        return [m["id"] for m in self.client.get("/v1/models").json()["data"]]

    def running(self, n: int) -> None:
        """Wait until so many streams run on the model that serves."""
        until(lambda: self.host.stats.n_running == n)


def until(true: Any) -> None:
    """Wait for it, up to a minute."""
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def closed(batch: BatchEngine) -> bool:
    """Has the engine ended, and given its device memory back?"""
    return not batch._thread.is_alive() and not batch.engine.chain._buffers


@pytest.fixture
def server(single: LLMEngine, tmp_path: Path) -> Iterator[Reloading]:
    from vkllm.serve.app import create_app, served
    from vkllm.serve.host import ModelHost
    from vkllm.serve.metrics import Metrics
    from vkllm.serve.options import Address, ServerOptions
    from vkllm.serve.server import Server

    other = tmp_path / "other.gguf"
    shutil.copy(resolve_model("tiny"), other)
    options, state = ServerOptions("tiny", path="tiny"), Reloading(None, None, other)
    state.may_load.set()
    state.host = ModelHost(served(state.load("tiny"), options), state.load)
    running = Server(create_app(state.host, options, Metrics()), Address(port=0), stop_s=5.0)
    running.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{running.port}", timeout=60) as state.client:
        yield state
    state.may_load.set()
    running.stop()
    assert all(closed(batch) for batch in state.opened), "the server gives back what it has loaded"


def streamed(client: Any, body: dict[str, Any]) -> str:
    """The text of a stream that ends as it should."""
    text, ended = "", False
    with client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            ended = ended or line == "data: [DONE]"
            if line.startswith("data: {"):
                text += "".join(c["text"] for c in json.loads(line[6:])["choices"])
    assert ended
    return text


def test_streams_go_on_while_another_model_is_loaded(server: Reloading, single: LLMEngine) -> None:
    expected = single.generate(LONG["prompt"], SamplingParams(temperature=0.0, max_tokens=300))
    with ThreadPoolExecutor(3) as clients:
        streams = [clients.submit(streamed, server.client, LONG) for _ in range(3)]
        server.running(3)
        reply = server.reload(model=str(server.other))
        assert reply.status_code == 200, reply.text
        said = reply.json()
        assert (said["model_id"], said["previous"]) == ("other", "tiny") and server.models() == ["other"]
        answers = [server.ask("other"), server.ask("tiny")]
        assert [a.status_code for a in answers] == [200, 404]
        assert answers[0].json()["choices"][0]["text"] == single.generate(
            "The cat", SamplingParams(temperature=0.0, max_tokens=8)
        )
        assert [s.result() for s in streams] == [expected] * 3
    until(lambda: closed(server.opened[0]))
    total = server.client.get("/metrics").text
    n_token = 3 * single.generate_result(LONG["prompt"], SamplingParams(temperature=0.0, max_tokens=300)).usage.completion_tokens
    found = next(line for line in total.splitlines() if line.startswith("vkllm_completion_tokens_total"))
    assert float(found.split()[1]) >= n_token, "totals go on through a reload"


def test_a_reload_that_fails_changes_nothing(server: Reloading, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(server.other.read_bytes()[:5000])
    for body, status in (({"model": str(damaged)}, 400), ({"model": str(tmp_path / "none.gguf")}, 400), ({"modle": "x"}, 400)):
        reply = server.reload(**body)
        assert reply.status_code == status and reply.json()["error"]["message"]
        assert server.ask("tiny").status_code == 200 and server.models() == ["tiny"]
    assert "'tiny' serves on" in server.reload(model=str(damaged)).json()["error"]["message"]


def test_where_both_do_not_fit_the_reply_says_so(server: Reloading) -> None:
    server.runtime = RuntimeConfig(n_ctx=512, n_seq=4, cache_tokens=1 << 36)
    reply = server.reload(model=str(server.other))
    assert reply.status_code == 507 and reply.json()["error"]["code"] == "out_of_device_memory"
    assert "drain=true" in reply.json()["error"]["message"]
    assert server.ask("tiny").status_code == 200


def test_two_reloads_at_once(server: Reloading) -> None:
    server.may_load.clear()
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(server.reload, model=str(server.other))
        until(lambda: server.host.loading)
        second = server.reload()
        assert second.status_code == 409 and second.json()["error"]["code"] == "reload_running"
        assert server.ask("tiny").status_code == 200, "the old model serves meanwhile"
        server.may_load.set()
        assert first.result().status_code == 200
    assert server.models() == ["other"]


def test_drained_first(server: Reloading, single: LLMEngine) -> None:
    expected = single.generate(LONG["prompt"], SamplingParams(temperature=0.0, max_tokens=300))
    server.may_load.clear()
    with ThreadPoolExecutor(2) as clients:
        stream = clients.submit(streamed, server.client, LONG)
        server.running(1)
        reload = clients.submit(server.reload, model=str(server.other), drain="true")
        until(lambda: server.host.current is None)
        refused, health = server.ask("tiny"), server.client.get("/health")
        assert refused.status_code == health.status_code == 503 and health.json() == {"status": "loading"}
        assert int(refused.headers["Retry-After"]) >= 1 and int(health.headers["Retry-After"]) >= 1
        assert stream.result() == expected, "what runs finishes first"
        until(lambda: closed(server.opened[0]))
        server.may_load.set()
        assert reload.result().status_code == 200
    assert server.ask("other").status_code == 200 and server.client.get("/health").json()["status"] == "ready"


def test_drained_first_and_then_it_fails(server: Reloading, tmp_path: Path) -> None:
    reply = server.reload(model=str(tmp_path / "none.gguf"), drain="true")
    assert reply.status_code == 400 and "'tiny' serves on" in reply.json()["error"]["message"]
    assert server.ask("tiny").status_code == 200 and closed(server.opened[0]) and len(server.opened) == 2


def test_the_same_file_again_without_a_body(server: Reloading) -> None:
    assert server.client.post("/admin/reload").json()["model_id"] == "tiny"
    server.host.reload_soon()  # what SIGHUP does
    until(lambda: len(server.opened) == 3 and not server.host.loading)
    assert server.ask("tiny").status_code == 200


def test_who_may_reload(server: Reloading, session_server: Any) -> None:
    """Without a key: programs on this machine, but no web page. With a key: who has it."""
    page = server.client.post("/admin/reload", headers={"Origin": "http://127.0.0.1"})
    far = server.client.post("/admin/reload", headers={"X-Forwarded-For": "203.0.113.7"})
    assert page.status_code == far.status_code == 403 and len(server.opened) == 1
    url, key = f"{session_server.url}/admin/reload", {"Authorization": f"Bearer {session_server.key}"}
    assert httpx.post(url).status_code == 401
    assert httpx.post(url, headers=key).status_code == 501, "that server has no way to load models"
