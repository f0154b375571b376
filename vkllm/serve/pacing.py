"""What a server does for its device's temperature: the pacer with a history of samples, its report as JSON, and its metrics."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vkllm.homeostasis import Condition, HomeostasisConfig, Reading, State
from vkllm.sensors import Sensor, open_sensor
from vkllm.sensors.pacer import ThermalPacer
from vkllm.sensors.power import power_limited

if TYPE_CHECKING:
    from vkllm.batching import BatchStats
    from vkllm.engine import LLMEngine
    from vkllm.kv_cache import BlockPool

log = logging.getLogger("vkllm.serve")
SAMPLES = 1200  # ten minutes of half seconds
STEP_S = 0.5  # at least, between samples: the controller reads more often than anybody looks
RATE_S = 4.0  # tokens a second are a mean over so long
ENERGY_S = 60.0  # and joules a token over so long


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment. `energy_j` and `tokens` count from the start; None: the device does not tell."""

    time_s: float
    condition: Condition
    duty: float
    temperature_c: float | None
    power_w: float | None
    energy_j: float | None
    tokens: int
    tok_s: float


@dataclass(frozen=True, slots=True)
class Metric:
    """A number for /metrics; a counter's name gets `_total`."""

    kind: Literal["gauge", "counter"]
    name: str
    help: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


class Watched(Protocol):
    """What has totals and a cache: a BatchEngine, or several of them in turn."""

    @property
    def stats(self) -> BatchStats: ...
    @property
    def pool(self) -> BlockPool: ...


class HomeostasisPacer(ThermalPacer):
    """The pacer of a server. `watch` tells it whose tokens to count."""

    def __init__(self, sensor: Sensor | None, config: HomeostasisConfig | None = None, **options: Any) -> None:
        self.samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._batch: Watched | None = None
        super().__init__(sensor, config, **options)

    def watch(self, batch: Watched) -> None:
        """Count this engine's tokens from now on."""
        self._batch = batch

    def poll(self) -> State:
        """As ThermalPacer.poll; every half second the result becomes a sample."""
        state, now = super().poll(), self._clock()
        if self.samples and 0 <= now - self.samples[-1].time_s < STEP_S:
            return state
        tokens = self._batch.stats.completion_tokens if self._batch else 0
        before = _first_since(self.samples, now - RATE_S)
        span = now - before.time_s if before else 0.0
        rate = max(0, tokens - before.tokens) / span if before and span > 0 else 0.0
        core, reading = _core_c(self.reading), self.reading
        energy_j = self.energy.joules if self.energy.measured else None
        watts = reading.power_w if reading else None
        self.samples.append(Sample(now, state.condition, state.duty, core, watts, energy_j, tokens, rate))
        return state

    @property
    def joules_per_token(self) -> float | None:
        """Energy of the last minute over the tokens generated in it; None where the device does not tell, or none came."""
        samples = list(self.samples)
        last = samples[-1] if samples else None
        first = _first_since(samples, last.time_s - ENERGY_S) if last else None
        if not first or not last or first.energy_j is None or last.energy_j is None or last.tokens <= first.tokens:
            return None
        return (last.energy_j - first.energy_j) / (last.tokens - first.tokens)

    def report(self, since_s: float = -math.inf) -> dict[str, Any]:
        """State and history, for /v1/homeostasis. Only samples after `since_s` (a sample's `time_s`)."""
        s, reading, samples = self.state, self.reading, list(self.samples)
        state = {
            "condition": s.condition,
            "duty": s.duty,
            "batch_limit": s.batch_limit,
            "limiting": s.limiting,
            "margin_c": s.margin_c if math.isfinite(s.margin_c) else None,
            "trips": s.trips,
            "throttle_s": self.throttle_s,
            "temperature_c": _core_c(reading),
            "temperatures_c": {name: t.value_c for name, t in reading.temperatures.items()} if reading else {},
            "power_w": reading.power_w if reading else None,
            "power_limit_w": reading.power_limit_w if reading else None,
            "energy_j": self.energy.joules if self.energy.measured else None,
            "joules_per_token": self.joules_per_token,
        }
        return {
            "mode": self.config.mode,
            "target_c": self.config.target_c,
            "trip_c": self.config.target_c + self.config.trip_over_c,
            "sensor": self.sensor.name if self.sensor else None,
            "now_s": self._clock(),
            "state": state,
            "engine": _engine(self._batch, samples[-1].tok_s if samples else 0.0),
            "history": [asdict(sample) for sample in samples if sample.time_s > since_s],
        }

    def metrics(self) -> Iterable[Metric]:
        """For /metrics. What the device does not tell now is left out."""
        state, reading, config = self.state, self.reading, self.config
        for name, t in reading.temperatures.items() if reading else ():
            yield Metric("gauge", "temperature_celsius", "By place, as the sensor tells it", t.value_c, {"sensor": name})
        yield Metric("gauge", "target_celsius", "The temperature to hold", config.target_c)
        if reading and reading.power_w is not None:
            yield Metric("gauge", "power_watts", "As the sensor tells it", reading.power_w)
        if reading and reading.power_limit_w is not None:
            yield Metric("gauge", "power_limit_watts", "The device's own limit", reading.power_limit_w)
        if self.energy.measured:
            yield Metric("counter", "energy_joules", "Used by the device since the server started", self.energy.joules)
        if (joules := self.joules_per_token) is not None:
            yield Metric("gauge", "joules_per_token", "Energy over tokens generated, of the last minute", joules)
        yield Metric("gauge", "duty", "Share of time in which the device may work", state.duty)
        yield Metric("gauge", "condition", "What the controller does", 1.0, {"condition": state.condition})
        help_text = "Time in which the device slowed itself down"
        for reason, seconds in {"thermal": 0.0, "power_brake": 0.0, "power_cap": 0.0, **self.throttle_by}.items():
            yield Metric("counter", "throttle_seconds", help_text, seconds, {"reason": reason})
        yield Metric("counter", "thermal_trips", "How often it was too hot to work", float(state.trips))


