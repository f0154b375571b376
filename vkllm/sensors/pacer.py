"""Sensor, controller and clock together: what `BatchEngine(engine, pacer=…)` takes.

    with ThermalPacer(open_sensor(engine.device.info), HomeostasisConfig(target_c=75)) as pacer:
        BatchEngine(engine, pacer=pacer)

A thread of its own reads the sensor, because drivers can hang: a sensor that does not answer is a stale one, and the engine goes
on at the duty of a lost sensor.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Self

from vkllm.homeostasis import (
    SAMPLE_S,
    HomeostasisConfig,
    Reading,
    State,
    Throttle,
    gap_s,
    initial_state,
    next_state,
    retry_after_s,
)
from vkllm.sensors import Sensor
from vkllm.sensors.energy import EnergyMeter

HISTORY = round(3600 / SAMPLE_S)  # an hour
IDLE_S = 5.0  # no submit ended for so long: idle; before that, one may be running
SLOWED: frozenset[Throttle] = frozenset({"thermal", "power_brake"})  # a power cap is how many devices run normally


class ThermalPacer:
    """Paces whoever calls `pace` after every submit. All methods may be called from any thread.

    Without a sensor (None) the duty is that of a lost one; give mode "off" where that is not wanted. `start=False`: no thread;
    call `poll` instead.
    """

    def __init__(
        self,
        sensor: Sensor | None,
        config: HomeostasisConfig | None = None,
        *,
        interval_s: float = SAMPLE_S,
        clock: Callable[[], float] = time.monotonic,
        start: bool = True,
    ) -> None:
        self.sensor, self.config = sensor, config or HomeostasisConfig()
        self.history: deque[tuple[State, Reading | None]] = deque(maxlen=HISTORY)
        self._interval_s, self._clock, self._lock, self._stop = interval_s, clock, threading.Lock(), threading.Event()
        self._state = initial_state(self.config)
        self._reading: Reading | None = None
        self.throttle_s = 0.0  # time in which heat or a power brake slowed the device down, as far as readings show it
        self.throttle_by: dict[Throttle, float] = {}  # and for every reason, a power cap too; they may overlap
        self.energy = EnergyMeter()
        self._busy_s, self._since_s, self._polled_s = 0.0, clock(), clock()
        self._thread = threading.Thread(target=self._watch, name="vkllm-homeostasis", daemon=True)
        if start:
            self._thread.start()

    @property
    def state(self) -> State:
        """The controller's state now, with what silence since the last reading means."""
        with self._lock:
            self._state = next_state(self.config, self._state, self._reading, self._clock())
            return self._state

    @property
    def reading(self) -> Reading | None:
        """The last reading; None before the first one, and when it has become stale."""
        reading = self._reading
        return reading if reading and abs(self._clock() - reading.time_s) <= self.config.stale_s else None

    @property
    def batch_limit(self) -> int | None:
        """Rows a step may hold; None: as many as fit; 0: tripped, take no work."""
        limit = self.state.batch_limit
        return limit if limit < self.config.max_batch else None

    @property
    def retry_after_s(self) -> float:
        """While tripped: about when to ask again."""
        return retry_after_s(self.config, self.state, self._clock())

    def pace(self, busy_s: float) -> float:
        """Told of a submit that kept the device busy for `busy_s`: seconds for which it must rest now."""
        state = self.state
        with self._lock:
            self._busy_s += max(0.0, busy_s)
        return gap_s(state, busy_s)

    def poll(self) -> State:
        """Read the sensor and take one step. The thread does this."""
        reading = self.sensor.read() if self.sensor else None  # may take long: outside of the lock
        with self._lock:
            now = self._clock()
            if reading is not None and reading.busy is None:
                reading = replace(reading, busy=self._busy(now))
            if reading is not None:
                self.energy.add(reading)
                self._count_throttling(reading, min(max(0.0, now - self._polled_s), self.config.stale_s))
            self._polled_s = now
            self._reading = reading or self._reading
            self._state = next_state(self.config, self._state, reading, now)
            self.history.append((self._state, reading))
            return self._state

    def _count_throttling(self, reading: Reading, span_s: float) -> None:
        if reading.throttle & SLOWED:
            self.throttle_s += span_s
        for reason in reading.throttle:
            self.throttle_by[reason] = self.throttle_by.get(reason, 0.0) + span_s

    def _busy(self, now: float) -> float | None:
        """Share of the time since submits were last counted in which they ran. None: none has ended, one may be running."""
        span = now - self._since_s
        if span <= 0 or (self._busy_s == 0 and span < IDLE_S):
            return None
        share = min(1.0, self._busy_s / span)
        if self._busy_s:
            self._busy_s, self._since_s = 0.0, now
        return share

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.poll()

    def close(self) -> None:
        """Stop reading, and close the sensor unless it hangs."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)
        if self.sensor and not self._thread.is_alive():
            self.sensor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
