"""`--power-limit`: set, and put back whatever ends the run. hwmon over files, signals in a process of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vkllm.errors import ConfigError, DeviceError
from vkllm.sensors.hwmon import HwmonSensor
from vkllm.sensors.power import power_limited

AMDGPU = {"name": "amdgpu", "temp1_input": 50000, "power1_average": 90_000_000, "power1_cap": 300_000_000}
RANGE = {"power1_cap_min": 100_000_000, "power1_cap_max": 330_000_000}


def sensor(folder: Path, files: dict[str, Any]) -> HwmonSensor:
    for file, value in files.items():
        (folder / file).write_text(f"{value}\n")
    return HwmonSensor(folder)


def watts(folder: Path, file: str = "power1_cap") -> float:
    return int((folder / file).read_text()) / 1e6


def test_amdgpu(tmp_path: Path) -> None:
    found = sensor(tmp_path, AMDGPU | RANGE)
    with power_limited(found, 200.0):
        assert watts(tmp_path) == 200.0
        reading = found.read()
        assert reading and reading.power_limit_w == 200.0
    assert watts(tmp_path) == 300.0
    with pytest.raises(ZeroDivisionError), power_limited(found, 200.0):
        raise ZeroDivisionError
    assert watts(tmp_path) == 300.0


@pytest.mark.parametrize("asked", [50.0, 400.0])
def test_outside_of_the_range(tmp_path: Path, asked: float) -> None:
    with pytest.raises(DeviceError, match=f"{asked:g} W") as error, power_limited(sensor(tmp_path, AMDGPU | RANGE), asked):
        pass
    assert "100 to 330 W" in error.value.hint and watts(tmp_path) == 300.0


def test_intel_has_its_sustained_limit_elsewhere(tmp_path: Path) -> None:
    """power1_cap of xe is for bursts, and must stay."""
    files = {"name": "xe", "temp2_label": "pkg", "temp2_input": 50000, "energy1_input": 5, "power1_cap": 250_000_000}
    found = sensor(tmp_path, files | {"power1_max": 190_000_000})
    reading = found.read()
    assert reading and reading.power_limit_w == 190.0
    with power_limited(found, 120.0):
        assert watts(tmp_path, "power1_max") == 120.0 and watts(tmp_path) == 250.0
    assert watts(tmp_path, "power1_max") == 190.0


def test_no_limit(tmp_path: Path) -> None:
    cpu = sensor(tmp_path, {"name": "coretemp", "temp1_label": "Package id 0", "temp1_input": 50000})
    for found in (cpu, None):
        with pytest.raises(DeviceError, match=r"can(not)? be set") as error, power_limited(found, 100.0):
            pass
        assert "leave --power-limit out" in error.value.hint
    with power_limited(None, None):
        pass
    with pytest.raises(ConfigError), power_limited(cpu, -1.0):
        pass


def test_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sensor(tmp_path, AMDGPU)

    def refuse(self: Path, text: str) -> int:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(DeviceError, match="Permission denied") as error, power_limited(found, 200.0):
        pass
    assert "root" in error.value.hint and "power1_cap" in error.value.hint


SERVING = """
import signal, sys, time
from pathlib import Path
from vkllm.sensors.hwmon import HwmonSensor
from vkllm.sensors.power import power_limited
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, and shells for what runs behind, have children ignore these
signal.signal(signal.SIGINT, signal.default_int_handler)
with power_limited(HwmonSensor(Path(sys.argv[1])), 200.0):
    print("set", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_put_it_back(tmp_path: Path, number: signal.Signals) -> None:
    sensor(tmp_path, AMDGPU)
    command = [sys.executable, "-c", SERVING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "set\n" and watts(tmp_path) == 200.0
            process.send_signal(number)
            assert process.wait(timeout=60) != 0
        finally:
            process.kill()
    assert watts(tmp_path) == 300.0
