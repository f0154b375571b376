"""What a soak has seen, added up. Knows no clock, engine or sensor."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

from vkllm.homeostasis import HomeostasisConfig, Reading, State, set_point_c
from vkllm.simulate import Trace
from vkllm.simulate.loop import SETTLE_S, TOLERANCE_C, TRACE_POINTS


@dataclass(frozen=True, slots=True)
class SoakFigures:
    """What the paced part of a soak shows. Temperatures are the core's, as the sensor tells them; None: not known.

    `time_over_target_s`: any temperature was more than `tolerance_c` above its set point. `temp_std_c`, `held_share`: after the
    first ten minutes, of longer runs. `held_share`: once the core has reached its set point, of the time in which the controller
    held the device back, how much was within `tolerance_c` of it. `throttle_s`: heat or a power brake slowed the device down.
    `throughput_kept`: tokens a second, of those of the reference. `lost_s`: the sensor told nothing. `simulated`: temperature,
    power and energy are a thermal model's, heated by the real work.
    """

    model: str
    device: str
    sensor: str
    simulated: bool
    mode: str
    target_c: float
    seconds: float
    streams: int
    time_over_target_s: float
    temp_std_c: float | None
    temp_max_c: float | None
    throttle_s: float
    throughput_kept: float | None
    trips: int
    mean_duty: float
    held_share: float | None
    lost_s: float
    tokens: int
    tok_s: float
    reference_tok_s: float | None
    reference_s: float
    joules: float | None
    joules_per_token: float | None
    mean_power_w: float | None
    requests: int
    refused: int
    errors: int
    tolerance_c: float = TOLERANCE_C


class Recorder:
    """Adds up what is seen, one look after another. Knows no clock."""

    def __init__(self, config: HomeostasisConfig) -> None:
        self._config = config
        self.times, self.temps, self.duties = array("d"), array("d"), array("d")  # temps: NaN where unknown
        self._spans, self._held = array("d"), bytearray()
        self.over_s = self.lost_s = 0.0

    def add(self, at_s: float, span_s: float, state: State, reading: Reading | None) -> None:
        """`span_s` seconds until `at_s`, all like this."""
        core = reading.temperatures.get("core") if reading else None
        margins = [set_point_c(self._config, n, t) - t.value_c for n, t in reading.temperatures.items()] if reading else []
        self.times.append(at_s)
        self._spans.append(span_s)
        self.temps.append(core.value_c if core else math.nan)
        self.duties.append(state.duty)
        self._held.append(bool(core) and state.duty < 0.99 and state.condition == "regulating")
        self.over_s += span_s if margins and min(margins) < -TOLERANCE_C else 0.0
        self.lost_s += span_s if not margins else 0.0

    @property
    def mean_duty(self) -> float:
        """Of the time."""
        total = math.fsum(self._spans)
        return math.fsum(d * s for d, s in zip(self.duties, self._spans, strict=True)) / total if total else 0.0

    def spread(self, set_c: float) -> tuple[float | None, float | None, float | None]:
        """(standard deviation, highest, held share) of the core's temperature; the first and the last once it has settled."""
        known = [(t, c, h) for t, c, h in zip(self.times, self.temps, self._held, strict=True) if not math.isnan(c)]
        if not known:
            return None, None, None
        settled = [k for k in known if k[0] - self.times[0] >= SETTLE_S] or known
        mean = math.fsum(c for _, c, _ in settled) / len(settled)
        deviation = math.sqrt(math.fsum((c - mean) ** 2 for _, c, _ in settled) / len(settled))
        reached = next((t for t, c, _ in known if c >= set_c - TOLERANCE_C), math.inf)
        held = [abs(c - set_c) <= TOLERANCE_C for t, c, h in settled if h and t >= reached]
        return deviation, max(c for _, c, _ in known), sum(held) / len(held) if held else None

    def trace(self, mode: str, ambient_c: float | None) -> Trace:
        """For the plot. Where the sensor was lost, the line goes straight on."""
        trace, size = Trace(mode), max(1, len(self.times) // TRACE_POINTS)
        for i in range(0, len(self.times), size):
            temps = [c for c in self.temps[i : i + size] if not math.isnan(c)]
            if temps:
                trace.time_s.append(self.times[i])
                trace.temp_c.append(max(temps))
                trace.duty.append(math.fsum(self.duties[i : i + size]) / len(self.duties[i : i + size]))
        if ambient_c is not None:
            trace.ambient_c.extend([ambient_c] * len(trace.time_s))
        return trace
