"""The controller against the thermal model: the figures that were promised, for other devices too, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import get_args
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from vkllm.errors import ConfigError
from vkllm.homeostasis import HomeostasisConfig, Mode
from vkllm.homeostasis_cli import app
from vkllm.sensors.simulated import ThermalModel, ThermalPlant
from vkllm.simulate import CARDS, SCENARIOS, Figures, Scenario, best_constant_duty, scenario, simulate

TARGET = 75.0


def figures(name: str, hours: float, card: str = "air", seed: int = 1, target: float = TARGET, ambient: float = 35.0) -> Figures:
    """`pi` in one scenario."""
    run = scenario(name, ambient, hours, seed)
    return simulate(run, HomeostasisConfig(target_c=target), model=CARDS[card], seed=seed)[0]


@pytest.fixture(scope="module")
def day() -> dict[str, Figures]:
    """Swing, bursts, a fan failure and a dropped sensor in four hours, by controller."""
    run = scenario("day", 35.0, 4.0)
    best = best_constant_duty(run, TARGET)
    return {m: simulate(run, HomeostasisConfig(mode=m), best=best, seed=1)[0] for m in get_args(Mode)}


def test_a_day_of_everything(day: dict[str, Figures]) -> None:
    pi = day["pi"]
    assert pi.time_over_target_s == 0 and pi.temp_max_c <= TARGET + 1
    assert pi.throttle_s == 0 and pi.trips == 0 and pi.step_downs == 0
    assert pi.throughput_kept >= 0.97 and (pi.held_share or 0) > 0.75


def test_a_day_of_everything_for_the_others(day: dict[str, Figures]) -> None:
    """The simple law keeps less and is over the target when the fan fails; without control the hardware throttles."""
    assert day["ramp"].time_over_target_s > 0 and day["ramp"].throughput_kept < day["pi"].throughput_kept
    assert day["off"].throttle_s > 60 and day["off"].time_over_target_s > 3600


@pytest.mark.parametrize("name", [n for n in SCENARIOS if n != "day"])
def test_each_disturbance_alone(name: str) -> None:
    f = figures(name, 2.0)
    assert f.time_over_target_s == 0 and f.throttle_s == 0 and f.trips == 0
    assert f.throughput_kept >= 0.97
    assert (f.held_share or 0) > (0.5 if name == "burst" else 0.97)


def test_twenty_minutes_without_a_sensor_in_a_day() -> None:
    run = scenario("sensor-loss", 35.0, 24.0)
    lost = [t for t in run.ticks if not t.sensor]
    assert len(lost) * 5.0 >= 20 * 60


@pytest.mark.parametrize(
    ("card", "target", "ambient"),
    [("air", 65.0, 40.0), ("air", 65.0, 20.0), ("server", 75.0, 30.0), ("laptop", 75.0, 45.0)],
)
def test_a_steady_load_keeps_its_throughput(card: str, target: float, ambient: float) -> None:
    """Near the ambient, where a degree is worth a tenth of the work, as well as far above it."""
    f = figures("steady", 2.0, card, 2, target, ambient)
    assert f.time_over_target_s == 0 and f.temp_std_c < 0.15 and f.throughput_kept >= 0.97


@pytest.mark.parametrize("card", [c for c in CARDS if c != "air"])
def test_devices_that_it_was_not_tuned_on(card: str) -> None:
    f = figures("day", 1.0, card, seed=4)
    assert f.time_over_target_s == 0 and f.throttle_s == 0 and f.trips == 0 and f.throughput_kept >= 0.97


@pytest.mark.parametrize("card", ["air", "laptop"])
@pytest.mark.parametrize("loss_first", [False, True])
def test_a_fan_and_the_sensor_fail_together(card: str, loss_first: bool) -> None:
    """For an hour, in a room that gets 5 °C warmer: below the target all along, and nothing throttles."""
    run = scenario("steady", 35.0, 1.5)
    ticks = []
    for i, tick in enumerate(run.ticks):
        at = i / len(run.ticks)
        sensor, airflow = not 0.31 < at < 0.98, 0.4 if at > (0.35 if loss_first else 0.30) else 1.0
        ticks.append(replace(tick, ambient_c=35.0 + 5.0 * at, sensor=sensor, airflow=airflow))
    f = simulate(Scenario("both", 35.0, tuple(ticks)), HomeostasisConfig(), model=CARDS[card], best=(1.0, 1.0))[0]
    assert f.temp_max_c < TARGET + 1 and f.throttle_s == 0 and f.trips == 0


def test_the_model_settles_where_the_resistances_say() -> None:
    plant = ThermalPlant(ambient_c=30.0)
    for _ in range(8000):
        plant.step(0.5, 0.7)
    power = 35 + 0.7 * 315
    assert plant.power_w == pytest.approx(power)
    assert plant.sink_c == pytest.approx(30 + 0.12 * power, abs=0.05)
    assert plant.die_c == pytest.approx(30 + 0.16 * power, abs=0.05)
    assert plant.energy_j == pytest.approx(power * 4000)


def test_the_model_keeps_its_heat() -> None:
    """All energy is in the nodes or went to the air: with no air there is nowhere to go."""
    plant = ThermalPlant(ThermalModel(fan_least=0.0, fan_low_c=500, fan_high_c=600), 20.0)
    plant.fan = 0.0
    for _ in range(200):
        plant.step(0.05, 1.0)
    stored = 60 * (plant.die_c - 20) + 900 * (plant.sink_c - 20)
    assert stored == pytest.approx(plant.energy_j, rel=0.01)


def test_the_model_throttles_and_recovers() -> None:
    plant = ThermalPlant(ThermalModel(sink_k_per_w=0.25), 35.0)
    for _ in range(4000):
        plant.step(0.5, 1.0)
    assert 80 < plant.die_c <= 91 and plant.throttle_s > 100 and plant.work_s < 2000
    for _ in range(200):
        plant.step(0.5, 0.0)
    assert plant.clock == 1.0


def test_the_best_constant_duty_is_the_best() -> None:
    run = scenario("steady", 35.0, 1.0)
    duty, work = best_constant_duty(run, TARGET)
    hottest = (TARGET + 1 - 35) / 0.16
    assert duty == pytest.approx((hottest - 35) / 315, abs=0.002) and work == pytest.approx(duty * 3600)
    assert best_constant_duty(scenario("steady", 80.0, 0.1), TARGET) == (0.0, 0.0)


def test_scenarios_are_repeatable_and_bounded() -> None:
    assert scenario("day", seed=3) == scenario("day", seed=3) != scenario("day", seed=4)
    loads = scenario("burst", 35.0, 24.0).ticks
    assert {t.demand for t in loads} == {0.0, 0.3, 1.0} and len(loads) == 24 * 720
    for wrong in (("monsoon", 24.0), ("day", 0.0), ("day", math.inf)):
        with pytest.raises(ConfigError):
            scenario(wrong[0], 35.0, wrong[1])


def test_a_lost_sensor_from_the_start() -> None:
    run = scenario("steady", 35.0, 0.1)
    blind = type(run)(run.name, run.ambient_c, tuple(type(t)(t.ambient_c, sensor=False) for t in run.ticks))
    f, _ = simulate(blind, HomeostasisConfig())
    assert f.mean_duty == HomeostasisConfig().lost_duty


def test_the_command_prints_one_object(tmp_path: object) -> None:
    command = ["simulate", "--mode", "pi", "--target", "75", "--ambient", "35", "--hours", "0.5", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    wanted = {"time_over_target_s", "temp_std_c", "throttle_s", "throughput_kept", "trips", "mean_duty"}
    assert wanted <= found.keys() and found["mode"] == "pi" and found["hours"] == 0.5


def test_the_command_prints_a_table_and_draws(tmp_path: object) -> None:
    out = f"{tmp_path}/out.svg"
    result = CliRunner().invoke(app, ["simulate", "--scenario", "all", "--hours", "0.1", "--json", "--plot", out])
    assert result.exit_code == 0
    rows = json.loads(result.stdout)
    assert [(r["scenario"], r["mode"]) for r in rows] == [(s, m) for s in SCENARIOS for m in ("pi", "ramp", "off")]
    root = ElementTree.parse(out).getroot()
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    titles = {line[0].text for line in lines}
    assert titles == {"ambient", *(f"{m}: {what}" for m in ("pi", "ramp", "off") for what in ("temperature", "duty"))}
    table = CliRunner().invoke(app, ["simulate", "--mode", "all", "--hours", "0.1"])
    assert table.exit_code == 0 and "ramp" in table.stdout


@pytest.mark.parametrize(
    "wrong", [["--mode", "x"], ["--scenario", "x"], ["--card", "x"], ["--hours", "-1"], ["--plot", "/no/such/folder/x.svg"]]
)
def test_wrong_usage(wrong: list[str]) -> None:
    assert CliRunner().invoke(app, ["simulate", *wrong]).exit_code == 2
