"""Sensor, controller and clock together."""

from __future__ import annotations

import threading
import time

import pytest

from vkllm.homeostasis import HomeostasisConfig, Reading, Temperature, Throttle
from vkllm.sensors.pacer import IDLE_S, ThermalPacer
from vkllm.sensors.simulated import SimulatedSensor, ThermalModel, ThermalPlant


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Fixed:
    """A sensor that tells what it is told."""

    name, closed = "fixed", False

    def __init__(self, clock: Clock, celsius: float | None) -> None:
        self.clock, self.celsius = clock, celsius

    def read(self) -> Reading | None:
        return None if self.celsius is None else Reading(self.clock(), {"core": Temperature(self.celsius)})

    def close(self) -> None:
        self.closed = True


class Throttled(Fixed):
    """Tells power and throttle reasons too."""

    throttle: frozenset[Throttle] = frozenset()

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock, 40.0)

    def read(self) -> Reading | None:
        return Reading(self.clock(), {"core": Temperature(40.0)}, power_w=100.0, throttle=self.throttle)


def polled(pacer: ThermalPacer, clock: Clock, count: int, busy_s: float = 0.0) -> None:
    for _ in range(count):
        clock.now += 0.5
        if busy_s:
            pacer.pace(busy_s)
        pacer.poll()


def test_it_paces_by_the_temperature() -> None:
    clock = Clock()
    sensor = Fixed(clock, 40.0)
    pacer = ThermalPacer(sensor, clock=clock, start=False)
    assert pacer.pace(0.28) == pytest.approx(0.72)  # slow before the first reading
    polled(pacer, clock, 60, 0.5)
    assert pacer.pace(0.1) == 0.0 and pacer.batch_limit is None
    sensor.celsius = 77.0
    polled(pacer, clock, 40, 0.5)
    assert pacer.pace(0.1) > 1.0 and 0 < (pacer.batch_limit or 0) < 64
    sensor.celsius = 95.0
    polled(pacer, clock, 10)
    assert pacer.batch_limit == 0 and pacer.retry_after_s >= 1 and pacer.state.condition == "tripped"
    assert len(pacer.history) == 110
    pacer.close()
    assert sensor.closed


def test_a_sensor_that_hangs_is_a_lost_one() -> None:
    """Nobody polls; the state knows by itself."""
    clock = Clock()
    pacer = ThermalPacer(Fixed(clock, 40.0), clock=clock, start=False)
    polled(pacer, clock, 60)
    assert pacer.state.duty == 1.0
    clock.now += 4
    assert pacer.state.condition == "lost" and pacer.pace(0.28) == pytest.approx(0.72)


def test_a_stale_reading_is_not_shown() -> None:
    clock = Clock()
    sensor = Fixed(clock, 40.0)
    pacer = ThermalPacer(sensor, clock=clock, start=False)
    polled(pacer, clock, 4)
    sensor.celsius = None
    polled(pacer, clock, 4)
    assert pacer.reading and pacer.reading.temperatures["core"].value_c == 40.0, "2 s old"
    polled(pacer, clock, 4)
    assert pacer.reading is None and pacer.state.condition == "lost"


def test_throttling_and_energy_are_counted() -> None:
    clock = Clock()
    sensor = Throttled(clock)
    pacer = ThermalPacer(sensor, clock=clock, start=False)
    polled(pacer, clock, 4)
    sensor.throttle = frozenset({"power_cap"})
    polled(pacer, clock, 4)
    sensor.throttle = frozenset({"power_cap", "thermal", "power_brake"})
    polled(pacer, clock, 6)
    assert pacer.throttle_s == pytest.approx(3.0), "a power cap is how devices run normally; two reasons at once are one time"
    assert pacer.throttle_by == pytest.approx({"power_cap": 5.0, "thermal": 3.0, "power_brake": 3.0})
    assert pacer.energy.measured and pacer.energy.joules == pytest.approx(6.5 * 100.0)
    clock.now += 1000  # the sensor hung
    pacer.poll()
    assert pacer.throttle_s == pytest.approx(3.0 + pacer.config.stale_s)


def test_no_sensor() -> None:
    pacer = ThermalPacer(None, start=False)
    pacer.poll()
    assert pacer.state.condition == "starting" and pacer.state.duty == HomeostasisConfig().lost_duty
    pacer.close()


def test_the_busy_share_survives_long_submits() -> None:
    clock = Clock()
    pacer = ThermalPacer(Fixed(clock, 40.0), clock=clock, start=False)

    def busy() -> float | None:
        pacer.poll()
        reading = pacer.reading
        assert reading
        return reading.busy

    clock.now += 0.5
    assert busy() is None  # one may be running
    clock.now += 1.5
    pacer.pace(1.6)
    assert busy() == pytest.approx(0.8)
    clock.now += 0.5
    pacer.pace(0.1)
    assert busy() == pytest.approx(0.2)
    clock.now += IDLE_S
    assert busy() == 0.0
    clock.now += 0.5
    assert busy() == 0.0


def test_the_loop_closes_on_the_simulated_device() -> None:
    plant = ThermalPlant(ThermalModel(), 35.0)
    clock = Clock()
    pacer = ThermalPacer(SimulatedSensor(plant, clock=clock), clock=clock, start=False)
    hottest = 0.0
    for _ in range(1200):
        duty, spent = pacer.state.duty, 0.0
        while spent < 0.5:  # submits of 50 ms with their gaps
            spent += 0.05 + pacer.pace(0.05)
        clock.now += spent
        plant.step(spent, 0.05 * round(spent * duty / 0.05) / spent)
        pacer.poll()
        hottest = max(hottest, plant.die_c)
    assert 74 < plant.die_c < 76.5 and hottest < 77


def test_the_thread() -> None:
    class Simple:
        name = "simple"

        def read(self) -> Reading:
            return Reading(time.monotonic(), {"core": Temperature(40.0)})

        def close(self) -> None:
            pass

    before = threading.active_count()
    with ThermalPacer(Simple(), interval_s=0.01) as pacer:
        for _ in range(500):
            if pacer.state.condition == "regulating":
                break
            time.sleep(0.01)
        assert pacer.state.condition == "regulating" and pacer.reading
    assert threading.active_count() == before
