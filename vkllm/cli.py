"""The command line: `vkllm run | chat | devices | doctor | inspect | tokenize | diff | bench | logits | shaders`.

Scripts read standard output: with `--json` it holds exactly one JSON object. Everything for people goes to standard error or
through rich. Exit status 1: an error of ours, printed with its hint; 2: wrong usage.
"""

from __future__ import annotations

import errno
import json
import math
import sys
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from vkllm.config import Activations, CacheType, ModelConfig, RuntimeConfig, speculate_of
from vkllm.errors import RequestError
from vkllm.hub_cli import pulled_model
from vkllm_codegen.errors import HintedError

if TYPE_CHECKING:
    from vkllm.chat import Conversation
    from vkllm.engine import LLMEngine
    from vkllm.files import ModelFile
    from vkllm.sampler import SamplingParams
    from vkllm.vk import DeviceInfo

err = Console(stderr=True, highlight=False, soft_wrap=True)


class Commands(TyperGroup):
    """The commands; errors of ours and of the file system become one message with a hint, and exit status 1.

    Those of other modules are imported when one of them, or a list of all, is asked for: `run` starts sooner, in less memory.
    """

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            self._add_others()
        return super().get_command(ctx, cmd_name)

    def list_commands(self, ctx: Any) -> list[str]:
        self._add_others()
        return super().list_commands(ctx)

    def _add_others(self) -> None:
        self.commands = {**self.commands, **typer.main.get_group(others()).commands}

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HintedError as error:
            report(error.message, error.hint)
        except OSError as error:
            if error.filename is None or error.errno == errno.EPIPE:
                raise
            report(f"{error.filename}: {error.strerror}", "check the path and its permissions")
        raise typer.Exit(1)


def report(message: str, hint: str) -> None:
    """An error for people, on standard error. Nothing in it is read as markup."""
    err.print(f"[red]error:[/red] {escape(message)}")
    if hint:
        err.print(f"[dim]hint: {escape(hint)}[/dim]")


