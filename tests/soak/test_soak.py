"""`vkllm soak`: its figures from made-up readings, and short runs of the real engine on a simulated device."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from vkllm import RuntimeConfig
from vkllm.errors import ConfigError, DeviceError
from vkllm.homeostasis import HomeostasisConfig, Reading, State, Temperature
from vkllm.sensors.simulated import LiveSensor, ThermalModel, ThermalPlant
from vkllm.soak import Moment, Recorder, SoakOptions, soak
from vkllm.soak import run as module

ISSUE = ("time_over_target_s", "temp_std_c", "throttle_s", "throughput_kept", "trips", "mean_duty")


def state(duty: float) -> State:
    return cast(State, SimpleNamespace(duty=duty, condition="regulating"))


def reading(core_c: float, memory_c: float = 50.0) -> Reading:
    return Reading(0.0, {"core": Temperature(core_c), "memory": Temperature(memory_c)})


def test_the_recorder_adds_up() -> None:
    recorder = Recorder(HomeostasisConfig(target_c=75.0))
    recorder.add(2.0, 2.0, state(1.0), reading(60.0))
    recorder.add(3.0, 1.0, state(0.5), reading(77.0))  # 2 °C over the target
    recorder.add(4.0, 1.0, state(0.5), reading(75.0, 92.0))  # memory: 2 °C over its set point of 90 °C
    recorder.add(5.0, 1.0, state(0.3), None)
    recorder.add(6.0, 1.0, state(0.4), reading(74.0))
    assert (recorder.over_s, recorder.lost_s) == (2.0, 1.0)
    assert recorder.mean_duty == pytest.approx((2 * 1.0 + 0.5 + 0.5 + 0.3 + 0.4) / 6)
    deviation, highest, held = recorder.spread(75.0)
    assert deviation == pytest.approx(math.sqrt(sum((t - 71.5) ** 2 for t in (60, 77, 75, 74)) / 4))
    assert highest == 77.0 and held == pytest.approx(2 / 3)
    trace = recorder.trace("pi", None)
    assert trace.temp_c == [60.0, 77.0, 75.0, 74.0] and trace.time_s == [2.0, 3.0, 4.0, 6.0] and trace.ambient_c == []
    assert recorder.trace("pi", 20.0).ambient_c == [20.0] * 4


def test_nothing_seen() -> None:
    recorder = Recorder(HomeostasisConfig())
    assert recorder.spread(75.0) == (None, None, None) and recorder.mean_duty == 0.0
    recorder.add(1.0, 1.0, state(0.9), reading(40.0))
    assert recorder.spread(75.0) == (0.0, 40.0, None), "the target was never reached"


def test_the_start_of_a_long_run_is_left_out() -> None:
    recorder = Recorder(HomeostasisConfig())
    for i in range(700):
        recorder.add(float(i), 1.0, state(0.6), reading(40.0 if i < 600 else 75.0))
    assert recorder.spread(75.0) == (0.0, 75.0, 1.0)


def test_options() -> None:
    assert SoakOptions(3600.0).full_speed_s == 60.0 and SoakOptions(60.0).full_speed_s == 12.0
    assert SoakOptions(60.0, reference_s=0.0).full_speed_s == 0.0
    with pytest.raises(ConfigError):
        SoakOptions(0.0)


def test_no_sensor_is_told(device: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_sensor", lambda info: None)
    with pytest.raises(DeviceError, match="no temperature sensor") as error:
        soak("tiny", RuntimeConfig(n_ctx=256), HomeostasisConfig(), SoakOptions(1.0))
    assert "--simulated" in error.value.hint


def test_a_short_run_with_a_reference(device: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference comes first and at full speed; what follows is paced, and only that is in the figures."""
    monkeypatch.setattr(module, "LEAST_REFERENCE_S", 0.1)
    plant = ThermalPlant(ThermalModel(noise_c=0.0, sink_j_per_k=9e9), 30.0)  # it stays cool, whatever comes
    seen: list[Moment] = []
    figures, trace = soak(
        "tiny",
        RuntimeConfig(n_ctx=256),
        HomeostasisConfig(),
        SoakOptions(3.5, streams=2, max_tokens=16, reference_s=1.5),
        sensor=LiveSensor(plant),
        progress=seen.append,
    )
    assert figures.simulated and figures.errors == 0 and figures.lost_s == 0 and figures.tokens > 0
    assert figures.reference_tok_s and figures.throughput_kept == pytest.approx(figures.tok_s / figures.reference_tok_s)
    assert 0 < figures.seconds < 3.0 and figures.trips == 0 and figures.time_over_target_s == 0
    assert figures.joules and figures.joules_per_token == pytest.approx(figures.joules / figures.tokens)
    assert figures.joules <= 350.0 * (figures.seconds + 1), "not more than the device can take"
    modes = [moment.full_speed for moment in seen]
    assert modes.index(True) < len(modes) - 1 - modes[::-1].index(False), "full speed first"
    assert trace.temp_c and trace.ambient_c == [30.0] * len(trace.time_s)


def test_a_device_that_is_hot_gets_no_reference(device: object) -> None:
    plant = ThermalPlant(ThermalModel(noise_c=0.0, sink_j_per_k=9e9), 30.0)
    plant.die_c = plant.sink_c = 85.0
    figures, _ = soak(
        "tiny",
        RuntimeConfig(n_ctx=256),
        HomeostasisConfig(),
        SoakOptions(2.0, streams=2, max_tokens=16, reference_s=1.0),
        sensor=LiveSensor(plant),
    )
    assert figures.reference_tok_s is None and figures.throughput_kept is None
    assert figures.reference_s == 0 and figures.held_share is None
    assert figures.time_over_target_s > 0 and figures.temp_max_c and figures.temp_max_c >= 85


def test_the_command(device: object, tmp_path: Path) -> None:
    from vkllm.cli import app

    def run(*args: str) -> Any:
        return CliRunner().invoke(app, ["soak", "tiny", "--n-ctx", "256", *args], env={"COLUMNS": "200", "TERM": "dumb"})

    plot = tmp_path / "out.svg"
    result = run("--minutes", "0.03", "--streams", "2", "--simulated", "--json", "--plot", str(plot))
    assert result.exit_code == 0 and result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert set(ISSUE) <= set(found) and found["simulated"] is True and "SIMULATED" in result.stderr
    assert found["throughput_kept"] is None and found["tok_s"] >= 0 and "joules_per_token" in found
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    assert run("--mode", "fast").exit_code == 2
    assert run("--plot", str(tmp_path / "no" / "out.svg")).exit_code == 2
