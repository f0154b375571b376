"""From a margin to a duty: the simple law, and proportional-integral control.

The integral counts in heat (duty times what a busy second heats), so that heavier work gets less time before the temperature
shows it (feed-forward).
"""

from __future__ import annotations

from vkllm.homeostasis.config import HomeostasisConfig
from vkllm.homeostasis.load import Load

RAMP_LEAST_S, RAMP_MOST_S, RAMP_WIDTH_C = 0.001, 0.050, 5.0
USED = 0.8  # of the allowed duty: below, it is not the duty that keeps the device cool
NOTICED = 0.04  # heat: a smaller jump may be noise
MOST_HEAT = 1.5  # of the integral


def ramp_gap_s(target_c: float, temperature_c: float) -> float:
    """The gap of the `ramp` mode: 50 ms at the target, 10 ms less for every degree below it, at least 1 ms."""
    share = (temperature_c - (target_c - RAMP_WIDTH_C)) / RAMP_WIDTH_C
    return min(RAMP_MOST_S, max(RAMP_LEAST_S, RAMP_MOST_S * share))


def next_lift_c(config: HomeostasisConfig, lift: float, load: Load, duty: float, integral: float, dt: float) -> float:
    """How far above the target (negative: below) to hold the device now. It rises slowly and falls at once.

    A degree is worth work, and whoever may be one above the target need not stay at it: in quiet full use the noise is small.
    What can go wrong meanwhile, a fan that fails, heats in proportion to the power, so there is more room with less of it.
    None is left when the load comes and goes; and the less, the more heavier work may come back, which heats the die faster
    than anyone can answer.
    """
    jump = max(0.0, duty * load.expected - NOTICED)
    most = -config.jump_c * jump
    if load.used >= USED:
        quiet = max(0.0, 1.0 - jump / NOTICED)
        most += quiet * max(0.0, min(config.lift_c, config.lift_room_c - config.lift_heat_c * integral))
    return min(most, lift + config.lift_per_s * dt) if most > lift else most


def pi(
    config: HomeostasisConfig, duty: float, integral: float, margin: float, lift: float, load: Load, dt: float
) -> tuple[float, float]:
    """(duty, integral) after `dt` seconds at `duty`; `margin` below the target, to be held at `lift` above it."""
    error = min(margin + lift, config.near_c)
    wanted = (integral + config.gain * error) / load.weight
    unused = load.used < USED and margin < config.cold_c
    if not _saturated(config, error, wanted, unused):
        over = error < -config.dead_band_c
        integral += config.gain * error * dt / (config.integral_s if over else config.integral_up_s)
        integral = min(MOST_HEAT, max(0.0, integral))
    if unused:  # what nobody uses is no evidence: wait at the duty that last held the target
        wanted = min(wanted, integral / (load.weight + load.expected))
    return min(1.0, max(config.min_duty, min(wanted, duty + config.rise_per_s * dt))), integral


def _saturated(config: HomeostasisConfig, error: float, wanted: float, unused: bool) -> bool:
    """Anti-windup: would the integral only go further beyond what the output can do, or be fed with no evidence?"""
    if error > 0:
        return wanted >= 1.0 or unused
    return wanted <= config.min_duty
