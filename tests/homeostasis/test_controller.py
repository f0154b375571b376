"""The controller as a pure function: what holds for any readings, and each of its rules alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vkllm.errors import ConfigError
from vkllm.homeostasis import (
    HomeostasisConfig,
    Reading,
    State,
    Temperature,
    Throttle,
    gap_s,
    initial_state,
    next_state,
    ramp_gap_s,
    retry_after_s,
    set_point_c,
    smallest_margin,
)
from vkllm.homeostasis.laws import next_lift_c
from vkllm.homeostasis.load import Load

PI, RAMP = HomeostasisConfig(), HomeostasisConfig(mode="ramp")
QUICK = settings(max_examples=60, deadline=None)

degrees = st.one_of(st.floats(20, 110), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -300.0, 1e9]))
watts = st.one_of(st.none(), st.floats(0, 500), st.just(math.nan))


@st.composite
def steps(draw: st.DrawFn) -> tuple[float, Reading | None]:
    """(seconds since the last step, reading): new, old, from the future, without a sensor, or none at all."""
    dt = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 10.0, -1.0]))
    if draw(st.integers(0, 9)) == 0:
        return dt, None
    age = draw(st.sampled_from([0.0, 0.0, 0.0, 0.2, 5.0, -5.0]))
    temperatures = {
        name: Temperature(draw(degrees), None, draw(st.sampled_from([None, 90.0])))
        for name in draw(st.sets(st.sampled_from(["core", "memory", "hotspot", "other"]), max_size=3))
    }
    throttle: frozenset[Throttle] = frozenset(draw(st.sets(st.sampled_from(get_args(Throttle)), max_size=2)))
    busy = draw(st.one_of(st.none(), st.floats(0, 1.2)))
    return dt, Reading(-age, temperatures, draw(watts), draw(st.sampled_from([None, 350.0, 0.0])), None, throttle, busy)


def at(now: float, celsius: float, **more: object) -> Reading:
    return Reading(now, {"core": Temperature(celsius)}, **more)  # type: ignore[arg-type]


def drive(config: HomeostasisConfig, celsius: Iterable[float], state: State | None = None, start: float = 0.0) -> list[State]:
    """A reading every half second."""
    states, state = [], state or initial_state(config)
    for i, c in enumerate(celsius, 1):
        now = start + 0.5 * i
        state = next_state(config, state, at(now, c), now)
        states.append(state)
    return states


@QUICK
@given(st.sampled_from([PI, RAMP]), st.lists(steps(), max_size=40))
def test_whatever_comes_the_output_is_sound(config: HomeostasisConfig, run: list[tuple[float, Reading | None]]) -> None:
    state, now = initial_state(config), 100.0
    for dt, reading in run:
        now += dt
        if reading is not None:
            reading = Reading(
                now + reading.time_s,
                reading.temperatures,
                reading.power_w,
                reading.power_limit_w,
                None,
                reading.throttle,
                reading.busy,
            )
        state = next_state(config, state, reading, now)
        assert 0 < state.duty <= 1 and 0 <= state.batch_limit <= config.max_batch
        assert (state.batch_limit == 0) == (state.condition == "tripped")
        assert math.isfinite(state.integral) and math.isfinite(state.margin_c) and 0.2 <= state.load.weight <= 1.5
        assert 0 <= gap_s(state, 0.02) < math.inf
        if state.condition in ("starting", "lost"):
            assert state.duty <= config.lost_duty


@QUICK
@given(st.lists(st.floats(20, 76), min_size=1, max_size=30), st.booleans())
def test_never_full_speed_without_fresh_readings(celsius: list[float], frozen: bool) -> None:
    """Whether readings stop or the last one comes again for ever."""
    states = drive(PI, celsius)
    end = 0.5 * len(celsius)
    last = at(end, celsius[-1]) if frozen else None
    assert next_state(PI, states[-1], last, end + PI.stale_s) == states[-1]  # for a while the last reading holds
    state = next_state(PI, states[-1], last, end + PI.stale_s + 0.1)
    assert state.condition == "lost" and state.duty <= PI.lost_duty and state.fixed_gap_s is None
    for i in range(100):
        state = next_state(PI, state, last, end + 4 + 10 * i)
        assert state.duty <= PI.lost_duty
    now = end + 2000.0
    back = drive(PI, [60.0] * 80, state, now)
    assert back[0].condition == "regulating" and back[-1].duty == 1.0  # and recovers by itself


def test_it_starts_slow() -> None:
    state = initial_state(PI)
    assert state.condition == "starting" and state.duty == PI.lost_duty
    assert next_state(PI, state, None, 1e6).duty == PI.lost_duty
    assert next_state(PI, state, at(0.0, 40.0), 100.0).condition == "starting"  # an old reading is none


@QUICK
@given(
    st.lists(st.floats(60, 78), max_size=20),
    st.floats(30, 95),
    st.floats(0, 20),
    st.sampled_from([PI, RAMP]),
)
def test_hotter_never_means_faster(celsius: list[float], cool: float, more: float, config: HomeostasisConfig) -> None:
    before = drive(config, celsius)[-1] if celsius else initial_state(config)
    start = 0.5 * len(celsius)
    a, b = (drive(config, [c], before, start)[0] for c in (cool, cool + more))
    assert b.duty <= a.duty and b.batch_limit <= a.batch_limit


@pytest.mark.parametrize("hours_s", [60, 7200])
def test_the_integral_does_not_wind_up(hours_s: int) -> None:
    """However long it was cool or hot before, the answer takes the same few seconds."""
    cool = drive(PI, [30.0] * hours_s)[-1]
    assert cool.duty == 1.0
    answer = drive(PI, [76.5] * 26, cool, hours_s / 2)
    assert answer[-1].duty < 0.25
    hot = drive(PI, [77.5] * hours_s)[-1]
    assert hot.duty == PI.min_duty and hot.condition == "regulating"
    answer = drive(PI, [73.0] * 30, hot, hours_s / 2)
    assert answer[-1].duty > 0.35


def test_what_nobody_uses_is_no_evidence() -> None:
    """An idle device is cool: the duty waits where it last held the target, and the integral stays."""
    state = initial_state(PI)
    now = 0.0
    for _ in range(200):
        now += 0.5
        state = next_state(PI, state, at(now, 74.5, busy=state.duty), now)
    held = state.integral
    for _ in range(400):
        now += 0.5
        state = next_state(PI, state, at(now, 55.0, busy=0.0), now)
    assert state.integral == held and state.duty <= max(held, PI.min_duty) + 1e-9
    cold = state
    for i in range(20):
        cold = next_state(PI, cold, at(now + i, 45.0, busy=0.0), now + i)
    assert cold.duty == 1.0  # nothing to fear
    for _ in range(20):
        now += 0.5
        state = next_state(PI, state, at(now, 60.0, busy=state.duty), now)
    assert state.duty == 1.0  # work again, and cool


def test_it_comes_down_faster_than_it_goes_up() -> None:
    """What heats from outside has to be answered within seconds; inside the dead band it may take as long as upwards."""
    still = replace(PI, lift_c=0.0)
    held = drive(still, [74.9] * 100)[-1]
    up, down, band = (
        drive(still, [75.0 - margin] * 20, held, 50.0)[-1].integral - held.integral for margin in (0.5, -0.5, -0.02)
    )
    assert up > 0 > down and -down > 4 * up and band < 0 and -band < 0.2 * up


def test_the_duty_rises_slowly_and_falls_at_once() -> None:
    states = drive(PI, [60.0] * 20 + [77.5] * 6 + [60.0] * 20)
    for a, b in pairwise(states):
        assert b.duty - a.duty <= PI.rise_per_s * 0.5 + 1e-9
    assert states[25].duty < states[19].duty - 0.15


def test_the_lift_comes_slowly_and_goes_at_once() -> None:
    """In quiet full use the device is held above its target, the higher the less power that takes."""
    quiet = working(PI, initial_state(PI), 350.0, 2400, 0.0)
    assert 0.3 < quiet.lift_c <= PI.lift_c
    few = working(PI, initial_state(PI), 350.0, 40, 0.0)
    assert few.lift_c <= 20 * PI.lift_per_s
    idle = quiet
    for i in range(1, 8):
        now = 1200.0 + 0.5 * i
        idle = next_state(PI, idle, at(now, 74.0, power_w=40.0, power_limit_w=350.0, busy=0.0), now)
    assert idle.lift_c <= 0.0
    heat = 0.2 * PI.lift_heat_c  # between holding with 70 and with 50 percent of the power
    lifts = [next_lift_c(PI, 1.0, Load(), integral, integral, 0.5) for integral in (0.7, 0.5, 0.0)]
    assert lifts[1] - lifts[0] == pytest.approx(heat) and lifts[2] == PI.lift_c


def working(config: HomeostasisConfig, state: State, watts: float, count: int, start: float) -> State:
    """Half seconds at 74.9 °C of work that takes `watts` when busy, all of the duty used."""
    for i in range(1, count + 1):
        now = start + 0.5 * i
        power = 35 + state.duty * (watts - 35)
        state = next_state(config, state, at(now, 74.9, power_w=power, power_limit_w=350.0, busy=state.duty), now)
    return state


def test_heavier_work_gets_less_time_before_it_is_hotter() -> None:
    """Feed-forward: the temperature stays, the power of a busy second rises by a third."""
    config = HomeostasisConfig(jump_c=0.0)
    light = working(config, initial_state(config), 240.0, 200, 0.0)
    heavy = working(config, light, 320.0, 16, 100.0)
    assert light.load.weight == pytest.approx((240 - 35) / 315, rel=0.02) and heavy.load.weight == pytest.approx(
        (320 - 35) / 315, rel=0.05
    )
    assert heavy.duty == pytest.approx(light.duty * 205 / 285, rel=0.1)


def test_light_work_keeps_a_distance_until_heavy_work_is_forgotten() -> None:
    """Heavy work is expected from the start, and again after it was there."""
    soon = HomeostasisConfig(jump_memory_s=20.0)
    early = working(soon, initial_state(soon), 240.0, 20, 0.0)
    late = working(soon, early, 240.0, 400, 10.0)
    again = working(soon, working(soon, late, 350.0, 30, 210.0), 240.0, 20, 225.0)
    assert early.load.heaviest > early.load.weight + 0.2 and again.load.heaviest > again.load.weight + 0.1
    assert late.load.heaviest == pytest.approx(late.load.weight, abs=0.03)
    assert early.lift_c < 0 < late.lift_c and again.load.expected > 0.1


@pytest.mark.parametrize(
    ("reason", "steps_down"), [("thermal", True), ("power_brake", True), ("power_cap", False), ("other", False)]
)
def test_the_devices_own_throttling_is_a_step_down(reason: str, steps_down: bool) -> None:
    state = drive(PI, [50.0] * 60)[-1]
    assert state.duty == 1.0
    throttled = next_state(PI, state, at(30.5, 50.0, throttle=frozenset({reason})), 30.5)
    assert throttled.duty == (pytest.approx(0.7) if steps_down else 1.0) and throttled.throttled == steps_down
    again = next_state(PI, throttled, at(31.0, 50.0, throttle=frozenset({reason})), 31.0)
    assert again.throttled == steps_down  # once in step_hold_s


def test_a_trip_has_hysteresis_and_ends_by_itself() -> None:
    states = drive(PI, [74.0] * 20 + [85.0] * 10)
    tripped = states[-1]
    assert tripped.condition == "tripped" and tripped.batch_limit == 0 and tripped.duty == PI.min_duty and tripped.trips == 1
    assert retry_after_s(PI, tripped, 15.0) > 1
    wavering = drive(PI, [78.0, 72.0, 80.0, 71.0] * 30, tripped, 15.0)
    assert {s.condition for s in wavering} == {"tripped"} and wavering[-1].trips == 1
    assert next_state(PI, wavering[-1], None, 200.0).condition == "tripped"  # a lost sensor is no reason to go on
    cool = drive(PI, [65.0] * 20, wavering[-1], 75.0)
    assert cool[-1].condition == "regulating" and cool[-1].batch_limit > 0 and cool[-1].trips == 1
    assert cool[0].duty <= PI.lost_duty  # slowly


def test_a_trip_with_a_lost_sensor_ends_too() -> None:
    tripped = drive(PI, [90.0] * 10)[-1]
    assert next_state(PI, tripped, None, 250.0).condition == "tripped"
    state = next_state(PI, tripped, None, 400.0)
    assert state.condition == "lost" and state.tripped_s is None and 0 < state.duty <= PI.lost_duty


@pytest.mark.parametrize("celsius", [50.0, 74.9, 75.7, 77.0])
def test_the_duty_of_a_lost_sensor_stays(celsius: float) -> None:
    """It takes at most half of the power that held the target, idle power and all, for as long as it takes."""
    known = drive(PI, [celsius] * 400)[-1]
    states = [known]
    for i in range(1000):
        states.append(next_state(PI, states[-1], None, 204.0 + 0.5 * i))
    (duty,) = {s.duty for s in states[1:]}
    assert states[-1].condition == "lost" and PI.min_duty <= duty <= PI.lost_duty
    assert duty == PI.min_duty or 0.1 + 0.9 * duty <= 0.5 * (0.1 + 0.9 * max(known.duty, known.integral)) + 1e-9
    assert duty == PI.lost_duty or celsius > 60


def test_readings_that_come_and_go_never_speed_up() -> None:
    """Three seconds of readings in every ten, at the target: each loss is no faster than the one before."""
    state, now, lost = drive(PI, [74.9] * 400)[-1], 200.0, 1.0
    for _ in range(20):
        for i in range(20):
            now += 0.5
            state = next_state(PI, state, at(now, 75.5) if i < 6 else None, now)
        assert state.condition == "lost" and state.duty <= lost + 1e-9
        lost = state.duty


@QUICK
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30))
def test_time_may_run_backwards(jumps: list[float]) -> None:
    """A clock that is set makes no time: at the target, nothing speeds up, and a heat that stays is answered."""
    state, now = drive(PI, [60.0] * 60, start=1000.0)[-1], 1030.0
    for jump in jumps:
        now += jump
        after = next_state(PI, state, at(now, 74.0), now)
        assert after.duty - state.duty <= PI.rise_per_s * max(0.0, min(jump, PI.stale_s)) + 1e-9 or after.condition == "lost"
        state = after
    assert drive(PI, [77.0] * 60, state, now + 10.0)[-1].duty < 0.1


def test_a_clock_that_is_set_back() -> None:
    cool = drive(PI, [50.0] * 60, start=1e6)[-1]
    assert cool.duty == 1.0
    assert drive(PI, [77.0] * 40, cool, 0.0)[-1].duty < 0.3


def test_a_trip_lasts_a_while() -> None:
    tripped = drive(PI, [90.0] * 10)[-1]
    assert drive(PI, [40.0] * 5, tripped, 5.0)[-1].condition == "tripped"
    assert drive(PI, [40.0] * 25, tripped, 5.0)[-1].condition == "regulating"


@pytest.mark.parametrize(("celsius", "ms"), [(20, 1), (70, 1), (70.1, 1), (71, 10), (72.5, 25), (73, 30), (75, 50), (78, 50)])
def test_the_ramp(celsius: float, ms: float) -> None:
    assert ramp_gap_s(75.0, celsius) == pytest.approx(ms / 1e3)
    state = drive(RAMP, [celsius])[0]
    assert gap_s(state, 0.005) == gap_s(state, 1.0) == pytest.approx(ms / 1e3)
    assert state.duty == pytest.approx(20 / (20 + ms))


def test_the_gap_makes_the_duty() -> None:
    for duty in (0.02, 0.25, 1.0):
        gap = gap_s(State(duty, 1), 0.03)
        assert 0.03 / (0.03 + gap) == pytest.approx(duty)


def test_off_is_off() -> None:
    off = HomeostasisConfig(mode="off")
    state = next_state(off, initial_state(off), at(0.0, 99.0), 0.0)
    assert state.duty == 1.0 and gap_s(state, 1.0) == 0.0 and state.batch_limit == off.max_batch


def test_the_nearest_sensor_counts() -> None:
    hot_memory = Reading(0.0, {"core": Temperature(60.0), "memory": Temperature(95.0), "odd": Temperature(math.nan)})
    assert smallest_margin(PI, hot_memory) == (-5.0, "memory")
    power = Reading(0.0, {"core": Temperature(60.0)}, 385.0, 350.0)
    margin, name = smallest_margin(PI, power) or (0.0, "")
    assert name == "power" and margin == pytest.approx(-3.5)  # 7 percent over the set point
    assert smallest_margin(PI, Reading(0.0, {"core": Temperature(math.nan)}, 100.0, 350.0)) is None


def test_set_points_stay_below_the_vendors() -> None:
    assert set_point_c(PI, "core", Temperature(0)) == 75
    assert set_point_c(PI, "core", Temperature(0, slowdown_c=78)) == 73
    assert set_point_c(PI, "core", Temperature(0, target_c=70)) == 70
    assert set_point_c(PI, "memory", Temperature(0)) == 90
    assert set_point_c(PI, "odd", Temperature(0, target_c=85)) == 85
    assert set_point_c(PI, "odd", Temperature(0)) == 75


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "fuzzy"},
        {"target_c": 200.0},
        {"gain": 0.0},
        {"lost_duty": 1.0},
        {"min_duty": 0.0},
        {"step_down": 1.5},
        {"stale_s": math.inf},
        {"dead_band_c": 9.0},
        {"max_batch": 0},
        {"filter_s": -1.0},
    ],
)
def test_options_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as error:
        HomeostasisConfig(**wrong)  # type: ignore[arg-type]
    assert error.value.hint
