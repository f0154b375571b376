"""The tables of docs/homeostasis.md: `python -m vkllm.simulate grid | ablation`. They take minutes on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from unittest.mock import patch

import typer

from vkllm.homeostasis import HomeostasisConfig
from vkllm.simulate import CARDS, SCENARIOS, Figures, best_constant_duty, scenario, simulate

app = typer.Typer(help=__doc__, no_args_is_help=True)
GRID_CARDS = ("air", "server", "laptop", "paste", "coarse")
TARGETS_C, AMBIENTS_C = (65.0, 75.0, 85.0), (20.0, 30.0, 40.0, 45.0)
STEADY_HOURS, SHORT_HOURS, SEED = 6.0, 1.0, 1  # disturbances: a day pressed into an hour
Patch = tuple[str, Callable[..., Any] | float]  # something of the controller, and what stands in for it


@dataclass(frozen=True)
class Run:
    """One simulation. `throughput_kept` is left out (0) where `best` is not asked for: finding it takes a while."""

    card: str
    name: str
    target_c: float
    ambient_c: float
    hours: float
    seed: int = 1
    best: bool = True
    options: tuple[tuple[str, float], ...] = ()
    patches: tuple[Patch, ...] = ()

    def figures(self) -> Figures:
        run, model = scenario(self.name, self.ambient_c, self.hours, self.seed), CARDS[self.card]
        best = best_constant_duty(run, self.target_c, model) if self.best else (0.0, 0.0)
        config = HomeostasisConfig(target_c=self.target_c, **dict(self.options))  # type: ignore[arg-type]
        for where, what in self.patches:
            patch(where, what).start()
        try:
            return simulate(run, config, model=model, best=best, seed=self.seed)[0]
        finally:
            patch.stopall()


@app.command()
def grid() -> None:
    """Every card, target and ambient that needs a controller: a steady day, and the worst of all disturbances."""
    _row(
        "card",
        "target",
        "ambient",
        "best duty",
        "kept",
        "std, °C",
        "highest, °C",
        "over, s",
        "worst highest, °C",
        "in",
        "throttled, s",
        "trips",
    )
    _row(*["---"] * 12)
    with ProcessPoolExecutor() as pool:
        for steady, others in pool.map(_cell, _cells()):
            if steady.best_constant_duty >= 1.0:
                continue
            over = steady.time_over_target_s + sum(f.time_over_target_s for f in others)
            worst = max(others, key=lambda f: f.temp_max_c)
            _row(
                *(steady.scenario, f"{steady.target_c:g}", f"{steady.ambient_c:g}", f"{steady.best_constant_duty:.2f}"),
                *(f"{steady.throughput_kept:.3f}", f"{steady.temp_std_c:.2f}", f"{steady.temp_max_c:.1f}"),
                *(f"{over:.1f}", f"{worst.temp_max_c:.2f}", worst.scenario),
                *(f"{sum(f.throttle_s for f in others):.0f}", f"{sum(f.trips for f in others)}"),
            )


def _cells() -> Iterator[tuple[str, float, float]]:
    """Where the vendor's threshold leaves the target alone."""
    guard_c = HomeostasisConfig().guard_c
    cells = product(GRID_CARDS, TARGETS_C, AMBIENTS_C)
    return (cell for cell in cells if cell[1] <= CARDS[cell[0]].slowdown_c - guard_c)


def _cell(cell: tuple[str, float, float]) -> tuple[Figures, list[Figures]]:
    """(steady, disturbances) of one row; the steady one's scenario names the card."""
    card, target, ambient = cell
    best = best_constant_duty(scenario("steady", ambient, 1.0), target, CARDS[card])
    if best[0] >= 1.0:  # full speed does not reach the target: nothing to control
        return Run(card, "steady", target, ambient, 1 / 60).figures(), []
    steady = replace(Run(card, "steady", target, ambient, STEADY_HOURS).figures(), scenario=card)
    names = [n for n in SCENARIOS if n != "steady"]
    return steady, [Run(card, n, target, ambient, SHORT_HOURS, SEED, best=False).figures() for n in names]


def _never(*_: object) -> bool:
    return False


def _unweighed(config: object, load: Any, reading: object, dt: float) -> tuple[None, None, float, float]:
    return None, None, 0.0, load.weight


ABLATIONS: dict[str, tuple[dict[str, float], tuple[Patch, ...]]] = {
    "nothing": ({}, ()),
    "the filter of the margin": ({"filter_s": 0.0}, ()),
    "five readings a second (two)": ({}, (("vkllm.simulate.loop.STEP_S", 0.5),)),
    "faster down than up": ({"integral_s": 6.0}, ()),
    "the dead band": ({"dead_band_c": 0.0}, ()),
    "anti-windup": ({}, (("vkllm.homeostasis.laws._saturated", _never),)),
    "unused time is no evidence": ({}, (("vkllm.homeostasis.laws.USED", 0.0),)),
    "full speed at once when cold": ({"cold_c": 1000.0}, ()),
    "near: margins count up to 3 °C": ({"near_c": 1000.0}, ()),
    "the slew limit": ({"rise_per_s": 100.0}, ()),
    "feed-forward": ({}, (("vkllm.homeostasis.load._weigh", _unweighed),)),
    "lower during light work": ({"jump_c": 0.0}, ()),
    "the lift": ({"lift_c": 0.0}, ()),
    "less lift with more power": ({"lift_heat_c": 0.0}, ()),
    "the slow rise of the lift": ({"lift_per_s": 100.0}, ()),
}
ABLATED = (
    Run("air", "steady", 75.0, 35.0, 3.0),
    Run("air", "steady", 65.0, 40.0, 3.0),
    Run("air", "burst", 75.0, 35.0, 3.0),
    *(Run("air", "day", 75.0, 35.0, 2.0, seed, best=False) for seed in (5, 6)),
    *(Run("paste", "burst", 75.0, 35.0, 3.0, seed, best=False) for seed in (8, 9)),
    Run("paste", "sensor-loss", 65.0, 30.0, 1.5, best=False),
    *(Run("air", "fan-failure", 65.0, 40.0, 0.75, seed, best=False) for seed in range(4)),
)


@app.command()
def ablation() -> None:
    """What each rule of `pi` is for: the figures without it."""
    _row("without", "kept, steady 75/35", "kept, steady 65/40", "std, °C", "kept, burst", "over, s", "furthest above, °C")
    _row(*["---"] * 7)
    with ProcessPoolExecutor() as pool:
        for name, found in zip(ABLATIONS, pool.map(_ablate, ABLATIONS), strict=True):
            steady, warm, burst = found[:3]
            _row(
                *(name, f"{steady.throughput_kept:.3f}", f"{warm.throughput_kept:.3f}", f"{steady.temp_std_c:.2f}"),
                *(f"{burst.throughput_kept:.3f}", f"{sum(f.time_over_target_s for f in found):.1f}"),
                f"{max(f.temp_max_c - f.target_c for f in found):.2f}",
            )


def _ablate(name: str) -> list[Figures]:
    options, patches = ABLATIONS[name]
    return [replace(run, options=tuple(options.items()), patches=patches).figures() for run in ABLATED]


def _row(*cells: str) -> None:
    typer.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    app()
