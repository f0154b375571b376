"""`--power-limit`: set a device's own power limit for as long as we run, and put back what was there.

It comes back at the end, after an error, and after SIGTERM or a closed terminal. A process that is killed (SIGKILL) cannot put
anything back: the limit then stays until somebody sets it, or the driver is loaded again.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

from vkllm.errors import ConfigError, DeviceError
from vkllm.sensors import WITHOUT_LIMIT, Sensor

log = logging.getLogger("vkllm.sensors")
ENDING = (signal.SIGTERM, signal.SIGHUP) if hasattr(signal, "SIGHUP") else (signal.SIGTERM,)


@runtime_checkable
class Limitable(Protocol):
    """A sensor whose device has a power limit that can be set."""

    def power_limit(self, watts: float) -> AbstractContextManager[None]: ...


@contextmanager
def power_limited(sensor: Sensor | None, watts: float | None) -> Iterator[None]:
    """Hold the device's power limit at `watts`; None: leave it alone.

    Raises: ConfigError: no positive number. DeviceError: the device has no limit that we can set, or the driver refuses.
    """
    if watts is None:
        yield
        return
    if not 0 < watts < 1e5:
        raise ConfigError(f"a power limit of {watts:g} W", "give watts, as in --power-limit 250")
    if not isinstance(sensor, Limitable):
        if sensor is None:
            raise DeviceError(
                "neither NVML nor hwmon knows the device, so its power limit cannot be set", "leave --power-limit out"
            )
        raise DeviceError(f"{sensor.name} has no power limit that can be set", WITHOUT_LIMIT)
    with _signals_unwind(), sensor.power_limit(watts):
        log.info("the power limit of %s is %g W while we run", sensor.name, watts)
        yield


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """Signals that would end the process at once raise SystemExit instead, so that `finally` runs. Handlers of others stay."""
    ours = [s for s in ENDING if signal.getsignal(s) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        ours = []

    def end(number: int, _: object) -> None:
        for s in ours:
            signal.signal(s, signal.SIG_IGN)  # once is enough: the next must not disturb the restoring
        raise SystemExit(128 + number)

    for s in ours:
        signal.signal(s, end)
    try:
        yield
    finally:
        for s in ours:
            signal.signal(s, signal.SIG_DFL)
