"""Hours of real work under the real controller: `vkllm soak`. The figures are those of `vkllm homeostasis simulate`, with energy.

Clients in threads keep several streams busy. First the device runs at full speed, as long as it is cool: the reference. Then the
controller paces it, and that is what the figures tell of.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from vkllm.batching import BatchEngine
from vkllm.config import RuntimeConfig
from vkllm.engine import LLMEngine
from vkllm.errors import CapacityError, ConfigError, DeviceError, VkllmError
from vkllm.homeostasis import HomeostasisConfig, Reading, State, set_point_c
from vkllm.sampler import SamplingParams
from vkllm.sensors import Sensor, open_sensor
from vkllm.sensors.pacer import ThermalPacer
from vkllm.sensors.power import power_limited
from vkllm.sensors.simulated import LiveSensor, ThermalPlant
from vkllm.simulate import Trace
from vkllm.simulate.loop import SETTLE_S, TOLERANCE_C, TRACE_POINTS

log = logging.getLogger("vkllm.soak")
REFERENCE_S = 60.0  # at most, and a fifth of the run
WARM_UP_S = 120.0  # at most, until the first token and the first reading
LEAST_REFERENCE_S = 5.0  # a shorter one tells nothing
LOOK_S = 0.5
TEXT = (
    "The keeper of the lighthouse wrote down the weather every evening: wind, sea, and how far one could see. Some days he saw"
    " the islands in the west, some days not even the rocks below. Ships passed by whose names he did not know. In the morning he"
    " cleaned the lamp, filled it with oil, and counted the steps down to the shore, where the boat brought bread and letters. "
)


@dataclass(frozen=True, slots=True)
class SoakOptions:
    """What to run. `seconds`: of the whole run, from the first token on; `reference_s`: of it at full speed, None: a fifth, at
    most a minute; `ambient_c`: of the thermal model where `simulated`; `watts`: the device's own power limit meanwhile.

    Raises: ConfigError: a value that makes no sense.
    """

    seconds: float
    streams: int = 8
    max_tokens: int = 128
    reference_s: float | None = None
    simulated: bool = False
    ambient_c: float = 35.0
    watts: float | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf or self.streams < 1 or self.max_tokens < 1:
            raise ConfigError(
                f"a soak of {self.seconds:g} s with {self.streams} streams of {self.max_tokens} tokens", "all must be above 0"
            )

    @property
    def full_speed_s(self) -> float:
        """How long the reference may take."""
        return min(REFERENCE_S, self.seconds / 5) if self.reference_s is None else self.reference_s


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


@dataclass(frozen=True, slots=True)
class Moment:
    """For a progress line."""

    elapsed_s: float
    full_speed: bool
    state: State
    reading: Reading | None
    tok_s: float


class SoakPacer(ThermalPacer):
    """A ThermalPacer that can be told to let the device run at full speed; a trip stops it all the same."""

    full_speed = False

    @property
    def batch_limit(self) -> int | None:
        limit = super().batch_limit
        return None if self.full_speed and limit != 0 else limit

    def pace(self, busy_s: float) -> float:
        rest = super().pace(busy_s)
        return 0.0 if self.full_speed else rest


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


class Clients:
    """Threads that keep the engine busy: one stream each, prompts of many lengths, a new one when one ends."""

    def __init__(self, batch: BatchEngine, options: SoakOptions) -> None:
        self._batch, self._options, self._stop, self._lock = batch, options, threading.Event(), threading.Lock()
        self.requests = self.refused = self.errors = 0
        n_prompt = max(1, min(256, batch.n_ctx // 2))
        piece = batch.tokenizer.encode(TEXT, add_special=False)
        self._ids, self._n_prompt = piece * (2 + n_prompt // len(piece)), n_prompt
        self._n_piece = len(piece)
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(options.streams)]
        for thread in self._threads:
            thread.start()

    def _work(self, index: int) -> None:
        rng = random.Random(self._options.seed * 1000 + index)
        while not self._stop.is_set() and self._batch.failure is None:
            start, n = rng.randrange(self._n_piece), rng.randint(min(8, self._n_prompt), self._n_prompt)
            n_new = rng.randint(max(1, self._options.max_tokens // 4), self._options.max_tokens)
            params = SamplingParams(temperature=0.0, max_tokens=n_new, ignore_eos=True)
            try:
                self._batch.submit(self._ids[start : start + n], params).result()
            except CapacityError as error:
                self._count(refused=1)
                self._stop.wait(min(error.retry_after_s, 1.0))
            except VkllmError as error:
                if not self._stop.is_set():
                    log.warning("a request failed: %s", error)
                    self._count(errors=1)
            else:
                self._count(requests=1)

    def _count(self, requests: int = 0, refused: int = 0, errors: int = 0) -> None:
        with self._lock:
            self.requests, self.refused, self.errors = self.requests + requests, self.refused + refused, self.errors + errors

    def stop(self) -> None:
        """No new requests."""
        self._stop.set()

    def join(self) -> None:
        """Wait for the threads; the engine must have been closed."""
        for thread in self._threads:
            thread.join()


def soak(
    model: str,
    runtime: RuntimeConfig,
    config: HomeostasisConfig,
    options: SoakOptions,
    *,
    sensor: Sensor | None = None,
    progress: Callable[[Moment], None] | None = None,
) -> tuple[SoakFigures, Trace]:
    """Load a model and keep it at work. An interrupt (Ctrl-C) ends it early; the figures are those until then.

    `sensor`: instead of the device's own. Raises: DeviceError: there is no sensor, and none is simulated; the device failed.
    """
    with LLMEngine.init_model(model, replace(runtime, n_seq=options.streams)) as engine:
        sensor = sensor or (_live(options) if options.simulated else open_sensor(engine.device.info))
        if sensor is None:
            raise DeviceError(
                f"{engine.device.info.name} has no temperature sensor that we can read",
                "--simulated takes a thermal model instead, heated by the real work, and says so in the result",
            )
        with (
            SoakPacer(sensor, replace(config, max_batch=engine.chain.capacity)) as pacer,
            power_limited(sensor, options.watts),
            BatchEngine(engine, pacer=pacer, revive=True) as batch,
        ):
            if isinstance(sensor, LiveSensor):
                sensor.busy_s = lambda: batch.stats.busy_s
            return _Run(model, batch, pacer, options, progress).result()


def _live(options: SoakOptions) -> LiveSensor:
    return LiveSensor(ThermalPlant(ambient_c=options.ambient_c), seed=options.seed)


class _Run:
    """One soak: the reference, then the paced part."""

    def __init__(
        self,
        model: str,
        batch: BatchEngine,
        pacer: SoakPacer,
        options: SoakOptions,
        progress: Callable[[Moment], None] | None,
    ) -> None:
        self.model, self.batch, self.pacer, self.options = model, batch, pacer, options
        self._progress = progress or (lambda moment: None)
        self._started = time.monotonic()
        self._recorder = Recorder(pacer.config)

    def result(self) -> tuple[SoakFigures, Trace]:
        """Do all of it."""
        clients = Clients(self.batch, self.options)
        reference_tok_s, reference_s = None, 0.0
        self._begin()
        with suppress(KeyboardInterrupt):  # enough: what was seen until now counts
            self._warm_up()
            reference_tok_s, reference_s = self._reference()
            self._begin()
            self._look(lambda: self._elapsed_s >= self.options.seconds, self._recorder)
        ended_s = time.monotonic()
        figures = self._figures(clients, ended_s, reference_tok_s, reference_s)
        clients.stop()
        self.batch.close()
        clients.join()
        if self.batch.failure is not None:
            raise self.batch.failure
        sensor = self.pacer.sensor
        ambient = sensor.plant.ambient_c if isinstance(sensor, LiveSensor) else None
        return figures, self._recorder.trace(self.pacer.config.mode, ambient)

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def _warm_up(self) -> None:
        """Wait for the first token and the first reading; the run counts from then on. A device that is too hot gives neither."""
        stats, pacer = self.batch.stats, self.pacer

        def ready() -> bool:
            known = pacer.state.condition != "starting" and (stats.completion_tokens > 0 or not self._cool())
            return known or self._elapsed_s > WARM_UP_S

        self._look(ready)
        self._started = time.monotonic()
        self._begin()

    def _reference(self) -> tuple[float | None, float]:
        """(tokens a second at full speed, seconds). It ends early where the device gets warm, or its sensor falls silent."""
        limit_s, pacer, stats = self.options.full_speed_s, self.pacer, self.batch.stats
        if limit_s <= 0 or not self._cool():
            return None, 0.0
        began_s, n = time.monotonic(), stats.completion_tokens
        ends_s = min(began_s + limit_s, self._started + self.options.seconds)
        pacer.full_speed = True
        try:
            self._look(lambda: time.monotonic() >= ends_s or not self._cool())
        finally:
            pacer.full_speed = False
        span = time.monotonic() - began_s
        return ((stats.completion_tokens - n) / span, span) if span >= LEAST_REFERENCE_S else (None, span)

    def _cool(self) -> bool:
        state = self.pacer.state
        return state.condition == "regulating" and state.margin_c > 0

    def _begin(self) -> None:
        """What is told of begins now."""
        pacer, stats = self.pacer, self.batch.stats
        self._before = (time.monotonic(), stats.completion_tokens, pacer.energy.joules, pacer.throttle_s, pacer.state.trips)

    def _look(self, done: Callable[[], bool], recorder: Recorder | None = None) -> None:
        """Look at the pacer until it is `done`."""
        at_s, n = time.monotonic(), self.batch.stats.completion_tokens
        while not done() and self.batch.failure is None:
            time.sleep(LOOK_S)
            now, tokens = time.monotonic(), self.batch.stats.completion_tokens
            state, reading = self.pacer.state, self.pacer.reading
            if recorder:
                recorder.add(now - self._started, now - at_s, state, reading)
            self._progress(Moment(self._elapsed_s, self.pacer.full_speed, state, reading, (tokens - n) / (now - at_s)))
            at_s, n = now, tokens

    def _figures(self, clients: Clients, ended_s: float, reference_tok_s: float | None, reference_s: float) -> SoakFigures:
        pacer, stats, recorder = self.pacer, self.batch.stats, self._recorder
        began_s, n, joules, throttle_s, trips = self._before
        span, tokens = ended_s - began_s, stats.completion_tokens - n
        used_j = pacer.energy.joules - joules if pacer.energy.measured else None
        reading = pacer.reading
        core = reading.temperatures.get("core") if reading else None
        deviation, highest, held = recorder.spread(set_point_c(pacer.config, "core", core) if core else pacer.config.target_c)
        tok_s = tokens / span if span > 0 else 0.0
        return SoakFigures(
            model=self.model,
            device=self.batch.engine.device.info.name,
            sensor=pacer.sensor.name if pacer.sensor else "none",
            simulated=isinstance(pacer.sensor, LiveSensor),
            mode=pacer.config.mode,
            target_c=pacer.config.target_c,
            seconds=span,
            streams=self.options.streams,
            time_over_target_s=recorder.over_s,
            temp_std_c=deviation,
            temp_max_c=highest,
            throttle_s=pacer.throttle_s - throttle_s,
            throughput_kept=tok_s / reference_tok_s if reference_tok_s else None,
            trips=pacer.state.trips - trips,
            mean_duty=recorder.mean_duty,
            held_share=held,
            lost_s=recorder.lost_s,
            tokens=tokens,
            tok_s=tok_s,
            reference_tok_s=reference_tok_s,
            reference_s=reference_s,
            joules=used_j,
            joules_per_token=used_j / tokens if used_j is not None and tokens else None,
            mean_power_w=used_j / span if used_j is not None and span > 0 else None,
            requests=clients.requests,
            refused=clients.refused,
            errors=clients.errors,
        )
