"""One soak. First the device runs at full speed, as long as it is cool: the reference. Then the controller paces it, and that is
what the figures tell of.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from vkllm.batching import BatchEngine
from vkllm.config import RuntimeConfig
from vkllm.engine import LLMEngine
from vkllm.errors import DeviceError
from vkllm.homeostasis import HomeostasisConfig, Reading, State, set_point_c
from vkllm.sensors import Sensor, open_sensor
from vkllm.sensors.pacer import ThermalPacer
from vkllm.sensors.power import power_limited
from vkllm.sensors.simulated import LiveSensor, ThermalPlant
from vkllm.simulate import Trace
from vkllm.soak.clients import Clients
from vkllm.soak.options import SoakOptions
from vkllm.soak.recorder import Recorder, SoakFigures

WARM_UP_S = 120.0  # at most, until the first token and the first reading
LEAST_REFERENCE_S = 5.0  # a shorter one tells nothing
LOOK_S = 0.5


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
