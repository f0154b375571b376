"""Devices, buffers, pipelines and recordings on real Vulkan, over the native module.

Knows nothing of models or kernels: SPIR-V and bytes in, results out. Every failing Vulkan result raises (errors.py).
"""

from __future__ import annotations

import os
import struct
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vkllm.errors import DeviceError, DeviceLostError, MissingFeatureError, OutOfDeviceMemoryError
from vkllm.vk import cache
from vkllm.vk.errors import raise_typed, size_text
from vkllm.vk.types import FORMATS, Binding, DeviceInfo, DeviceKind, DeviceLimits, check_dispatch

try:
    from vkllm.vk import _native
except ImportError as e:
    raise DeviceError(
        f"the native module cannot be loaded: {e}",
        "install the Vulkan loader (Debian: apt-get install libvulkan1 mesa-vulkan-drivers) or rebuild with pip install",
    ) from e

KINDS: tuple[DeviceKind, ...] = ("other", "integrated", "discrete", "virtual", "cpu")  # VkPhysicalDeviceType
PREFERENCE: tuple[DeviceKind, ...] = ("discrete", "integrated", "virtual", "cpu", "other")
STAGING_BYTES = 16 << 20  # of each of the two staging buffers
CHECK_BUDGET_BYTES = 16 << 20  # smaller buffers are not checked against the budget
DEFAULT_TIMEOUT_S = 60.0


def list_devices() -> list[DeviceInfo]:
    """All Vulkan devices, in Vulkan's order. Empty when there is no driver."""
    _choose_lanes()
    try:
        found = _native.devices()
    except _native.NativeError as e:
        if e.args[1] == -9:  # no driver at all
            return []
        raise_typed(e, "listing devices")
    return [_info(i, d) for i, d in enumerate(found)]


def _choose_lanes() -> None:
    """VKLLM_LAVAPIPE_LANES=8|16 sets lavapipe's subgroup size; it is read when the driver is loaded."""
    lanes = os.environ.get("VKLLM_LAVAPIPE_LANES")
    if lanes in ("8", "16"):
        os.environ.setdefault("LP_NATIVE_VECTOR_WIDTH", str(32 * int(lanes)))
    elif lanes:
        raise DeviceError(f"VKLLM_LAVAPIPE_LANES is {lanes!r}; expected 8 or 16", "16 needs a CPU with AVX-512")


def _info(index: int, d: dict[str, Any]) -> DeviceInfo:
    names = DeviceLimits.__dataclass_fields__
    values = {k: v for k, v in d.items() if k in names}
    values |= {"features": frozenset(d["features"]), "coop_shapes": tuple(d["coop_shapes"])}
    version, pci = d["api_version"], d["pci"]
    kind: DeviceKind = KINDS[d["type"]] if d["type"] < len(KINDS) else "other"
    return DeviceInfo(
        index=index,
        name=d["name"],
        kind=kind,
        vendor_id=d["vendor_id"],
        device_id=d["device_id"],
        driver_name=d["driver_name"],
        driver_info=d["driver_info"],
        driver_version=d["driver_version"],
        api_version=(version >> 22 & 0x7F, version >> 12 & 0x3FF, version & 0xFFF),
        uuid=d["uuid"],
        pci_bus="{:04x}:{:02x}:{:02x}.{:x}".format(*pci) if pci else None,
        memory_bytes=_host_memory(kind, d["memory_bytes"], "MemTotal"),
        available_bytes=_host_memory(kind, d["available_bytes"], "MemAvailable"),
        limits=DeviceLimits(**values),
        queue_family=d["family"],
        cache_uuid=d["cache_uuid"],
    )


def _host_memory(kind: DeviceKind, nbytes: int, field: str) -> int:
    """The heap of a CPU device is a nominal figure (lavapipe says 2 GiB and gives what there is): ask the machine instead."""
    if kind != "cpu":
        return nbytes
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return nbytes


