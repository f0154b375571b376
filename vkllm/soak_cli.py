"""`vkllm soak`: hours of real work under the real controller, and the figures that come of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer
from rich.console import Console
from rich.table import Table

from vkllm.config import RuntimeConfig
from vkllm.homeostasis import HomeostasisConfig, Mode
from vkllm.hub_cli import pulled_model

if TYPE_CHECKING:
    from vkllm.soak import Moment, SoakFigures

err = Console(stderr=True, highlight=False, soft_wrap=True)
MODES = get_args(Mode)
SELDOM_S = 30.0  # between progress lines, where nobody watches a terminal
SHOWN = (  # label, figure, format
    ("time over target", "time_over_target_s", ".0f", "s"),
    ("temperature, highest", "temp_max_c", ".1f", "°C"),
    ("temperature, standard deviation", "temp_std_c", ".2f", "°C"),
    ("held within tolerance", "held_share", ".1%", ""),
    ("throttled", "throttle_s", ".0f", "s"),
    ("trips", "trips", "d", ""),
    ("mean duty", "mean_duty", ".1%", ""),
    ("throughput", "tok_s", ".1f", "tok/s"),
    ("throughput at full speed", "reference_tok_s", ".1f", "tok/s"),
    ("throughput kept", "throughput_kept", ".3f", ""),
    ("energy per token", "joules_per_token", ".3g", "J"),
    ("mean power", "mean_power_w", ".0f", "W"),
    ("requests", "requests", "d", ""),
    ("errors", "errors", "d", ""),
)


def soak(
    model: Annotated[str, typer.Argument(help="A model, as for `vkllm run`.", callback=pulled_model)],
    minutes: Annotated[float, typer.Option(min=0.01, help="Length of the run; 0.5 is half a minute.")] = 60.0,
    streams: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    mode: Annotated[str, typer.Option(help="pi, ramp or off.")] = "pi",
    target: Annotated[float, typer.Option(help="The temperature to hold, °C.")] = 75.0,
    reference: Annotated[
        float | None, typer.Option(min=0, help="Seconds at full speed first; default: a fifth of the run, at most 60.")
    ] = None,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="No sensor: a thermal model, heated by the real work. The result says so.")
    ] = False,
    ambient: Annotated[float, typer.Option(help="Ambient temperature of the thermal model, °C.")] = 35.0,
    power_limit: Annotated[float | None, typer.Option(help="Hold the device's power limit at so many watts meanwhile.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Index or part of the name (see `vkllm devices`).")] = None,
    n_ctx: Annotated[int | None, typer.Option("--n-ctx", "-c", min=1, help="Positions of each stream.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="Draw temperature and duty into this SVG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Keep a model at work for a long time, at its temperature. Ctrl-C ends it early, with the figures until then."""
    from vkllm.sensors.simulated import ThermalModel
    from vkllm.simulate import svg
    from vkllm.soak import SoakOptions
    from vkllm.soak import soak as run

    if mode not in MODES:
        raise typer.BadParameter(f"{mode!r} is none of {', '.join(MODES)}", param_hint="--mode")
    if plot is not None and not plot.parent.is_dir():
        raise typer.BadParameter(f"the folder {plot.parent} does not exist", param_hint="--plot")
    options = SoakOptions(
        minutes * 60, streams, reference_s=reference, simulated=simulated, ambient_c=ambient, watts=power_limit, seed=seed
    )
    if simulated:
        err.print("SIMULATED: temperature, power and energy are a thermal model's, heated by the real work", style="yellow")
    config = HomeostasisConfig(mode=cast(Mode, mode), target_c=target)
    figures, trace = run(model, RuntimeConfig(device=device, n_ctx=n_ctx), config, options, progress=_progress(options.seconds))
    if sys.stderr.isatty():
        err.print()
    if plot is not None:
        title = f"{figures.model}, {figures.seconds / 60:.3g} min, {figures.sensor} sensor, target {target:g} °C"
        slowdown_c = ThermalModel().slowdown_c if simulated else None
        plot.write_text(svg([trace], target, slowdown_c, title), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(asdict(figures), allow_nan=False))
    else:
        Console().print(_table(figures))


def _progress(seconds: float) -> Callable[[Moment], None]:
    """Prints where the run is: one line that changes on a terminal, a line now and then elsewhere."""
    told_s = time.monotonic()

    def show(moment: Moment) -> None:
        nonlocal told_s
        line = _line(moment, seconds)
        if sys.stderr.isatty():
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - told_s >= SELDOM_S:
            told_s = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    return show


def _line(moment: Moment, seconds: float) -> str:
    reading = moment.reading
    core = reading.temperatures.get("core") if reading else None
    parts = [f"{_clock(moment.elapsed_s)} of {_clock(seconds)}", "full speed" if moment.full_speed else moment.state.condition]
    parts += [f"{core.value_c:.0f} °C"] if core else ["no temperature"]
    parts += [f"duty {moment.state.duty:.0%}"]
    parts += [f"{reading.power_w:.0f} W"] if reading and reading.power_w is not None else []
    return " · ".join([*parts, f"{moment.tok_s:.1f} tok/s"])


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _table(figures: SoakFigures) -> Table:
    sensor = f"{figures.sensor}{', SIMULATED' if figures.simulated and figures.sensor != 'simulated' else ''}"
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_row("model, device", f"{figures.model}, {figures.device}")
    table.add_row("sensor", sensor)
    table.add_row("paced", f"{figures.seconds:.0f} s, {figures.streams} streams, {figures.mode}, target {figures.target_c:g} °C")
    for label, name, form, unit in SHOWN:
        value = getattr(figures, name)
        table.add_row(label, "–" if value is None else f"{value:{form}} {unit}".strip())
    return table
