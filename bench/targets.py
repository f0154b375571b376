"""What issue 5 asks for, and which figure of a run answers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CPU, VULKAN = "llama.cpp CPU", "llama.cpp Vulkan"
QWEN_K, QWEN_8, LLAMA_K = "qwen2.5-0.5b-q4_k_m", "qwen2.5-0.5b-q8_0", "llama-3.2-1b-q4_k_m"

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """`reached` reads the figure from a model's report and gives None where the run did not measure it."""

    model: str
    test: str
    limit: float
    reached: Callable[[Report], float | None]
    at_least: bool = True
    form: str = "{:.2f} ×"

    def text(self, value: float) -> str:
        return self.form.format(value)


@dataclass(frozen=True)
class Verdict:
    """A target beside what was reached (None: not measured)."""

    model: str
    test: str
    target: str
    reached: str | None
    ok: bool | None


def _decode(peer: str) -> Callable[[Report], float | None]:
    return lambda report: report["ratios"].get(f"tg over {peer}")


def _prefill(peer: str) -> Callable[[Report], float | None]:
    return lambda report: report["ratios"].get(f"pp over {peer}") if report["n_prompt"] == 512 else None


def _slower_deep(report: Report) -> float | None:
    depth = report.get("depth") or {}
    return depth["shallow_tok_s"] / depth["deep_tok_s"] if depth.get("depth", 0) >= 4096 else None


def _over_file(report: Report) -> float:
    return float(report["vkllm"]["rss_bytes"] / report["file_bytes"])


def _start(report: Report) -> float | None:
    """Seconds over what is allowed: half a second, or llama.cpp's where that is longer. Both are whole processes."""
    peer = report.get(CPU, {}).get("start_s")
    return None if peer is None else float(report["vkllm"]["start_s"] / max(0.5, peer))


def _dispatches(report: Report) -> float:
    """Dispatches beyond 5 a layer: at most 4."""
    return float(report["dispatches_per_token"] - 5 * report["n_layer"])


_SLOWER = "decode at 4,096 / at 16 tokens, slower"
_MEMORY = "resident memory / file"
_START = "start to first token / max(0.5 s, llama.cpp)"
_DISPATCHES = "dispatches a token beyond 5 a layer"


TARGETS = (
    Target(QWEN_K, "decode / llama.cpp CPU", 0.6, _decode(CPU)),
    Target(QWEN_K, "decode / llama.cpp Vulkan on lavapipe", 25, _decode(VULKAN), form="{:.1f} ×"),
    Target(QWEN_K, "prefill 512 / llama.cpp CPU", 0.5, _prefill(CPU)),
    Target(QWEN_K, "prefill 512 / llama.cpp Vulkan on lavapipe", 25, _prefill(VULKAN), form="{:.1f} ×"),
    Target(QWEN_8, "decode / llama.cpp CPU", 0.6, _decode(CPU)),
    Target(QWEN_8, "prefill 512 / llama.cpp CPU", 0.4, _prefill(CPU)),
    Target(LLAMA_K, "decode / llama.cpp CPU", 0.5, _decode(CPU)),
    Target(LLAMA_K, "prefill 512 / llama.cpp CPU", 0.5, _prefill(CPU)),
    *(Target(model, _SLOWER, 1.35, _slower_deep, at_least=False) for model in (QWEN_K, QWEN_8, LLAMA_K)),
    *(Target(model, _START, 1.0, _start, at_least=False) for model in (QWEN_K, QWEN_8)),
    *(Target(model, _MEMORY, 1.25, _over_file, at_least=False) for model in (QWEN_K, LLAMA_K)),
    *(Target(model, _DISPATCHES, 4, _dispatches, at_least=False, form="{:.0f}") for model in (QWEN_K, QWEN_8, LLAMA_K)),
)


def verdicts(models: Sequence[Report]) -> list[Verdict]:
    """A line for each target of a model that was measured, found by the name of its file."""
    lines = []
    for target in TARGETS:
        for report in models:
            if target.model in report["name"].lower():
                lines.append(_verdict(target, report))
    return lines


def _verdict(target: Target, report: Report) -> Verdict:
    value = target.reached(report)
    sign = "≥" if target.at_least else "≤"
    ok = None if value is None else value >= target.limit if target.at_least else value <= target.limit
    reached = None if value is None else target.text(value)
    return Verdict(report["name"], target.test, f"{sign} {target.text(target.limit)}", reached, ok)
