"""Three pictures of a benchmark run as SVG text: tokens per second, the roofline, and a token's time by kernel. No library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, LEFT, RIGHT = 960, 70, 30
COLOURS = ("#0a7d3c", "#1f5fbf", "#e08a1e", "#8e44ad", "#c0392b", "#16a085", "#7f8c8d", "#b7950b", "#2c3e50", "#d35d90")
GREY, INK = "#d8d8d8", "#333333"
BAR, GAP = 18, 26  # of horizontal bars, and between groups of them
LEAST_SHARE = 0.02  # of a token's time: smaller parts are shown as one


def tokens_per_second(models: Sequence[Mapping[str, Any]], title: str) -> str:
    """Bars: two panels (prompt, generation), a group for each model, a bar for each engine."""
    engines = list(dict.fromkeys(name for m in models for name in m["engines"]))
    colours = dict(zip(engines, COLOURS, strict=False))
    parts = [_text(20, 26, title, size=16), *_legend(colours, 46)]
    panel = (WIDTH - 2 * 20 - 30) / 2
    bottom = 0.0
    for i, (rate, name) in enumerate((("pp_tok_s", "prompt, tokens per second"), ("tg_tok_s", "generation, tokens per second"))):
        left, y = 20 + i * (panel + 30), 92.0
        most = max((m["engines"][e].get(rate, 0.0) for m in models for e in m["engines"]), default=0.0) or 1.0
        parts.append(_text(left, y, name, size=13))
        for m in models:
            y += GAP
            parts.append(_text(left, y - 5, m["name"]))
            for engine, figures in m["engines"].items():
                if rate in figures:
                    parts += _bar(left, y, (panel - 60) * figures[rate] / most, colours[engine], f"{figures[rate]:.3g}")
                    y += BAR
        bottom = max(bottom, y)
    return _svg(parts, bottom + 20)


def roofline(kernels: Sequence[Mapping[str, Any]], ceiling: Mapping[str, float], title: str) -> str:
    """Operations a byte against operations a second, both logarithmic; the roof: the ceiling's read_gb_s and f32_gflop_s.

    kernels: name, kind ("prefill", "decode"), flop_per_byte, gflop_s, share.
    """
    top, bottom = 96, 520
    read, compute = ceiling["read_gb_s"], ceiling["f32_gflop_s"]
    xs = [k["flop_per_byte"] for k in kernels] + [1.0, 2 * compute / read]
    ys = [k["gflop_s"] for k in kernels] + [compute]
    x_range, y_range = _decades(xs), _decades(ys)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(value) - x_range[0]) / (x_range[1] - x_range[0])

    def y(value: float) -> float:
        low, high = y_range
        return bottom - (bottom - top) * (min(max(math.log10(value), low), high) - low) / (high - low)

    parts = [
        _text(20, 26, title, size=16),
        _text(LEFT - 8, top - 12, "GFLOP/s", "end"),
        _text(WIDTH - RIGHT, bottom + 38, "FLOP a byte", "end"),
    ]
    for power in range(x_range[0], x_range[1] + 1):
        parts += [
            _path(f"M{x(10.0**power):.1f} {top}V{bottom}"),
            _text(x(10.0**power), bottom + 18, f"{10.0**power:g}", "middle"),
        ]
    for power in range(y_range[0], y_range[1] + 1):
        parts += [
            _path(f"M{LEFT} {y(10.0**power):.1f}H{WIDTH - RIGHT}"),
            _text(LEFT - 8, y(10.0**power) + 4, f"{10.0**power:g}", "end"),
        ]
    ridge, start = compute / read, max(10.0 ** x_range[0], 10.0 ** y_range[0] / read)
    parts.append(_path(f"M{x(start):.1f} {y(start * read):.1f}L{x(ridge):.1f} {y(compute):.1f}H{WIDTH - RIGHT}", INK, 2))
    parts.append(_text(WIDTH - RIGHT, y(compute) - 7, f"{compute:.0f} GFLOP/s (f32)", "end"))
    middle = math.sqrt(start * ridge)
    parts.append(_text(x(middle) + 12, y(middle * read) + 16, f"{read:.0f} GB/s"))
    colours = {"decode": COLOURS[0], "prefill": COLOURS[1]}
    parts += _legend(colours, 46)
    labels: list[tuple[float, float]] = []
    for i, k in enumerate(sorted(kernels, key=lambda k: -k["share"]), 1):
        at, radius = (x(k["flop_per_byte"]), y(k["gflop_s"])), 4 + 12 * math.sqrt(k["share"])
        rates = f"{k['gflop_s']:.3g} GFLOP/s, {k['flop_per_byte']:.3g} FLOP a byte, {k['share']:.0%} of its time"
        about = f"{k['kind']}, {k['name']}: {rates}"
        circle = f'cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:.1f}" fill="{colours[k["kind"]]}" fill-opacity="0.55"'
        parts.append(f"<circle {circle}><title>{escape(about)}</title></circle>")
        labels.append(_free(labels, at[0] + radius + 3, at[1] + 4))
        parts.append(_text(*labels[-1], str(i), size=11))
        parts.append(_text(LEFT, bottom + 48 + 16 * i, f"{i}: {about}", size=11))
    return _svg(parts, bottom + 60 + 16 * (len(kernels) + 1))


def token_time(models: Sequence[Mapping[str, Any]], title: str) -> str:
    """A bar for each model and depth: the milliseconds of a token, by op. models: name, parts {op: ms}."""
    ops = sorted({op for m in models for op in m["parts"]}, key=lambda op: -sum(m["parts"].get(op, 0.0) for m in models))
    colours = {op: COLOURS[i % len(COLOURS)] for i, op in enumerate(ops)}
    most = max((sum(m["parts"].values()) for m in models), default=0.0) or 1.0
    parts, y = [_text(20, 26, title, size=16), *_legend(colours, 46)], 66.0 + 20 * ((len(ops) - 1) // 6)
    for m in models:
        y += GAP
        total = sum(m["parts"].values())
        parts.append(_text(20, y - 5, f"{m['name']}: {total:.2f} ms"))
        at = 20.0
        for op, ms in sorted(m["parts"].items(), key=lambda part: ops.index(part[0])):
            width = (WIDTH - 40) * ms / most
            box = f'x="{at:.1f}" y="{y:.1f}" width="{max(width - 0.5, 0.2):.1f}" height="{BAR + 8}" fill="{colours[op]}"'
            parts.append(f"<rect {box}><title>{escape(op)}: {ms:.3f} ms, {ms / total:.0%}</title></rect>")
            if width > 34:
                parts.append(_text(at + width / 2, y + 17, f"{ms / total:.0%}", "middle"))
            at += width
        y += BAR + 8
    return _svg(parts, y + 20)


def gathered(parts: Mapping[str, float]) -> dict[str, float]:
    """The same with parts below LEAST_SHARE put together as "other"."""
    least = LEAST_SHARE * sum(parts.values())
    small = sum(ms for ms in parts.values() if ms < least)
    return {op: ms for op, ms in parts.items() if ms >= least} | ({"other": small} if small else {})


def _free(taken: Sequence[tuple[float, float]], x: float, y: float) -> tuple[float, float]:
    """Where a short label may stand: at (x, y), or below others that are there already."""
    while any(abs(x - a) < 24 and abs(y - b) < 12 for a, b in taken):
        y += 12
    return x, y


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """The powers of ten around positive values."""
    logs = [math.log10(v) for v in values if v > 0]
    return math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)


def _bar(x: float, y: float, width: float, colour: str, text: str) -> list[str]:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{BAR - 3}" fill="{colour}"'
    return [f"<rect {box}/>", _text(x + max(width, 1) + 6, y + BAR - 6, text)]


def _legend(colours: Mapping[str, str], y: float, columns: int = 6) -> list[str]:
    parts, step = [], (WIDTH - 40) / columns
    for i, (name, colour) in enumerate(colours.items()):
        x, at = 20 + step * (i % columns), y + 20 * (i // columns)
        parts += [f'<rect x="{x:.1f}" y="{at - 10:.1f}" width="12" height="12" fill="{colour}"/>', _text(x + 17, at, name)]
    return parts


def _path(d: str, colour: str = GREY, width: float = 1) -> str:
    return f'<path d="{d}" stroke="{colour}" stroke-width="{width}" fill="none"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = INK, size: int = 12) -> str:
    style = f'text-anchor="{anchor}" fill="{colour}" font-size="{size}" stroke="white" stroke-width="3" paint-order="stroke"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _svg(parts: Sequence[str], height: float) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>', *parts, "</svg>", ""])
