"""A device that exists only as arithmetic: heat, a fan, throttling, and a sensor as coarse as real ones.

Two nodes, die and heat sink: C_die dT_die/dt = P - (T_die - T_sink) / R_die;
C_sink dT_sink/dt = (T_die - T_sink) / R_die - (T_sink - T_ambient) / R_sink.

The defaults describe a 350 W air-cooled card in a warm, badly ventilated case. They were chosen before the controller, from what
such cards show, and are not fitted to it: at full power the die runs 10 to 15 °C above its cooler within seconds (0.04 K/W and
60 J/K of silicon, lid and vapour chamber: 2.4 s), and the cooler (1 kg of aluminium and copper: 900 J/K) needs some minutes
(0.12 K/W with the fan at full speed: 108 s). Idle at a tenth of the limit. Forced convection goes with the 0.8th power of the
air speed (turbulent flow, Dittus-Boelter). At the slowdown threshold the hardware halves its clock ("HW slowdown" in NVIDIA's
nvidia-smi manual: by a factor of 2 or more) until it is 3 °C cooler. NVML tells whole degrees.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from vkllm.homeostasis import Reading, Temperature, Throttle

LONGEST_S = 0.5  # of one step of the arithmetic, in real time


@dataclass(frozen=True, slots=True)
class ThermalModel:
    """The device's constants: W, J/K, K/W, °C, s."""

    idle_w: float = 35.0
    max_w: float = 350.0
    die_j_per_k: float = 60.0
    die_k_per_w: float = 0.04
    sink_j_per_k: float = 900.0
    sink_k_per_w: float = 0.12  # with the fan at full speed
    fan_low_c: float = 40.0  # the fan's curve: least speed up to here,
    fan_high_c: float = 70.0  # full speed from here on
    fan_least: float = 0.3
    fan_s: float = 3.0  # its inertia
    slowdown_c: float = 90.0
    max_c: float = 98.0
    slowdown_clock: float = 0.5
    slowdown_hysteresis_c: float = 3.0
    noise_c: float = 0.3
    quantum_c: float = 1.0
    noise_w: float = 2.0
    power_average_s: float = 1.0  # NVML's power is an average over about a second


class ThermalPlant:
    """The device's state. `step` moves it on; what it has done is in `work_s` and `throttle_s`."""

    __slots__ = (
        *("_dt", "_k", "_k_fan", "_k_power", "airflow", "ambient_c", "clock", "die_c", "energy_j"),
        *("fan", "intensity", "model", "power_w", "shown_w", "sink_c", "throttle_s", "time_s", "work_s"),
    )

    def __init__(self, model: ThermalModel | None = None, ambient_c: float = 35.0) -> None:
        self.model = model or ThermalModel()
        self.ambient_c = self.die_c = self.sink_c = ambient_c
        self.airflow = 1.0  # of what the fans should give: less when one has failed
        self.intensity = 1.0  # power of a busy second, of the most
        self.fan, self.clock = self.model.fan_least, 1.0
        self.power_w = self.shown_w = self.model.idle_w
        self.time_s = self.work_s = self.throttle_s = self.energy_j = 0.0
        self._dt = self._k = self._k_fan = self._k_power = 0.0

    def step(self, dt: float, busy: float) -> None:
        """`dt` seconds with the device busy for the share `busy` of them. Exact for the die, Euler for the sink and the fan."""
        m = self.model
        if dt != self._dt:
            self._dt, self._k = dt, -math.expm1(-dt / (m.die_k_per_w * m.die_j_per_k))
            self._k_fan, self._k_power = -math.expm1(-dt / m.fan_s), -math.expm1(-dt / m.power_average_s)
        clock = self.clock
        power = m.idle_w + busy * clock * self.intensity * (m.max_w - m.idle_w)
        wanted = (self.die_c - m.fan_low_c) / (m.fan_high_c - m.fan_low_c)
        wanted = m.fan_least if wanted < m.fan_least else 1.0 if wanted > 1.0 else wanted
        self.fan += (wanted * self.airflow - self.fan) * self._k_fan
        before = self.die_c
        self.die_c = die = before + (self.sink_c + m.die_k_per_w * power - before) * self._k
        flow = (0.5 * (before + die) - self.sink_c) / m.die_k_per_w
        self.sink_c += dt / m.sink_j_per_k * (flow - (self.sink_c - self.ambient_c) * self.fan**0.8 / m.sink_k_per_w)
        self.power_w = power
        self.shown_w += (power - self.shown_w) * self._k_power
        self.energy_j += power * dt
        self.work_s += busy * clock * dt
        self.time_s += dt
        if clock < 1.0:
            self.throttle_s += dt
            if die < m.slowdown_c - m.slowdown_hysteresis_c:
                self.clock = 1.0
        elif die >= m.slowdown_c:
            self.clock = m.slowdown_clock


class SimulatedSensor:
    """Reads a ThermalPlant as NVML reads a GPU: noise, whole degrees, thresholds, throttle reasons.

    `lost`: every reading fails. `clock` gives a reading's time (default: the plant's own).
    """

    name = "simulated"

    def __init__(self, plant: ThermalPlant, seed: int = 0, clock: Callable[[], float] | None = None) -> None:
        self.plant, self.lost = plant, False
        self.busy: float | None = None
        self._random = random.Random(seed)
        self._clock = clock
        m = plant.model
        self._steps: dict[float, dict[str, Temperature]] = {}  # one object a degree: a day has 172,800 readings
        self._none: frozenset[Throttle] = frozenset()
        self._thermal: frozenset[Throttle] = frozenset({"thermal"})
        self._thresholds = (None, m.slowdown_c, m.max_c)

    def read(self) -> Reading | None:
        """A reading, or None when the sensor is lost."""
        if self.lost:
            return None
        plant, gauss = self.plant, self._random.gauss
        m = plant.model
        value = plant.die_c + gauss(0.0, m.noise_c) if m.noise_c else plant.die_c
        if m.quantum_c:
            value = round(value / m.quantum_c) * m.quantum_c
        temperatures = self._steps.get(value)
        if temperatures is None:
            temperatures = {"core": Temperature(value, *self._thresholds)}
            if m.quantum_c:
                self._steps[value] = temperatures
        return Reading(
            self._clock() if self._clock else plant.time_s,
            temperatures,
            plant.shown_w + gauss(0.0, m.noise_w),
            m.max_w,
            plant.energy_j,
            self._thermal if plant.clock < 1.0 else self._none,
            self.busy,
        )

    def close(self) -> None:
        """Nothing to close."""


class LiveSensor(SimulatedSensor):
    """A simulated device that real work heats, in real time: it follows `clock`, and was busy for as long as `busy_s` says.

    `busy_s` gives the seconds that submits took so far, of all together, `BatchEngine.stats.busy_s` for example.
    """

    def __init__(
        self,
        plant: ThermalPlant,
        busy_s: Callable[[], float] = lambda: 0.0,
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(plant, seed, clock)
        self.busy_s = busy_s
        self._now_s, self._told_s, self._owed_s = clock(), 0.0, 0.0

    def read(self) -> Reading | None:
        """Move the device on to now, then read it. Work that took longer than the time since the last reading is carried over."""
        assert self._clock is not None
        now, told = self._clock(), self.busy_s()
        self._owed_s += max(0.0, told - self._told_s)
        self._told_s = told
        while now > self._now_s:
            dt = min(LONGEST_S, now - self._now_s)
            used = min(self._owed_s, dt)
            self.plant.step(dt, used / dt)
            self._owed_s -= used
            self._now_s += dt
        return super().read()
