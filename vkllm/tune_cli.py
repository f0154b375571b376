"""`vkllm tune`: finds what is fastest on this device for a model's shapes, and keeps it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vkllm.hub_cli import pulled_model

if TYPE_CHECKING:
    from vkllm.tune import Outcome

AXES = {
    "activations": "activations",
    "lanes": "lanes a subgroup",
    "rows": "rows of a matrix a lane",
    "dequantize": "prefill: where weights are dequantized",
    "tile": "prefill: tokens a tile",
    "side_by_side": "decode: row groups side by side",
    "attention_tile": "attention: positions a turn",
    "split": "attention: positions a workgroup",
    "dispatches": "decode: what a dispatch does",
}
"""What a report says of each choice that is tried."""

err = Console(stderr=True, highlight=False, soft_wrap=True)


def tune_model(
    model: Annotated[str, typer.Argument(help="A model, as for `vkllm run`: its shapes count.", callback=pulled_model)] = "tiny",
    minutes: Annotated[float, typer.Option(min=0.0, help="Stop after so long, with what was found until then.")] = 5.0,
    report: Annotated[bool, typer.Option("--report", help="Show every experiment.")] = False,
    device: Annotated[str | None, typer.Option("--device", help="Index or part of the name (see `vkllm devices`).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Try kernels' tiles, rows a lane, activations and attention on this device, and keep the fastest."""
    from vkllm.config import ModelConfig
    from vkllm.files import open_model
    from vkllm.tune import DeviceTimer, axes, model_shapes, search
    from vkllm.tuned import save, tuned
    from vkllm.vk import open_device

    with open_model(model) as file:
        config, shapes = ModelConfig.from_gguf(file), model_shapes(file)
    with open_device(device) as opened:
        lane_row = opened.info.kind == "cpu"
        timer = DeviceTimer(opened, config, shapes, lane_row)
        candidates = axes(lane_row, opened.limits)
        outcome = search(tuned(opened.info, shapes, lane_row), candidates, timer, 60 * minutes, tell=_progress)
        kept = save(outcome.choices, opened.info, shapes)
        name = opened.info.name
    if as_json:
        typer.echo(json.dumps({"device": name, "file": str(kept), **asdict(outcome)}))
        return
    if sys.stderr.isatty():
        err.print()
    _show(outcome, report)
    err.print(
        f"kept in {kept}" + ("" if outcome.finished else "; the time was up before all was tried"), style="dim", markup=False
    )


def _progress(text: str) -> None:
    """One line that changes, on a terminal; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


def _show(outcome: Outcome, report: bool) -> None:
    console = Console(highlight=False)
    for axis, tried in groupby(outcome.experiments if report else (), key=lambda e: e.axis):
        table = Table(AXES[axis], "best so far, ms", "this, ms", "", box=None, padding=(0, 2, 0, 0))
        for e in tried:
            took = escape(e.problem) if e.seconds is None else f"{e.seconds * 1e3:.2f}"
            table.add_row(str(e.value), f"{e.best * 1e3:.2f}", took, "kept" if e.kept else "")
        console.print(table)
        console.print()
    console.print(", ".join(f"{name} {value}" for name, value in asdict(outcome.choices).items()), soft_wrap=True)
