"""A real server on 127.0.0.1 with the packaged model, in threads of this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from vkllm import LLMEngine, RuntimeConfig
from vkllm.batching import BatchEngine
from vkllm.vk import list_devices

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance", "httpx")
KEY = "sesame"


@dataclass(frozen=True)
class Running:
    """A server that answers at `url`, and the engine behind it."""

    url: str
    batch: BatchEngine
    key: str = KEY

    def quiet(self) -> None:
        """Wait until nothing runs, and check that all blocks came back."""
        for _ in range(1000):
            if not self.batch._streams and not self.batch._inbox:
                break
            time.sleep(0.01)
        assert self.batch.pool.n_free == self.batch.pool.n_block, "blocks leaked"


@pytest.fixture(scope="session")
def single() -> Iterator[LLMEngine]:
    """The same model, one request at a time."""
    if not list_devices():
        pytest.skip("no Vulkan device: install mesa-vulkan-drivers")
    with LLMEngine.init_model("tiny", RuntimeConfig(n_ctx=512)) as engine:
        yield engine


@pytest.fixture(scope="session")
def session_server(single: LLMEngine) -> Iterator[Running]:
    for needed in NEEDED:
        pytest.importorskip(needed, reason=f"{needed} is not installed: pip install 'vkllm[serve,test]'")
    from vkllm.serve.app import ServerOptions, create_app
    from vkllm.serve.command import Address, Server
    from vkllm.serve.metrics import Metrics

    metrics = Metrics()
    with (
        LLMEngine.init_model("tiny", RuntimeConfig(n_ctx=512, n_seq=8)) as engine,
        BatchEngine(engine, observe=metrics.observe) as batch,
    ):
        options = ServerOptions("tiny", api_key=KEY, max_body=64 << 10)
        server = Server(create_app(batch, options, metrics), Address(port=0), stop_s=5.0)
        server.start()
        yield Running(f"http://127.0.0.1:{server.port}", batch)
        server.stop()


@pytest.fixture
def server(session_server: Running) -> Iterator[Running]:
    """The server; after each test nothing may be left in it."""
    yield session_server
    session_server.quiet()