def choose_device(devices: Sequence[DeviceInfo], selector: str | int | None = None) -> DeviceInfo:
    """The device that `selector` (index or part of a name; else VKLLM_DEVICE) names, or the best one.

    Raises: DeviceError: there is none, or none fits.
    """
    if not devices:
        raise DeviceError(
            "no Vulkan device found", "install a driver (Debian: apt-get install mesa-vulkan-drivers) or try `vkllm doctor`"
        )
    wanted = os.environ.get("VKLLM_DEVICE") if selector is None else selector
    if wanted is None or wanted == "":
        return min(devices, key=lambda d: PREFERENCE.index(d.kind))
    text = str(wanted)
    fits = [d for d in devices if str(d.index) == text] or [d for d in devices if text.lower() in d.name.lower()]
    if not fits:
        names = "; ".join(f"{d.index}: {d.name}" for d in devices)
        raise DeviceError(f"no device fits {text!r}", f"there are {names}")
    return min(fits, key=lambda d: PREFERENCE.index(d.kind))


def open_device(selector: str | int | None = None, *, cache_dir: Path | None = None, force_unmapped: bool = False) -> Device:
    """Open a device: the best one, or the one that `selector` or VKLLM_DEVICE names (index or part of the name).

    `cache_dir`: where pipelines are kept (default: VKLLM_CACHE_DIR or the user's cache folder).
    `force_unmapped`: treat device buffers as not host-visible, for tests of the staging path.
    """
    return Device(choose_device(list_devices(), selector), cache_dir=cache_dir, force_unmapped=force_unmapped)


class Buffer:
    """Device memory. Made by Device.buffer."""

    def __init__(self, device: Device, native: _native.Buffer, name: str) -> None:
        self._device, self._native, self.name = device, native, name
        self.nbytes: int = native.nbytes
        self.mapped: bool = native.mapped
        self._bytes: NDArray[np.uint8] | None = native.bytes() if self.mapped else None
        self._freed = False

    def __repr__(self) -> str:
        return f"Buffer({self.name!r}, {self.nbytes} bytes{', mapped' if self.mapped else ''})"

    def view(self, dtype: DTypeLike = np.uint8) -> NDArray[Any]:
        """The buffer's memory as a flat array, no copy. Raises ValueError when it is not mapped."""
        self._check_open()
        if self._bytes is None:
            raise ValueError(f"buffer {self.name!r} is not mapped; use read() and write()")
        return self._bytes.view(dtype)

    def write(self, array: NDArray[Any], offset: int = 0) -> None:
        """Copy `array` (any shape and dtype, C order) to byte `offset`. Blocks until the data is there."""
        self._check_open()
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._check_range(offset, data.nbytes)
        if self._bytes is not None:
            self._bytes[offset : offset + data.nbytes] = data
        else:
            self._device._staging().upload(self, offset, data)

    def read(self, nbytes: int | None = None, offset: int = 0, dtype: DTypeLike = np.uint8) -> NDArray[Any]:
        """A copy of `nbytes` bytes (default: to the end) from byte `offset`, as a flat array of `dtype`."""
        self._check_open()
        n = self.nbytes - offset if nbytes is None else nbytes
        self._check_range(offset, n)
        if self._bytes is not None:
            return self._bytes[offset : offset + n].copy().view(dtype)
        return self._device._staging().download(self, offset, n).view(dtype)

    def free(self) -> None:
        """Let go of the memory. It returns to the device when no recording and no view uses it any more."""
        self._freed = True
        self._bytes = None
        self.__dict__.pop("_native", None)

    def _check_open(self) -> None:
        if self._freed:
            raise ValueError(f"buffer {self.name!r} was freed")

    def _check_range(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"[{offset}, {offset + nbytes}) is outside of buffer {self.name!r} of {self.nbytes} bytes")


class Pipeline:
    """A compiled kernel. Made and shared by Device.pipeline."""

    def __init__(self, name: str, kinds: tuple[str, ...], push_bytes: int, native: _native.Pipeline) -> None:
        self.name, self.kinds, self.push_bytes, self._native = name, kinds, push_bytes, native

    def __repr__(self) -> str:
        return f"Pipeline({self.name!r})"


