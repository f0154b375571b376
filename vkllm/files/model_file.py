"""What every kind of model file gives its readers: metadata and tensors under GGUF's names, mapped, not copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of the file. `shape` has the slowest dimension first; `offset` counts from the start of the file that holds it,
    and is -1 where the tensor is made of others when it is asked for."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class ModelFile(Protocol):
    """An open model: one GGUF file, a split one, or a Hugging Face folder. Make one with `open_model`; close it after use."""

    @property
    def path(self) -> Path:
        """What was opened."""

    @property
    def format(self) -> str:
        """The file's format and version, for people."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk, of all its files that hold tensors."""

    @property
    def metadata(self) -> Mapping[str, object]:
        """Metadata in GGUF's keys and types: numbers, booleans, strings, and arrays of them."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by GGUF's names."""

    def data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, read-only, uint8 [n_row, row_bytes]; n_row is the product of all but the last dimension.

        Raises: FileFormatError: no such tensor, or the file is closed.
        """

    def release(self, name: str) -> None:
        """Tell the kernel that a tensor's pages will not be needed soon. Views stay valid."""

    def close(self) -> None:
        """Unmap. Views that are still alive stay valid."""

    def __enter__(self) -> ModelFile: ...

    def __exit__(self, *_: object) -> None: ...
