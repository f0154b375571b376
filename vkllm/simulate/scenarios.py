"""What a device meets in a day: ambient temperature, load, the state of its fan and of its sensor.

A scenario is a tuple of Conditions, one for every TICK_S seconds, made before the run: every controller meets the same day.
Events keep their place in the run, whatever its length: a fan that fails after half of 24 h fails after half of 2 h.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise

from vkllm.errors import ConfigError

TICK_S = 5.0
SCENARIOS = ("steady", "swing", "burst", "fan-failure", "sensor-loss", "blind", "day")
SWING_C = 6.0  # the day's ambient: this much above and below
FAILED_AIRFLOW = 0.4  # of the air when a fan has failed
TWENTY_MINUTES = 20 / 1440  # of a day

Span = tuple[float, float]  # from and to, as shares of the run
HALF_PAST = (0.50, 0.58)  # about two hours of a day
FAN_FAILURES: dict[str, tuple[Span, ...]] = {
    "fan-failure": (HALF_PAST,),
    "blind": ((0.255, 0.29), HALF_PAST),
    "day": (HALF_PAST,),
}
LOSSES = ((0.25, 0.25 + TWENTY_MINUTES), (0.70, 0.7002))  # twenty minutes, and some seconds
SENSOR_LOSSES: dict[str, tuple[Span, ...]] = {
    "sensor-loss": LOSSES,
    "blind": ((0.25, 0.25 + TWENTY_MINUTES), (0.52, 0.52 + TWENTY_MINUTES)),  # the fan fails after it, and before it
    "day": LOSSES,
}


@dataclass(frozen=True, slots=True)
class Conditions:
    """The world for one tick. `demand`: the share of time for which there is work; `intensity`: power of a busy second."""

    ambient_c: float
    demand: float = 1.0
    intensity: float = 1.0
    airflow: float = 1.0
    sensor: bool = True


@dataclass(frozen=True, slots=True)
class Scenario:
    """A named run of `len(ticks) * TICK_S` seconds."""

    name: str
    ambient_c: float  # the mean
    ticks: tuple[Conditions, ...]

    @property
    def seconds(self) -> float:
        """Length of the run."""
        return len(self.ticks) * TICK_S


def scenario(name: str, ambient_c: float = 35.0, hours: float = 24.0, seed: int = 1) -> Scenario:
    """One of SCENARIOS. `day` has swing, bursts, the fan failure and the lost sensor; `blind` a fan failure beside a lost sensor,
    in either order.

    Raises: ConfigError: the name is unknown, or the run is shorter than a minute or longer than a year.
    """
    if name not in SCENARIOS:
        raise ConfigError(f"scenario {name!r} is unknown", f"choose one of {', '.join(SCENARIOS)}, all")
    if not 1 / 60 <= hours <= 8784:
        raise ConfigError(f"a run of {hours} hours", "choose something between a minute and a year")
    count = round(hours * 3600 / TICK_S)
    loads = _loads(count, random.Random(seed)) if name in ("burst", "day") else [(1.0, 1.0)] * count
    swing_c = SWING_C if name in ("swing", "day") else 0.0
    ticks = []
    for i, (demand, intensity) in enumerate(loads):
        at = i / count
        ambient = ambient_c - swing_c * math.cos(math.tau * at)
        airflow = FAILED_AIRFLOW if _within(at, FAN_FAILURES.get(name, ())) else 1.0
        ticks.append(Conditions(ambient, demand, intensity, airflow, not _within(at, SENSOR_LOSSES.get(name, ()))))
    return Scenario(name, ambient_c, tuple(ticks))


def _within(at: float, spans: tuple[Span, ...]) -> bool:
    return any(start <= at < end for start, end in spans)


def _loads(count: int, rng: random.Random) -> list[tuple[float, float]]:
    """(demand, intensity) of every tick: idle, light and full load in turn, for 10 s to some minutes each; at full load prefill
    (all of the power) alternates with decode (less)."""
    ends, kinds, at = [0], [], 0
    while at < count:
        at += 1 + int(rng.expovariate(1.0) * rng.choice((6, 24, 72)))  # 30 s, 2 min, 6 min on the average
        ends.append(min(at, count))
        kinds.append(rng.choice(((0.0, 1.0), (0.3, 0.8), (1.0, 1.0), (1.0, 1.0), (1.0, 0.75))))
    return [kind for (a, b), kind in zip(pairwise(ends), kinds, strict=True) for _ in range(b - a)]
