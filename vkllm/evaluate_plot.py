"""KL divergence as SVG text: how it is distributed over positions, and how it changes along a chunk. No library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from vkllm.evaluate import Difference, Positions
from vkllm.perplexity import F64, Chunks

WIDTH, HEIGHT, LEFT, RIGHT = 960, 560, 70, 20
TOP_PANEL, BOTTOM_PANEL = (80, 310), (385, 515)
BARS, POINTS = 60, 40
FLOOR = 1e-8  # divergences below it are shown there: f32 logits know no less
GREEN, BLUE, RED, GREY, INK = "#0a7d3c", "#1f5fbf", "#c0392b", "#d8d8d8", "#333333"


def svg(at: Positions, figures: Difference, chunks: Chunks, title: str) -> str:
    """The picture of a comparison."""
    summary = (
        f"mean {figures.kl_mean:.2e} ± {figures.kl_error:.0e} nats · same top token {figures.same_top:.2%} · "
        f"perplexity {figures.quantized.ppl:.4f} against {figures.parent.ppl:.4f}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 22, title, size=16),
        _text(LEFT, 42, summary),
        *_histogram(at.kl, figures),
        *_along(at.kl.reshape(-1, chunks.n_scored), chunks.first + 1),
    ]
    return "\n".join([*parts, "</svg>", ""])


def _histogram(kl: F64, figures: Difference) -> list[str]:
    """Shares of positions over the logarithm of their divergence, with the figures as lines."""
    logs = np.log10(np.maximum(kl, FLOOR))
    low = math.floor(float(logs.min()))
    high = max(math.ceil(float(logs.max())), low + 1)
    counts, edges = np.histogram(logs, bins=BARS, range=(low, high))
    shares = counts / len(kl)
    top, bottom = TOP_PANEL
    ceiling = _nice(float(shares.max()))

    def x(log: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (log - low) / (high - low)

    parts = _grid(top, bottom, ceiling, "share of positions", ".0%" if ceiling > 0.1 else ".1%")
    for share, left, right in zip(shares.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        height = (bottom - top) * share / ceiling
        box = f'x="{x(left):.1f}" y="{bottom - height:.1f}" width="{x(right) - x(left) - 1:.1f}" height="{height:.1f}"'
        parts.append(f'<rect {box} fill="{BLUE}" fill-opacity="0.55"><title>{share:.2%}</title></rect>')
    for power in range(low, high + 1):
        parts.append(_text(x(power), bottom + 18, f"1e{power}", anchor="middle"))
    parts.append(_text(WIDTH - RIGHT, bottom + 36, "KL divergence, nats", anchor="end"))
    marks = (("median", figures.kl_median, GREEN), ("mean", figures.kl_mean, INK), ("99 %", figures.kl_p99, RED))
    for i, (name, value, colour) in enumerate(marks):
        where = x(math.log10(max(value, FLOOR)))
        parts.append(f'<path d="M{where:.1f} {top}V{bottom}" stroke="{colour}" stroke-dasharray="5 4" fill="none"/>')
        left = where > WIDTH - 130 or (name == "median" and where > LEFT + 130)
        at = (where - 5, "end") if left else (where + 5, "start")
        parts.append(_text(at[0], top + 14 + 15 * i, f"{name} {value:.2e}", at[1], colour))
    return parts


def _along(kl: F64, first: int) -> list[str]:
    """Mean divergence over the positions of a chunk, in some steps. kl: [n_chunk, n_scored]."""
    top, bottom = BOTTOM_PANEL
    means = [float(part.mean()) for part in np.array_split(kl, min(POINTS, kl.shape[1]), axis=1)]
    ceiling = _nice(max(means))
    step = (WIDTH - LEFT - RIGHT) / len(means)
    points = " ".join(
        f"{LEFT + step * (i + 0.5):.1f},{bottom - (bottom - top) * mean / ceiling:.1f}" for i, mean in enumerate(means)
    )
    ends = ((LEFT, str(first), "start"), (WIDTH - RIGHT, f"position {first + kl.shape[1] - 1} of a chunk", "end"))
    return [
        *_grid(top, bottom, ceiling, "mean KL divergence by position", ".1e"),
        f'<polyline points="{points}" fill="none" stroke="{BLUE}" stroke-width="1.5"/>',
        *(_text(at, bottom + 18, text, anchor) for at, text, anchor in ends),
    ]


def _grid(top: int, bottom: int, ceiling: float, name: str, form: str) -> list[str]:
    """Four steps from 0 to the ceiling, with their values on the left."""
    parts = [_text(LEFT, top - 8, name)]
    for i in range(5):
        at = bottom - (bottom - top) * i / 4
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="{GREY}" fill="none"/>')
        parts.append(_text(LEFT - 8, at + 4, format(ceiling * i / 4, form), "end"))
    return parts


def _nice(value: float, steps: Sequence[float] = (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10)) -> float:
    """The next round number that a grid of four steps divides well."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return power * next(s for s in steps if s * power >= value * 0.999)


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = INK, size: int = 12) -> str:
    style = f'text-anchor="{anchor}" fill="{colour}" font-size="{size}" stroke="white" stroke-width="3" paint-order="stroke"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
