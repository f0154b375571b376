"""What Debian 12's Mesa does not have, tested where it is: cooperative matrices, and today's validation layers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CANNOT = 77
ENGINE = ("gemm_prefill", "shapes", "multi_step", "persistent")
TESTS = ("tests/shaders/test_gemm.py", "tests/vk/test_device.py", *(f"tests/engine/test_{name}.py" for name in ENGINE))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_on_a_newer_driver() -> None:
    if os.environ.get("VKLLM_TEST_SID") != "1":
        pytest.skip("builds a Debian sid system of 2 GB for some minutes: set VKLLM_TEST_SID=1 (needs root and a mirror)")
    run = subprocess.run([ROOT / "tools/sid.sh", *TESTS], capture_output=True, text=True, errors="replace")
    if run.returncode == CANNOT:
        pytest.skip(run.stderr.strip().splitlines()[-1])
    told = [line for line in (run.stdout + run.stderr).splitlines() if "Layer Info" not in line]
    assert run.returncode == 0, "\n".join(told[-60:])
    assert not any("no cooperative matrices" in line for line in told), "sid's lavapipe has lost its cooperative matrices"