class Recording:
    """A command buffer: record once, finish, then submit any number of times. Made by Device.recording."""

    def __init__(self, device: Device, name: str, timestamps: int) -> None:
        self._device, self.name = device, name
        with device._calls(f"recording {name!r}"):
            self._native = device._native.recording(timestamps)

    def dispatch(self, pipeline: Pipeline, bindings: Sequence[Binding], groups: tuple[int, int, int], push: bytes = b"") -> None:
        """Run `pipeline` over `groups` workgroups. Raises ValueError when it does not fit the pipeline or the limits."""
        check_dispatch(self._device.limits, pipeline, bindings, groups, push)
        bound = []
        for b in bindings:
            b.buffer._check_open()
            bound.append((b.buffer._native, b.offset, b.size, FORMATS[b.format][0] if b.format else 0))
        with self._device._calls(f"recording {pipeline.name}"):
            self._native.dispatch(pipeline._native, bound, groups, push)

    def barrier(self) -> None:
        """What was written before is seen by what is read or written after (compute, copies, the host)."""
        self._native.barrier()

    def copy(self, src: Buffer, dst: Buffer, nbytes: int, src_offset: int = 0, dst_offset: int = 0) -> None:
        """Copy bytes between buffers."""
        for b, offset in ((src, src_offset), (dst, dst_offset)):
            b._check_open()
            b._check_range(offset, nbytes)
        if nbytes:
            self._native.copy(src._native, dst._native, nbytes, src_offset, dst_offset)

    def timestamp(self) -> int:
        """Note the time when all commands so far are done. Returns its place in timestamps_us()."""
        return self._native.timestamp()

    def finish(self) -> None:
        """End recording."""
        with self._device._calls(f"recording {self.name!r}"):
            self._native.finish()

    def submit(self) -> None:
        """Start the commands; returns at once."""
        with self._device._calls(f"submitting {self.name!r}"):
            self._native.submit()

    def wait(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Block, without the GIL, until the last submit is done.

        Raises: DeviceLostError: the device was lost, or did not end in time (it may be waited for again).
        """
        with self._device._calls(f"waiting for {self.name!r}"):
            done = self._native.wait(int(timeout_s * 1e9))
        if not done:
            raise DeviceLostError(
                f"{self.name or 'the recording'} did not end within {timeout_s:g} s",
                "the device may hang, or the work is too large",
            )

    def run(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """submit() and wait()."""
        self.submit()
        self.wait(timeout_s)

    def timestamps_us(self) -> list[float]:
        """Times of the last run in µs, the first one being 0."""
        with self._device._calls("reading timestamps"):
            ticks = self._native.timestamps()
        period = self._device.limits.timestamp_period_ns / 1e3
        return [(t - ticks[0]) * period for t in ticks]


class Device:
    """An open device. Close it, or use it as a context manager, so that its pipeline cache is saved."""

    def __init__(self, info: DeviceInfo, *, cache_dir: Path | None = None, force_unmapped: bool = False) -> None:
        self.info, self.limits = info, info.limits
        self.lost, self._unmapped = False, force_unmapped
        if info.queue_family == 0xFFFFFFFF:
            raise MissingFeatureError(f"{info.name} has no compute queue", "choose another device (--device)")
        self._cache_file = cache.path(info, cache_dir)
        data = cache.load(self._cache_file)
        with self._calls(f"opening {info.name}"):
            self._native = _native.Device(info.index, info.queue_family, data, force_unmapped)
        self.trim()  # loading drivers runs through all of their code
        self._pipelines: dict[tuple[Any, ...], Pipeline] = {}
        self._stage: Staging | None = None
        self._lock = threading.Lock()
        self._closer = weakref.finalize(self, _save_cache, self._native, self._cache_file, data)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Device({self.info.name!r})"

    def buffer(self, nbytes: int, *, host: bool = False, name: str = "") -> Buffer:
        """Allocate `nbytes` (rounded up to 16). `host`: mapped and coherent, for parameters and results.

        Raises: OutOfDeviceMemoryError: it does not fit what is free. DeviceError: larger than one allocation may be.
        """
        size = max(16, (nbytes + 15) // 16 * 16)
        if size > (most := self.limits.max_buffer_bytes):
            raise DeviceError(
                f"buffer {name!r} needs {size_text(size)}; {self.info.name} allocates at most {size_text(most)}",
                "split the tensor by rows",
            )
        if size > CHECK_BUDGET_BYTES and not host:
            self.require(size, f"buffer {name!r}")
        with self._calls(f"buffer {name!r}"):
            native = self._native.buffer(size, host)
        return Buffer(self, native, name)

    def import_buffer(self, data: NDArray[np.uint8], nbytes: int, name: str = "") -> Buffer | None:
        """The first `nbytes` of writable host memory as a buffer for kernels to read, without a copy; it keeps `data` alive.

        None where the device cannot use it: its place and size must be multiples of `limits.import_alignment`.
        """
        alignment = self.limits.import_alignment
        if not alignment or self._unmapped or data.ctypes.data % alignment or data.nbytes % alignment or not nbytes:
            return None
        try:
            return Buffer(self, self._native.import_buffer(data, nbytes), name)
        except (_native.NativeError, RuntimeError):  # the driver takes no memory of this kind
            return None

    def require(self, nbytes: int, what: str) -> None:
        """Check before loading that `nbytes` fit. Raises: OutOfDeviceMemoryError with needed and available bytes."""
        available, _ = self.memory_budget()
        if nbytes > available:
            raise OutOfDeviceMemoryError(
                f"{what} needs {size_text(nbytes)} on {self.info.name}, {size_text(available)} available",
                "use a smaller model, a shorter context (--n-ctx) or another device",
                needed=nbytes,
                available=available,
            )

    def pipeline(
        self,
        kernel_name: str,
        spirv: bytes,
        kinds: tuple[str, ...],
        push_bytes: int = 0,
        spec: tuple[tuple[int, int | float], ...] = (),
        required_subgroup_size: int | None = None,
        features: frozenset[str] = frozenset(),
    ) -> Pipeline:
        """A compiled kernel; the same arguments give the same object.

        `kinds`: the bindings in order. `spec`: (constant id, value) pairs; int → 32-bit integer, float → f32.
        Raises: MissingFeatureError: the device lacks one of `features`, or cannot give the subgroup size.
        """
        key = (spirv, kinds, push_bytes, spec, required_subgroup_size)
        self._check_pipeline(kernel_name, kinds, push_bytes, required_subgroup_size, features)
        found = self._pipelines.get(key)
        if found is None:  # several threads may compile at once; of two that compile the same, the first one's counts
            with self._calls(f"compiling {kernel_name}"):
                native = self._native.pipeline(
                    spirv, kinds, push_bytes, [(i, _bits(v)) for i, v in spec], required_subgroup_size or 0
                )
            found = self._pipelines.setdefault(key, Pipeline(kernel_name, kinds, push_bytes, native))
        return found

    def _check_pipeline(
        self, name: str, kinds: tuple[str, ...], push_bytes: int, subgroup: int | None, features: frozenset[str]
    ) -> None:
        limits = self.limits
        for kind, most in (("storage", limits.max_storage_buffers), ("texel", limits.max_texel_buffers)):
            if kinds.count(kind) > most:
                raise MissingFeatureError(
                    f"{name} binds {kinds.count(kind)} {kind} buffers; {self.info.name} has {most}",
                    "choose another device (--device)",
                )
        if missing := features - limits.features:
            raise MissingFeatureError(
                f"{name} needs {', '.join(sorted(missing))}, which {self.info.name} lacks", "choose another device (--device)"
            )
        if push_bytes > limits.max_push_bytes:
            raise MissingFeatureError(
                f"{name} needs {push_bytes} bytes of push constants; {self.info.name} has {limits.max_push_bytes}", ""
            )
        if subgroup and not (
            "subgroup_size_control" in limits.features and limits.min_subgroup_size <= subgroup <= limits.max_subgroup_size
        ):
            raise MissingFeatureError(
                f"{name} needs subgroups of {subgroup}; {self.info.name} has {limits.min_subgroup_size} to "
                f"{limits.max_subgroup_size}" + ("" if "subgroup_size_control" in limits.features else " and no control of it"),
                "leave required_subgroup_size away or choose another device (--device)",
            )

    def recording(self, name: str = "", timestamps: int = 0) -> Recording:
        """An empty recording with room for `timestamps` timestamps."""
        return Recording(self, name, timestamps)

    def memory_budget(self) -> tuple[int, int]:
        """(available, total) bytes of device memory."""
        available, total = self._native.memory_budget()
        kind = self.info.kind
        return _host_memory(kind, available, "MemAvailable"), _host_memory(kind, total, "MemTotal")

    def wait_idle(self) -> None:
        """Block, without the GIL, until the device has nothing to do."""
        with self._calls("waiting for the device"):
            self._native.wait_idle()

    def trim(self) -> None:
        """Give back what only starting and compiling needed: of this process memory that was freed, and the code of libraries.
        What runs again is read again as it is reached, from the page cache."""
        _native.trim()

    def close(self) -> None:
        """Wait for the device, save the pipeline cache, and let go of pipelines and staging memory."""
        if self._closer.alive:
            if not self.lost:
                self.wait_idle()
            self._closer()
            self._pipelines.clear()
            self._stage = None

    def _staging(self) -> Staging:
        with self._lock:
            if self._stage is None:
                self._stage = Staging(self)
        return self._stage

    @contextmanager
    def _calls(self, doing: str) -> Iterator[None]:
        """Turns NativeError into the typed tree; a lost device refuses further calls."""
        if self.lost:
            raise DeviceLostError(f"{doing}: {self.info.name} was lost before", "open the device again")
        try:
            yield
        except _native.NativeError as e:
            self.lost = e.args[1] == -4
            raise_typed(e, doing, lambda: self.memory_budget()[0] if hasattr(self, "_native") else self.info.available_bytes)


class Staging:
    """Two host buffers of STAGING_BYTES for memory that is not mapped: while one is copied, the other is filled."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers = [device.buffer(STAGING_BYTES, host=True, name=f"staging {i}") for i in range(2)]
        self._busy: list[Recording | None] = [None, None]
        self._lock = threading.Lock()

    def upload(self, buffer: Buffer, offset: int, data: NDArray[np.uint8]) -> None:
        """Copy `data` to the buffer; returns when it is there."""
        with self._lock:
            for turn, start in enumerate(range(0, data.nbytes, STAGING_BYTES)):
                part = data[start : start + STAGING_BYTES]
                slot = self._free_slot(turn)
                self._buffers[slot].view()[: part.nbytes] = part
                self._start(slot, self._buffers[slot], buffer, part.nbytes, 0, offset + start)
            self._drain()

    def download(self, buffer: Buffer, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Copy bytes of the buffer to a new array."""
        out = np.empty(nbytes, np.uint8)
        with self._lock:
            starts = list(range(0, nbytes, STAGING_BYTES))
            sizes = [min(STAGING_BYTES, nbytes - s) for s in starts]
            for turn in range(len(starts) + 1):
                if turn < len(starts):
                    self._start(turn % 2, buffer, self._buffers[turn % 2], sizes[turn], offset + starts[turn], 0)
                if turn > 0:
                    slot, start = self._free_slot(turn - 1), starts[turn - 1]
                    out[start : start + sizes[turn - 1]] = self._buffers[slot].view()[: sizes[turn - 1]]
        return out

    def _start(self, slot: int, src: Buffer, dst: Buffer, nbytes: int, src_offset: int, dst_offset: int) -> None:
        r = self._device.recording("staging copy")
        r.copy(src, dst, nbytes, src_offset, dst_offset)
        r.submit()
        self._busy[slot] = r

    def _free_slot(self, turn: int) -> int:
        slot = turn % 2
        if (r := self._busy[slot]) is not None:
            self._busy[slot] = None
            r.wait()
        return slot

    def _drain(self) -> None:
        for slot in range(2):
            self._free_slot(slot)


def _bits(value: int | float) -> int:
    """The 32 bits of a specialization constant."""
    if isinstance(value, float):
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    return int(value) & 0xFFFFFFFF


def _save_cache(native: _native.Device, file: Path | None, loaded: bytes) -> None:
    """Write the pipeline cache when it has changed; runs at close, when the device is collected, or at exit."""
    try:
        data = native.cache_data()
    except _native.NativeError:
        return
    if data != loaded:
        cache.save(file, data)
