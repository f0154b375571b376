"""State and steps: fresh readings, lost sensors, trips.

Too hot in spite of all (`trip_over_c` above a set point) is a trip: no new work until every margin is `recover_c` again.
Readings that are stale or missing are a state of their own, with a small fixed duty: never full speed in the dark.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from vkllm.homeostasis.config import HomeostasisConfig
from vkllm.homeostasis.laws import next_lift_c, pi, ramp_gap_s
from vkllm.homeostasis.load import IDLE_SHARE, Load, next_load
from vkllm.homeostasis.readings import STEP_DOWN_REASONS, Reading, smallest_margin

Condition = Literal["starting", "regulating", "lost", "tripped", "off"]

LOST_SHARE = 0.5  # of the power that last held the target: with a fan failure beside it, air carries off about half


class State(NamedTuple):
    """What the controller decided and what it remembers. The first five fields are its output."""

    duty: float  # share of time for submits, in (0, 1]
    batch_limit: int  # rows a submit may hold; 0: take no new work
    condition: Condition = "starting"
    fixed_gap_s: float | None = None  # `ramp`: this gap after every submit, whatever it took
    limiting: str = ""  # the sensor with the smallest margin
    margin_c: float = 0.0  # that margin, filtered
    lift_c: float = 0.0  # held so far above the target
    integral: float = 0.0  # in units of heat: duty times the load's weight
    load: Load = Load()
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
    """Keep still while the last good reading is fresh; after that, lost.

    A trip stays a trip for `trip_lost_s`, in which an idle device cools.
    """
    if state.condition in ("starting", "lost"):
        return state._replace(now_s=now_s)
    if state.reading_s is not None and abs(now_s - state.reading_s) <= config.stale_s:
        return state
    if state.tripped_s is not None and abs(now_s - state.tripped_s) < config.trip_lost_s:
        return state
    duty = _lost_duty(config, state)
    return State(
        duty,
        batch_limit(config, duty),
        "lost",
        integral=duty * state.load.worst,  # where to start again: nobody knows what happened meanwhile
        load=Load(max(1.0, state.load.weight), state.load.heaviest),
        reading_s=state.reading_s,
        now_s=now_s,
        trips=state.trips,
        throttled=state.throttled,
    )


def _lost_duty(config: HomeostasisConfig, state: State) -> float:
    """Half of the power that last held the target, or did not reach it; even if the heaviest work of late comes back."""
    idle = IDLE_SHARE / (1.0 - IDLE_SHARE)
    held = max(state.integral, state.duty * state.load.weight) if state.margin_c > 0 else state.integral
    heat = LOST_SHARE * (held + idle) - idle
    return min(config.lost_duty, max(config.min_duty, heat / state.load.worst))


def _with_reading(config: HomeostasisConfig, state: State, reading: Reading, found: tuple[float, str], now_s: float) -> State:
    """A new reading: filter it, trip or recover, then the law of the mode."""
    raw, limiting = found
    dt = 0.0
    if state.reading_s is not None and state.condition in ("regulating", "tripped"):
        dt = min(max(0.0, reading.time_s - state.reading_s), config.stale_s)
    margin = state.margin_c + (raw - state.margin_c) * dt / (dt + config.filter_s) if dt > 0 else raw
    seen = state._replace(
        condition="regulating",
        fixed_gap_s=None,
        limiting=limiting,
        margin_c=margin,
        load=next_load(config, state.load, reading, state.duty, dt),
        reading_s=reading.time_s,
        now_s=now_s,
        tripped_s=_trip(config, state, margin, raw, now_s),
    )
    if seen.tripped_s is not None:
        return _stopped(config, seen, first=state.tripped_s is None)
    if config.mode == "ramp":
        return _ramp(config, seen, raw)
    return _pi(config, seen, reading, dt)


def _trip(config: HomeostasisConfig, state: State, margin: float, raw: float, now_s: float) -> float | None:
    """When the present trip began; None: there is none. It ends after its least duration, cool by the sensor and the filter."""
    if state.tripped_s is None:
        return now_s if margin <= -config.trip_over_c else None
    over = abs(now_s - state.tripped_s) >= config.trip_hold_s and min(margin, raw) >= config.recover_c
    return None if over else state.tripped_s


def _stopped(config: HomeostasisConfig, seen: State, first: bool) -> State:
    """Tripped: no new work; what is in flight ends at the smallest duty. Afterwards it goes on slowly."""
    return seen._replace(
        duty=config.min_duty,
        batch_limit=0,
        condition="tripped",
        lift_c=0.0,
        integral=min(seen.integral, config.lost_duty),
        trips=seen.trips + first,
    )


def _ramp(config: HomeostasisConfig, seen: State, raw: float) -> State:
    """The simple law, of the margin as it was read."""
    gap = ramp_gap_s(0.0, -raw)
    duty = config.submit_s / (config.submit_s + gap)
    return seen._replace(duty=duty, batch_limit=batch_limit(config, duty), fixed_gap_s=gap, integral=duty * seen.load.weight)


def _pi(config: HomeostasisConfig, seen: State, reading: Reading, dt: float) -> State:
    """Proportional-integral control, with a step down, at most every `step_hold_s`, when the device throttles itself."""
    lift = next_lift_c(config, seen.lift_c, seen.load, seen.duty, seen.integral, dt)
    duty, integral = pi(config, seen.duty, seen.integral, seen.margin_c, lift, seen.load, dt)
    stepped_s, throttled = seen.stepped_s, seen.throttled
    if reading.throttle & STEP_DOWN_REASONS and _may_step(config, seen):
        stepped_s, throttled, lift = seen.now_s, throttled + 1, min(0.0, lift)
        duty = max(config.min_duty, min(duty, seen.duty) * config.step_down)
        integral = min(integral, duty * seen.load.weight)
    return seen._replace(
        duty=duty,
        batch_limit=batch_limit(config, duty),
        lift_c=lift,
        integral=integral,
        stepped_s=stepped_s,
        throttled=throttled,
    )


def _may_step(config: HomeostasisConfig, seen: State) -> bool:
    return seen.stepped_s is None or seen.now_s is None or abs(seen.now_s - seen.stepped_s) >= config.step_hold_s
