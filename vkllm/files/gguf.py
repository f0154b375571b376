"""GGUF v2 and v3, little-endian: header, metadata and tensors of a memory-mapped file.

Reads what the file says and checks that it can be true; knows nothing of models. Every count is compared with the bytes that
are left before anything is allocated, so memory stays within a small multiple of the file's size. Tensor data is never
copied: `data` gives read-only views of the map.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from vkllm.errors import FileFormatError, UnsupportedQuantError
from vkllm.files.mapped import DAMAGED as _DAMAGED
from vkllm.files.mapped import MappedFile
from vkllm.files.model_file import TensorInfo
from vkllm.files.types import TYPES_BY_ID, TypeInfo
from vkllm.vocab.strings import Strings

__all__ = ["GGUFFile", "TensorInfo"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_ELEMENTS = 1 << 62
MAX_NAME_BYTES = 64  # ggml's GGML_MAX_NAME; llama.cpp refuses longer tensor names
MAX_KEY_BYTES = 65_535
MAX_ALIGNMENT = 1 << 20
MIN_PAIR_BYTES = 8 + 4 + 1  # empty key, value type, one-byte value
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # empty name, one dimension

STRING, ARRAY = 8, 9
SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = SCALARS[4], SCALARS[10]


class _Cursor:
    """A bounds-checked position in the mapped bytes."""

    __slots__ = ("at", "buf", "end")

    def __init__(self, buf: mmap.mmap) -> None:
        self.buf, self.at, self.end = buf, 0, len(buf)

    def need(self, nbytes: int, what: str) -> int:
        """Reserve `nbytes`; returns where they start."""
        start = self.at
        if nbytes > self.end - start:
            raise FileFormatError(
                f"{what} at byte {start} needs {nbytes} bytes; the file has {self.end - start} more", hint=_DAMAGED
            )
        self.at = start + nbytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.buf, self.need(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.buf, self.need(8, what))[0])

    def count(self, what: str, item_bytes: int) -> int:
        """A 64-bit count of things that take at least `item_bytes` each in what is left of the file."""
        n = self.u64(what)
        if n > (self.end - self.at) // item_bytes:
            raise FileFormatError(f"{what} is {n}: more than the file of {self.end} bytes can hold", hint=_DAMAGED)
        return n

    def name(self, what: str, limit: int) -> str:
        """A key or a tensor's name: must be UTF-8, at most `limit` bytes."""
        n = self.u64(f"length of {what}")
        if n > limit:
            raise FileFormatError(f"{what} is {n} bytes long; the limit is {limit}", hint=_DAMAGED)
        start = self.need(n, what)
        try:
            return self.buf[start : start + n].decode("utf-8")
        except UnicodeDecodeError as e:
            raise FileFormatError(f"{what} at byte {start} is not UTF-8: {e.reason}", hint=_DAMAGED) from None

    def text(self, what: str) -> str:
        """A string value. Vocabularies hold stray bytes, which survive as surrogate escapes."""
        n = self.u64(f"length of {what}")
        start = self.need(n, what)
        return self.buf[start : start + n].decode("utf-8", "surrogateescape")


def _strings(cur: _Cursor, n: int, what: str) -> Strings:
    """`n` strings. The hot loop of opening a file: 300 000 turns for a large vocabulary."""
    buf, first, at, end, unpack = cur.buf, cur.at, cur.at, cur.end, _U64.unpack_from
    lengths = array("Q")  # where they are; behind each of them is a string
    append = lengths.append
    for i in range(n):
        if at + 8 > end:
            raise FileFormatError(f"{what}: string {i} of {n} begins past the end of the file", hint=_DAMAGED)
        append(at - first)
        at += 8 + unpack(buf, at)[0]
        if at > end:
            raise FileFormatError(f"{what}: string {i} of {n} reaches past the end of the file", hint=_DAMAGED)
    cur.at = at
    places = np.asarray(lengths, np.int64)
    data, own = np.frombuffer(buf, np.uint8, at - first, first), np.ones(at - first, bool)
    own[places[:, None] + np.arange(8)] = False
    return Strings(data[own].tobytes(), np.append(places, at - first)[1:] - 8 * np.arange(1, n + 1))


