"""`vkllm homeostasis simulate | sensors`: the controller against the thermal model, and what this machine's sensors tell."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vkllm.homeostasis import HomeostasisConfig, Mode

if TYPE_CHECKING:
    from vkllm.sensors.simulated import ThermalModel
    from vkllm.simulate import Figures, Scenario, Trace

app = typer.Typer(help="Hold a device at its temperature.", no_args_is_help=True)
SHOWN = {  # heading → figure, format
    "over s": ("time_over_target_s", ".0f"),
    "max °C": ("temp_max_c", ".1f"),
    "std °C": ("temp_std_c", ".2f"),
    "thr. s": ("throttle_s", ".0f"),
    "kept": ("throughput_kept", ".3f"),
    "trips": ("trips", "d"),
    "duty": ("mean_duty", ".3f"),
    "held": ("held_share", ".3f"),
}
MODES = get_args(Mode)


@app.command()
def simulate(
    mode: Annotated[str, typer.Option(help="pi, ramp, off, or all of them.")] = "pi",
    target: Annotated[float, typer.Option(help="Temperature to hold, °C.")] = 75.0,
    ambient: Annotated[float, typer.Option(help="Mean ambient temperature, °C.")] = 35.0,
    hours: Annotated[float, typer.Option(min=1 / 60, max=8784.0, help="Length of the run.")] = 24.0,
    scenario: Annotated[
        str, typer.Option(help="steady, swing, burst, fan-failure, sensor-loss, blind (both), day (all at once), or all.")
    ] = "steady",
    card: Annotated[
        str, typer.Option(help="air (350 W), server (700 W), laptop (80 W), paste (bad), coarse or fine (sensor).")
    ] = "air",
    seed: Annotated[int, typer.Option(min=0, help="Of the loads and of the sensor's noise.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="Draw pi, ramp and off into this SVG file.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object (a list for several runs), nothing else.")
    ] = False,
) -> None:
    """Run the controller against a thermal model, far faster than real time, beside the best constant duty."""
    from vkllm.simulate import CARDS, SCENARIOS, svg
    from vkllm.simulate import scenario as build

    if mode not in (*MODES, "all"):
        raise typer.BadParameter(f"{mode!r} is none of {', '.join(MODES)}, all", param_hint="--mode")
    if scenario not in (*SCENARIOS, "all"):
        raise typer.BadParameter(f"{scenario!r} is none of {', '.join(SCENARIOS)}, all", param_hint="--scenario")
    if card not in CARDS:
        raise typer.BadParameter(f"{card!r} is none of {', '.join(CARDS)}", param_hint="--card")
    if plot is not None and not plot.parent.is_dir():
        raise typer.BadParameter(f"the folder {plot.parent} does not exist", param_hint="--plot")
    names = SCENARIOS if scenario == "all" else (scenario,)
    wanted = MODES if mode == "all" or scenario == "all" else (mode,)
    drawn = names[-1]  # of all, the day that has everything
    rows: list[Figures] = []
    traces: list[Trace] = []
    for name in names:
        modes = MODES if plot is not None and name == drawn else wanted
        for figures, trace in _runs(build(name, ambient, hours, seed), modes, target, CARDS[card], seed):
            if figures.mode in wanted:
                rows.append(figures)
            if plot is not None and name == drawn:
                traces.append(trace)
    if plot is not None:
        title = f"{drawn}: {hours:g} h, target {target:g} °C, ambient {ambient:g} °C"
        plot.write_text(svg(traces, target, CARDS[card].slowdown_c, title), encoding="utf-8")
    if as_json:
        listed = [asdict(r) for r in rows]
        typer.echo(json.dumps(listed[0] if len(listed) == 1 else listed, allow_nan=False))
    else:
        Console().print(_table(rows))


def _runs(run: Scenario, modes: tuple[str, ...], target: float, model: ThermalModel, seed: int) -> list[tuple[Figures, Trace]]:
    """Every mode through one scenario; the best constant duty is found once."""
    from vkllm import simulate as sim

    best = sim.best_constant_duty(run, target, model)
    configs = [HomeostasisConfig(mode=cast(Mode, m), target_c=target) for m in modes]
    return [sim.simulate(run, config, model=model, best=best, seed=seed) for config in configs]


@app.command()
def sensors(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """What the sensors of this machine's Vulkan devices tell now."""
    from vkllm.sensors import open_sensor
    from vkllm.vk.device import list_devices

    found: list[dict[str, object]] = []
    for info in list_devices():
        sensor = open_sensor(info)
        reading = sensor.read() if sensor else None
        row: dict[str, object] = {"device": info.name, "sensor": sensor.name if sensor else None, "reading": None}
        if reading:
            row["reading"] = asdict(reading) | {"throttle": sorted(reading.throttle)}
        if sensor:
            sensor.close()
        found.append(row)
    if as_json:
        typer.echo(json.dumps({"devices": found}))
        return
    table = Table("device", "sensor", "reading")
    for row in found:
        table.add_row(*(escape(str(value or "none")) for value in row.values()))
    Console().print(table if found else "no Vulkan device; `vkllm doctor` tells what to do")


def _table(rows: list[Figures]) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for heading in ("scenario", "mode"):
        table.add_column(heading, no_wrap=True)
    for heading in SHOWN:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        values = ((getattr(row, name), form) for name, form in SHOWN.values())
        table.add_row(row.scenario, row.mode, *("–" if v is None else format(v, form) for v, form in values))
    return table
