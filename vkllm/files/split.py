"""A GGUF model in several files, `NAME-00001-of-0000N.gguf`: the first holds the metadata, each some of the tensors.

Source: llama.cpp's gguf-split and https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (file names).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from vkllm.errors import FileFormatError
from vkllm.files.gguf import GGUFFile
from vkllm.files.model_file import TensorInfo

SHARD = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
NO, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
_ALIKE = ("general.architecture", "general.name", "general.file_type")  # where a later part repeats them
_FETCH = "download all parts of the model into one folder"


class SplitGGUF:
    """An open split GGUF. Make one with `open`; use it as a context manager, or call `close`."""

    def __init__(self, path: Path, parts: Sequence[GGUFFile], home: Mapping[str, GGUFFile]) -> None:
        """`home`: the part that holds each tensor."""
        self.path = path
        self.nbytes = sum(part.nbytes for part in parts)
        self.format = f"{parts[0].format}, {len(parts)} files"
        whole = {k: v for k, v in parts[0].metadata.items() if k not in (NO, COUNT, TENSORS)}
        self.metadata: Mapping[str, object] = MappingProxyType(whole)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType({name: part.tensors[name] for name, part in home.items()})
        self._parts, self._home = tuple(parts), dict(home)

    @classmethod
    def open(cls, path: str | Path) -> SplitGGUF:
        """Open the model of which `path` is any one part.

        Raises: FileFormatError: a part is missing, damaged or of another model; UnsupportedQuantError.
        """
        path = Path(path)
        paths = _part_paths(path)
        parts: list[GGUFFile] = []
        try:
            for p in paths:
                parts.append(GGUFFile.open(p))
                _check_part(parts[-1], parts[0], len(parts) - 1, len(paths))
            return cls(path, parts, _homes(parts))
        except BaseException:
            for part in parts:
                part.close()
            raise

    def data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor: a read-only view of its file's map, uint8 [n_row, row_bytes]. Raises: as `GGUFFile.data`."""
        return self._home.get(name, self._parts[0]).data(name)

    def release(self, name: str) -> None:
        """Tell the kernel that the pages of a tensor will not be needed soon. Views stay valid."""
        self._home.get(name, self._parts[0]).release(name)

    def close(self) -> None:
        """Unmap all parts. Views that are still alive stay valid."""
        for part in self._parts:
            part.close()

    def __enter__(self) -> SplitGGUF:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_split(file: GGUFFile) -> bool:
    """Is this file one part of several?"""
    count = file.metadata.get(COUNT, 0)
    return isinstance(count, int) and count > 1


def _part_paths(path: Path) -> list[Path]:
    """The paths of all parts, in order, from the name of one."""
    match = SHARD.fullmatch(path.name)
    if match is None:
        raise FileFormatError(
            f"{path.name} is a part of a split model, but its name does not say which",
            hint="restore the name, like model-00001-of-00002.gguf, beside the other parts",
        )
    count = int(match["count"])
    if not 1 <= int(match["no"]) <= count:
        raise FileFormatError(f"{path.name}: part {int(match['no'])} of {count} cannot be", hint="restore the file's name")
    paths = [path.with_name(f"{match['stem']}-{i:05d}-of-{match['count']}{path.suffix}") for i in range(1, count + 1)]
    for p in paths:
        if not p.is_file():
            raise FileFormatError(f"{p.name} is missing: part {paths.index(p) + 1} of {count}", hint=_FETCH)
    return paths


def _check_part(part: GGUFFile, first: GGUFFile, index: int, count: int) -> None:
    """A part must be the one that its name says, of the same model as the first."""
    name, meta = part.path.name, part.metadata
    if meta.get(COUNT) != count:
        raise FileFormatError(f"{name}: {COUNT} is {meta.get(COUNT)}; its name says {count}", hint=_FETCH)
    if meta.get(NO) != index:
        raise FileFormatError(f"{name}: {NO} is {meta.get(NO)}; expected {index}", hint=_FETCH)
    if meta.get(TENSORS) != first.metadata.get(TENSORS):
        found, expected = meta.get(TENSORS), first.metadata.get(TENSORS)
        raise FileFormatError(f"{name}: {TENSORS} is {found}, but {expected} in {first.path.name}: another model's", hint=_FETCH)
    for key in _ALIKE:
        if key in meta and meta[key] != first.metadata.get(key):
            raise FileFormatError(f"{name}: {key} is {meta[key]!r}, unlike {first.path.name}: another model's", hint=_FETCH)


def _homes(parts: Sequence[GGUFFile]) -> dict[str, GGUFFile]:
    """Each tensor's part. No tensor is in two, and together they are as many as the first part promises."""
    home: dict[str, GGUFFile] = {}
    for part in parts:
        for name in part.tensors:
            if name in home:
                raise FileFormatError(f"tensor {name} is in {home[name].path.name} and in {part.path.name}", hint=_FETCH)
            home[name] = part
    promised = parts[0].metadata.get(TENSORS)
    if promised is not None and promised != len(home):
        raise FileFormatError(
            f"{parts[0].path.name} promises {promised} tensors; the {len(parts)} parts hold {len(home)}", hint=_FETCH
        )
    return home