def _array(cur: _Cursor, what: str) -> Strings | NDArray[np.generic]:
    kind = cur.u32(f"element type of {what}")
    if kind == STRING:
        return _strings(cur, cur.count(f"length of {what}", 8), what)
    if kind not in SCALARS:
        found = "arrays" if kind == ARRAY else f"unknown type {kind}"
        raise FileFormatError(f"{what} is an array of {found}; expected numbers, booleans or strings", hint=_DAMAGED)
    code = SCALARS[kind]
    n = cur.count(f"length of {what}", code.size)
    start = cur.need(n * code.size, what)
    values = np.frombuffer(cur.buf, np.dtype(code.format), n, start).copy()  # a copy: metadata outlives the map
    values.flags.writeable = False
    return values


def _value(cur: _Cursor, what: str) -> object:
    kind = cur.u32(f"type of {what}")
    if kind == STRING:
        return cur.text(what)
    if kind == ARRAY:
        return _array(cur, what)
    if kind not in SCALARS:
        raise FileFormatError(f"{what} has the unknown value type {kind}", hint=_DAMAGED)
    code = SCALARS[kind]
    return code.unpack_from(cur.buf, cur.need(code.size, what))[0]


def _header(cur: _Cursor) -> tuple[int, int, int]:
    """Returns: version, number of tensors, number of metadata pairs."""
    magic = cur.buf[cur.need(4, "magic") : 4]
    if magic != MAGIC:
        raise FileFormatError(f"the file begins with {magic!r}; expected {MAGIC!r}", hint="give a GGUF file")
    version = cur.u32("version")
    if version not in VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise FileFormatError(
                "the file is big-endian; expected little-endian", hint="convert the model again, without --bigendian"
            )
        raise FileFormatError(f"GGUF version {version}; expected 2 or 3", hint="convert the model again with a current tool")
    n_tensor = cur.count("tensor count", MIN_TENSOR_BYTES)
    return version, n_tensor, cur.count("metadata count", MIN_PAIR_BYTES)


def _metadata(cur: _Cursor, n: int) -> dict[str, object]:
    pairs: dict[str, object] = {}
    for i in range(n):
        key = cur.name(f"metadata key {i}", MAX_KEY_BYTES)
        if not key:
            raise FileFormatError(f"metadata key {i} is empty", hint=_DAMAGED)
        if key in pairs:
            raise FileFormatError(f"metadata key {key!r} is there twice", hint=_DAMAGED)
        pairs[key] = _value(cur, f"metadata {key!r}")
    return pairs


