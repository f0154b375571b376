"""How to hold the temperature: one frozen set of options, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Literal, get_args

from vkllm.errors import ConfigError

Mode = Literal["pi", "ramp", "off"]

SAMPLE_S = 0.2  # how often to read: noise averages out, and what holds the target can be nearer to its limit
MAY_BE_ZERO = frozenset(
    {
        "guard_c",
        "dead_band_c",
        "filter_s",
        "power_lag_s",
        "power_filter_s",
        "jump_c",
        "lift_c",
        "lift_room_c",
        "lift_heat_c",
        "step_hold_s",
        "trip_hold_s",
    }
)


@dataclass(frozen=True, slots=True)
class HomeostasisConfig:
    """How to hold the temperature. Degrees are °C, gains are duty per °C.

    `targets` gives sensors other than the core their own set point; one that is not named takes the vendor's target, or the
    core's where there is none. No set point is above the vendor's, or nearer than `guard_c` to the sensor's slowdown threshold.
    Raises: ConfigError: a value that makes no sense.
    """

    mode: Mode = "pi"
    target_c: float = 75.0
    targets: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({"memory": 90.0, "hotspot": 88.0}))
    guard_c: float = 5.0
    power_fraction: float = 1.03  # set point of the power, of the device's limit: a device at its limit is no fault
    power_c_per_percent: float = 0.5
    # pi
    gain: float = 0.07
    integral_s: float = 1.0  # downwards: what heats from outside has to be answered within seconds
    integral_up_s: float = 7.0  # upwards: cold is no danger
    dead_band_c: float = 0.03  # above the set point: the integral goes down as slowly as up
    near_c: float = 3.0  # margins count up to here: a cold start is no reason to arrive at full speed
    filter_s: float = 0.7
    rise_per_s: float = 0.05  # downwards there is no limit
    # room above the target while all is quiet
    lift_c: float = 0.78  # at most
    lift_room_c: float = 0.98  # without any power,
    lift_heat_c: float = 0.68  # and so much less with the whole power limit
    lift_per_s: float = 0.002
    # what the load does
    power_lag_s: float = 1.0  # devices tell the mean power of about the last second
    power_filter_s: float = 1.5
    jump_c: float = 5.2  # rise, before we can answer, when a busy second starts to take the whole power limit
    jump_memory_s: float = 7200.0  # for how long heavy work is expected to come back
    cold_c: float = 25.0  # so far below the target the whole device is cold: full speed at once
    # the device's own throttling
    step_down: float = 0.7
    step_hold_s: float = 5.0
    # limits
    min_duty: float = 0.02
    lost_duty: float = 0.28  # without readings, at most
    stale_s: float = 3.0
    trip_over_c: float = 4.0
    recover_c: float = 5.0
    trip_hold_s: float = 10.0
    trip_lost_s: float = 300.0  # with a lost sensor
    max_batch: int = 64
    submit_s: float = 0.02  # a typical submit: `ramp` fixes gaps, and this makes them a duty

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"homeostasis mode {self.mode!r} is unknown", f"choose one of {', '.join(get_args(Mode))}")
        for option in fields(self):
            if option.type in ("float", "int"):
                self._check(option.name, getattr(self, option.name))
        if not 20 <= self.target_c <= 110:
            raise ConfigError(f"homeostasis: target {self.target_c!r} °C", "choose something between 20 and 110 °C")
        if not self.min_duty <= self.lost_duty < 1:
            raise ConfigError(
                f"homeostasis: min_duty {self.min_duty!r}, lost_duty {self.lost_duty!r}", "min_duty <= lost_duty < 1"
            )
        if not self.step_down < 1:
            raise ConfigError(f"homeostasis: step_down is {self.step_down!r}", "it must lie between 0 and 1")
        if self.dead_band_c + self.lift_c >= self.trip_over_c:
            raise ConfigError("homeostasis: the dead band and the lift reach the trip threshold", "keep them below trip_over_c")
        if self.max_batch < 1:
            raise ConfigError(f"homeostasis: max_batch is {self.max_batch!r}", "at least 1")

    @staticmethod
    def _check(name: str, value: float) -> None:
        """Every number is finite and positive, or may be zero."""
        if not 0 <= value < math.inf or (value == 0 and name not in MAY_BE_ZERO):
            kind = "must not be negative" if name in MAY_BE_ZERO else "must be a positive number"
            raise ConfigError(f"homeostasis: {name} is {value!r}", f"it {kind}")
