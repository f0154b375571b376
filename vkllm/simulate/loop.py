"""Run a scenario: plant, sensor and controller in steps of a reading, and the figures that come of it."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

from vkllm.homeostasis import SAMPLE_S, HomeostasisConfig, initial_state, next_state
from vkllm.sensors.simulated import SimulatedSensor, ThermalModel, ThermalPlant
from vkllm.simulate.scenarios import TICK_S, Scenario

STEP_S = SAMPLE_S
CONSTANT_STEP_S = 0.5  # a constant duty needs no readings; the model is as good
TOLERANCE_C = 1.0  # "over target" begins here
SETTLE_S = 600.0  # of the start, left out of temp_std_c and held_share
DUTY_STEPS = 1000  # resolution of the search for the best constant duty
TRACE_POINTS = 720


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run shows. Temperatures are the die's true ones, not the sensor's.

    `time_over_target_s`: more than TOLERANCE_C above the target. `throttle_s`: the hardware had slowed itself down.
    `throughput_kept`: work done, of what the best constant duty does in the same conditions (it may be above 1: a constant duty
    has to suit the worst hour). `held_share`: of the time in which the duty was what held the device back, how much was
    within TOLERANCE_C of the target; None where heat never limited.
    """

    scenario: str
    mode: str
    target_c: float
    ambient_c: float
    hours: float
    time_over_target_s: float
    temp_std_c: float
    throttle_s: float
    throughput_kept: float
    trips: int
    mean_duty: float
    temp_max_c: float
    held_share: float | None
    best_constant_duty: float
    mean_power_w: float
    step_downs: int
    tolerance_c: float = TOLERANCE_C


@dataclass(slots=True)
class Trace:
    """About TRACE_POINTS averages of a run, for the plot: the highest temperature of each stretch, and its mean duty."""

    mode: str
    time_s: list[float] = field(default_factory=list)
    temp_c: list[float] = field(default_factory=list)
    duty: list[float] = field(default_factory=list)
    ambient_c: list[float] = field(default_factory=list)


def best_constant_duty(run: Scenario, target_c: float, model: ThermalModel | None = None) -> tuple[float, float]:
    """(duty, work in seconds) of the largest constant duty that is never over the target by more than TOLERANCE_C and never
    throttled in this scenario; by bisection, to 1 in DUTY_STEPS. (0, 0) when even the smallest is too much."""
    low, high, work = 0, DUTY_STEPS + 1, 0.0
    while high - low > 1:
        middle = (low + high) // 2
        done = _constant(run, middle / DUTY_STEPS, target_c + TOLERANCE_C, model)
        if done is None:
            high = middle
        else:
            low, work = middle, done
    return low / DUTY_STEPS, work


def _constant(run: Scenario, duty: float, limit_c: float, model: ThermalModel | None) -> float | None:
    """Work of a constant duty; None as soon as it is too hot."""
    plant = ThermalPlant(model, run.ticks[0].ambient_c)
    step, limit = plant.step, min(limit_c, plant.model.slowdown_c)
    for tick in run.ticks:
        plant.ambient_c, plant.airflow, plant.intensity = tick.ambient_c, tick.airflow, tick.intensity
        busy = min(duty, tick.demand)
        for _ in range(round(TICK_S / CONSTANT_STEP_S)):
            step(CONSTANT_STEP_S, busy)
            if plant.die_c > limit:
                return None
    return plant.work_s


def simulate(
    run: Scenario,
    config: HomeostasisConfig,
    *,
    model: ThermalModel | None = None,
    best: tuple[float, float] | None = None,
    seed: int = 0,
) -> tuple[Figures, Trace]:
    """One controller through one scenario. `best`: of best_constant_duty, where it is known already."""
    if best is None:
        best = best_constant_duty(run, config.target_c, model)
    plant = ThermalPlant(model, run.ticks[0].ambient_c)
    sensor = SimulatedSensor(plant, seed)
    state = initial_state(config)
    temps, duties, heated = array("d"), array("d"), bytearray()  # every step; is it heat that limits?
    for tick in run.ticks:
        plant.ambient_c, plant.airflow, plant.intensity = tick.ambient_c, tick.airflow, tick.intensity
        sensor.lost = not tick.sensor
        for _ in range(round(TICK_S / STEP_S)):
            allowed = state.duty if state.batch_limit else 0.0  # a trip: no work but what is in flight
            sensor.busy = busy = allowed if allowed < tick.demand else tick.demand
            plant.step(STEP_S, busy)
            temps.append(plant.die_c)
            duties.append(state.duty)
            heated.append(allowed < tick.demand - 0.01 and tick.sensor)
            state = next_state(config, state, sensor.read(), plant.time_s)
    settled = temps[int(SETTLE_S / STEP_S) :] or temps
    mean = math.fsum(settled) / len(settled)
    low, high = config.target_c - TOLERANCE_C, config.target_c + TOLERANCE_C
    first = int(SETTLE_S / STEP_S)
    holding = [low <= t <= high for t, h in zip(temps[first:], heated[first:], strict=True) if h]
    figures = Figures(
        scenario=run.name,
        mode=config.mode,
        target_c=config.target_c,
        ambient_c=run.ambient_c,
        hours=run.seconds / 3600,
        time_over_target_s=STEP_S * sum(t > high for t in temps),
        temp_std_c=math.sqrt(math.fsum((t - mean) ** 2 for t in settled) / len(settled)),
        throttle_s=plant.throttle_s,
        throughput_kept=plant.work_s / best[1] if best[1] else 0.0,
        trips=state.trips,
        mean_duty=math.fsum(duties) / len(duties),
        temp_max_c=max(temps),
        held_share=sum(holding) / len(holding) if holding else None,
        best_constant_duty=best[0],
        mean_power_w=plant.energy_j / run.seconds,
        step_downs=state.throttled,
    )
    return figures, _trace(config.mode, run, temps, duties)


def _trace(mode: str, run: Scenario, temps: array[float], duties: array[float]) -> Trace:
    """Every step is too many to draw."""
    trace, size = Trace(mode), max(1, len(temps) // TRACE_POINTS)
    for i in range(0, len(temps), size):
        piece = duties[i : i + size]
        trace.time_s.append(i * STEP_S)
        trace.temp_c.append(max(temps[i : i + size]))
        trace.duty.append(math.fsum(piece) / len(piece))
        trace.ambient_c.append(run.ticks[int(i * STEP_S / TICK_S)].ambient_c)
    return trace
