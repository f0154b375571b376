"""What /metrics says, with a simulated device: every figure that an operator needs, in Prometheus's text format."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vkllm.errors import DeviceError
from vkllm.homeostasis import HomeostasisConfig
from vkllm.sensors.hwmon import HwmonSensor
from vkllm.sensors.simulated import SimulatedSensor, ThermalModel, ThermalPlant
from vkllm.serve.pacing import HomeostasisPacer, paced

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")

NAMES = {
    *("requests_waiting", "requests_running", "prompt_tokens_total", "completion_tokens_total", "prefix_hit_tokens_total"),
    *("time_to_first_token_seconds", "time_between_tokens_seconds", "kv_blocks_used", "kv_blocks", "temperature_celsius"),
    *("power_watts", "power_limit_watts", "duty", "throttle_seconds_total", "energy_joules_total", "joules_per_token"),
    *("thermal_trips_total", "target_celsius", "condition"),
}
"""What issue 3 asks for, and what goes with it."""


class Engine:
    """Totals as a BatchEngine has them."""

    def __init__(self) -> None:
        from vkllm.batching import BatchStats

        self.stats, self.pool = BatchStats(), cast(Any, SimpleNamespace(n_block=8, block_size=16))


class Device:
    """A simulated device that a test runs, with its pacer and an engine that makes 10 tokens for every busy second."""

    def __init__(self, model: ThermalModel | None = None, mode: str = "pi") -> None:
        self.now_s, self.engine = 1000.0, Engine()
        self.plant = ThermalPlant(model or ThermalModel(noise_c=0.0, noise_w=0.0), 30.0)
        self.sensor = SimulatedSensor(self.plant, clock=lambda: self.now_s)
        config = HomeostasisConfig(mode=cast(Any, mode))
        self.pacer = HomeostasisPacer(self.sensor, config, clock=lambda: self.now_s, start=False)
        self.pacer.watch(self.engine)

    def run(self, seconds: float, busy: float = 1.0) -> None:
        for _ in range(round(2 * seconds)):
            self.now_s += 0.5
            share = min(busy, self.pacer.state.duty)
            self.plant.step(0.5, share)
            self.pacer.pace(0.5 * share)
            self.engine.stats.completion_tokens += round(5 * share)
            self.pacer.poll()

    def metrics(self) -> dict[str, float]:
        """Name with labels → value, as Prometheus reads it."""
        from prometheus_client.parser import text_string_to_metric_families

        from vkllm.serve.metrics import Metrics

        metrics = Metrics()
        metrics.watch(self.engine, self.pacer.metrics)
        metrics.observe("ttft", 0.2)
        metrics.observe("gap", 0.02)
        found = {}
        for family in text_string_to_metric_families(metrics.text().decode()):
            for sample in family.samples:
                labels = "".join(f"{{{name}={value}}}" for name, value in sample.labels.items())
                found[sample.name.removeprefix("vkllm_") + labels] = sample.value
        return found


def test_everything_is_there() -> None:
    device = Device()
    device.run(120)
    found = device.metrics()
    names = {name.split("{")[0].removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for name in found}
    assert names >= NAMES
    assert found["temperature_celsius{sensor=core}"] == round(device.plant.die_c) and found["power_limit_watts"] == 350.0
    assert found["condition{condition=regulating}"] == 1.0 and found["time_to_first_token_seconds_count"] == 1.0
    assert found["kv_blocks"] == 8.0 and found["throttle_seconds_total{reason=thermal}"] == 0.0


def test_joules_are_those_of_the_device() -> None:
    device = Device()
    device.run(90)
    found, plant = device.metrics(), device.plant
    first = 350.0 * 0.5  # at most: the first reading only sets the start
    assert plant.energy_j - first <= found["energy_joules_total"] <= plant.energy_j
    before, tokens = found["energy_joules_total"], device.engine.stats.completion_tokens
    device.run(60)
    found = device.metrics()
    made = device.engine.stats.completion_tokens - tokens
    assert found["joules_per_token"] == pytest.approx((found["energy_joules_total"] - before) / made, rel=0.02)
    device.run(70, busy=0.0)
    assert "joules_per_token" not in device.metrics(), "no token for a minute"


def test_throttling_is_counted_by_reason() -> None:
    device = Device(mode="off")
    device.plant.die_c = device.plant.sink_c = 95.0
    device.run(10)
    found = device.metrics()
    assert found["throttle_seconds_total{reason=thermal}"] == pytest.approx(device.plant.throttle_s, abs=0.5)
    assert found["throttle_seconds_total{reason=power_cap}"] == 0.0


def test_a_lost_sensor_shows_no_old_temperature() -> None:
    device = Device()
    device.run(20)
    device.sensor.lost = True
    device.run(10)
    found, report = device.metrics(), device.pacer.report()
    assert "temperature_celsius{sensor=core}" not in found and "power_watts" not in found
    assert found["condition{condition=lost}"] == 1.0 and found["energy_joules_total"] > 0
    assert report["state"]["temperature_c"] is None and report["history"][-1]["temperature_c"] is None


def test_the_report_has_ten_minutes() -> None:
    device = Device()
    device.run(700)
    report = device.pacer.report()
    history = report["history"]
    assert len(history) == 1200 and history[-1]["time_s"] == report["now_s"] == device.now_s
    assert history[-1]["tok_s"] == pytest.approx(report["engine"]["tok_s"]) and 4 < history[-1]["tok_s"] <= 10
    assert [h["time_s"] for h in device.pacer.report(history[-3]["time_s"])["history"]] == [h["time_s"] for h in history[-2:]]
    assert report["engine"]["kv_tokens"] == 128 and report["state"]["joules_per_token"] > 0


def fake_engine() -> Any:
    """As much of an LLMEngine as pacing needs."""
    info = SimpleNamespace(name="a device")
    return SimpleNamespace(device=SimpleNamespace(info=info), chain=SimpleNamespace(capacity=16))


def test_pacing_holds_the_power_limit(tmp_path: Path) -> None:
    for file, value in {"name": "amdgpu", "temp1_input": 50000, "power1_cap": 300_000_000}.items():
        (tmp_path / file).write_text(f"{value}\n")
    limit = tmp_path / "power1_cap"
    with (
        pytest.raises(ZeroDivisionError),
        paced(fake_engine(), HomeostasisConfig(), 200.0, find=lambda info: HwmonSensor(tmp_path)) as pacer,
    ):
        assert limit.read_text() == "200000000\n" and pacer.config.max_batch == 16
        raise ZeroDivisionError
    assert limit.read_text() == "300000000\n"


def test_without_a_sensor_nothing_is_held_but_tokens_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with paced(fake_engine(), HomeostasisConfig(), find=lambda info: None) as pacer:
        assert pacer.batch_limit is None and pacer.pace(1.0) == 0.0
        pacer.watch(Engine())
        pacer.poll()
        report = pacer.report()
        assert report["mode"] == "off" and report["sensor"] is None and report["history"][-1]["tok_s"] == 0.0
        assert {m.name for m in pacer.metrics()} >= {"duty", "thermal_trips"}
    assert "not paced" in caplog.text
    with (
        pytest.raises(DeviceError, match="cannot be set"),
        paced(fake_engine(), HomeostasisConfig(), 100.0, find=lambda info: None),
    ):
        pass
