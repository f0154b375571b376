"""What a server shows of its homeostasis: the pacer's state and history as JSON, and its gauges."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from typing import Any

from vkllm.homeostasis import Reading, State
from vkllm.sensors.pacer import ThermalPacer

SHOWN = 1200  # samples of a report: ten minutes


class HomeostasisPacer(ThermalPacer):
    """The pacer of a server."""

    def report(self) -> dict[str, Any]:
        """State and history, for /v1/homeostasis."""
        s = self.state
        state = {
            "condition": s.condition,
            "duty": s.duty,
            "batch_limit": s.batch_limit,
            "limiting": s.limiting,
            "margin_c": s.margin_c if math.isfinite(s.margin_c) else None,
            "trips": s.trips,
            "throttle_s": self.throttle_s,
            **_measured(self.reading),
        }
        history = list(self.history)
        return {
            "mode": self.config.mode,
            "target_c": self.config.target_c,
            "sensor": self.sensor.name if self.sensor else None,
            "state": state,
            "history": [_sample(*entry) for entry in islice(history, max(0, len(history) - SHOWN), None)],
        }

    def gauges(self) -> Iterable[tuple[str, str, float]]:
        """For /metrics."""
        measured, state = _measured(self.reading), self.state
        names = (("temperature_c", "temperature_celsius"), ("power_w", "power_watts"), ("energy_j", "energy_joules"))
        for key, name in names:
            if measured[key] is not None:
                yield name, "As the sensor tells it", measured[key]
        yield "duty", "Share of time in which the device may work", state.duty
        yield "throttle_seconds", "Time in which the device slowed itself down", self.throttle_s
        yield "thermal_trips", "How often it was too hot to work", float(state.trips)


def _sample(state: State, reading: Reading | None) -> dict[str, Any]:
    return {"time_s": state.now_s, "duty": state.duty, "condition": state.condition, **_measured(reading)}


def _measured(reading: Reading | None) -> dict[str, Any]:
    if reading is None:
        return {"temperature_c": None, "power_w": None, "energy_j": None}
    hottest = max((t.value_c for t in reading.temperatures.values()), default=None)
    core = reading.temperatures.get("core")
    return {"temperature_c": core.value_c if core else hottest, "power_w": reading.power_w, "energy_j": reading.energy_j}
