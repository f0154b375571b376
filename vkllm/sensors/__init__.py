"""Sensors of devices: NVML, Linux hwmon, and a simulated one. They make homeostasis.Reading of what a driver tells.

    sensor = open_sensor(device.info)      # None: this device tells no temperature
    reading = sensor.read()                # None: it told nothing this time

A sensor is opened once and read every half second or so, from one thread. Nothing here raises when a driver fails: a reading
is then missing, which the controller knows how to live with.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vkllm.homeostasis import Reading

if TYPE_CHECKING:
    from vkllm.vk import DeviceInfo

NVIDIA = 0x10DE
WITHOUT_LIMIT = "leave --power-limit out: pacing holds the temperature without it"


class Sensor(Protocol):
    """Something that tells a device's temperature."""

    @property
    def name(self) -> str: ...
    def read(self) -> Reading | None: ...
    def close(self) -> None: ...


def open_sensor(
    info: DeviceInfo, *, hwmon_root: Path | None = None, clock: Callable[[], float] = time.monotonic
) -> Sensor | None:
    """The sensor of a Vulkan device, or None: NVML for NVIDIA's (hwmon where nouveau or NVK has it), hwmon for others.

    `clock` gives the time of readings; next_state must be given the same clock. `hwmon_root`: instead of /sys/class/hwmon.
    """
    from vkllm.sensors import hwmon, nvml

    sensor: Sensor | None = None
    if info.vendor_id == NVIDIA:
        sensor = nvml.open_nvml(info.pci_bus, info.uuid, clock=clock)
    return sensor or hwmon.open_hwmon(info.kind, info.pci_bus, root=hwmon_root, clock=clock)


__all__ = ["Sensor", "open_sensor"]
