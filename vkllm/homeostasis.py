"""The thermal controller: readings in, a duty cycle and a batch limit out. A pure policy: no Vulkan, no clock, no sensor.

    state = initial_state(config)
    state = next_state(config, state, reading, now_s)   # at every reading, or when one failed to come (None)
    ... submit ...; sleep(gap_s(state, busy_s))         # the idle gap after a submit that ran for busy_s seconds

The duty is the share of time in which submits may run, in (0, 1]. Modes:

- `ramp`: the gap is a law of the temperature alone: 1 ms when cool, 10 ms more for every degree of the last 5 °C below the
  target, 50 ms from there on (73 °C with a target of 75 °C gives 30 ms).
- `pi`: proportional-integral control of the smallest margin over all temperatures and power. The margin is filtered (sensors
  count whole degrees), the integral rests in a dead band of a few tenths above the target, stops while the output is at a
  limit or while nobody uses what is allowed (anti-windup), the output's slew is limited, and what a busy second heats is
  measured, so that heavier work gets less time before the temperature shows it (feed-forward); during light work the set point
  is a little lower, for heavy work may come back faster than anyone can answer. The device's own throttling takes a step down
  at once.
- `off`: full speed; the device is left to its own protection.

Margins are in °C below the set point of a sensor; power counts as one, `power_c_per_percent` for every percent of the limit.
Too hot in spite of all (`trip_over_c` above a set point) is a trip: no new work until every margin is `recover_c` again.
Readings that are stale or missing are a state of their own, with a small fixed duty: never full speed in the dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from vkllm.errors import ConfigError

Mode = Literal["pi", "ramp", "off"]
Condition = Literal["starting", "regulating", "lost", "tripped", "off"]
Throttle = Literal["thermal", "power_brake", "power_cap", "other"]

STEP_DOWN_REASONS = frozenset({"thermal", "power_brake"})  # a power cap is how many devices run normally
PLAUSIBLE_C = (-40.0, 150.0)  # anything else is a broken sensor

SAMPLE_S = 0.5  # how often to read, unless there is a reason to read more or less often
RAMP_LEAST_S, RAMP_MOST_S, RAMP_WIDTH_C = 0.001, 0.050, 5.0


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
    gain: float = 0.2
    integral_s: float = 7.0  # downwards
    integral_up_s: float = 18.0  # upwards: rather some seconds below the target than one above
    near_c: float = 3.0  # margins count up to here: far below the target, full speed
    cold_c: float = 25.0  # so far below the target the whole device is cold: full speed at once
    dead_band_c: float = 0.3  # above the target
    filter_s: float = 1.0
    power_lag_s: float = 1.0  # devices tell the mean power of about the last second
    power_filter_s: float = 2.0
    jump_c: float = 4.0  # rise, before we can answer, when a busy second starts to take the whole power limit
    jump_memory_s: float = 7200.0  # for how long heavy work is expected to come back
    rise_per_s: float = 0.2
    fall_per_s: float = 1.0
    step_down: float = 0.7
    step_hold_s: float = 5.0
    # limits
    min_duty: float = 0.02
    lost_duty: float = 0.28  # at most: what the worst hours of the simulated day allow
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
        positive = (
            *(
                "gain",
                "integral_s",
                "integral_up_s",
                "near_c",
                "cold_c",
                "rise_per_s",
                "fall_per_s",
                "stale_s",
                "recover_c",
                "trip_over_c",
                "submit_s",
            ),
            *("jump_memory_s", "power_fraction"),
        )
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"homeostasis: {name} is {getattr(self, name)!r}", "it must be a positive number")
        for name in (
            "filter_s",
            "power_filter_s",
            "power_lag_s",
            "dead_band_c",
            "guard_c",
            "step_hold_s",
            "trip_hold_s",
            "jump_c",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"homeostasis: {name} is {getattr(self, name)!r}", "it must not be negative")
        if not 0 < self.min_duty <= self.lost_duty < 1:
            raise ConfigError(
                f"homeostasis: min_duty {self.min_duty!r}, lost_duty {self.lost_duty!r}", "0 < min_duty <= lost_duty < 1"
            )
        if not 0 < self.step_down < 1:
            raise ConfigError(f"homeostasis: step_down is {self.step_down!r}", "it must lie between 0 and 1")
        if self.dead_band_c >= self.trip_over_c:
            raise ConfigError("homeostasis: the dead band reaches the trip threshold", "keep dead_band_c below trip_over_c")
        if not 20 <= self.target_c <= 110:
            raise ConfigError(f"homeostasis: target {self.target_c!r} °C", "choose something between 20 and 110 °C")
        if self.max_batch < 1:
            raise ConfigError(f"homeostasis: max_batch is {self.max_batch!r}", "at least 1")


@dataclass(frozen=True, slots=True)
class State:
    """What the controller decided and what it remembers. The first five fields are its output."""

    duty: float  # share of time for submits, in (0, 1]
    batch_limit: int  # rows a submit may hold; 0: take no new work
    condition: Condition = "starting"
    fixed_gap_s: float | None = None  # `ramp`: this gap after every submit, whatever it took
    limiting: str = ""  # the sensor with the smallest margin
    margin_c: float = 0.0  # that margin, filtered
    integral: float = 0.0  # in units of heat: duty times `weight`
    weight: float = 1.0  # heat of a busy second, 1: the whole power limit
    heaviest: float = 0.0  # the largest weight of late
    power_w: float | None = None  # filtered, with `busy`
    busy: float | None = None
    late_busy: float = 0.0  # as late as the power
    used: float = 1.0  # share of the allowed duty that submits took, filtered
    reading_s: float | None = None  # time of the last good reading
    now_s: float | None = None
    tripped_s: float | None = None
    stepped_s: float | None = None
    trips: int = 0
    throttled: int = 0  # steps down taken


def initial_state(config: HomeostasisConfig) -> State:
    """Before the first reading: the duty of a lost sensor."""
    if config.mode == "off":
        return State(1.0, config.max_batch, "off")
    return State(config.lost_duty, batch_limit(config, config.lost_duty), integral=config.lost_duty)


def gap_s(state: State, busy_s: float) -> float:
    """Seconds to leave the device idle after a submit that kept it busy for `busy_s`."""
    if state.fixed_gap_s is not None:
        return state.fixed_gap_s
    return max(0.0, busy_s) * (1.0 - state.duty) / state.duty


def retry_after_s(config: HomeostasisConfig, state: State, now_s: float) -> float:
    """Seconds after which a refused request may come back: the rest of the trip's least duration, at least 1 s."""
    rest = config.trip_hold_s - (now_s - state.tripped_s) if state.tripped_s is not None else 0.0
    return max(1.0, rest)


