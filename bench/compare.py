"""vkllm beside llama.cpp: the same file, the same run, turns taken.

Usage: python bench/compare.py MODEL.gguf --peer DIR [-p 512] [-n 64] [-r 3] [--peer-vulkan-prompt 512] [--out bench/results]

DIR holds llama.cpp's builds (`build-cpu/bin`, `build-vulkan/bin`). Each round runs every engine once. The medians over the
rounds and their ratios are printed as one JSON line and written to OUT/DEVICE/DATE-MODEL.json. `busy` is how many cores others
kept busy just before the rounds: above 0.1 the figures are noise, and `quiet` is false.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any


def peer_bench(folder: Path, model: str, n_prompt: int, n_generate: int, vulkan: bool) -> dict[str, float]:
    """One llama-bench run: {"pp": tok/s, "tg": tok/s}; a size of 0 is left out."""
    tool = folder / ("build-vulkan" if vulkan else "build-cpu") / "bin" / "llama-bench"
    env = os.environ | {"LD_LIBRARY_PATH": str(tool.parent)} | ({"GGML_VK_VISIBLE_DEVICES": "0"} if vulkan else {})
    command = [str(tool), "-m", model, "-t", "2", "-p", str(n_prompt), "-n", str(n_generate), "-r", "1", "-o", "json"]
    command += ["-ngl", "99"] if vulkan else []
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    tests = json.loads(done.stdout)
    return {("pp" if t["n_prompt"] else "tg"): float(t["avg_ts"]) for t in tests}


def own_bench(model: str, n_prompt: int, n_generate: int, extra: list[str]) -> dict[str, Any]:
    """One `vkllm bench` run in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "vkllm.cli",
        "bench",
        model,
        "-p",
        str(n_prompt),
        "-n",
        str(n_generate),
        "-r",
        "1",
        "--json",
        *extra,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def others_busy(seconds: float = 1.0) -> float:
    """Cores in use while we sleep."""

    def ticks() -> int:
        fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return sum(fields) - fields[3] - fields[4]

    before = ticks()
    time.sleep(seconds)
    return (ticks() - before) / 100.0 / seconds


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All rounds, medians and ratios."""
    rounds: list[dict[str, Any]] = []
    for i in range(args.rounds):
        print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
        turn: dict[str, Any] = {"busy": others_busy()}
        turn["vkllm"] = own_bench(args.model, args.prompt, args.generate, args.vkllm_args)
        turn["cpu"] = peer_bench(args.peer, args.model, args.prompt, args.generate, vulkan=False)
        if args.peer_vulkan_prompt is not None:
            turn["vulkan"] = peer_bench(args.peer, args.model, args.peer_vulkan_prompt, args.peer_vulkan_generate, vulkan=True)
        rounds.append(turn)
    own = {
        k: statistics.median(r["vkllm"][k] for r in rounds)
        for k in ("pp_tok_s", "tg_tok_s", "load_s", "ttft_s", "rss_bytes", "busy")
    }
    peers = {
        p: {k: statistics.median(r[p][k] for r in rounds) for k in rounds[0][p]} for p in ("cpu", "vulkan") if p in rounds[0]
    }
    ratios = {f"{k}_vs_{p}": own[f"{k}_tok_s"] / v for p, figures in peers.items() for k, v in figures.items()}
    last = rounds[-1]["vkllm"]
    busy = statistics.median(r["busy"] for r in rounds)
    return {
        "model": Path(args.model).name,
        "device": last["device"],
        "driver": last["driver"],
        "date": date.today().isoformat(),
        "n_prompt": args.prompt,
        "n_generate": args.generate,
        "vkllm": own
        | {"rss_over_file": own["rss_bytes"] / last["file_bytes"], "dispatches_per_layer": last["dispatches_per_layer"]},
        "llama.cpp": peers,
        "ratios": ratios,
        "busy": busy,
        "quiet": busy < 0.1,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--generate", type=int, default=64)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument(
        "--peer-vulkan-prompt", type=int, help="prompt tokens for the peer's Vulkan backend (slow); left out: not run"
    )
    parser.add_argument("--peer-vulkan-generate", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args, args.vkllm_args = parser.parse_known_args()
    report = compare(args)
    folder = args.out / re.sub(r"\W+", "-", f"{report['device']} {report['driver']}").strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{report['date']}-{Path(args.model).stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "rounds"}))


if __name__ == "__main__":
    main()
