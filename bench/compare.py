"""vkllm and llama.cpp on one model: the same file, the same run, turns taken, and what others did to the machine meanwhile.

Used by run.py. A round runs every engine once, in an order that the next round reverses; figures are medians over the rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUIET = 0.1  # CPUs that others may use before figures are noise
OWN_FIGURES = ("pp_tok_s", "tg_tok_s", "load_s", "ttft_s", "start_s", "rss_bytes", "busy")
PEER_FIGURES = ("pp_tok_s", "tg_tok_s", "start_s", "rss_bytes", "busy")


@dataclass(frozen=True)
class Size:
    """What a round measures: prompt and generated tokens, threads for llama.cpp."""

    n_prompt: int
    n_generate: int
    threads: int


@dataclass(frozen=True)
class Done:
    """A finished command: its output, wall seconds, largest resident memory, and the CPUs that others used meanwhile."""

    stdout: str
    wall_s: float
    rss_bytes: int
    busy: float


@dataclass(frozen=True)
class Peer:
    """A build of llama.cpp: the folder of its programs, and whether they work on a Vulkan device. `seldom`: in one round only."""

    name: str
    folder: Path
    vulkan: bool = False
    seldom: bool = False

    @property
    def env(self) -> dict[str, str]:
        return {"LD_LIBRARY_PATH": str(self.folder)} | ({"GGML_VK_VISIBLE_DEVICES": "0"} if self.vulkan else {})

    @property
    def layers(self) -> list[str]:
        return ["-ngl", "99"] if self.vulkan else []

    def bench(self, model: str, size: Size) -> dict[str, float]:
        """llama-bench once: a rate for each size that is not 0."""
        tool = [str(self.folder / "llama-bench"), "-m", model, "-t", str(size.threads), "-r", "1", "-o", "json", *self.layers]
        tool += ["--no-warmup"] if self.seldom else []
        done = measured([*tool, "-p", str(size.n_prompt), "-n", str(size.n_generate)], self.env)
        rates = {("pp_tok_s" if t["n_prompt"] else "tg_tok_s"): float(t["avg_ts"]) for t in json.loads(done.stdout)}
        return rates | {"rss_bytes": done.rss_bytes, "busy": done.busy}

    def start_s(self, model: str, size: Size) -> float:
        """Seconds of a process that loads the model, makes one token and ends."""
        tool = [str(self.folder / "llama-completion"), "-m", model, "-t", str(size.threads), *self.layers]
        return measured([*tool, "-p", "Hello", "-n", "1", "--temp", "0", "--no-warmup", "-no-cnv"], self.env).wall_s


def measured(command: Sequence[str], env: Mapping[str, str] | None = None) -> Done:
    """Run a command to its end.

    Raises: RuntimeError: it failed; with the end of what it said.
    """
    before, own, started = machine_busy_s(), time.process_time(), time.perf_counter()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})}
        )
        assert child.stdout is not None
        stdout = child.stdout.read().decode("utf-8", "replace")
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        child.stdout.close()
        if child.returncode:
            said.seek(0)
            raise RuntimeError(
                f"{' '.join(command)} ended with {child.returncode}: {said.read().decode(errors='replace')[-800:]}"
            )
    wall = time.perf_counter() - started
    ours = usage.ru_utime + usage.ru_stime + time.process_time() - own
    return Done(stdout, wall, usage.ru_maxrss * 1024, max(0.0, machine_busy_s() - before - ours) / wall)


def machine_busy_s() -> float:
    """CPU seconds of all processes of the machine since some fixed time."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def others_busy(seconds: float = 1.0) -> float:
    """CPUs in use while we sleep."""
    before = machine_busy_s()
    time.sleep(seconds)
    return (machine_busy_s() - before) / seconds


def vkllm(*arguments: str) -> Done:
    """A vkllm command in a process of its own."""
    return measured([sys.executable, "-m", "vkllm", *arguments])


def own_bench(model: str, size: Size, extra: Sequence[str]) -> dict[str, Any]:
    """`vkllm bench` once. `busy` is what others used while it ran."""
    done = vkllm("bench", model, "-p", str(size.n_prompt), "-n", str(size.n_generate), "-r", "1", "--json", *extra)
    report: dict[str, Any] = json.loads(done.stdout)
    return report | {"busy": done.busy, "max_rss_bytes": done.rss_bytes}


def own_start_s(model: str) -> float:
    """Seconds of a process that loads the model, makes one token and ends."""
    return vkllm("run", model, "-p", "Hello", "-n", "1", "--temp", "0", "--json").wall_s


def rounds(
    model: str, size: Size, peers: Sequence[Peer], n_round: int, extra: Sequence[str], tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every engine's figures, round by round: {"vkllm": …, name of a peer: …}."""
    found = []
    for i in range(n_round):
        turn: dict[str, Any] = {}
        engines: list[Peer | None] = [None, *(p for p in peers if not (p.seldom and i))]
        for engine in engines if i % 2 == 0 else reversed(engines):
            name = engine.name if engine else "vkllm"
            tell(f"{Path(model).stem}: round {i + 1} of {n_round}, {name}")
            if engine is None:
                turn[name] = own_bench(model, size, extra) | {"start_s": own_start_s(model)}
            else:
                turn[name] = engine.bench(model, size) | {"start_s": engine.start_s(model, size)}
        found.append(turn)
    return found


def medians(found: Sequence[Mapping[str, Any]], engine: str, names: Sequence[str]) -> dict[str, float]:
    """The median of each figure over the rounds that have it."""
    values = {name: [turn[engine][name] for turn in found if name in turn.get(engine, {})] for name in names}
    return {name: statistics.median(v) for name, v in values.items() if v}


def figures(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of all engines, and vkllm's rates over each peer's: the median of the rounds' own ratios."""
    engines = list(dict.fromkeys(name for turn in found for name in turn))
    report: dict[str, Any] = {name: medians(found, name, OWN_FIGURES if name == "vkllm" else PEER_FIGURES) for name in engines}
    ratios = {}
    for peer in engines:
        for rate in ("pp_tok_s", "tg_tok_s"):
            pairs = [(t["vkllm"][rate], t[peer][rate]) for t in found if peer != "vkllm" and rate in t.get(peer, {})]
            if pairs:
                ratios[f"{rate.removesuffix('_tok_s')} over {peer}"] = statistics.median(own / other for own, other in pairs)
    busy = max(statistics.median(turn[name]["busy"] for turn in found if name in turn) for name in engines)
    return report | {"ratios": ratios, "busy": busy, "quiet": busy < QUIET}
