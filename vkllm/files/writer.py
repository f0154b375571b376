"""Write a GGUF file, tensor by tensor: nothing is held in memory, and nothing is seen under its name before it is complete.

The header comes first, so names, shapes and types of all tensors must be known; their bytes then follow in the same order.
They go to a file beside the target, which takes the target's place only when every byte has reached the disk.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from vkllm.errors import FileFormatError
from vkllm.files.gguf import ARRAY, MAGIC, MAX_NAME_BYTES, SCALARS, STRING
from vkllm.files.model_file import TensorInfo
from vkllm.files.types import TYPES
from vkllm.vocab.strings import Strings

VERSION = 3
DEFAULT_ALIGNMENT = 32
U32, I32, F32, BOOL, U64, I64 = 4, 5, 6, 7, 10, 11
_HEAD = struct.Struct("<4sIQQ")
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_ARRAY_TYPES = {np.dtype(code.format): kind for kind, code in SCALARS.items()}

Layout = Sequence[tuple[str, tuple[int, ...], str]]
"""Tensors: name, shape with the slowest dimension first, type."""
Raw = bytes
"""A value as the file holds it: its type, then its bytes."""


class GGUFWriter:
    """A GGUF file in the making. Use it as a context manager: left by an exception, it leaves nothing behind.

    Args: path: where the file will be; metadata: values, or Raw ones (see `raw_metadata`), which are copied; tensors: in
        the order in which their bytes will be written; force: replace a file of that name.
    """

    def __init__(self, path: Path, metadata: Mapping[str, object], tensors: Layout, *, force: bool = False) -> None:
        self.path, self.force = path, force
        self._alignment = _alignment(metadata)
        self._tensors = _placed(tensors, self._alignment)
        self._header = _header(metadata, self._tensors)
        self._base = -(-len(self._header) // self._alignment) * self._alignment
        self._next, self._written = 0, 0
        self._file: BinaryIO | None = None
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")

    @property
    def nbytes(self) -> int:
        """Size of the finished file."""
        return self._base + sum(_padded(t.nbytes, self._alignment) for t in self._tensors)

    def __enter__(self) -> GGUFWriter:
        """Raises: FileFormatError: the target is there already, or there is no folder or no space for it."""
        self._check_target()
        free = shutil.disk_usage(self.path.parent).free
        if self.nbytes > free:
            raise FileFormatError(
                f"{self.path.name} needs {_size(self.nbytes)}; {_size(free)} are free in {self.path.parent}",
                hint="free some space, choose a smaller type, or write to another disk",
            )
        self._file = open(self._part, "xb")
        try:
            self._file.write(self._header)
            self._pad(len(self._header))
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, rows: NDArray[np.uint8]) -> None:
        """The next bytes of the current tensor; after its last ones the next tensor begins."""
        assert self._file is not None and self._next < len(self._tensors)
        current = self._tensors[self._next]
        self._written += rows.nbytes
        assert self._written <= current.nbytes, f"{current.name} has {current.nbytes} bytes"
        rows.tofile(self._file) if rows.flags.c_contiguous else self._file.write(rows.tobytes())
        if self._written == current.nbytes:
            self._pad(current.nbytes)
            self._next, self._written = self._next + 1, 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._finish()
        except BaseException:
            self._discard()
            raise

    def _finish(self) -> None:
        """To the disk, then under its name."""
        assert self._file is not None and self._next == len(self._tensors), "tensors are missing"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._check_target()
        os.replace(self._part, self.path)
        _sync_folder(self.path.parent)

    def _check_target(self) -> None:
        if self.path.is_dir():
            raise FileFormatError(f"{self.path} is a folder", hint="give the name of the file to write")
        if self.path.exists() and not self.force:
            raise FileFormatError(f"{self.path} is there already", hint="give another name, or --force to replace it")
        if not self.path.parent.is_dir():
            raise FileFormatError(f"the folder {self.path.parent} does not exist", hint="make it first")

    def _pad(self, nbytes: int) -> None:
        assert self._file is not None
        self._file.write(bytes(_padded(nbytes, self._alignment) - nbytes))

    def _discard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._part.unlink(missing_ok=True)


def raw_metadata(path: Path) -> dict[str, Raw]:
    """The metadata of a GGUF file that `GGUFFile.open` has found sound, each value as it stands there, type included."""
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as buf:
        _, _, _, n_pair = _HEAD.unpack_from(buf, 0)
        at, pairs = _HEAD.size, {}
        for _ in range(n_pair):
            start = at + 8 + _u64(buf, at)
            key = buf[at + 8 : start].decode()
            at = _after(buf, start + 4, _u32(buf, start))
            pairs[key] = buf[start:at]
    return pairs


def _after(buf: mmap.mmap, at: int, kind: int) -> int:
    """Where the value of type `kind` at `at` ends."""
    if kind in SCALARS:
        return at + SCALARS[kind].size
    if kind == STRING:
        return at + 8 + _u64(buf, at)
    item, n = _u32(buf, at), _u64(buf, at + 4)
    at += 12
    if item in SCALARS:
        return at + n * SCALARS[item].size
    for _ in range(n):
        at += 8 + _u64(buf, at)
    return at


def _u32(buf: mmap.mmap, at: int) -> int:
    return int(_U32.unpack_from(buf, at)[0])


def _u64(buf: mmap.mmap, at: int) -> int:
    return int(_U64.unpack_from(buf, at)[0])


def encode(value: object) -> Raw:
    """A value with the type that GGUF readers expect: whole numbers u32 where they fit, other numbers f32.

    Arrays of numpy keep theirs; lists hold strings, numbers or booleans of one kind.
    Raises: FileFormatError: nothing that GGUF can hold.
    """
    if isinstance(value, str):
        return _U32.pack(STRING) + _string(value)
    if isinstance(value, list | tuple | Strings):
        return _U32.pack(ARRAY) + _list(value)
    if isinstance(value, np.ndarray):
        return _U32.pack(ARRAY) + _numbers(value)
    if isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating):
        kind = _kind(value)
        return _U32.pack(kind) + SCALARS[kind].pack(value)
    raise FileFormatError(f"a {type(value).__name__} cannot be metadata of a GGUF file", hint="expected text, numbers or lists")


def _kind(value: bool | float | np.generic) -> int:
    """The type of one number."""
    if isinstance(value, np.generic):
        return _ARRAY_TYPES[value.dtype]
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, float):
        return F32
    if value < 0:
        return I32 if value >= -(1 << 31) else I64
    return U32 if value < 1 << 32 else U64


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return _U64.pack(len(data)) + data


def _list(items: Sequence[object]) -> bytes:
    """An array's element type, length and elements."""
    if all(isinstance(item, str) for item in items):
        return _U32.pack(STRING) + _U64.pack(len(items)) + b"".join(_string(str(item)) for item in items)
    whole = all(isinstance(item, int) for item in items) and not isinstance(items[0], bool)
    return _numbers(np.asarray(items, np.int32) if whole else np.asarray(items))


