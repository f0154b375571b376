"""The benchmark: ceilings of the machine, kernels against them, and models beside llama.cpp. `make bench` runs it.

python bench/run.py MODEL... [--peer BIN] [--peer-vulkan BIN] [-p 512] [-n 64] [-r 3] [--depth 4096] [--out bench/results]

BIN is the folder of llama.cpp's programs (llama-bench, llama-completion). Everything is measured in one run, engines taking turns
on the same file. Results go to OUT/DEVICE/DATE.json with three pictures beside it; a table shows issue 5's targets.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import plots
from ceiling import ceilings, threads
from compare import QUIET, Peer, Size, figures, others_busy, own_bench, rounds
from kernels import measure
from rich.console import Console
from rich.table import Table
from targets import CPU, VULKAN, Verdict, verdicts

from vkllm.config import ModelConfig, RuntimeConfig
from vkllm.files import open_model, resolve_model
from vkllm.hub import store
from vkllm.profile import Profile, profile, summary
from vkllm.tune import product_spec
from vkllm.tuned import default_choices
from vkllm.vk import Device, open_device

FORMATS_OF_LIST = ("Q4_K", "Q5_0", "Q6_K", "Q8_0", "F16")
TOKENS = (1, 64)  # of a dispatch: decode and prefill
BIG = (("Q4_K", "Q5_K", "Q6_K"), (4864, 1024), (4864, 896))  # K-quants need whole blocks of 256
LEAST_DEPTH = 64

console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)
STARTED = time.perf_counter()


def tell(text: str) -> None:
    """Progress, with the time so far."""
    elapsed = round(time.perf_counter() - STARTED)
    err.print(f"{elapsed // 60}:{elapsed % 60:02}  {text}", style="dim", markup=False)


def standard_kernels(device: Device, repeat: int) -> list[dict[str, Any]]:
    """The default matrix kernels by format, on weights that no cache holds: decode (1 token) and prefill (64)."""
    cpu = device.info.kind == "cpu"
    found = []
    for fmt in FORMATS_OF_LIST:
        for n_token in TOKENS:
            n_row, n_col = BIG[1] if fmt in BIG[0] else BIG[2]
            spec = product_spec(fmt, default_choices(cpu), n_row, n_token, cpu, device.limits)
            tell(f"kernel {spec.name}")
            found.append({"fmt": fmt, "activations": spec.activations, **measure(device, spec, n_row, n_col, n_token, repeat)})
    return found


def model_report(model: str, args: argparse.Namespace, peers: Sequence[Peer]) -> dict[str, Any]:
    """One model: rounds of all engines, decode by depth, and profiles."""
    size = Size(args.prompt, args.generate, args.threads)
    found = rounds(model, size, peers, args.rounds, args.vkllm_args, tell)
    with open_model(model) as file:
        config = ModelConfig.from_gguf(file)
    last = found[-1]["vkllm"]
    report: dict[str, Any] = {"name": Path(model).stem, "n_prompt": args.prompt, "n_generate": args.generate}
    report |= {name: last[name] for name in ("activations", "file_bytes", "dispatches_per_token", "dispatches_per_layer")}
    report |= {"n_layer": config.n_layer, **figures(found), "rounds": found}
    depth = min(args.depth, config.n_ctx - LEAST_DEPTH)
    if depth > 0:
        tell(f"{report['name']}: decode at depth {depth}")
        deep = own_bench(model, Size(0, 0, args.threads), ["--depth", str(depth), *args.vkllm_args])
        report["depth"] = {name: deep[name] for name in ("depth", "fill_tok_s", "shallow_tok_s", "deep_tok_s", "busy")}
    tell(f"{report['name']}: profile")
    report["profile"] = profiled(profile(model, RuntimeConfig(device=args.device), depth=80))
    return report


def profiled(found: Profile) -> dict[str, Any]:
    """A profile's dispatches, added up by op and by kernel, for decode and prefill."""
    kinds: dict[str, Any] = {}
    for kind in ("decode", "prefill"):
        steps = found.of(kind)
        kinds[kind] = {
            "n_row": steps[-1].n_row,
            "depth": steps[-1].depth,
            "kernel_us": statistics.median(s.kernel_us for s in steps),
            "barrier_us": statistics.median(s.barrier_us for s in steps),
            "by_op": [asdict(r) for r in summary(steps, lambda d: d.op_kind)],
            "by_kernel": [asdict(r) for r in summary(steps, lambda d: d.name)],
        }
    return kinds


