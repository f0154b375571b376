"""What a device says of its heat, and how far that is from where it should be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vkllm.homeostasis.config import HomeostasisConfig

Throttle = Literal["thermal", "power_brake", "power_cap", "other"]

STEP_DOWN_REASONS = frozenset({"thermal", "power_brake"})  # a power cap is how many devices run normally
PLAUSIBLE_C = (-40.0, 150.0)  # anything else is a broken sensor


@dataclass(frozen=True, slots=True)
class Temperature:
    """One sensor. `target_c`: what the vendor aims at; `slowdown_c`: the device throttles; `max_c`: it switches off."""

    value_c: float
    target_c: float | None = None
    slowdown_c: float | None = None
    max_c: float | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What a device said at `time_s` (the clock of `now_s`). None: the device does not tell.

    `temperatures`: by place: "core", "memory", "hotspot", or the driver's own name. `busy`: the share of the time since the
    last reading in which submits ran, from whoever submits (0 when idle); it tells a device that is cool because it is paced
    from one that has nothing to do.
    """

    time_s: float
    temperatures: Mapping[str, Temperature]
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None
    throttle: frozenset[Throttle] = frozenset()
    busy: float | None = None


def set_point_c(config: HomeostasisConfig, name: str, t: Temperature) -> float:
    """The temperature at which a sensor is held: its target, or the vendor's where that is lower, below any slowdown."""
    target = config.targets.get(name, config.target_c if name == "core" or t.target_c is None else t.target_c)
    if t.target_c is not None and t.target_c < target:
        target = t.target_c
    return target if t.slowdown_c is None else min(target, t.slowdown_c - config.guard_c)


def smallest_margin(config: HomeostasisConfig, reading: Reading) -> tuple[float, str] | None:
    """(°C below the set point, sensor) of the sensor that is nearest to it or furthest above. None: no sensor is plausible.

    Power counts as a sensor, `power_c_per_percent` for every percent of the limit.
    """
    found: tuple[float, str] | None = None
    for name, t in reading.temperatures.items():
        if PLAUSIBLE_C[0] <= t.value_c <= PLAUSIBLE_C[1]:  # false for NaN too
            margin = set_point_c(config, name, t) - t.value_c
            if found is None or margin < found[0]:
                found = margin, name
    power, limit = reading.power_w, reading.power_limit_w
    if found and power is not None and limit and limit > 0 and math.isfinite(power):
        margin = 100.0 * (config.power_fraction - power / limit) * config.power_c_per_percent
        if margin < found[0]:
            found = margin, "power"
    return found
