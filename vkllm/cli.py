"""The command line: `vkllm run | chat | devices | doctor | inspect | tokenize | diff | bench | logits | shaders`.

Scripts read standard output: with `--json` it holds exactly one JSON object. Everything for people goes to standard error or
through rich. Exit status 1: an error of ours, printed with its hint; 2: wrong usage.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from vkllm.config import ModelConfig, RuntimeConfig
from vkllm.errors import HintedError, RequestError

app = typer.Typer(
    help="Large language models on any Vulkan device.", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
)
err = Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Argument(help="A GGUF file, or `tiny`, the model that comes with vkllm.")]
Prompt = Annotated[str, typer.Option("-p", "--prompt", help="The text to continue.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="Index or part of the name (see `vkllm devices`).")]
ContextOption = Annotated[int | None, typer.Option("--n-ctx", "-c", help="Positions in the KV cache.")]
ActivationsOption = Annotated[str, typer.Option("--activations", help="auto, f32 or int8: how matrix products see activations.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def runtime(device: str | None, n_ctx: int | None, activations: str, *, progress: bool = True) -> RuntimeConfig:
    """RuntimeConfig from the options that every command with a model has."""
    return RuntimeConfig(device=device, n_ctx=n_ctx, activations=activations, progress=progress and sys.stderr.isatty())  # type: ignore[arg-type]


def print_json(value: object) -> None:
    """One JSON object on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False))


@app.command()
def run(
    model: Model,
    prompt: Prompt,
    n: Annotated[int, typer.Option("-n", "--max-tokens", help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option("--temp", help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option()] = 40,
    top_p: Annotated[float, typer.Option()] = 0.95,
    min_p: Annotated[float, typer.Option()] = 0.05,
    repetition_penalty: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text (repeat for more).")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")] = False,
    device: DeviceOption = None,
    n_ctx: ContextOption = None,
    activations: ActivationsOption = "auto",
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
    with LLMEngine.init_model(model, runtime(device, n_ctx, activations, progress=not as_json)) as engine:
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
        typer.echo(prompt, nl=False)
        for event in engine.stream(prompt, params):
            typer.echo(event.text, nl=False)
            sys.stdout.flush()
            if event.result:
                typer.echo()
                print_speed(
                    engine.device.info.name, engine.load_s, event.result.timings.prompt_tok_s, event.result.timings.decode_tok_s
                )


def print_speed(device: str, load_s: float, prompt_tok_s: float, decode_tok_s: float) -> None:
    """The line under a generation."""
    err.print(
        f"[dim]{device} · loaded in {load_s:.2f} s · prompt {prompt_tok_s:.1f} tok/s · generation {decode_tok_s:.1f} tok/s[/dim]"
    )


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")] = None,
    temperature: Annotated[float, typer.Option("--temp")] = 0.7,
    seed: Annotated[int | None, typer.Option()] = None,
    n: Annotated[int, typer.Option("-n", "--max-tokens", help="Most tokens an answer.")] = 512,
    device: DeviceOption = None,
    n_ctx: ContextOption = None,
    activations: ActivationsOption = "auto",
) -> None:
    """Talk to a model that has a chat template. Ctrl-D ends, `/reset` starts over."""
    from vkllm.chat import Conversation
    from vkllm.engine import LLMEngine
    from vkllm.sampler import SamplingParams

    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=n)
    with LLMEngine.init_model(model, runtime(device, n_ctx, activations)) as engine:
        conversation = Conversation(engine.tokenizer, system)
        err.print(f"[dim]{engine.config.name or model} on {engine.device.info.name}; Ctrl-D ends, /reset starts over[/dim]")
        while (line := ask()) is not None:
            if line.strip() == "/reset":
                conversation.reset()
                continue
            if not line.strip():
                continue
            for event in engine.stream(conversation.ask(line), params):
                typer.echo(event.text, nl=False)
                sys.stdout.flush()
                if event.result:
                    conversation.answered(event.result.text)
            typer.echo()


def ask() -> str | None:
    """One line from the person, or None at the end of input."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        return None


@app.command()
def devices(as_json: JsonOption = False) -> None:
    """List the Vulkan devices, in the order in which vkllm would choose them."""
    from vkllm.vk import list_devices

    found = list_devices()
    if as_json:
        rows = [{k: v for k, v in asdict(d).items() if k != "limits"} | {"features": sorted(d.limits.features)} for d in found]
        print_json({"devices": rows})
        return
    table = Table("index", "name", "kind", "driver", "memory", "free", "features")
    for d in found:
        gib = (f"{d.memory_bytes / 2**30:.1f} GiB", f"{d.available_bytes / 2**30:.1f} GiB")
        table.add_row(str(d.index), d.name, d.kind, f"{d.driver_name} {d.driver_info}", *gib, " ".join(sorted(d.limits.features)))
    Console().print(table)


@app.command()
def doctor(device: DeviceOption = None, as_json: JsonOption = False) -> None:
    """Check loader, drivers, permissions, a kernel's result and memory; every failure comes with its next step."""
    from vkllm.doctor import examine

    checks = examine(device)
    if as_json:
        print_json({"ok": all(c.ok for c in checks), "checks": [asdict(c) for c in checks]})
    else:
        for c in checks:
            mark = "[green]ok  [/green]" if c.ok else "[red]FAIL[/red]"
            Console(highlight=False).print(f"{mark} {c.name}: {c.found}" + (f"\n     next: {c.next_step}" if not c.ok else ""))
    raise typer.Exit(0 if all(c.ok for c in checks) else 1)


