"""safetensors files: a length, a JSON header, and raw tensors, mapped and not copied.

The header is checked here, before anything is believed: its size, that every range lies in the file, fits its shape and type,
and shares no byte with another.

Source: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from vkllm.errors import FileFormatError
from vkllm.files.huggingface.json_file import parse
from vkllm.files.mapped import DAMAGED, MappedFile

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMS = 8
MAX_ELEMENTS = 1 << 62
_LENGTH = struct.Struct("<Q")

ITEM_BITS: dict[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of one element, by the format's type names."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it is stored. `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """An open safetensors file. Make one with `open`; close it after use."""

    def __init__(self, mapped: MappedFile, tensors: Mapping[str, Stored]) -> None:
        self.path, self.nbytes = mapped.path, mapped.nbytes
        self.tensors: Mapping[str, Stored] = MappingProxyType(dict(tensors))
        self._mapped = mapped

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Map a file and check its header. Raises: FileFormatError: no such file, or not a sound one."""
        mapped = MappedFile(path)
        try:
            return cls(mapped, _tensors(mapped))
        except FileFormatError as e:
            mapped.close()
            raise FileFormatError(f"{path.name}: {e.message}", hint=e.hint) from None
        except BaseException:
            mapped.close()
            raise

    def data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, uint8 [nbytes]: a read-only view of the map."""
        t = self.tensors[name]
        return self._mapped.view(t.offset, t.nbytes)

    def release(self, name: str) -> None:
        """Tell the kernel that the pages of a tensor will not be needed soon."""
        t = self.tensors[name]
        self._mapped.release(t.offset, t.nbytes)

    def close(self) -> None:
        """Unmap. Views that are still alive stay valid."""
        self._mapped.close()


def _tensors(mapped: MappedFile) -> dict[str, Stored]:
    """The header's tensors, in the order of their data."""
    if mapped.nbytes < _LENGTH.size:
        raise FileFormatError(f"{mapped.nbytes} bytes are too few for a safetensors file", hint=DAMAGED)
    n = _LENGTH.unpack_from(mapped.buf)[0]
    if n > MAX_HEADER_BYTES:
        raise FileFormatError(f"a header of {n} bytes; the limit is {MAX_HEADER_BYTES}", hint=DAMAGED)
    start = _LENGTH.size + n
    if start > mapped.nbytes:
        raise FileFormatError(f"a header of {n} bytes in a file of {mapped.nbytes}: the download is half-finished", hint=DAMAGED)
    header = parse(mapped.buf[_LENGTH.size : start], "the header")
    found = [_stored(name, entry, start) for name, entry in header.items() if name != "__metadata__"]
    found.sort(key=lambda t: (t.offset, t.nbytes))
    _check_places(found, start, mapped.nbytes)
    return {t.name: t for t in found}


def _stored(name: str, entry: object, start: int) -> Stored:
    """One header entry, checked by itself."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise FileFormatError(f"tensor {name} lacks dtype, shape or data_offsets", hint=DAMAGED)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise FileFormatError(f"tensor {name} has the unknown type {str(dtype)[:40]!r}", hint=f"known: {', '.join(ITEM_BITS)}")
    if not _naturals(shape) or len(shape) > MAX_DIMS or math.prod(shape) > MAX_ELEMENTS:
        raise FileFormatError(f"tensor {name} has the impossible shape {str(shape)[:80]}", hint=DAMAGED)
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FileFormatError(f"tensor {name} has the impossible data_offsets {str(offsets)[:80]}", hint=DAMAGED)
    nbytes, bits = offsets[1] - offsets[0], math.prod(shape) * ITEM_BITS[dtype]
    if nbytes * 8 != bits:
        raise FileFormatError(
            f"tensor {name}, {dtype} of shape {shape}, needs {-(-bits // 8)} bytes; its data_offsets give {nbytes}", hint=DAMAGED
        )
    return Stored(name, dtype, tuple(shape), start + offsets[0], nbytes)


def _naturals(values: object) -> bool:
    """Is it a list of integers that are not negative and fit 63 bits?"""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def _check_places(tensors: list[Stored], start: int, file_bytes: int) -> None:
    """The tensors, in order, fill the file from the header's end to its own, as the format asks: no gap, no overlap."""
    end, before = start, "the header"
    for t in tensors:
        if t.offset + t.nbytes > file_bytes:
            raise FileFormatError(
                f"tensor {t.name} ends at byte {t.offset + t.nbytes}; the file has {file_bytes}: the download is half-finished",
                hint=DAMAGED,
            )
        if t.offset != end:
            what = "overlap" if t.offset < end else "leave a gap"
            raise FileFormatError(f"{before} and {t.name} {what}", hint=DAMAGED)
        end, before = t.offset + t.nbytes, t.name
    if end != file_bytes:
        raise FileFormatError(f"{file_bytes - end} bytes follow the last tensor", hint=DAMAGED)