def _first_since(samples: Iterable[Sample], time_s: float) -> Sample | None:
    """The oldest sample that is not older."""
    return next((s for s in samples if s.time_s >= time_s), None)


def _core_c(reading: Reading | None) -> float | None:
    """The core's temperature; of a device without such a name, the hottest."""
    if reading is None:
        return None
    core = reading.temperatures.get("core")
    return core.value_c if core else max((t.value_c for t in reading.temperatures.values()), default=None)


def _engine(batch: Watched | None, tok_s: float) -> dict[str, Any] | None:
    """What an engine does now."""
    if batch is None:
        return None
    s, pool = batch.stats, batch.pool
    return {
        "running": s.n_running,
        "waiting": s.n_waiting,
        "kv_tokens_used": s.n_block_used * pool.block_size,
        "kv_tokens": pool.n_block * pool.block_size,
        "completion_tokens": s.completion_tokens,
        "tok_s": tok_s,
    }


@contextmanager
def paced(
    engine: LLMEngine,
    config: HomeostasisConfig,
    watts: float | None = None,
    *,
    find: Callable[..., Sensor | None] = open_sensor,
) -> Iterator[HomeostasisPacer]:
    """The homeostasis loop for the engine's device. Without a sensor its mode is "off"; it still counts. `watts`: hold the
    device's own power limit there meanwhile.

    Raises: DeviceError, ConfigError: as power_limited.
    """
    sensor, name = find(engine.device.info), engine.device.info.name
    if sensor is None and config.mode != "off":
        log.warning("%s has no temperature sensor that we can read: it is not paced", name)
    elif sensor is not None and config.mode != "off":
        log.info("holding %s at %g °C (%s)", sensor.name, config.target_c, config.mode)
    mode = config.mode if sensor is not None else "off"
    pacer = HomeostasisPacer(sensor, replace(config, mode=mode, max_batch=engine.chain.capacity))
    del engine  # a reload may close it long before we end
    try:
        with power_limited(sensor, watts):
            yield pacer
    finally:
        pacer.close()
