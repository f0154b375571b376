"""Packed weights on disk: the second load of a model maps what the first one packed.

One file a model and layout, beside the pipeline cache: a header, then every matrix as it lies in device memory, at a page's
start. What the header must say is known before the file is opened (which files the weights came from, the layout, a hash of the
code that packs), so it is compared, never interpreted. A file that is damaged, stale or cannot be written is no error.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache as once
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

import vkllm_shaders.formats
from vkllm import debug, expand
from vkllm.files.model_file import ModelFile
from vkllm.vk import cache
from vkllm_shaders.formats import Layout

MAGIC = b"vkllm weights 1\n"
PAGE = 4096  # matrices begin at multiples: devices import whole pages
DATA_START = 1 << 16
STATE = 64  # bytes at the header's end, which change when the data is known to be on the disk
SYNCED = b"on disk".ljust(STATE)
LEAST_BYTES = 64 << 20  # smaller models are packed in no time
LIMIT_GIB = 32.0  # of all files together
LIMIT = "VKLLM_WEIGHT_CACHE"  # another limit, in GiB; 0: no cache
LEAST_FREE = 0.1  # of the disk
ABANDONED_S = 3600.0  # a temporary file of this age has no writer any more
SLAB_BYTES = 16 << 20
FETCH_STEP = 1 << 16  # a fault brings in so many bytes round it
FETCH_BYTES = 8 << 30  # larger files come page by page: experts may never be used


class PackedMatrix(Protocol):
    """What counts of a matrix: its name, and all that decides how its bytes lie (vkllm.packing.Matrix)."""

    @property
    def name(self) -> str: ...
    @property
    def fmt(self) -> str: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def order(self) -> NDArray[np.int64]: ...
    @property
    def nbytes(self) -> int: ...


class PackedCache:
    """Where one model's packed matrices are, or would be, on disk. Make one with `of`."""

    def __init__(self, path: Path, header: bytes, places: Mapping[str, tuple[int, int]], limit_bytes: int) -> None:
        """`places`: by matrix, its offset and size in bytes."""
        self.path, self.header, self.places, self.limit_bytes = path, header, places, limit_bytes
        self.nbytes = max((_pages(offset + size) for offset, size in places.values()), default=DATA_START)

    @classmethod
    def of(cls, file: ModelFile, matrices: Sequence[PackedMatrix], folder: Path | None = None) -> PackedCache | None:
        """The cache for these matrices of a file; None where there shall be none, or the model is small."""
        limit = _limit_bytes()
        if not LEAST_BYTES <= sum(m.nbytes for m in matrices) <= limit:
            return None
        try:
            files = _sources(file)
        except OSError:
            return None
        places: dict[str, tuple[int, int]] = {}
        at = DATA_START
        for matrix in matrices:
            places[matrix.name] = (at, matrix.nbytes)
            at = _pages(at + matrix.nbytes)
        layout = "|".join(f"{m.name} {m.fmt} {m.layout}" for m in matrices)
        digest = hashlib.sha256(f"{_code()}|{layout}|{sorted(file.tensors.items())}".encode())
        for matrix in matrices:
            digest.update(np.ascontiguousarray(matrix.order).data)
        header = MAGIC + json.dumps({"files": files, "digest": digest.hexdigest(), "nbytes": at}).encode() + b"\n"
        if len(header) > DATA_START - STATE:
            return None
        name = hashlib.sha256(f"{file.path.resolve()}|{layout}".encode()).hexdigest()[:32]
        return cls((folder or cache.directory()) / f"weights-{name}.bin", header, places, limit)

    def open(self) -> PackedMap | None:
        """The file, mapped, where it is what it should be and on the disk; else None."""
        try:
            with self.path.open("rb") as f:
                head = f.read(DATA_START)
                state = head[-STATE:]
                whole = os.fstat(f.fileno()).st_size == self.nbytes and head[:-STATE] == self.header.ljust(
                    DATA_START - STATE, b"\0"
                )
                if not whole or state not in (SYNCED, _boot()):
                    return None
                mapped = mmap.mmap(f.fileno(), self.nbytes, access=mmap.ACCESS_COPY)
            os.utime(self.path)  # the least recently used goes first
        except (OSError, ValueError):
            return None
        if state != SYNCED:
            _sync(self.path)
        return PackedMap(mapped, self.places)

    def writer(self) -> PackedWriter | None:
        """To write the file anew; None where there is no room for it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _make_room(self.path, self.nbytes, self.limit_bytes)
            disk = shutil.disk_usage(self.path.parent)
            if disk.free - self.nbytes < LEAST_FREE * disk.total:
                debug.log(debug.DEVICE, f"packed weights are not kept: {disk.free >> 20} MiB are free in {self.path.parent}")
                return None
            return PackedWriter(self)
        except OSError:
            return None


class PackedMap:
    """A mapped cache file. Pages that are written to are this process's own; the file never changes."""

    def __init__(self, mapped: mmap.mmap, places: Mapping[str, tuple[int, int]]) -> None:
        self._map, self._places = mapped, places
        self._bytes = np.frombuffer(mapped, np.uint8)

    def pages(self, name: str) -> NDArray[np.uint8]:
        """A matrix with the rest of its last page: views of the file, which keep it mapped."""
        offset, size = self._places[name]
        return self._bytes[offset : _pages(offset + size)]

    def fetch(self) -> None:
        """Beside everything else: bring the file into memory, and its pages into this process."""
        if len(self._map) <= FETCH_BYTES:
            touched = self._bytes[::FETCH_STEP]
            threading.Thread(target=touched.max, name="fetch packed weights", daemon=True).start()

    def slabs(self, name: str) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(offset in the matrix, bytes) of its pieces. What was read leaves the memory before the next one."""
        offset, size = self._places[name]
        for start in range(0, size, SLAB_BYTES):
            n = min(SLAB_BYTES, size - start)
            yield start, self._bytes[offset + start : offset + start + n]
            if hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED, offset + start, _pages(n))


class PackedWriter:
    """Writes a cache file: `write` in any order, from several threads, then `publish`. `discard` undoes it."""

    def __init__(self, target: PackedCache) -> None:
        self._target, self._failed = target, False
        self._fd, self._temporary = tempfile.mkstemp(dir=target.path.parent, prefix=".weights-")
        try:
            os.truncate(self._fd, target.nbytes)
        except OSError:
            self.discard()
            raise

    def write(self, name: str, offset: int, data: NDArray[np.uint8]) -> None:
        """Bytes of a matrix, which begin at its byte `offset`. After a failure nothing is written any more."""
        at = self._target.places[name][0] + offset
        rest = data.data
        try:
            while rest.nbytes and not self._failed:
                n = os.pwrite(self._fd, rest[:SLAB_BYTES], at)
                rest, at = rest[n:], at + n
        except OSError as e:
            debug.log(debug.DEVICE, f"packed weights are not kept: {e}")
            self._failed = True

    def publish(self) -> None:
        """Put the file into its place, in one step, where all of it was written."""
        try:
            if self._failed:
                return
            boot = _boot()
            if not boot:
                os.fsync(self._fd)
            os.pwrite(self._fd, self._target.header.ljust(DATA_START - STATE, b"\0") + (boot or SYNCED), 0)
            os.replace(self._temporary, self._target.path)
            if boot:
                _sync(self._target.path)
        except OSError as e:
            debug.log(debug.DEVICE, f"packed weights are not kept: {e}")
        finally:
            self.discard()

    def discard(self) -> None:
        """Close the file; what was not published goes."""
        with suppress(OSError):
            os.close(self._fd)
        Path(self._temporary).unlink(missing_ok=True)


def _limit_bytes() -> int:
    """Of all cache files. A variable that is no number counts for nothing."""
    try:
        gib = float(os.environ.get(LIMIT) or LIMIT_GIB)
    except ValueError:
        gib = LIMIT_GIB
    return int(min(max(gib, 0.0), 1e6) * 2**30) if gib == gib else 0


def _sources(file: ModelFile) -> list[list[object]]:
    """Path, size, time of change and inode of the files that hold a model, or may: all of a folder where it is several."""
    path = file.path.resolve()
    if not (path.is_file() and path.stat().st_size == file.nbytes):
        folder = path if path.is_dir() else path.parent
        found = sorted(p for p in folder.iterdir() if p.is_file())
    else:
        found = [path]
    stats = [p.stat() for p in found]
    return [[str(p), s.st_size, s.st_mtime_ns, s.st_ino] for p, s in zip(found, stats, strict=True)]


@once
def _code() -> str:
    """A hash of what decides how weights are packed."""
    digest = hashlib.sha256()
    sources = sorted(Path(vkllm_shaders.formats.__path__[0]).rglob("*.py"))
    for source in (*sources, Path(expand.__file__), Path(__file__), Path(__file__).with_name("packing.py")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()


@once
def _boot() -> bytes:
    """This boot of the machine: until it ends, the page cache holds what was written. Empty where nobody knows."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()[:STATE].ljust(STATE)
    except OSError:
        return b""