def draw(report: Mapping[str, Any]) -> dict[str, str]:
    """The pictures of a report by name."""
    where = f"{report['device']}, {report['date']}"
    names = [n for n in ("vkllm", CPU, VULKAN) if any(n in m for m in report["models"])]
    rates = [{"name": m["name"], "engines": {n: m[n] for n in names if n in m}} for m in report["models"]]
    times = [{"name": m["name"], "parts": _token_ms(m)} for m in report["models"]]
    pictures = {"tokens": plots.tokens_per_second(rates, f"vkllm beside llama.cpp: {where}")}
    pictures["token-time"] = plots.token_time(times, f"a token's time: each kernel's share of what was measured; {where}")
    for m in report["models"][:1]:
        pictures["roofline"] = plots.roofline(_roof_points(m), report["ceiling"], f"{m['name']}: {where}")
    return pictures


def _token_ms(model: Mapping[str, Any]) -> dict[str, float]:
    """The measured time of a token, shared among ops as in its profile, whose stamps cost time themselves."""
    ms = 1e3 / model["vkllm"]["tg_tok_s"]
    return plots.gathered({r["name"]: r["share"] * ms for r in model["profile"]["decode"]["by_op"]})


def _roof_points(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ops that read and multiply, with at least 2 % of the time of their kind of step."""
    return [
        {"kind": kind, "name": r["name"], "share": r["share"], "gflop_s": r["gflop_s"]}
        | {"flop_per_byte": r["gflop_s"] / r["gb_s"]}
        for kind, p in model["profile"].items()
        for r in p["by_op"]
        if r["nbytes"] and r["gflop_s"] and r["share"] >= plots.LEAST_SHARE
    ]


def show(report: Mapping[str, Any]) -> None:
    """The tables for people."""
    c = report["ceiling"]
    console.print(
        f"{report['device']}, {report['driver']}: a kernel reads {c['device_read_gb_s']:.1f} GB/s and multiplies "
        f"{c['device_fma_gflop_s']:.0f} GFLOP/s; numpy {c['host_read_gb_s']:.1f} GB/s and {c['host_gemm_gflop_s']:.0f} GFLOP/s",
        soft_wrap=True,
        markup=False,
    )
    _print_kernels(report)
    for m in report["models"]:
        _print_model(m, c)
    _print_targets([Verdict(**v) for v in report["targets"]])
    if not report["quiet"]:
        text = f"others used {report['busy']:.1f} CPUs meanwhile (quiet: below {QUIET}): these figures are noise, run it again"
        console.print(text, style="red", soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


def _print_kernels(report: Mapping[str, Any]) -> None:
    c = report["ceiling"]
    if not report["kernels"]:
        return
    table = _table(
        "matrix kernels", "format, activations", "1 token, GB/s", "of the reads", "64 tokens, GFLOP/s", "of the f32 rate"
    )
    for decode, prefill in zip(report["kernels"][::2], report["kernels"][1::2], strict=True):
        shares = (decode["gb_s"] / c["read_gb_s"], prefill["gflop_s"] / c["f32_gflop_s"])
        name = f"{decode['fmt']}, {decode['activations']}"
        table.add_row(name, f"{decode['gb_s']:.1f}", f"{shares[0]:.0%}", f"{prefill['gflop_s']:.1f}", f"{shares[1]:.0%}")
    console.print(table)


def _print_model(m: Mapping[str, Any], ceiling: Mapping[str, float]) -> None:
    engines = [n for n in ("vkllm", CPU, VULKAN) if n in m]
    table = _table(m["name"], "median of the rounds", *engines)
    rows = (
        (f"prefill {m['n_prompt']}, tok/s", "pp_tok_s", 1.0, ".1f"),
        (f"decode {m['n_generate']}, tok/s", "tg_tok_s", 1.0, ".1f"),
        ("whole process to its first token, s", "start_s", 1.0, ".2f"),
        ("loading to the first token, s", "ttft_s", 1.0, ".2f"),
        ("resident memory, MB", "rss_bytes", 1e-6, ".0f"),
        ("CPUs that others used", "busy", 1.0, ".2f"),
    )
    for label, name, factor, form in rows:
        table.add_row(label, *(format(m[e][name] * factor, form) if name in m[e] else "–" for e in engines))
    console.print(table)
    if depth := m.get("depth"):
        ratio = depth["shallow_tok_s"] / depth["deep_tok_s"]
        rates = (
            f"{depth['shallow_tok_s']:.1f} tok/s, after {depth['depth']} {depth['deep_tok_s']:.1f} tok/s ({ratio:.2f} × slower)"
        )
        filled = f"prefill of those {depth['fill_tok_s']:.1f} tok/s; {m['dispatches_per_token']} dispatches a token"
        console.print(f"decode after 16 tokens {rates}; {filled}", soft_wrap=True)
    for kind, p in m["profile"].items():
        table = _table(f"{kind}, {p['n_row']} row(s)", "op", "share", "GB/s", "of the reads", "GFLOP/s", "of the f32 rate")
        for r in p["by_op"]:
            if r["share"] >= plots.LEAST_SHARE:
                shares = (r["gb_s"] / ceiling["read_gb_s"], r["gflop_s"] / ceiling["f32_gflop_s"])
                values = (f"{r['gb_s']:.1f}", f"{shares[0]:.0%}", f"{r['gflop_s']:.1f}", f"{shares[1]:.0%}")
                table.add_row(r["name"], f"{r['share']:.0%}", *values)
        console.print(table)


def _print_targets(lines: Sequence[Verdict]) -> None:
    if not lines:
        return
    table = _table("targets of issue 5", "model", "test", "target", "reached", "")
    for v in lines:
        mark = "–" if v.ok is None else "[green]yes[/green]" if v.ok else "[red]no[/red]"
        table.add_row(v.model, v.test, v.target, v.reached or "not measured", mark)
    console.print(table, soft_wrap=True)


def measured_all(args: argparse.Namespace) -> dict[str, Any]:
    """The whole run as one report."""
    peers = [Peer(CPU, args.peer)] if args.peer and not args.peer_is_vulkan else []
    peers += [Peer(VULKAN, args.peer, vulkan=True)] if args.peer and args.peer_is_vulkan else []
    slow = [Peer(VULKAN, args.peer_vulkan, vulkan=True, seldom=True)] if args.peer_vulkan else []
    before = others_busy()
    if before > QUIET:
        tell(f"the machine is busy: others use {before:.1f} CPUs")
    with open_device(args.device) as device:
        tell("ceilings")
        report: dict[str, Any] = {"date": date.today().isoformat(), "device": device.info.name, "driver": device.info.driver_info}
        report |= {"kind": device.info.kind, "machine": machine(), "ceiling": ceilings(device)}
        report["kernels"] = standard_kernels(device, args.kernel_repeat) if args.kernel_repeat else []
    report["models"] = [model_report(m, args, [*peers, *(slow if i == 0 else [])]) for i, m in enumerate(args.models)]
    report["targets"] = [asdict(v) for v in verdicts(report["models"])]
    busy = max([m["busy"] for m in report["models"]] + [m["depth"]["busy"] for m in report["models"] if "depth" in m])
    return report | {"busy": busy, "quiet": busy < QUIET, "seconds": round(time.perf_counter() - STARTED)}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    lanes = os.environ.get("VKLLM_LAVAPIPE_LANES")
    return {"cpu": cpu, "threads": threads(), "kernel": platform.release(), "python": platform.python_version(), "lanes": lanes}


def save(report: Mapping[str, Any], out: Path) -> Path:
    """Write OUT/DEVICE/DATE.json (or DATE-2.json, … where there is one) and its pictures. Returns the file."""
    folder = out / re.sub(r"\W+", "-", f"{report['device']} {report['driver']}").strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    names = (f"{report['date']}{f'-{i}' if i > 1 else ''}" for i in range(1, 1000))
    file = next(f for f in (folder / f"{name}.json" for name in names) if not f.exists())
    file.write_text(json.dumps(report, indent=1) + "\n")
    for name, picture in draw(report).items():
        (folder / f"{file.stem}-{name}.svg").write_text(picture, encoding="utf-8")
    return file


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what it does not know goes to `vkllm bench`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--peer", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument("--peer-is-vulkan", action="store_true", help="--peer is a Vulkan build, for a GPU")
    parser.add_argument(
        "--peer-vulkan", type=Path, help="folder of a Vulkan build, run once on the first model (slow on lavapipe)"
    )
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--generate", type=int, default=64)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=4096, help="decode after so many tokens as well; 0: do not")
    parser.add_argument("--threads", type=int, default=threads(), help="of llama.cpp")
    parser.add_argument("--kernel-repeat", type=int, default=5, help="runs of each kernel of the standard list; 0: leave it out")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args, extra = parser.parse_known_args(arguments)
    args.models = [str(resolve_model(store.resolve(m))) for m in args.models]
    args.vkllm_args = [*extra, *(["--device", args.device] if args.device else [])]
    for folder in (args.peer, args.peer_vulkan):
        if folder and not (folder / "llama-bench").is_file():
            parser.error(f"{folder} holds no llama-bench; expected the folder of llama.cpp's programs, e.g. build/bin")
    return args


def main() -> None:
    args = parsed()
    report = measured_all(args)
    file = save(report, args.out)
    show(report)
    tell(f"written to {file} and three .svg beside it")
    print(json.dumps({"file": str(file), "quiet": report["quiet"], "busy": report["busy"], "seconds": report["seconds"]}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