def batch_limit(config: HomeostasisConfig, duty: float) -> int:
    """Rows a submit may hold: all of them at half the duty and more, fewer below, at least 1."""
    return max(1, min(config.max_batch, math.ceil(config.max_batch * duty / 0.5)))


def ramp_gap_s(target_c: float, temperature_c: float) -> float:
    """The gap of the `ramp` mode: 50 ms at the target, 10 ms less for every degree below it, at least 1 ms."""
    share = (temperature_c - (target_c - RAMP_WIDTH_C)) / RAMP_WIDTH_C
    return min(RAMP_MOST_S, max(RAMP_LEAST_S, RAMP_MOST_S * share))


def set_point_c(config: HomeostasisConfig, name: str, t: Temperature) -> float:
    """The temperature at which a sensor is held: its target, or the vendor's where that is lower, below any slowdown."""
    target = config.targets.get(name, config.target_c if name == "core" or t.target_c is None else t.target_c)
    if t.target_c is not None and t.target_c < target:
        target = t.target_c
    return target if t.slowdown_c is None else min(target, t.slowdown_c - config.guard_c)


def smallest_margin(config: HomeostasisConfig, reading: Reading) -> tuple[float, str] | None:
    """(°C below the set point, sensor) of the sensor that is nearest to it or furthest above. None: no sensor is plausible."""
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


def next_state(config: HomeostasisConfig, state: State, reading: Reading | None, now_s: float) -> State:
    """One step. `reading` may be the last one again (nothing changes until it is stale) or None.

    Never raises; time that runs backwards counts as no time.
    """
    if config.mode == "off":
        return State(1.0, config.max_batch, "off", now_s=now_s)
    fresh = reading is not None and abs(now_s - reading.time_s) <= config.stale_s
    margin = smallest_margin(config, reading) if reading is not None and fresh else None
    if reading is None or margin is None:
        return _without_reading(config, state, now_s)
    if state.reading_s is not None and state.condition != "lost" and 0 <= state.reading_s - reading.time_s <= config.stale_s:
        return state  # nothing new; further back, the clock was set
    return _with_reading(config, state, reading, margin, now_s)


def _without_reading(config: HomeostasisConfig, state: State, now_s: float) -> State:
    """Keep still while the last good reading is fresh; after that a small fixed duty, less where the target needed less.

    A trip stays a trip for `trip_lost_s`, in which an idle device cools.
    """
    if state.reading_s is not None and state.condition != "lost" and abs(now_s - state.reading_s) <= config.stale_s:
        return state
    if state.tripped_s is not None and abs(now_s - state.tripped_s) < config.trip_lost_s:
        return state
    heavy = max(1.0, state.weight, state.heaviest)
    duty = min(config.lost_duty, max(config.min_duty, state.integral / heavy))
    condition: Condition = "starting" if state.reading_s is None else "lost"
    return State(
        duty=duty,
        batch_limit=batch_limit(config, duty),
        condition=condition,
        integral=min(state.integral, config.lost_duty * heavy),
        weight=max(1.0, state.weight),
        heaviest=state.heaviest,
        reading_s=state.reading_s,
        now_s=now_s,
        trips=state.trips,
        throttled=state.throttled,
    )


