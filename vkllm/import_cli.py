"""`vkllm import`: a model file in other types, for other programs too."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from vkllm.files import open_model
from vkllm.hub_cli import pulled_model
from vkllm.quantize.mixes import FILE_TYPES, file_type

if TYPE_CHECKING:
    from vkllm.quantize.convert import Imported

err = Console(stderr=True, highlight=False, soft_wrap=True)


def import_model(
    source: Annotated[
        str,
        typer.Argument(
            help="A GGUF file, a Hugging Face folder, or a pulled model's name.", metavar="SRC", callback=pulled_model
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.", metavar="OUT")],
    kind: Annotated[str, typer.Option("--type", help=f"One of {', '.join(FILE_TYPES)}.")] = "Q4_K_M",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it is there already.")] = False,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Take a source that is quantized already; it loses more.")
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="Workers; 0: one a CPU.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Write a model as a GGUF file of another type (quantize it), for vkllm and for llama.cpp."""
    from vkllm.quantize.convert import Plan, write_model

    target = file_type(kind)
    with closing(open_model(source)) as file:
        plan = Plan.of(file, target, allow_requantize=allow_requantize)
        if plan.requantized:
            err.print(
                f"[yellow]warning:[/yellow] {len(plan.requantized)} tensors are quantized already and lose more", style="dim"
            )
        bar = Progress(
            *(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()),
            console=err,
            disable=as_json or not sys.stderr.isatty(),
        )
        with bar:
            task = bar.add_task("quantizing", total=sum(t.nbytes for t in file.tensors.values()))
            done = write_model(plan, out, force=force, threads=threads, advance=lambda n: bar.advance(task, n))
    if as_json:
        typer.echo(json.dumps(asdict(done)))
    else:
        _show(done)


def _show(done: Imported) -> None:
    types = ", ".join(f"{n} {kind}" for kind, n in sorted(done.types.items(), key=lambda pair: -pair[1]))
    size = f"{done.source_bytes / 2**20:,.1f} → {done.file_bytes / 2**20:,.1f} MiB"
    err.print(f"{escape(done.path)}: {done.file_type}, {size}, {done.bits_per_weight:.2f} bits a weight ({types})")
    if done.fallbacks:
        err.print(f"{len(done.fallbacks)} matrices have rows that are no whole blocks and got another type", style="dim")
