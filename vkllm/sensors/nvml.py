"""NVIDIA's management library through nvidia-ml-py, loaded when a sensor is opened.

Every call is guarded: a function that a driver lacks, a value that a card does not tell, a GPU that fell off the bus all give
None for that value, and a reading without a core temperature is no reading. Nothing here needs root, except power_limit.
"""

from __future__ import annotations

import importlib
import logging
import time
import uuid as uuids
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vkllm.errors import DeviceError
from vkllm.homeostasis import Reading, Temperature, Throttle
from vkllm.sensors import WITHOUT_LIMIT

log = logging.getLogger("vkllm.sensors")

HW_SLOWDOWN, THERMAL, POWER_BRAKE = 0x08, 0x60, 0x80
REASONS: tuple[tuple[int, Throttle], ...] = (  # nvmlClocksEventReasons in nvml.h
    (0x04, "power_cap"),  # software power cap: how a card at its limit runs
    (HW_SLOWDOWN, "thermal"),  # heat, power brake or a fast trigger
    (0x20, "thermal"),  # software thermal slowdown
    (0x40, "thermal"),  # hardware thermal slowdown
    (POWER_BRAKE, "power_brake"),
)


class NvmlSensor:
    """One NVIDIA GPU. `handle` is NVML's."""

    def __init__(self, nvml: Any, handle: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._nvml, self._handle, self._clock = nvml, handle, clock
        label = self._ask("nvmlDeviceGetName")
        self.name = f"NVML {label.decode(errors='replace') if isinstance(label, bytes) else label or 'GPU'}"
        self._slowdown = self._threshold("NVML_TEMPERATURE_THRESHOLD_SLOWDOWN")
        self._max = self._threshold("NVML_TEMPERATURE_THRESHOLD_SHUTDOWN")
        self._target = self._threshold("NVML_TEMPERATURE_THRESHOLD_GPU_MAX")  # the driver slows the clock down from here on
        self._memory_max = self._threshold("NVML_TEMPERATURE_THRESHOLD_MEM_MAX")
        self._closed = False

    def _ask(self, function: str, *arguments: Any) -> Any:
        """The result of an NVML call for this device; None when it fails, whatever the reason."""
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except Exception:  # NVMLError, a missing symbol, a driver that went away: all mean "not told"
            return None

    def _threshold(self, name: str) -> float | None:
        kind = getattr(self._nvml, name, None)
        value = None if kind is None else self._ask("nvmlDeviceGetTemperatureThreshold", kind)
        return float(value) if isinstance(value, int) and 20 <= value <= 150 else None

    def read(self) -> Reading | None:
        """Temperatures, power and throttle reasons now; None when the GPU does not tell its temperature."""
        if self._closed:
            return None
        now = self._clock()
        core = self._core()
        if core is None:
            return None
        slowdown = self._slowdown
        if slowdown is None and isinstance(margin := self._ask("nvmlDeviceGetMarginTemperature"), int):
            slowdown = core + margin  # newer GPUs tell the distance instead ("T.Limit")
        temperatures = {"core": Temperature(core, self._target, slowdown, self._max)}
        memory = self._memory()
        if memory is not None:
            temperatures["memory"] = Temperature(memory, None, self._memory_max, None)
        power, limit = self._ask("nvmlDeviceGetPowerUsage"), self._ask("nvmlDeviceGetEnforcedPowerLimit")
        energy = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return Reading(now, temperatures, _thousandth(power), _thousandth(limit), _thousandth(energy), self._throttle())

    def _core(self) -> float | None:
        """Core temperature in °C, by the newer call or the older."""
        sensor = getattr(self._nvml, "NVML_TEMPERATURE_GPU", 0)
        value = self._ask("nvmlDeviceGetTemperatureV", sensor)
        if not isinstance(value, int):
            value = self._ask("nvmlDeviceGetTemperature", sensor)
        return float(value) if isinstance(value, int) else None

    def _memory(self) -> float | None:
        """Memory temperature of cards that have a sensor there (HBM, GDDR6X); they say 0 for "none"."""
        field = getattr(self._nvml, "NVML_FI_DEV_MEMORY_TEMP", 82)
        answers = self._ask("nvmlDeviceGetFieldValues", [field])
        try:
            answer = answers[0]
            value = int(answer.value.uiVal) if answer.nvmlReturn == 0 else 0
        except (TypeError, IndexError, AttributeError, ValueError):
            return None
        return float(value) if value > 0 else None

    def _throttle(self) -> frozenset[Throttle]:
        """The reasons now. "Hardware slowdown" stands for heat, unless the driver says that it is the power brake."""
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if not isinstance(bits, int):
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        if not isinstance(bits, int):
            return frozenset()
        if bits & POWER_BRAKE and not bits & THERMAL:
            bits &= ~HW_SLOWDOWN
        return frozenset(name for bit, name in REASONS if bits & bit)

    @contextmanager
    def power_limit(self, watts: float) -> Iterator[None]:
        """Set the device's power limit, and restore it at the end. Needs root.

        Raises: DeviceError: the driver refuses (no permission, or outside the card's range), or does not tell what to restore.
        """
        before = self._ask("nvmlDeviceGetPowerManagementLimit")
        if not isinstance(before, int):
            before = self._ask("nvmlDeviceGetPowerManagementDefaultLimit")
        if not isinstance(before, int):
            raise DeviceError(f"{self.name} does not tell its power limit, so it could not be restored", WITHOUT_LIMIT)
        try:
            self._nvml.nvmlDeviceSetPowerManagementLimit(self._handle, round(watts * 1000))
        except Exception as error:
            raise DeviceError(f"the power limit of {watts:g} W is refused: {error}", self._remedy(watts, error)) from error
        try:
            yield
        finally:
            try:
                self._nvml.nvmlDeviceSetPowerManagementLimit(self._handle, before)
            except Exception as error:
                log.error("the power limit stays at %g W: %s; set it with `nvidia-smi -pl %g`", watts, error, before / 1e3)

    def _remedy(self, watts: float, error: Exception) -> str:
        """What to do about a refused limit."""
        allowed = self._ask("nvmlDeviceGetPowerManagementLimitConstraints")
        if allowed and not allowed[0] <= watts * 1e3 <= allowed[1]:
            return f"this card takes {allowed[0] / 1e3:.0f} to {allowed[1] / 1e3:.0f} W"
        code = getattr(error, "value", None)
        if code == getattr(self._nvml, "NVML_ERROR_NOT_SUPPORTED", 3):
            return f"this card has no limit that can be set; or {WITHOUT_LIMIT}"
        return f"it needs root: run as root, or set it once with `sudo nvidia-smi -pl {watts:g}`; or {WITHOUT_LIMIT}"

    def close(self) -> None:
        """Release NVML (it counts its users)."""
        if not self._closed:
            self._closed = True
            _quietly(self._nvml.nvmlShutdown)


def open_nvml(
    pci_bus: str | None, uuid: bytes = b"", *, nvml: Any = None, clock: Callable[[], float] = time.monotonic
) -> NvmlSensor | None:
    """The GPU at a PCI address ("0000:03:00.0") or with Vulkan's 16-byte UUID; None when NVML is not there or does not know it.

    `nvml`: instead of the pynvml module, for tests.
    """
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return None
    try:
        nvml.nvmlInit()
    except Exception:  # no driver, no library, or one that does not match
        return None
    handle = None
    if pci_bus:
        handle = _quietly(nvml.nvmlDeviceGetHandleByPciBusId, pci_bus.encode())
    if handle is None and len(uuid) == 16 and any(uuid):
        handle = _quietly(nvml.nvmlDeviceGetHandleByUUID, f"GPU-{uuids.UUID(bytes=uuid)}".encode())
    if handle is None:
        _quietly(nvml.nvmlShutdown)
        return None
    sensor = NvmlSensor(nvml, handle, clock)
    if sensor.read() is None:
        sensor.close()
        return None
    return sensor


def _quietly(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception:  # see NvmlSensor._ask
        return None


def _thousandth(value: Any) -> float | None:
    """mW → W, mJ → J."""
    return value / 1e3 if isinstance(value, int) else None