@app.command()
def inspect(
    model: Model,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a model file holds, without loading it."""
    from vkllm.files import resolve_model
    from vkllm.files.gguf import GGUFFile

    with GGUFFile.open(resolve_model(model)) as file:
        config = asdict(ModelConfig.from_gguf(file))
        types: dict[str, int] = {}
        for t in file.tensors.values():
            types[t.type] = types.get(t.type, 0) + 1
        n_parameter = sum(int(np.prod(t.shape)) for t in file.tensors.values())
        if as_json:
            rows = [{"name": t.name, "shape": list(t.shape), "type": t.type, "nbytes": t.nbytes} for t in file.tensors.values()]
            print_json(
                {
                    "config": config,
                    "version": file.version,
                    "n_parameter": n_parameter,
                    "types": types,
                    "tensors": rows if tensors else len(rows),
                }
            )
            return
        console = Console()
        table = Table("key", "value", title=str(model))
        for key, value in (config | {"parameters": f"{n_parameter:,}", "tensor types": types}).items():
            table.add_row(key, str(value))
        console.print(table)
        if tensors:
            listing = Table("tensor", "shape", "type", "bytes")
            for t in file.tensors.values():
                listing.add_row(t.name, " × ".join(map(str, t.shape)), t.type, f"{t.nbytes:,}")
            console.print(listing)


@app.command()
def tokenize(
    model: Model,
    text: Annotated[str, typer.Argument(help="The text; `-` reads standard input.")],
    no_special: Annotated[
        bool, typer.Option("--no-special", help="No BOS or EOS; control tokens in the text stay text.")
    ] = False,
) -> None:
    """Print the token ids of a text as a JSON list."""
    from vkllm.files import resolve_model
    from vkllm.files.gguf import GGUFFile
    from vkllm.tokenizer import Tokenizer

    with GGUFFile.open(resolve_model(model)) as file:
        source = sys.stdin.buffer.read().decode("utf-8", errors="replace") if text == "-" else text
        ids = Tokenizer.from_gguf(file.metadata).encode(source, add_special=not no_special, parse_special=not no_special)
    print_json(ids)


@app.command()
def diff(
    model: Model,
    prompt: Prompt,
    limit: Annotated[float, typer.Option(help="NMSE above which an op has diverged.")] = 1e-4,
    device: DeviceOption = None,
    activations: ActivationsOption = "f32",
    as_json: JsonOption = False,
) -> None:
    """Compare the device with the numpy reference after every op, and name the first divergence."""
    from vkllm.diff import diff as compare
    from vkllm.engine import LLMEngine

    with LLMEngine.init_model(model, runtime(device, None, activations, progress=not as_json)) as engine:
        report = compare(engine, engine.tokenizer.encode(prompt), limit)
    first = report.first_divergence
    if as_json:
        print_json({"ops": [asdict(d) for d in report.ops], "limit": limit, "first_divergence": first.op if first else None})
    else:
        table = Table("op", "NMSE", "max |difference|")
        for d in report.ops:
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
    n_prompt: Annotated[int, typer.Option("-p", help="Prompt tokens.")] = 512,
    n_generate: Annotated[int, typer.Option("-n", help="Generated tokens.")] = 128,
    repeat: Annotated[int, typer.Option("-r", help="Runs; the median counts.")] = 5,
    device: DeviceOption = None,
    n_ctx: ContextOption = None,
    activations: ActivationsOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure prefill and decode speed, load time, time to the first token and memory."""
    from vkllm.benchmark import benchmark

    report = benchmark(model, runtime(device, n_ctx, activations, progress=not as_json), n_prompt, n_generate, repeat)
    if as_json:
        print_json(asdict(report))
        return
    table = Table("figure", "value", title=f"{model} on {report.device}")
    for key, value in asdict(report).items():
        table.add_row(key, f"{value:,.2f}" if isinstance(value, float) else str(value))
    Console().print(table)


@app.command()
def logits(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The .npy file to write.")],
    ids: Annotated[str | None, typer.Option(help="Token ids, separated by commas.")] = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Or a text.")] = None,
    step: Annotated[bool, typer.Option("--step", help="Decode token by token instead of one prefill.")] = False,
    device: DeviceOption = None,
    n_ctx: ContextOption = None,
    activations: ActivationsOption = "auto",
) -> None:
    """Write the logits of every token, float32 [n_token, n_vocab]."""
    from vkllm.engine import LLMEngine

    with LLMEngine.init_model(model, runtime(device, n_ctx, activations)) as engine:
        token_ids = parse_ids(ids) if ids is not None else engine.tokenizer.encode(prompt or "")
        values = engine.logits(token_ids, step=step)
    with open(out, "wb") as sink:
        np.save(sink, values)


def parse_ids(text: str) -> list[int]:
    """ "1,2,3" as a list.

    Raises: RequestError: something that is no number.
    """
    try:
        return [int(piece) for piece in text.split(",")]
    except ValueError:
        raise RequestError(f"--ids is {text!r}; expected numbers separated by commas", hint="for example --ids 1,2,3") from None


@app.command()
def shaders(out: Annotated[Path, typer.Argument(help="Folder for .spv, .spvasm, .comp and manifest.json.")]) -> None:
    """Write every kernel: SPIR-V, its text, and GLSL, with a manifest."""
    from vkllm_shaders.catalog import export

    count = export(out)
    err.print(f"{count} kernels written to {out}")


def main() -> None:
    """Entry point: errors of ours become one message with a hint."""
    try:
        app()
    except HintedError as error:
        err.print(f"[red]error:[/red] {error.message}", markup=True)
        if error.hint:
            err.print(f"[dim]hint: {error.hint}[/dim]")
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(1)


if __name__ == "__main__":
    main()
