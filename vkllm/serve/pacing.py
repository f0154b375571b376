"""The homeostasis loop of a server: reads the sensor in a thread of its own, and paces the batch engine with what comes out."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from vkllm.homeostasis import SAMPLE_S, HomeostasisConfig, Reading, gap_s, initial_state, next_state, retry_after_s
from vkllm.sensors import Sensor

HISTORY = 1200  # samples: ten minutes


class HomeostasisPacer:
    """A `Pacer` for the batch engine. `start` begins to read; without it call `sample` yourself.

    The state is replaced as a whole, so the engine's worker reads it without a lock.
    """

    def __init__(self, sensor: Sensor, config: HomeostasisConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.sensor, self.config, self._clock = sensor, config, clock
        self.state = initial_state(config)
        self.reading: Reading | None = None
        self.throttle_s = 0.0
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self._busy_s = 0.0
        self._seen_busy_s, self._sampled_s = 0.0, clock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def batch_limit(self) -> int | None:
        """Rows of the next step; None with mode "off"."""
        return None if self.config.mode == "off" else self.state.batch_limit

    @property
    def retry_after_s(self) -> float:
        """While tripped: about when there will be work again."""
        return retry_after_s(self.config, self.state, self._clock())

    def pace(self, busy_s: float) -> float:
        """The idle gap after a step of `busy_s` seconds."""
        self._busy_s += busy_s
        return gap_s(self.state, busy_s)

    def sample(self) -> None:
        """Read the sensor once, and decide."""
        now, busy = self._clock(), self._busy_s
        dt = max(now - self._sampled_s, 1e-6)
        found = self.sensor.read()
        self.reading = found and replace(found, busy=min((busy - self._seen_busy_s) / dt, 1.0))
        self._seen_busy_s, self._sampled_s = busy, now
        self.state = next_state(self.config, self.state, self.reading, now)
        if self.reading and self.reading.throttle:
            self.throttle_s += dt
        self.history.append({"time_s": now, "duty": self.state.duty, "condition": self.state.condition, **self._measured()})

    def start(self) -> None:
        """Read and decide every half second, until `close`."""
        self._thread = threading.Thread(target=self._loop, name="vkllm-homeostasis", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and give the sensor back."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.sensor.close()

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
            **self._measured(),
        }
        return {
            "mode": self.config.mode,
            "target_c": self.config.target_c,
            "sensor": self.sensor.name,
            "state": state,
            "history": list(self.history),
        }

    def gauges(self) -> Iterable[tuple[str, str, float]]:
        """For /metrics."""
        measured = self._measured()
        names = (("temperature_c", "temperature_celsius"), ("power_w", "power_watts"), ("energy_j", "energy_joules"))
        for key, name in names:
            if measured[key] is not None:
                yield name, "As the sensor tells it", measured[key]
        yield "duty", "Share of time in which the device may work", self.state.duty
        yield "throttle_seconds", "Time in which the device slowed itself down", self.throttle_s
        yield "thermal_trips", "How often it was too hot to work", float(self.state.trips)

    def _measured(self) -> dict[str, Any]:
        r = self.reading
        if r is None:
            return {"temperature_c": None, "power_w": None, "energy_j": None}
        hottest = max((t.value_c for t in r.temperatures.values()), default=None)
        core = r.temperatures.get("core")
        return {"temperature_c": core.value_c if core else hottest, "power_w": r.power_w, "energy_j": r.energy_j}

    def _loop(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.sample()
