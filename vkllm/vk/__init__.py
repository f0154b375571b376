"""Vulkan devices: the only importer of the native Kompute binding.

`open_device()` gives a Device; `NullDevice()` the same interface without Vulkan. The native module is loaded on first use of a
real device, so that plans, null devices and tools work where no Vulkan loader is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vkllm.vk.null import NullBuffer, NullDevice, NullPipeline, NullRecording
from vkllm.vk.types import (
    FORMATS,
    MINIMUM_LIMITS,
    BarrierCommand,
    Binding,
    BufferLike,
    Command,
    CopyCommand,
    DeviceInfo,
    DeviceLimits,
    DispatchCommand,
    PipelineLike,
    TimestampCommand,
)

if TYPE_CHECKING:
    from vkllm.vk.device import Buffer, Device, Pipeline, Recording, choose_device, list_devices, open_device

_NATIVE = ("Buffer", "Device", "Pipeline", "Recording", "choose_device", "list_devices", "open_device")

__all__ = [
    "FORMATS",
    "MINIMUM_LIMITS",
    "BarrierCommand",
    "Binding",
    "Buffer",
    "BufferLike",
    "Command",
    "CopyCommand",
    "Device",
    "DeviceInfo",
    "DeviceLimits",
    "DispatchCommand",
    "NullBuffer",
    "NullDevice",
    "NullPipeline",
    "NullRecording",
    "Pipeline",
    "PipelineLike",
    "Recording",
    "TimestampCommand",
    "choose_device",
    "list_devices",
    "open_device",
]


def __getattr__(name: str) -> Any:
    if name in _NATIVE:
        from vkllm.vk import device

        return getattr(device, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