def _sync(path: Path) -> None:
    """Beside everything else: wait until a file is on the disk, and note it in the file."""

    def work() -> None:
        with suppress(OSError), path.open("r+b") as f:
            os.fsync(f.fileno())
            os.pwrite(f.fileno(), SYNCED, DATA_START - STATE)

    threading.Thread(target=work, name="sync packed weights", daemon=True).start()


def _make_room(path: Path, nbytes: int, limit_bytes: int) -> None:
    """Remove what nobody can use any more, then the least recently used, until `nbytes` more stay below the limit."""
    for temporary in path.parent.glob(".weights-*"):
        with suppress(OSError):
            if time.time() - temporary.stat().st_mtime > ABANDONED_S:
                temporary.unlink()
    others = []
    for other in path.parent.glob("weights-*.bin"):
        with suppress(OSError):
            if other == path or not _has_source(other):
                other.unlink()
            else:
                others.append((other.stat().st_mtime, other.stat().st_size, other))
    total = nbytes + sum(size for _, size, _ in others)
    for _, size, other in sorted(others):
        if total <= limit_bytes:
            return
        other.unlink(missing_ok=True)
        total -= size


def _has_source(path: Path) -> bool:
    """Are the files still there from which this one was made?"""
    with path.open("rb") as f:
        head = f.read(DATA_START)
    try:
        files = json.loads(head[len(MAGIC) : head.index(b"\n", len(MAGIC))])["files"]
        return head.startswith(MAGIC) and all(Path(p).stat().st_mtime_ns == mtime for p, _, mtime, _ in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _pages(nbytes: int) -> int:
    """Bytes rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE
