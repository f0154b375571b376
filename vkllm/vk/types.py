"""What a device says about itself, and what a dispatch binds. Plain frozen values: no Vulkan here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

Kind = Literal["storage", "texel", "uniform_texel"]
Format = Literal["r32ui", "r32i", "r32f", "rgba32ui", "rgba32i", "rgba32f", "rgba16f"]
DeviceKind = Literal["discrete", "integrated", "virtual", "cpu", "other"]

# VkFormat and bytes a texel.
FORMATS: dict[str, tuple[int, int]] = {
    "r32ui": (98, 4),
    "r32i": (99, 4),
    "r32f": (100, 4),
    "rgba16f": (97, 8),
    "rgba32ui": (107, 16),
    "rgba32i": (108, 16),
    "rgba32f": (109, 16),
}


@dataclass(frozen=True)
class DeviceLimits:
    """What kernels and plans must respect. Sizes in bytes. `features` holds the words of Kernel.features."""

    max_storage_buffer_range: int
    max_texel_elements: int
    max_push_bytes: int
    max_storage_buffers: int  # of a kernel
    max_texel_buffers: int
    max_shared_bytes: int
    max_workgroup_invocations: int
    max_workgroup_count: tuple[int, int, int]
    subgroup_size: int
    min_subgroup_size: int
    max_subgroup_size: int
    timestamp_period_ns: float
    storage_alignment: int
    texel_alignment: int
    features: frozenset[str] = frozenset()
    coop_shapes: tuple[tuple[int, int, int, str, str, str, str], ...] = ()  # M, N, K, then the types of A, B, C, result
    unified_memory: bool = True
    max_buffer_bytes: int = 1 << 30
    import_alignment: int = 0  # of host memory that buffers can lie in; 0: none can


# What Vulkan 1.1 guarantees, with the features that the kernels use everywhere. Two exceptions: Vulkan guarantees 65,536 texels
# and 4 buffers of a kind, but drivers of real computers offer 2**27 or more and 8 or more, and the schedules count on it.
MINIMUM_LIMITS = DeviceLimits(
    max_storage_buffer_range=1 << 27,
    max_texel_elements=1 << 27,
    max_push_bytes=128,
    max_storage_buffers=8,
    max_texel_buffers=8,
    max_shared_bytes=16384,
    max_workgroup_invocations=128,
    max_workgroup_count=(65535, 65535, 65535),
    subgroup_size=8,
    min_subgroup_size=8,
    max_subgroup_size=8,
    timestamp_period_ns=1.0,
    storage_alignment=256,
    texel_alignment=256,
    features=frozenset({"float16", "storage16", "int8", "storage8", "int16", "subgroup_arith", "subgroup_shuffle"}),
)


@dataclass(frozen=True)
class DeviceInfo:
    """One device. `index` is its place in Vulkan's list; `memory_bytes` the largest device-local heap."""

    index: int
    name: str
    kind: DeviceKind
    vendor_id: int
    device_id: int
    driver_name: str
    driver_info: str
    driver_version: int
    api_version: tuple[int, int, int]
    uuid: bytes
    pci_bus: str | None
    memory_bytes: int
    available_bytes: int
    limits: DeviceLimits
    queue_family: int = 0
    cache_uuid: bytes = b""


class BufferLike(Protocol):
    """What both device.Buffer and null.NullBuffer offer."""

    name: str

    @property
    def nbytes(self) -> int: ...
    @property
    def mapped(self) -> bool: ...
    def view(self, dtype: DTypeLike = np.uint8) -> NDArray[Any]: ...
    def write(self, array: NDArray[Any], offset: int = 0) -> None: ...
    def read(self, nbytes: int | None = None, offset: int = 0, dtype: DTypeLike = np.uint8) -> NDArray[Any]: ...
    def free(self) -> None: ...


class PipelineLike(Protocol):
    """What both device.Pipeline and null.NullPipeline offer."""

    @property
    def name(self) -> str: ...
    @property
    def kinds(self) -> tuple[str, ...]: ...
    @property
    def push_bytes(self) -> int: ...


@dataclass(frozen=True)
class Binding:
    """A range of a buffer. `format` None: storage buffer; else a texel view. `nbytes` None: to the end of the buffer."""

    buffer: Any
    offset: int = 0
    nbytes: int | None = None
    format: Format | None = None

    @property
    def size(self) -> int:
        """Bytes bound."""
        return int(self.buffer.nbytes) - self.offset if self.nbytes is None else self.nbytes


@dataclass(frozen=True)
class DispatchCommand:
    """One dispatch of a recording."""

    pipeline: Any
    bindings: tuple[Binding, ...]
    groups: tuple[int, int, int]
    push: bytes = b""


@dataclass(frozen=True)
class BarrierCommand:
    """A global memory barrier."""


@dataclass(frozen=True)
class CopyCommand:
    """A copy between two buffers."""

    src: Any
    dst: Any
    nbytes: int
    src_offset: int = 0
    dst_offset: int = 0


@dataclass(frozen=True)
class TimestampCommand:
    """A timestamp; `index` is its place in timestamps_us()."""

    index: int = field(default=0)


Command = DispatchCommand | BarrierCommand | CopyCommand | TimestampCommand


def check_dispatch(
    limits: DeviceLimits, pipeline: PipelineLike, bindings: Sequence[Binding], groups: tuple[int, int, int], push: bytes
) -> None:
    """Refuse a dispatch that Vulkan would not define.

    Raises: ValueError naming kernel, binding and limit.
    """

    def fail(text: str) -> None:
        raise ValueError(f"{pipeline.name}: {text}")

    if len(bindings) != len(pipeline.kinds):
        fail(f"{len(bindings)} bindings, expected {len(pipeline.kinds)}")
    if len(push) != pipeline.push_bytes:
        fail(f"{len(push)} bytes of push constants, expected {pipeline.push_bytes}")
    if any(not 0 <= n <= most for n, most in zip(groups, limits.max_workgroup_count, strict=True)):
        fail(f"{groups} workgroups, at most {limits.max_workgroup_count}")
    for i, (b, kind) in enumerate(zip(bindings, pipeline.kinds, strict=True)):
        where = f"binding {i} ({b.buffer.name or 'unnamed'})"
        if b.offset < 0 or b.size <= 0 or b.offset + b.size > b.buffer.nbytes:
            fail(f"{where} is [{b.offset}, {b.offset + b.size}) of {b.buffer.nbytes} bytes")
        if kind == "storage":
            if b.format is not None:
                fail(f"{where} has format {b.format}, expected none for a storage buffer")
            if b.offset % limits.storage_alignment:
                fail(f"{where} begins at {b.offset}, no multiple of {limits.storage_alignment}")
            if b.size > limits.max_storage_buffer_range:
                fail(f"{where} is {b.size} bytes, at most {limits.max_storage_buffer_range}: split it by rows")
        else:
            if b.format not in FORMATS:
                fail(f"{where} has format {b.format}, expected one of {', '.join(FORMATS)}")
            texel_bytes = FORMATS[str(b.format)][1]
            if b.offset % limits.texel_alignment:
                fail(f"{where} begins at {b.offset}, no multiple of {limits.texel_alignment}")
            if b.size % texel_bytes:
                fail(f"{where} is {b.size} bytes, no multiple of a texel ({texel_bytes})")
            if b.size // texel_bytes > limits.max_texel_elements:
                fail(f"{where} has {b.size // texel_bytes} texels, at most {limits.max_texel_elements}: split it by rows")
