"""Temperature and duty over time as SVG text: one stacked pair of panels, one line a controller. No library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from vkllm.simulate.loop import Trace

WIDTH, LEFT, RIGHT = 960, 60, 20
PANELS = ((50, 290), (330, 470))  # top and bottom of temperature and duty
HEIGHT = 530
COLOURS = {"pi": "#0a7d3c", "ramp": "#1f5fbf", "off": "#c0392b"}
GREY, INK = "#d8d8d8", "#333333"


def svg(traces: Sequence[Trace], target_c: float, slowdown_c: float | None, title: str) -> str:
    """The picture. `traces`: of one scenario, each from loop.simulate; the first one's ambient is drawn."""
    end = max((t.time_s[-1] for t in traces if t.time_s), default=0.0) or 1.0
    temps = [v for t in traces for v in (*t.temp_c, *t.ambient_c)] + [target_c] + ([slowdown_c] if slowdown_c else [])
    low, high = 10 * (min(temps) // 10), 10 * (max(temps) // 10 + 1)
    (t0, t1), (d0, d1) = PANELS

    def x(s: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * s / end

    def y_temp(c: float) -> float:
        return t1 - (t1 - t0) * (c - low) / (high - low)

    def y_duty(d: float) -> float:
        return d1 - (d1 - d0) * d

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 24, title, size=16),
        *_legend([t.mode for t in traces]),
        *_axis(y_temp, [low + 10 * i for i in range(int((high - low) / 10) + 1)], "°C", t0),
        *_axis(y_duty, [0.0, 0.25, 0.5, 0.75, 1.0], "duty", d0),
        *_hours(x, end),
    ]
    if traces and traces[0].ambient_c:
        parts.append(_line(traces[0].time_s, traces[0].ambient_c, x, y_temp, "#999999", "ambient"))
    for trace in reversed(traces):  # the first on top
        colour = COLOURS.get(trace.mode, INK)
        parts.append(_line(trace.time_s, trace.temp_c, x, y_temp, colour, f"{trace.mode}: temperature"))
        parts.append(_line(trace.time_s, trace.duty, x, y_duty, colour, f"{trace.mode}: duty"))
    for value, colour, label in ((target_c, "#0a7d3c", "target"), (slowdown_c, "#c0392b", "hardware slowdown")):
        if value is not None:
            at = y_temp(value)
            parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="{colour}" stroke-dasharray="6 4" fill="none"/>')
            parts.append(_text(WIDTH - RIGHT, at - 4, f"{label} {value:g} °C", anchor="end", colour=colour))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, *, anchor: str = "start", colour: str = INK, size: int = 12) -> str:
    style = f'text-anchor="{anchor}" fill="{colour}" font-size="{size}" stroke="white" stroke-width="3" paint-order="stroke"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _line(
    xs: Sequence[float], ys: Sequence[float], x: Callable[[float], float], y: Callable[[float], float], colour: str, title: str
) -> str:
    points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys, strict=True))
    return (
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"><title>{escape(title)}</title></polyline>'
    )


def _axis(y: Callable[[float], float], ticks: Sequence[float], unit: str, top: float) -> list[str]:
    """Grid lines with their values on the left."""
    parts = [_text(LEFT - 8, top - 10, unit, anchor="end")]
    for value in ticks:
        at = y(value)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="{GREY}" fill="none"/>')
        parts.append(_text(LEFT - 8, at + 4, f"{value:g}", anchor="end"))
    return parts


def _hours(x: Callable[[float], float], end: float) -> list[str]:
    """The time axis, in hours or minutes, with at most a dozen marks."""
    unit, name = (3600.0, "h") if end >= 3 * 3600 else (60.0, "min")
    step = next(s for s in (1, 2, 3, 4, 6, 12, 24, 48, 168, 720, 8760) if end / unit / s <= 12)
    bottom = PANELS[-1][1]
    marks = [i * step for i in range(int(end / unit / step) + 1)]
    return [_text(x(m * unit), bottom + 18, f"{m} {name}", anchor="middle") for m in marks]


def _legend(modes: Sequence[str]) -> list[str]:
    parts = []
    for i, mode in enumerate(modes):
        at, colour = LEFT + 90 * i, COLOURS.get(mode, INK)
        parts.append(f'<path d="M{at} {HEIGHT - 18}h24" stroke="{colour}" stroke-width="3"/>')
        parts.append(_text(at + 30, HEIGHT - 14, mode))
    return parts
