"""`vkllm serve` as a process: it says where it listens, stops when asked to, and a killed one leaves nothing to repair."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed")


@contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port: the process and its URL."""
    for needed in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    command = [sys.executable, "-m", "vkllm", "serve", "tiny", "--port", "0", "--n-ctx", "256", "--parallel", "2", *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(120, server.kill)
    watchdog.start()
    assert server.stderr is not None
    try:
        lines = []
        for line in server.stderr:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield server, found[0]
                return
        raise AssertionError("".join(lines))
    finally:
        watchdog.cancel()
        server.kill()
        server.communicate()


def test_kill_start_again_and_stop_gracefully(device: object, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sesame\n")
    ask = {"model": "pet", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 200, "stream": True}
    headers = {"Authorization": "Bearer sesame"}
    options = ("--api-key-file", str(key), "--alias", "pet")
    with process(*options) as (server, url), httpx.stream("POST", f"{url}/v1/completions", json=ask, headers=headers) as reply:
        next(reply.iter_lines())
        server.kill()
    with process(*options) as (server, url), httpx.stream("POST", f"{url}/v1/completions", json=ask, headers=headers) as reply:
        lines = reply.iter_lines()
        next(lines)
        os.kill(server.pid, signal.SIGTERM)
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]", "a running stream may finish"
        assert server.wait(timeout=60) == 0


def test_the_key_comes_from_one_place(monkeypatch: Any, tmp_path: Path) -> None:
    from vkllm.errors import ConfigError
    from vkllm.serve.command import key_from

    monkeypatch.setenv("VKLLM_API_KEY", "of the environment")
    assert key_from(None, None) == "of the environment"
    assert key_from("given", None) == "given"
    (tmp_path / "key").write_text("\n")
    with pytest.raises(ConfigError):
        key_from(None, tmp_path / "key")
