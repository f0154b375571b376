"""What the work does with the device: how much a busy second heats, and how much of the allowed time is used."""

from __future__ import annotations

import math
from typing import NamedTuple

from vkllm.homeostasis.config import HomeostasisConfig
from vkllm.homeostasis.readings import Reading

IDLE_SHARE = (
    0.1  # of the power limit, typical of an idle device; an error here makes the feed-forward a little too strong or weak
)
LEAST_BUSY = 0.1  # share of the time from which a busy second can be weighed
HEAVIEST_S = 20.0  # heavier work counts when it lasts: a moment may be noise
WEIGHTS = (0.2, 1.5)  # plausible ones


class Load(NamedTuple):
    """Heat counts as a share of what the power limit adds to an idle device, time as a share of a second."""

    weight: float = 1.0  # heat of a busy second
    heaviest: float = 1.0  # the largest weight of late
    used: float = 1.0  # share of the allowed duty that submits took, filtered
    power_w: float | None = None  # filtered, as is `busy`
    busy: float | None = None
    late_busy: float = 0.0  # as late as the power

    @property
    def expected(self) -> float:
        """How much heavier the work may become again at any moment."""
        return max(0.0, self.heaviest - self.weight)

    @property
    def worst(self) -> float:
        """The weight to assume when nothing is known."""
        return max(1.0, self.weight, self.heaviest)


def next_load(config: HomeostasisConfig, load: Load, reading: Reading, duty: float, dt: float) -> Load:
    """One step of `dt` seconds, in which `duty` was allowed."""
    used, busy_now = 1.0, reading.busy  # where nobody tells, all of it is used
    if busy_now is not None and busy_now >= 0:
        used = load.used + (min(1.0, busy_now / duty) - load.used) * _share(dt, config.filter_s)
    power, busy, late, weight = _weigh(config, load, reading, dt)
    follow = HEAVIEST_S if weight > load.heaviest else config.jump_memory_s
    return Load(weight, load.heaviest + (weight - load.heaviest) * _share(dt, follow), used, power, busy, late)


def _weigh(config: HomeostasisConfig, load: Load, reading: Reading, dt: float) -> tuple[float | None, float | None, float, float]:
    """(power, busy, late busy, weight). Power tells of about the last second, so that the busy share has to wait for it."""
    power_w, limit, share = reading.power_w, reading.power_limit_w, reading.busy
    if power_w is None or not limit or share is None or not math.isfinite(power_w + share):
        return None, None, 0.0, load.weight
    share = min(1.0, max(0.0, share))
    if load.power_w is None or load.busy is None:
        return power_w, share, share, load.weight
    late = load.late_busy + (share - load.late_busy) * _share(dt, config.power_lag_s)
    new = _share(dt, config.power_filter_s)
    power = load.power_w + (power_w - load.power_w) * new
    busy = load.busy + (late - load.busy) * new
    if busy < LEAST_BUSY:  # idle: nothing to learn
        return power, busy, late, load.weight
    weight = (power / limit - IDLE_SHARE) / (busy * (1.0 - IDLE_SHARE))
    return power, busy, late, min(WEIGHTS[1], max(WEIGHTS[0], weight))


def _share(dt: float, filter_s: float) -> float:
    """Weight of a new value in a first-order filter."""
    return dt / (dt + filter_s) if dt > 0 else 0.0
