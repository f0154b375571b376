"""The exception tree. Every error says what was found, what was expected, and what to do next."""

from __future__ import annotations

from vkllm_codegen.errors import HintedError


class VkllmError(HintedError):
    """Base of every error that vkllm raises on purpose."""


class FileFormatError(VkllmError):
    """A model file is damaged, hostile, or not what its header says."""


class ConfigError(VkllmError):
    """An option or a model's metadata is missing, unknown or contradicts another."""


class UnsupportedModelError(VkllmError):
    """The file is sound, but we cannot run what it holds."""


class UnsupportedQuantError(UnsupportedModelError):
    """A tensor's quantization type has no kernel."""


class DeviceError(VkllmError):
    """Vulkan, the driver or the device failed."""


class MissingFeatureError(DeviceError):
    """The device lacks something that we need."""


class OutOfDeviceMemoryError(DeviceError):
    """An allocation does not fit. `needed` and `available` are bytes (available is None where the driver does not tell)."""

    def __init__(self, message: str, hint: str = "", *, needed: int = 0, available: int | None = None) -> None:
        super().__init__(message, hint)
        self.needed = needed
        self.available = available


class DeviceLostError(DeviceError):
    """The device was lost: a driver reset, a submit that ran too long, or a removed device."""


class NonFiniteError(VkllmError):
    """The model produced NaN or infinity. `layer` names the first op whose output holds one."""

    def __init__(self, message: str, hint: str = "", *, layer: str = "") -> None:
        super().__init__(message, hint)
        self.layer = layer


class CapacityError(VkllmError):
    """Not now: a limit is reached. HTTP 503. `retry_after_s`: when to ask again."""

    retry_after_s = 1.0


class CacheFullError(CapacityError):
    """Too few free KV-cache blocks."""


class ThermalLimitError(CapacityError):
    """The device is too hot to take work."""


class RequestError(VkllmError):
    """The caller asked for something impossible. HTTP 400."""


class ContextTooLongError(RequestError):
    """Prompt and completion do not fit the context."""