def _alignment(metadata: Mapping[str, object]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or isinstance(value, bool) or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise FileFormatError(f"general.alignment is {value!r}; expected a power of two from 8 to {MAX_ALIGNMENT}", hint=_DAMAGED)
    return value


def _nbytes(name: str, shape: tuple[int, ...], kind: TypeInfo) -> int:
    """Bytes of a tensor: whole blocks along the last dimension."""
    if math.prod(shape) > MAX_ELEMENTS or 0 in shape:
        raise FileFormatError(f"tensor {name} has the impossible shape {list(shape)}", hint=_DAMAGED)
    if shape[-1] % kind.block_size:
        raise FileFormatError(
            f"tensor {name} has rows of {shape[-1]}; {kind.name} needs multiples of {kind.block_size}", hint=_DAMAGED
        )
    return math.prod(shape) // kind.block_size * kind.block_bytes


def _tensor(cur: _Cursor, index: int, alignment: int) -> TensorInfo:
    """One tensor record; its offset still counts from the start of the data."""
    name = cur.name(f"name of tensor {index}", MAX_NAME_BYTES)
    n_dim = cur.u32(f"dimension count of tensor {name}")
    if not 1 <= n_dim <= MAX_DIMS:
        raise FileFormatError(f"tensor {name} has {n_dim} dimensions; expected 1 to {MAX_DIMS}", hint=_DAMAGED)
    shape = tuple(reversed([cur.u64(f"shape of tensor {name}") for _ in range(n_dim)]))
    type_id = cur.u32(f"type of tensor {name}")
    offset = cur.u64(f"offset of tensor {name}")
    kind = TYPES_BY_ID.get(type_id)
    if kind is None:
        raise UnsupportedQuantError(f"tensor {name} has the unknown type {type_id}", hint="re-quantize as Q4_K_M")
    if offset % alignment:
        raise FileFormatError(
            f"tensor {name} begins at {offset}, which is no multiple of the alignment {alignment}", hint=_DAMAGED
        )
    return TensorInfo(name, shape, kind.name, offset, _nbytes(name, shape, kind))


def _tensors(cur: _Cursor, n: int, alignment: int) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for i in range(n):
        t = _tensor(cur, i, alignment)
        if t.name in found:
            raise FileFormatError(f"tensor {t.name} is there twice", hint=_DAMAGED)
        found[t.name] = t
    base = -(-cur.at // alignment) * alignment
    placed = {t.name: TensorInfo(t.name, t.shape, t.type, base + t.offset, t.nbytes) for t in found.values()}
    _check_places(placed, cur.end)
    return placed


def _check_places(tensors: Mapping[str, TensorInfo], file_bytes: int) -> None:
    """Every tensor lies within the file, and no two share a byte."""
    before: TensorInfo | None = None
    for t in sorted(tensors.values(), key=lambda t: t.offset):
        if t.offset + t.nbytes > file_bytes:
            raise FileFormatError(f"tensor {t.name} ends at byte {t.offset + t.nbytes}; the file has {file_bytes}", hint=_DAMAGED)
        if before is not None and t.offset < before.offset + before.nbytes:
            raise FileFormatError(f"tensors {before.name} and {t.name} overlap", hint=_DAMAGED)
        before = t


class GGUFFile:
    """An open GGUF file. Make one with `open`; use it as a context manager, or call `close`. Of a split model it is one part."""

    def __init__(
        self, mapped: MappedFile, version: int, metadata: Mapping[str, object], tensors: Mapping[str, TensorInfo]
    ) -> None:
        self.path = mapped.path
        self.version = version
        self.nbytes = mapped.nbytes
        self.metadata: Mapping[str, object] = MappingProxyType(dict(metadata))
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self._mapped = mapped

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map the file and read all but its tensor data.

        Raises: FileFormatError: no such file, or not a sound GGUF file; UnsupportedQuantError: an unknown tensor type.
        """
        mapped = MappedFile(Path(path))
        try:
            cur = _Cursor(mapped.buf)
            version, n_tensor, n_pair = _header(cur)
            metadata = _metadata(cur, n_pair)
            tensors = _tensors(cur, n_tensor, _alignment(metadata))
            mapped.release(0, cur.at)
            return cls(mapped, version, metadata, tensors)
        except BaseException:
            mapped.close()
            raise

    @property
    def format(self) -> str:
        """Format and version, for people."""
        return f"GGUF v{self.version}"

    def data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor: a read-only view of the map, uint8 [n_row, row_bytes].

        n_row is the product of all but the last dimension. Raises: FileFormatError: no such tensor, or the file is closed.
        """
        t = self._info(name)
        n_row = math.prod(t.shape[:-1])
        return self._mapped.view(t.offset, t.nbytes).reshape(n_row, t.nbytes // n_row)

    def release(self, name: str) -> None:
        """Tell the kernel that the pages of a tensor will not be needed soon. Views stay valid."""
        t = self._info(name)
        self._mapped.release(t.offset, t.nbytes)

    def close(self) -> None:
        """Unmap the file. Where views of it are still alive, the map goes with the last of them."""
        self._mapped.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise FileFormatError(
                f"{self.path.name} holds no tensor {name}", hint="the file is incomplete or of another architecture"
            )
        return info