app = typer.Typer(
    cls=Commands,
    help="Large language models on any Vulkan device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def known_activations(value: str) -> str:
    """Option check: one of the Activations."""
    if value not in get_args(Activations):
        raise typer.BadParameter(f"{value!r} is none of {', '.join(get_args(Activations))}")
    return value


def readable(text: str | None) -> str | None:
    """Bytes of an argument that are no UTF-8 become U+FFFD: tokenizers and terminals take nothing else."""
    return text and text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


Model = Annotated[
    str,
    typer.Argument(help="A GGUF file, a Hugging Face folder, a pulled model's name, or `tiny`.", callback=pulled_model),
]
Prompt = Annotated[str, typer.Option("-p", "--prompt", help="The text to continue.", callback=readable)]
Tokens = Annotated[int, typer.Option("-n", "--max-tokens", min=0, help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option("--temp", min=0.0, help="0 is greedy.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Same seed, same tokens.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="Index or part of the name (see `vkllm devices`).")]
ContextOption = Annotated[int | None, typer.Option("--n-ctx", "-c", min=1, help="Positions in the KV cache.")]
ActivationsOption = Annotated[
    str, typer.Option(help="auto, f32 or int8: how matrix products see activations.", callback=known_activations)
]
CacheOption = Annotated[str, typer.Option("--cache-type", help="f16, or q8_0: the KV cache in about half the memory.")]
SpeculateOption = Annotated[
    str, typer.Option("--speculate", help="Try several tokens a step where words repeat: auto, off or how many.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def runtime(
    device: str | None,
    n_ctx: int | None,
    activations: str,
    cache_type: str = "f16",
    *,
    progress: bool = True,
    speculate: str = "auto",
) -> RuntimeConfig:
    """RuntimeConfig from the options that every command with a model has."""
    return RuntimeConfig(
        device=device,
        n_ctx=n_ctx,
        activations=cast(Activations, activations),
        cache_type=cast(CacheType, cache_type),
        speculate=speculate_of(speculate),
        progress=progress and sys.stderr.isatty(),
    )


def print_json(value: object) -> None:
    """One JSON value on standard output."""
    typer.echo(json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False))


def jsonable(value: object) -> object:
    """A value in JSON's types: bytes as hexadecimal, sets sorted, NaN and infinity, which JSON lacks, as null."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | frozenset):
        return [jsonable(item) for item in (sorted(value) if isinstance(value, frozenset) else value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.hex() if isinstance(value, bytes) else value


@app.command()
def run(
    model: Model,
    prompt: Prompt,
    n: Tokens = 128,
    temperature: Temperature = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from this many; 0 keeps all.")] = 40,
    top_p: Annotated[float, typer.Option(max=1.0, help="Draw from the likeliest that reach this sum.")] = 0.95,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Drop tokens below this share of the best one.")] = 0.05,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: recent tokens are less likely.")] = 1.0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text (repeat for more).")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")] = False,
    device: DeviceOption = None,
    n_ctx: ContextOption = None,
    activations: ActivationsOption = "auto",
    cache_type: CacheOption = "f16",
    speculate: SpeculateOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue a text."""
    from vkllm.engine import LLMEngine
    from vkllm.sampler import SamplingParams

    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_tokens=n,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    options = runtime(device, n_ctx, activations, cache_type, progress=not as_json, speculate=speculate)
    with LLMEngine.init_model(model, options) as engine:
        if as_json:
            result = engine.generate_result(prompt, params)
            print_json(
                {
                    "text": result.text,
                    "token_ids": list(result.token_ids),
                    "finish_reason": result.finish_reason,
                    "usage": asdict(result.usage),
                    "timings": asdict(result.timings) | {"load_s": engine.load_s},
                    "device": engine.device.info.name,
                }
            )
            return
        text = prompt  # shown with the first piece: an error leaves standard output empty
        for event in engine.stream(prompt, params):
            show(text + event.text)
            text = ""
            if event.result:
                typer.echo()
                rates = event.result.timings
                err.print(
                    f"{engine.device.info.name} · loaded in {engine.load_s:.2f} s · prompt {rates.prompt_tok_s:.1f} tok/s"
                    f" · generation {rates.decode_tok_s:.1f} tok/s",
                    style="dim",
                    markup=False,
                )


def show(text: str) -> None:
    """A piece of a generation, at once."""
    typer.echo(text, nl=False)
    sys.stdout.flush()


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System prompt.", callback=readable)] = None,
    temperature: Temperature = 0.7,
    seed: Seed = None,
    n: Tokens = 512,
    device: DeviceOption = None,
    n_ctx: ContextOption = None,
    activations: ActivationsOption = "auto",
    cache_type: CacheOption = "f16",
    speculate: SpeculateOption = "auto",
) -> None:
    """Talk to a model that has a chat template. Ctrl-C ends an answer, Ctrl-D the chat; `/reset` starts over."""
    from vkllm.chat import Conversation
    from vkllm.engine import LLMEngine
    from vkllm.sampler import SamplingParams
    from vkllm.serve.render import TemplateWorker

    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=n)
    options = runtime(device, n_ctx, activations, cache_type, speculate=speculate)
    with LLMEngine.init_model(model, options) as engine, ExitStack() as stack:
        t = engine.tokenizer
        template = stack.enter_context(closing(TemplateWorker(t.chat_template or "", t.bos_token, t.eos_token)))
        conversation = Conversation(t, system, template.render)
        name = f"{engine.config.name or model} on {engine.device.info.name}"
        err.print(f"{name}; Ctrl-D ends, /reset starts over", style="dim", markup=False)
        while (line := ask()) is not None:
            if line.strip() == "/reset":
                conversation.reset()
            elif line.strip():
                answer(engine, conversation, line, params)


def ask() -> str | None:
    """One line from the person, or None at the end of input."""
    try:
        return readable(input("> " if sys.stdin.isatty() else ""))
    except (EOFError, KeyboardInterrupt):
        return None


def answer(engine: LLMEngine, conversation: Conversation, line: str, params: SamplingParams) -> None:
    """Stream the model's answer to one line. What cannot be answered is reported, and the chat goes on."""
    try:
        for event in engine.stream(conversation.ask(line), params):
            show(event.text)
            if event.result:
                conversation.answered(event.result.text)
        typer.echo()
    except KeyboardInterrupt:
        typer.echo()
    except RequestError as error:
        report(error.message, f"{error.hint}; /reset starts over")


@app.command()
def devices(as_json: JsonOption = False) -> None:
    """List the Vulkan devices, in the order in which vkllm would choose them."""
    from vkllm.vk.device import PREFERENCE, list_devices

    found = sorted(list_devices(), key=lambda d: PREFERENCE.index(d.kind))
    if as_json:
        print_json({"devices": [described(d) for d in found]})
        return
    table = Table("index", "name", "kind", "driver", "memory", "free")
    for d in found:
        gib = (f"{d.memory_bytes / 2**30:.1f} GiB", f"{d.available_bytes / 2**30:.1f} GiB")
        table.add_row(str(d.index), escape(d.name), d.kind, escape(f"{d.driver_name} {d.driver_info}"), *gib)
    Console().print(table if found else "no Vulkan device; `vkllm doctor` tells what to do")


def described(device: DeviceInfo) -> dict[str, object]:
    """What is worth knowing of a device."""
    limits = device.limits
    known = {name: value for name, value in asdict(device).items() if name not in ("limits", "cache_uuid", "queue_family")}
    return known | {"features": limits.features, "subgroup_size": limits.subgroup_size}


@app.command()
def doctor(device: DeviceOption = None, as_json: JsonOption = False) -> None:
    """Check loader, drivers, permissions, a kernel's result and memory; every failure comes with its next step."""
    from vkllm.doctor import examine

    checks = examine(device)
    if as_json:
        print_json({"ok": all(c.ok for c in checks), "checks": [asdict(c) for c in checks]})
    else:
        console = Console(highlight=False, soft_wrap=True)
        for c in checks:
            console.print(f"{'[green]ok  [/green]' if c.ok else '[red]FAIL[/red]'} {c.name}: {escape(c.found)}")
            if not c.ok:
                console.print(f"     next: {escape(c.next_step)}")
    raise typer.Exit(0 if all(c.ok for c in checks) else 1)


@app.command()
def inspect(
    model: Model,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a model file holds, without loading it, and whether vkllm can run it."""
    from vkllm.files import open_model

    with open_model(model) as file:
        metadata = {k: v for k, v in file.metadata.items() if isinstance(v, str | int | float) and "chat_template" not in k}
        config, problem = understood(file)
        rows = [{"name": t.name, "shape": list(t.shape), "type": t.type, "nbytes": t.nbytes} for t in file.tensors.values()]
        types = dict(Counter(t.type for t in file.tensors.values()))
        n_parameter = sum(math.prod(t.shape) for t in file.tensors.values())
        figures = {"format": file.format, "n_parameter": n_parameter, "types": types, "problem": problem}
    if as_json:
        print_json({"config": config, **figures, "metadata": metadata, "tensors": rows if tensors else len(rows)})
        return
    console = Console()
    table = Table("key", "value", title=escape(model))
    for key, value in ((config or metadata) | figures).items():
        table.add_row(escape(key), escape(f"{value:,}" if key == "n_parameter" else str(value)))
    console.print(table)
    if tensors:
        listing = Table("tensor", "shape", "type", "bytes")
        for t in file.tensors.values():
            listing.add_row(escape(t.name), " × ".join(map(str, t.shape)), t.type, f"{t.nbytes:,}")
        console.print(listing)


def understood(file: ModelFile) -> tuple[dict[str, object] | None, str | None]:
    """The configuration that a file's metadata gives, and why the model cannot be run; None where there is no such thing."""
    from vkllm.models import build_graph
    from vkllm.tokenizer import Tokenizer
    from vkllm.weights import check_weights

    config = None
    try:
        parsed = ModelConfig.from_gguf(file)
        config = asdict(parsed)
        check_weights(build_graph(parsed, file.tensors), file)
        Tokenizer.from_gguf(file.metadata)
    except HintedError as error:
        return config, error.message
    return config, None


@app.command()
def tokenize(
    model: Model,
    text: Annotated[str, typer.Argument(help="The text; `-` reads standard input.", callback=readable)],
    no_special: Annotated[
        bool, typer.Option("--no-special", help="No BOS or EOS; control tokens in the text stay text.")
    ] = False,
) -> None:
    """Print the token ids of a text as a JSON list."""
    from vkllm.files import open_model
    from vkllm.tokenizer import Tokenizer

    with open_model(model) as file:
        source = sys.stdin.buffer.read().decode("utf-8", errors="replace") if text == "-" else text
        ids = Tokenizer.from_gguf(file.metadata).encode(source, add_special=not no_special, parse_special=not no_special)
    print_json(ids)


@app.command()
def diff(
    model: Model,
    prompt: Prompt,
    limit: Annotated[float, typer.Option(min=0.0, help="NMSE above which an op has diverged.")] = 1e-4,
    device: DeviceOption = None,
    n_ctx: ContextOption = None,
    activations: ActivationsOption = "f32",
    cache_type: CacheOption = "f16",
    as_json: JsonOption = False,
) -> None:
    """Compare the device with the numpy reference after every op, and name the first divergence."""
    from vkllm.diff import diff as compare
    from vkllm.engine import LLMEngine

    with LLMEngine.init_model(model, runtime(device, n_ctx, activations, cache_type, progress=not as_json)) as engine:
        found = compare(engine, engine.tokenizer.encode(prompt), limit)
    first = found.first_divergence
    if as_json:
        print_json({"ops": [asdict(d) for d in found.ops], "limit": limit, "first_divergence": first.op if first else None})
    else:
        table = Table("op", "NMSE", "max |difference|")
        for d in found.ops:
            table.add_row(d.op, f"{d.nmse:.2e}", f"{d.max_abs:.2e}", style="red" if d == first else None)
        Console().print(table)
        Console().print(
            f"first divergence: {first.op} (NMSE {first.nmse:.2e} > {limit:.0e})"
            if first
            else f"no op differs by more than {limit:.0e}"
        )
    raise typer.Exit(1 if first else 0)


@app.command()
def bench(
    model: Model,
    n_prompt: Annotated[int, typer.Option("-p", min=0, help="Prompt tokens.")] = 512,
    n_generate: Annotated[int, typer.Option("-n", min=0, help="Generated tokens.")] = 128,
    repeat: Annotated[int, typer.Option("-r", min=1, help="Runs; the median counts.")] = 5,
    depth: Annotated[int, typer.Option(min=0, help="Also decode after so many tokens; 0: do not.")] = 0,
    device: DeviceOption = None,
    n_ctx: ContextOption = None,
    activations: ActivationsOption = "auto",
    cache_type: CacheOption = "f16",
    as_json: JsonOption = False,
) -> None:
    """Measure prefill and decode speed, load time, time to the first token and memory."""
    from vkllm.benchmark import benchmark

    figures = benchmark(
        model, runtime(device, n_ctx, activations, cache_type, progress=not as_json), n_prompt, n_generate, repeat, depth
    )
    if as_json:
        print_json(asdict(figures))
        return
    table = Table("figure", "value", title=escape(f"{model} on {figures.device}"))
    for key, value in asdict(figures).items():
        table.add_row(key, f"{value:,.2f}" if isinstance(value, float) else escape(str(value)))
    Console().print(table)


@app.command()
def logits(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The .npy file to write.")],
    ids: Annotated[str | None, typer.Option(help="Token ids, separated by commas.")] = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Or a text.", callback=readable)] = None,
    step: Annotated[bool, typer.Option("--step", help="Decode token by token instead of one prefill.")] = False,
    device: DeviceOption = None,
    n_ctx: ContextOption = None,
    activations: ActivationsOption = "auto",
    cache_type: CacheOption = "f16",
) -> None:
    """Write the logits of every token: float32, a row for each token."""
    from vkllm.engine import LLMEngine

    if (ids is None) == (prompt is None):
        raise typer.BadParameter("give --ids or -p, one of them")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"the folder {out.parent} does not exist", param_hint="--out")
    given = parse_ids(ids) if ids is not None else None
    with LLMEngine.init_model(model, runtime(device, n_ctx, activations, cache_type)) as engine:
        values = engine.logits(engine.tokenizer.encode(prompt or "") if given is None else given, step=step)
    with open(out, "wb") as sink:
        np.save(sink, values)


def parse_ids(text: str) -> list[int]:
    """ "1,2,3" as a list."""
    try:
        return [int(piece) for piece in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list like 1,2,3", param_hint="--ids") from None


@app.command()
def shaders(out: Annotated[Path, typer.Argument(help="Folder for .spv, .spvasm, .comp and manifest.json.")]) -> None:
    """Write every kernel: SPIR-V, its text, and GLSL, with a manifest."""
    from vkllm_shaders.catalog import export

    count = export(out)
    err.print(f"{count} kernels written to {out}")


def others() -> typer.Typer:
    """The commands that have modules of their own."""
    from vkllm.homeostasis_cli import app as homeostasis
    from vkllm.hub_cli import list_models, pull_model, remove_model
    from vkllm.import_cli import import_model
    from vkllm.perplexity_cli import eval_quant, perplexity
    from vkllm.profile_cli import profile_model
    from vkllm.serve.command import serve
    from vkllm.soak_cli import soak
    from vkllm.tune_cli import tune_model

    added = typer.Typer()
    added.command()(serve)
    added.command()(soak)
    added.command("profile")(profile_model)
    added.command("tune")(tune_model)
    added.command("import")(import_model)
    added.command("pull")(pull_model)
    added.command("list")(list_models)
    added.command("rm")(remove_model)
    added.command()(perplexity)
    added.command("eval-quant")(eval_quant)
    added.add_typer(homeostasis, name="homeostasis")
    return added


def main() -> None:
    """Entry point of the `vkllm` script and of `python -m vkllm`. What a terminal cannot show or say becomes a replacement."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    app(prog_name="vkllm")


if __name__ == "__main__":
    main()
