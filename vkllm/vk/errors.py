"""From failing Vulkan results to the typed error tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from vkllm.errors import DeviceError, DeviceLostError, MissingFeatureError, OutOfDeviceMemoryError

RESULTS = {
    -1: "VK_ERROR_OUT_OF_HOST_MEMORY",
    -2: "VK_ERROR_OUT_OF_DEVICE_MEMORY",
    -3: "VK_ERROR_INITIALIZATION_FAILED",
    -4: "VK_ERROR_DEVICE_LOST",
    -5: "VK_ERROR_MEMORY_MAP_FAILED",
    -6: "VK_ERROR_LAYER_NOT_PRESENT",
    -7: "VK_ERROR_EXTENSION_NOT_PRESENT",
    -8: "VK_ERROR_FEATURE_NOT_PRESENT",
    -9: "VK_ERROR_INCOMPATIBLE_DRIVER",
    -10: "VK_ERROR_TOO_MANY_OBJECTS",
    -11: "VK_ERROR_FORMAT_NOT_SUPPORTED",
    -12: "VK_ERROR_FRAGMENTED_POOL",
    -13: "VK_ERROR_UNKNOWN",
    -1000069000: "VK_ERROR_OUT_OF_POOL_MEMORY",
    -1000072003: "VK_ERROR_INVALID_EXTERNAL_HANDLE",
    -1000012000: "VK_ERROR_INVALID_SHADER_NV",
}


def size_text(nbytes: int) -> str:
    """1536 → '1.5 KiB'."""
    n, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while n >= 1024 and len(units) > 1:
        n, units = n / 1024, units[1:]
    return f"{n:.0f} {units[0]}" if units[0] == "B" else f"{n:.1f} {units[0]}"


def raise_typed(error: Exception, doing: str, available: Callable[[], int] | None = None) -> NoReturn:
    """Raise the typed error for a NativeError(call, result, needed). `available` tells the free device memory in bytes."""
    call, result, needed = error.args
    text = f"{doing}: {call} gave {RESULTS.get(result, result)}"
    if result in (-1, -2):
        free = available() if available else None
        if needed:
            text += f"; needed {size_text(needed)}" + (f", {size_text(free)} available" if free is not None else "")
        raise OutOfDeviceMemoryError(
            text, "use a smaller model, a shorter context (--n-ctx) or another device", needed=needed, available=free
        ) from None
    if result == -4:
        raise DeviceLostError(
            text, "the driver reset the device or killed work that ran too long; open it again. `dmesg` may say why"
        ) from None
    if result in (-7, -8, -11):
        raise MissingFeatureError(text, "choose another device (--device) or update the driver") from None
    hint = "is a Vulkan driver installed? Try `vkllm doctor`" if result in (-3, -6, -9) else "try `vkllm doctor`"
    raise DeviceError(text, hint) from None
