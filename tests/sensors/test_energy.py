"""Joules from counters and from power."""

from __future__ import annotations

import pytest

from vkllm.homeostasis import Reading
from vkllm.sensors.energy import EnergyMeter
from vkllm.sensors.simulated import LiveSensor, ThermalModel, ThermalPlant


def metered(*readings: tuple[float, float | None, float | None]) -> float | None:
    """Joules after readings of (time, power, energy)."""
    meter = EnergyMeter()
    for time_s, power_w, energy_j in readings:
        meter.add(Reading(time_s, {}, power_w, None, energy_j))
    return meter.joules if meter.measured else None


def test_a_counter_counts() -> None:
    assert metered((0, 100.0, 5000.0), (1, 900.0, 5120.0), (60, None, 9000.0)) == 4000.0, "through silence too"


def test_power_over_time() -> None:
    assert metered((0, 100.0, None), (1, 200.0, None), (3, 200.0, None)) == 550.0
    assert metered((0, 100.0, None), (60, 100.0, None), (61, 100.0, None)) == 100.0, "what was not measured is not counted"
    assert metered((5, 100.0, None), (4, 100.0, None)) is None, "a clock set back"


def test_a_counter_that_went_back() -> None:
    assert metered((0, 100.0, 5000.0), (1, 100.0, 10.0), (2, 100.0, 130.0)) == 220.0


def test_nothing_told() -> None:
    assert metered((0, None, None), (1, None, None)) is None and metered((0, 100.0, 5.0)) is None


def test_a_live_sensor_is_heated_by_work() -> None:
    now, busy = [100.0], [0.0]
    plant = ThermalPlant(ThermalModel(noise_w=0.0, noise_c=0.0), 35.0)
    sensor = LiveSensor(plant, lambda: busy[0], clock=lambda: now[0])
    assert sensor.read() and plant.energy_j == 0.0
    now[0] += 2.0
    sensor.read()
    assert plant.energy_j == pytest.approx(2 * 35.0)
    now[0], busy[0] = 104.0, 3.0  # a submit longer than the time since the last look: the rest comes later
    sensor.read()
    assert plant.work_s == pytest.approx(2.0)
    now[0] = 106.0
    reading = sensor.read()
    assert plant.work_s == pytest.approx(3.0) and reading and reading.time_s == 106.0
    assert plant.energy_j == pytest.approx(6 * 35.0 + 3 * 315.0)
