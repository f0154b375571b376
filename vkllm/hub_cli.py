"""`vkllm pull | list | rm`: models from the Hugging Face hub, by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from vkllm.errors import RequestError
from vkllm.hub import store

if TYPE_CHECKING:
    from vkllm.hub.download import Progress as Advance

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def pull_model(
    name: Annotated[str, typer.Argument(metavar="REPO[:FILE]", help="OWNER/NAME; FILE: a GGUF file, or a type such as Q4_K_M.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: the newest.")] = None,
    accept_license: Annotated[bool, typer.Option("--accept-license", help="You have read the licence and accept it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch a model from the Hugging Face hub; its name then works wherever a MODEL is asked for."""
    from vkllm.hub.pull import pull

    err = Console(stderr=True, highlight=False, soft_wrap=True)
    model = pull(
        name,
        revision=revision,
        accepted=accept_license,
        show=lambda text: err.print(text, markup=False),
        ask=(lambda question: typer.confirm(question, err=True)) if someone_is_there() else None,
        meter=lambda file, nbytes: _bar(err, file, nbytes),
    )
    if as_json:
        typer.echo(json.dumps(_shown(model)))
    else:
        typer.echo(model.name)


def list_models(as_json: JsonOption = False) -> None:
    """Show the models that were pulled."""
    models, unfinished = store.pulled(), list(store.incomplete())
    if as_json:
        typer.echo(json.dumps({"models": [_shown(m) for m in models], "incomplete": [str(p) for p in unfinished]}))
        return
    table = Table("model", "size", "licence", "revision", "pulled")
    for m in models:
        table.add_row(escape(m.name), _size(m.nbytes), escape(m.licence), m.revision[:12], m.pulled_at[:10])
    console = Console(highlight=False, soft_wrap=True)
    console.print(table if models else "no models; `vkllm pull OWNER/NAME` fetches one")
    for path in unfinished:
        console.print(f"incomplete: {escape(str(path))}; pull it again, or delete the folder")


def remove_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `vkllm list` shows it.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a pulled model, all its revisions, and what was never finished of it."""
    folders = store.folders(name)
    size = sum(p.stat().st_size for folder in folders for p in folder.rglob("*") if p.is_file())
    if not yes:
        if not someone_is_there():
            raise RequestError(f"{name} has {_size(size)}, and nobody is here to say yes", hint="add --yes")
        typer.confirm(f"Delete {name} ({_size(size)})?", abort=True, err=True)
    for folder in folders:
        store.remove(folder)
    typer.echo(f"{name} is deleted")


def pulled_model(model: str) -> str:
    """Option check for every MODEL: the path of a pulled model, where it is the name of one."""
    return store.resolve(model)


def someone_is_there() -> bool:
    """Can a person be asked?"""
    return sys.stdin.isatty()


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _shown(model: store.Pulled) -> dict[str, object]:
    return {"name": model.name, "path": str(model.path), **asdict(model)}


@contextmanager
def _bar(console: Console, name: str, nbytes: int) -> Iterator[Advance]:
    """A progress bar on a terminal; elsewhere nothing."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=nbytes)
        yield lambda n: progress.advance(task, n)