def _numbers(values: NDArray[np.generic]) -> bytes:
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    kind = _ARRAY_TYPES.get(values.dtype.newbyteorder("<"))
    if kind is None or values.ndim != 1:
        raise FileFormatError(
            f"an array of {values.dtype} with {values.ndim} dimensions cannot be metadata of a GGUF file",
            hint="expected a list of numbers",
        )
    return _U32.pack(kind) + _U64.pack(len(values)) + values.astype(values.dtype.newbyteorder("<")).tobytes()


def _alignment(metadata: Mapping[str, object]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if isinstance(value, Raw):
        value = _U32.unpack_from(value, 4)[0]
    assert isinstance(value, int)
    return value


def _padded(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment


def _placed(tensors: Layout, alignment: int) -> list[TensorInfo]:
    """Sizes and offsets, counted from the start of the data."""
    placed, at = [], 0
    for name, shape, kind in tensors:
        if len(name.encode()) > MAX_NAME_BYTES:
            raise FileFormatError(f"the tensor name {name} is longer than {MAX_NAME_BYTES} bytes", hint="give it a shorter one")
        info = TYPES[kind]
        nbytes = math.prod(shape) // info.block_size * info.block_bytes
        placed.append(TensorInfo(name, shape, kind, at, nbytes))
        at += _padded(nbytes, alignment)
    return placed


def _header(metadata: Mapping[str, object], tensors: Sequence[TensorInfo]) -> bytes:
    parts = [_HEAD.pack(MAGIC, VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), value if isinstance(value, Raw) else encode(value)]
    for t in tensors:
        dims = struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *reversed(t.shape))
        parts += [_string(t.name), dims, struct.pack("<IQ", TYPES[t.type].id, t.offset)]
    return b"".join(parts)


def _sync_folder(folder: Path) -> None:
    """The new name to the disk as well, where folders can be opened."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:.2f} MiB"
