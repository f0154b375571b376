"""The null device: everything except arithmetic, without Vulkan. Buffers are numpy arrays, recordings keep their commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vkllm.errors import MissingFeatureError
from vkllm.vk.types import (
    MINIMUM_LIMITS,
    BarrierCommand,
    Binding,
    Command,
    CopyCommand,
    DeviceInfo,
    DeviceLimits,
    DispatchCommand,
    TimestampCommand,
    check_dispatch,
)


class NullBuffer:
    """Zeroed host memory behind the interface of device.Buffer."""

    def __init__(self, nbytes: int, name: str) -> None:
        self.nbytes, self.name, self.mapped = nbytes, name, True
        self._bytes = np.zeros(nbytes, np.uint8)

    def __repr__(self) -> str:
        return f"NullBuffer({self.name!r}, {self.nbytes} bytes)"

    def view(self, dtype: DTypeLike = np.uint8) -> NDArray[Any]:
        """The memory as a flat array, no copy."""
        return self._bytes.view(dtype)

    def write(self, array: NDArray[Any], offset: int = 0) -> None:
        """Copy `array` to byte `offset`."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._check_range(offset, data.nbytes)
        self._bytes[offset : offset + data.nbytes] = data

    def read(self, nbytes: int | None = None, offset: int = 0, dtype: DTypeLike = np.uint8) -> NDArray[Any]:
        """A copy of bytes."""
        n = self.nbytes - offset if nbytes is None else nbytes
        self._check_range(offset, n)
        return self._bytes[offset : offset + n].copy().view(dtype)

    def free(self) -> None:
        """Let go of the memory."""
        self._bytes = np.zeros(0, np.uint8)

    def _check_range(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"[{offset}, {offset + nbytes}) is outside of buffer {self.name!r} of {self.nbytes} bytes")


@dataclass(frozen=True)
class NullPipeline:
    """What a pipeline was made from."""

    name: str
    spirv: bytes
    kinds: tuple[str, ...]
    push_bytes: int = 0
    spec: tuple[tuple[int, int | float], ...] = ()
    required_subgroup_size: int | None = None


class NullRecording:
    """Keeps its commands; run() counts in `.runs`."""

    def __init__(self, limits: DeviceLimits, name: str, timestamps: int) -> None:
        self._limits, self.name, self._room = limits, name, timestamps
        self.commands: list[Command] = []
        self.runs = 0
        self.finished = False

    def _add(self, command: Command) -> None:
        if self.finished:
            raise ValueError("the recording is finished")
        self.commands.append(command)

    def dispatch(
        self, pipeline: NullPipeline, bindings: Sequence[Binding], groups: tuple[int, int, int], push: bytes = b""
    ) -> None:
        """Note a dispatch; the same checks as on a device."""
        check_dispatch(self._limits, pipeline, bindings, groups, push)
        self._add(DispatchCommand(pipeline, tuple(bindings), groups, push))

    def barrier(self) -> None:
        """Note a barrier."""
        self._add(BarrierCommand())

    def copy(self, src: NullBuffer, dst: NullBuffer, nbytes: int, src_offset: int = 0, dst_offset: int = 0) -> None:
        """Note a copy."""
        src._check_range(src_offset, nbytes)
        dst._check_range(dst_offset, nbytes)
        self._add(CopyCommand(src, dst, nbytes, src_offset, dst_offset))

    def timestamp(self) -> int:
        """Note a timestamp."""
        n = sum(isinstance(c, TimestampCommand) for c in self.commands)
        if n == self._room:
            raise ValueError("no timestamp is left in this recording")
        self._add(TimestampCommand(n))
        return n

    def finish(self) -> None:
        """End recording."""
        self.finished = True

    def submit(self) -> None:
        """Count one run."""
        self.finished = True
        self.runs += 1

    def wait(self, timeout_s: float = 0.0) -> None:
        """Nothing to wait for."""

    def run(self, timeout_s: float = 0.0) -> None:
        """Count one run."""
        self.submit()

    def timestamps_us(self) -> list[float]:
        """Zeros."""
        return [0.0 for c in self.commands if isinstance(c, TimestampCommand)]


class NullDevice:
    """The interface of device.Device without Vulkan."""

    def __init__(self, limits: DeviceLimits = MINIMUM_LIMITS, memory_bytes: int = 1 << 40) -> None:
        self.limits = limits
        self.lost = False
        self.recordings: list[NullRecording] = []
        self._pipelines: dict[tuple[Any, ...], NullPipeline] = {}
        self.info = DeviceInfo(
            0, "null device", "other", 0, 0, "null", "", 0, (1, 1, 0), bytes(16), None, memory_bytes, memory_bytes, limits
        )

    def __enter__(self) -> NullDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def buffer(self, nbytes: int, *, host: bool = False, name: str = "") -> NullBuffer:
        """Zeroed memory, rounded up to 16 bytes."""
        return NullBuffer(max(16, (nbytes + 15) // 16 * 16), name)

    def import_buffer(self, data: NDArray[np.uint8], nbytes: int, name: str = "") -> NullBuffer | None:
        """Never possible: null buffers own their memory."""
        return None

    def require(self, nbytes: int, what: str) -> None:
        """Always fits."""

    def pipeline(
        self,
        kernel_name: str,
        spirv: bytes,
        kinds: tuple[str, ...],
        push_bytes: int = 0,
        spec: tuple[tuple[int, int | float], ...] = (),
        required_subgroup_size: int | None = None,
        features: frozenset[str] = frozenset(),
    ) -> NullPipeline:
        """Shared like on a device: the same arguments give the same object."""
        if missing := features - self.limits.features:
            raise MissingFeatureError(f"{kernel_name} needs {', '.join(sorted(missing))}", "choose another device (--device)")
        key = (spirv, kinds, push_bytes, spec, required_subgroup_size)
        return self._pipelines.setdefault(key, NullPipeline(kernel_name, spirv, kinds, push_bytes, spec, required_subgroup_size))

    def recording(self, name: str = "", timestamps: int = 0) -> NullRecording:
        """An empty recording; also kept in `.recordings`."""
        r = NullRecording(self.limits, name, timestamps)
        self.recordings.append(r)
        return r

    def memory_budget(self) -> tuple[int, int]:
        """(available, total) bytes."""
        return self.info.available_bytes, self.info.memory_bytes

    def wait_idle(self) -> None:
        """Nothing to wait for."""

    def trim(self) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to close."""
