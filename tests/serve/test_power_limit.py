"""`vkllm serve --power-limit` as a process: the limit holds while it serves, and is as before when a signal has ended it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from urllib.request import urlopen

import pytest

SERVE = """
import sys
from pathlib import Path
from vkllm.sensors import hwmon
hwmon.ROOT = Path(sys.argv[1])
from vkllm.cli import app
app(["serve", "tiny", "--port", "0", "--n-ctx", "128", "--parallel", "1", "--power-limit", "200"])
"""
CHIP = {"name": "coretemp", "temp1_label": "Package id 0", "temp1_input": 50000, "power1_cap": 300_000_000}


@pytest.fixture
def limit(device: object, tmp_path: Path) -> Path:
    """The file of a limit of 300 W, of what stands for the CPU that lavapipe runs on."""
    for needed in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    if getattr(getattr(device, "info", None), "kind", "") != "cpu":
        pytest.skip("the device is no CPU: it has a sensor of its own")
    (tmp_path / "hwmon0").mkdir()
    for file, value in CHIP.items():
        (tmp_path / "hwmon0" / file).write_text(f"{value}\n")
    return tmp_path / "hwmon0" / "power1_cap"


def test_sigterm_puts_the_limit_back(limit: Path) -> None:
    command = [sys.executable, "-c", SERVE, str(limit.parent.parent)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        watchdog = threading.Timer(120, server.kill)
        watchdog.start()
        try:
            assert server.stderr is not None
            url = next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            with urlopen(f"{url}/health", timeout=60) as reply:  # it is serving: the connection waited for that
                assert reply.status == 200
            assert limit.read_text() == "200000000\n"
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=60) == 0
        finally:
            watchdog.cancel()
            server.kill()
    assert limit.read_text() == "300000000\n"
