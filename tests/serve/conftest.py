"""Real servers on 127.0.0.1 with the packaged model: one in threads of this process, others as processes of their own."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Serving:
    """A server process, and the file that it logs to."""

    process: subprocess.Popen[bytes]
    file: Path
    url: str = ""

    def log(self) -> str:
        """What it has logged up to now."""
        return self.file.read_text()

    def wait_for_log(self, pattern: str) -> str:
        """Wait until the log holds it, up to two minutes; returns the match."""
        for _ in range(12_000):
            if found := re.search(pattern, self.log()):
                return found[0]
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        raise AssertionError(self.log())


@pytest.fixture
def serving(tmp_path: Path) -> Callable[..., AbstractContextManager[Serving]]:
    """`with serving("--option", …) as server`: a process on a free port, killed at the end."""

    @contextmanager
    def start(*options: str) -> Iterator[Serving]:
        for needed in NEEDED:
            pytest.importorskip(needed, reason=f"{needed} is not installed")
        command = [sys.executable, "-m", "vkllm", "serve", "tiny", "--port", "0", "--n-ctx", "256", "--parallel", "2", *options]
        file = tmp_path / f"log-{time.monotonic_ns()}"
        with file.open("wb") as log:
            process = subprocess.Popen(command, stderr=log)
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        try:
            url = Serving(process, file).wait_for_log(r"http://127\.0\.0\.1:\d+")
            yield Serving(process, file, url)
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()

    return start
