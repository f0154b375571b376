"""`vkllm profile`: a timeline of a token for a trace viewer, and where its time goes."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vkllm.config import Activations, CacheType, RuntimeConfig
from vkllm.hub_cli import pulled_model

if TYPE_CHECKING:
    from vkllm.profile import Profile, ProfiledStep, Row

err = Console(stderr=True, highlight=False, soft_wrap=True)


def profile_model(
    model: Annotated[str, typer.Argument(help="A model, as for `vkllm run`.", callback=pulled_model)],
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The text before the profiled tokens.")] = None,
    depth: Annotated[int, typer.Option(min=1, help="Without -p: so many random tokens come before.")] = 16,
    n_decode: Annotated[int, typer.Option("-n", min=1, help="Decode steps to profile; medians count.")] = 8,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write trace events for Perfetto or chrome://tracing.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Index or part of the name (see `vkllm devices`).")] = None,
    n_ctx: Annotated[int | None, typer.Option("--n-ctx", "-c", min=1, help="Positions in the KV cache.")] = None,
    activations: Annotated[str, typer.Option(help="auto, f32 or int8.")] = "auto",
    cache_type: Annotated[str, typer.Option("--cache-type", help="f16, or q8_0.")] = "f16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Show where the time of a prefill chunk and of a token goes, by the device's own clock."""
    from vkllm.profile import profile, trace_events

    if activations not in get_args(Activations):
        raise typer.BadParameter(f"{activations!r} is none of {', '.join(get_args(Activations))}", param_hint="--activations")
    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"the folder {out.parent} does not exist", param_hint="--out")
    runtime = RuntimeConfig(
        device=device, n_ctx=n_ctx, activations=cast(Activations, activations), cache_type=cast(CacheType, cache_type)
    )
    found = profile(model, runtime, prompt=prompt, depth=depth, n_decode=n_decode, tell=_progress())
    if out is not None:
        out.write_text(json.dumps(trace_events(found)) + "\n", encoding="utf-8")
        err.print(f"timeline written to {out}; open it in https://ui.perfetto.dev", style="dim", markup=False)
    if as_json:
        typer.echo(json.dumps(figures(found), allow_nan=False))
        return
    console = Console()
    for kind in ("prefill", "decode"):
        _show(console, found, kind)


def figures(found: Profile) -> dict[str, object]:
    """The profile as JSON: for each kind of step its times in µs, and its dispatches by op and by kernel."""
    found_by: dict[str, object] = {}
    for kind in ("prefill", "decode"):
        steps = found.of(kind)
        by_op, by_kernel = _summaries(steps)
        rows: dict[str, object] = {"by_op": [asdict(r) for r in by_op], "by_kernel": [asdict(r) for r in by_kernel]}
        found_by[kind] = {**_times(steps), **rows}
    about: dict[str, object] = {
        "model": found.model,
        "device": found.device,
        "driver": found.driver,
        "activations": found.activations,
    }
    return about | found_by


def _summaries(steps: Sequence[ProfiledStep]) -> tuple[list[Row], list[Row]]:
    from vkllm.profile import summary

    return summary(steps, lambda d: d.op_kind), summary(steps, lambda d: d.name)


def _times(steps: Sequence[ProfiledStep]) -> dict[str, float]:
    """Medians over the steps, in µs. `idle_us`: the device had nothing to do while the host worked."""
    wall, kernels, barriers = (
        statistics.median(getattr(step, name) for step in steps) for name in ("wall_us", "kernel_us", "barrier_us")
    )
    hosts = ("write parameters", "submit", "sample")
    host = {
        f"{name.replace(' ', '_')}_us": statistics.median(sum(i.us for i in s.intervals if i.name == name) for s in steps)
        for name in hosts
    }
    return {
        "n_row": steps[-1].n_row,
        "depth": steps[-1].depth,
        "n_dispatch": len(steps[-1].dispatches),
        "wall_us": wall,
        "kernel_us": kernels,
        "barrier_us": barriers,
        "idle_us": max(0.0, wall - kernels - barriers),
        **host,
    }


def _show(console: Console, found: Profile, kind: str) -> None:
    steps = found.of(kind)
    t = _times(steps)
    console.print(
        f"{kind}: {t['n_row']:.0f} row(s) at depth {t['depth']:.0f}, {t['n_dispatch']:.0f} dispatches, "
        f"{t['wall_us'] / 1e3:.2f} ms = "
        f"kernels {t['kernel_us'] / 1e3:.2f} + barriers {t['barrier_us'] / 1e3:.2f} + idle {t['idle_us'] / 1e3:.2f}; host: "
        f"parameters {t['write_parameters_us']:.0f} µs, submit {t['submit_us']:.0f} µs, sampling {t['sample_us']:.0f} µs",
        highlight=False,
        soft_wrap=True,
    )
    for title, rows in zip(("op", "kernel"), _summaries(steps), strict=True):
        console.print(_table(title, rows), soft_wrap=True)


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(title, min_width=max((len(r.name) for r in rows), default=0), no_wrap=True)
    for column in ("dispatches", "µs", "share", "MB", "GB/s", "GFLOP/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in rows:
        moved = (f"{r.nbytes / 1e6:.2f}", f"{r.gb_s:.2f}") if r.nbytes else ("–", "–")
        table.add_row(
            escape(r.name), str(r.n_dispatch), f"{r.us:.0f}", f"{r.share:.1%}", *moved, f"{r.gflop_s:.1f}" if r.gflop_s else "–"
        )
    return table


def _progress() -> Callable[[str], None]:
    """One line that changes, on a terminal; nothing elsewhere."""

    def show(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)

    return show