def _with_reading(config: HomeostasisConfig, state: State, reading: Reading, found: tuple[float, str], now_s: float) -> State:
    """A new reading: filter it, trip or recover, then the law of the mode."""
    raw, limiting = found
    known = state.reading_s is not None and state.condition in ("regulating", "tripped")
    dt = min(max(0.0, reading.time_s - (state.reading_s or 0.0)), config.stale_s) if known else 0.0
    margin = state.margin_c + (raw - state.margin_c) * dt / (dt + config.filter_s) if known and dt > 0 else raw
    tripped_s = _trip(config, state, margin, raw, now_s)
    power, busy, late, weight = _heat(config, state, reading, dt)
    forget = math.exp(-dt / config.jump_memory_s) if dt else 1.0
    heaviest = max(weight, weight + (state.heaviest - weight) * forget)
    jump_c = config.jump_c * state.duty * max(0.0, heaviest - weight)
    used = _used(config, state, reading.busy, dt)
    trips = state.trips + (tripped_s is not None and state.tripped_s is None)
    stepped_s, throttled = state.stepped_s, state.throttled
    fixed: float | None = None
    if tripped_s is not None:
        duty, integral = config.min_duty, min(state.integral, config.lost_duty)
    elif config.mode == "ramp":
        fixed, integral = ramp_gap_s(0.0, -raw), state.integral
        duty = config.submit_s / (config.submit_s + fixed)
    else:
        duty, integral = _pi(config, state, margin - jump_c, weight, heaviest, used, dt)
        held = stepped_s is not None and now_s - stepped_s < config.step_hold_s
        if not held and reading.throttle & STEP_DOWN_REASONS:
            stepped_s, throttled = now_s, throttled + 1
            duty = max(config.min_duty, min(duty, state.duty) * config.step_down)
            integral = min(integral, duty * weight)
    return State(
        duty,
        0 if tripped_s is not None else batch_limit(config, duty),
        "tripped" if tripped_s is not None else "regulating",
        fixed,
        limiting,
        margin,
        integral,
        weight,
        heaviest,
        power,
        busy,
        late,
        used,
        reading.time_s,
        now_s,
        tripped_s,
        stepped_s,
        trips,
        throttled,
    )


def _trip(config: HomeostasisConfig, state: State, margin: float, raw: float, now_s: float) -> float | None:
    """When the present trip began; None: there is none. It ends after its least duration, cool by the sensor and the filter."""
    if state.tripped_s is None:
        return now_s if margin <= -config.trip_over_c else None
    over = now_s - state.tripped_s >= config.trip_hold_s and min(margin, raw) >= config.recover_c
    return None if over else state.tripped_s


def _heat(
    config: HomeostasisConfig, state: State, reading: Reading, dt: float
) -> tuple[float | None, float | None, float, float]:
    """(power, busy, late busy, weight): what a busy second heats, as a share of the power limit, from filtered power and busy
    share."""
    power_w, limit, share = reading.power_w, reading.power_limit_w, reading.busy
    if power_w is None or not limit or share is None or not math.isfinite(power_w + share):
        return None, None, 0.0, state.weight
    share = min(1.0, max(0.0, share))
    if state.power_w is None or state.busy is None:
        return power_w, share, share, state.weight
    late = state.late_busy + (share - state.late_busy) * dt / (dt + config.power_lag_s) if dt > 0 else state.late_busy
    new = dt / (dt + config.power_filter_s) if dt > 0 else 0.0
    power = state.power_w + (power_w - state.power_w) * new
    busy = state.busy + (late - state.busy) * new
    if busy < 0.1:  # idle: nothing to learn
        return power, busy, late, state.weight
    idle_w = 0.1 * limit  # typical; an error here only makes the feed-forward a little too strong or weak
    return power, busy, late, min(1.5, max(0.2, (power - idle_w) / (busy * (limit - idle_w))))


def _used(config: HomeostasisConfig, state: State, busy: float | None, dt: float) -> float:
    """Filtered share of the last duty that submits took; 1 where nobody tells."""
    if busy is None or not busy >= 0:
        return 1.0
    return state.used + (min(1.0, busy / state.duty) - state.used) * dt / (dt + config.filter_s) if dt > 0 else state.used


def _pi(
    config: HomeostasisConfig, state: State, margin: float, weight: float, heaviest: float, used: float, dt: float
) -> tuple[float, float]:
    """(duty, integral). The integral and the gain count in heat (duty times weight), so that weight is a feed-forward."""
    near = min(margin, config.near_c)
    error = near if near > 0 else min(0.0, near + config.dead_band_c)
    unused = used < 0.8 and margin < config.cold_c
    wanted = (state.integral + config.gain * near) / weight
    saturated = (error > 0 and (wanted >= 1 or unused)) or (error < 0 and wanted <= config.min_duty)
    integral = (
        state.integral
        if saturated
        else state.integral + config.gain * error * dt / (config.integral_up_s if error > 0 else config.integral_s)
    )
    integral = min(1.5, max(0.0, integral))
    if unused:  # what nobody uses is no evidence: wait at the duty that last held the target
        wanted = min(wanted, max(integral / heaviest, config.min_duty))
    slowest, fastest = state.duty - config.fall_per_s * dt, state.duty + config.rise_per_s * dt
    return min(1.0, max(config.min_duty, min(fastest, max(slowest, wanted)))), integral
