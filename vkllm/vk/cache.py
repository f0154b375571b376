"""The pipeline cache on disk: one file a device and driver, written atomically, ignored when damaged."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import platformdirs

from vkllm.vk.types import DeviceInfo

MAGIC = b"vkllm pipelines 1\n"


def directory() -> Path:
    """Where caches are kept: VKLLM_CACHE_DIR, or the user's cache folder."""
    return Path(os.environ.get("VKLLM_CACHE_DIR") or platformdirs.user_cache_dir("vkllm"))


def path(info: DeviceInfo, cache_dir: Path | None = None) -> Path:
    """The cache file of a device: named by vendor, device, driver version, and the driver's cache UUID and build.

    The build (name and info text) is hashed in because some drivers repeat a UUID (Debian 12's lavapipe: "val-%s").
    """
    base = cache_dir or directory()
    build = hashlib.sha256(info.cache_uuid + f"{info.name}|{info.driver_name}|{info.driver_info}".encode()).hexdigest()[:24]
    key = f"{info.vendor_id:04x}-{info.device_id:04x}-{info.driver_version:08x}-{build}"
    return base / f"pipelines-{key}.bin"


def load(file: Path) -> bytes:
    """The saved data, or nothing when there is none or its checksum is wrong (drivers do not survive damaged data)."""
    try:
        blob = file.read_bytes()
    except OSError:
        return b""
    head = len(MAGIC) + 32
    if blob[: len(MAGIC)] != MAGIC or hashlib.sha256(blob[head:]).digest() != blob[len(MAGIC) : head]:
        return b""
    return blob[head:]


def save(file: Path | None, data: bytes) -> None:
    """Replace the file in one step; a cache that cannot be written is no error."""
    if file is not None:
        replace(file, MAGIC + hashlib.sha256(data).digest() + data)


def replace(file: Path, data: bytes) -> None:
    """Write a cache file in one step; one that cannot be written is no error, and leaves nothing behind."""
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with os.fdopen(handle, "wb") as f:
            f.write(data)
        os.replace(temporary, file)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
