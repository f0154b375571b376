"""`vkllm perplexity` and `vkllm eval-quant`: how well a model predicts a text, and what quantizing it cost."""

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
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vkllm.config import Activations, CacheType, RuntimeConfig
from vkllm.hub_cli import pulled_model

if TYPE_CHECKING:
    from vkllm.evaluate import Difference
    from vkllm.perplexity import Perplexity

STORIES = Path(__file__).resolve().parent / "data" / "stories.txt"
err = Console(stderr=True, highlight=False, soft_wrap=True)


def _known_activations(value: str) -> str:
    if value not in get_args(Activations):
        raise typer.BadParameter(f"{value!r} is none of {', '.join(get_args(Activations))}")
    return value


ContextOption = Annotated[int, typer.Option("--n-ctx", "-c", min=4, help="Tokens of a chunk; the second half counts.")]
ChunksOption = Annotated[int | None, typer.Option("--chunks", min=1, help="Only the first so many.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="Index or part of the name (see `vkllm devices`).")]
ActivationsOption = Annotated[
    str, typer.Option(help="auto, f32 or int8: how matrix products see activations.", callback=_known_activations)
]
CacheOption = Annotated[str, typer.Option("--cache-type", help="f16, or q8_0: the KV cache in about half the memory.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def perplexity(
    model: Annotated[str, typer.Argument(help="A model, as for `vkllm run`.", callback=pulled_model)],
    file: Annotated[Path, typer.Argument(help="A text of at least one chunk.")],
    n_ctx: ContextOption = 512,
    chunks: ChunksOption = None,
    device: DeviceOption = None,
    activations: ActivationsOption = "auto",
    cache_type: CacheOption = "f16",
    as_json: JsonOption = False,
) -> None:
    """Measure how well a model predicts a text, as llama-perplexity does; the lower the better."""
    from vkllm.engine import LLMEngine
    from vkllm.perplexity import cut
    from vkllm.perplexity import perplexity as measure

    text = _text(file)
    with LLMEngine.init_model(model, _runtime(device, n_ctx, activations, cache_type, not as_json)) as engine:
        parts = cut(engine.tokenizer, text, n_ctx, chunks)
        with _bar(as_json) as bar:
            task = bar.add_task("", total=len(parts.ids))
            started = time.perf_counter()
            found = measure(engine, parts, lambda _, so_far: bar.update(task, advance=1, description=f"PPL {so_far.ppl:.4f}"))
            seconds = time.perf_counter() - started
        name = engine.device.info.name
    if as_json:
        typer.echo(json.dumps(asdict(found) | {"seconds": seconds, "device": name}))
    else:
        typer.echo(f"PPL = {found.ppl:.4f} ± {found.error:.5f}")
        n = found.n_chunk * found.n_ctx
        err.print(f"{found.n_chunk} chunks of {found.n_ctx} tokens, {n / seconds:,.0f} tokens/s on {escape(name)}", style="dim")


def eval_quant(
    quantized: Annotated[str, typer.Argument(help="The quantized model.", callback=pulled_model)],
    parent: Annotated[str, typer.Argument(help="The model that it was made of, in F16, BF16 or F32.", callback=pulled_model)],
    file: Annotated[Path | None, typer.Option("--text", help="A text; default: the stories that come with vkllm.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the divergences into this SVG file.")] = None,
    n_ctx: ContextOption = 512,
    chunks: ChunksOption = None,
    device: DeviceOption = None,
    activations: ActivationsOption = "auto",
    cache_type: CacheOption = "f16",
    as_json: JsonOption = False,
) -> None:
    """Compare a quantized model with its parent: KL divergence, agreement on the top token, perplexity.

    --activations and --cache-type are for the quantized model; the parent runs with f32 and f16.
    """
    from vkllm.engine import LLMEngine
    from vkllm.evaluate import compare
    from vkllm.evaluate_plot import svg
    from vkllm.perplexity import cut

    if plot is not None and not plot.parent.is_dir():
        raise typer.BadParameter(f"the folder {plot.parent} does not exist", param_hint="--plot")
    text = _text(file or STORIES)
    tested, exact = (_runtime(device, n_ctx, *how, not as_json) for how in ((activations, cache_type), ("f32", "f16")))
    with LLMEngine.init_model(quantized, tested) as small, LLMEngine.init_model(parent, exact) as large:
        parts = cut(small.tokenizer, text, n_ctx, chunks)
        with _bar(as_json) as bar:
            task = bar.add_task("", total=len(parts.ids))
            found, positions = compare(
                small, large, parts, lambda _, at: bar.update(task, advance=1, description=f"KL {at.kl.mean():.2e}")
            )
    if plot is not None:
        plot.write_text(svg(positions, found, parts, f"{Path(quantized).name} against {Path(parent).name}"), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        Console().print(_table(found))


def _text(file: Path) -> str:
    return file.read_bytes().decode("utf-8", "replace")


def _runtime(device: str | None, n_ctx: int, activations: str, cache_type: str, shown: bool) -> RuntimeConfig:
    return RuntimeConfig(
        device=device,
        n_ctx=n_ctx,
        activations=cast(Activations, activations),
        cache_type=cast(CacheType, cache_type),
        progress=shown and sys.stderr.isatty(),
    )


def _bar(as_json: bool) -> Progress:
    """Chunks done, with the estimate so far."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err, disable=as_json or not sys.stderr.isatty())


def _table(found: Difference) -> Table:
    table = Table("figure", "value", "±")
    for column in table.columns[1:]:
        column.justify = "right"
    rows: tuple[tuple[str, float, float | None, Callable[[float], str]], ...] = (
        ("KL divergence, mean (nats)", found.kl_mean, found.kl_error, _small),
        ("KL divergence, median", found.kl_median, None, _small),
        ("KL divergence, 90 %", found.kl_p90, None, _small),
        ("KL divergence, 99 %", found.kl_p99, None, _small),
        ("KL divergence, greatest", found.kl_max, None, _small),
        ("same top token", found.same_top, found.same_top_error, _percent),
        ("probability of the text's token, rms change", found.p_shift_rms, None, _percent),
        *_perplexities(("perplexity", found.quantized), ("perplexity of the parent", found.parent)),
        ("perplexity, difference", found.ppl_delta, found.ppl_delta_error, lambda v: f"{v:.4f}"),
        ("ln of the perplexities' ratio", found.log_ratio, found.log_ratio_error, lambda v: f"{v:.5f}"),
    )
    for name, value, spread, form in rows:
        table.add_row(name, form(value), "" if spread is None else form(spread))
    return table


def _perplexities(*named: tuple[str, Perplexity]) -> list[tuple[str, float, float, Callable[[float], str]]]:
    return [(name, p.ppl, p.error, lambda v: f"{v:.4f}") for name, p in named]


def _small(value: float) -> str:
    return f"{value:.6f}" if value >= 0.001 else f"{value:.3e}"


def _percent(value: float) -> str:
    return f"{value:.3%}"
