"""A file mapped read-only: views of its bytes, which outlive it, and pages that can be given back."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vkllm.errors import FileFormatError

DAMAGED = "the file is damaged or incomplete: download or convert it again"


class MappedFile:
    """The bytes of one regular file. Close it after use."""

    def __init__(self, path: Path) -> None:
        """Raises: FileFormatError: no such file, no regular file, or an empty one."""
        self.path = path
        try:
            if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
                raise FileFormatError(f"{path} is no regular file", hint="give the path of a model file")
            with path.open("rb") as f:
                self._map: mmap.mmap | None = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as e:
            raise FileFormatError(f"cannot open {path}: {e.strerror}", hint="check the path and its permissions") from e
        except ValueError:
            raise FileFormatError(f"{path} is empty", hint=DAMAGED) from None
        self.nbytes = len(self._map)

    @property
    def buf(self) -> mmap.mmap:
        """The map. Raises: FileFormatError: the file is closed."""
        if self._map is None:
            raise FileFormatError(f"{self.path.name} is closed", hint="read tensors before the file is closed")
        return self._map

    def view(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes of the map, uint8 [nbytes], read-only."""
        return np.frombuffer(self.buf, np.uint8, nbytes, offset)

    def release(self, offset: int, nbytes: int) -> None:
        """Drop the whole pages of a range; they are read again when they are needed."""
        page = mmap.PAGESIZE
        start = -(-offset // page) * page
        length = (offset + nbytes) // page * page - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self.buf.madvise(mmap.MADV_DONTNEED, start, length)

    def close(self) -> None:
        """Unmap the file. Where views of it are still alive, the map goes with the last of them."""
        buf, self._map = self._map, None
        if buf is not None:
            with suppress(BufferError):  # a view holds the map; it is freed with the view
                buf.close()
