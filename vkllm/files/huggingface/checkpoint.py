"""The weights of a Hugging Face folder: one safetensors file, or several that an index lists. Nothing outside the folder is read.

Pickle files are never opened: they can run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from vkllm.errors import FileFormatError, UnsupportedModelError
from vkllm.files.huggingface.json_file import Fields, read
from vkllm.files.huggingface.safetensors import SafetensorsFile, Stored

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
PARTIAL = ("*.incomplete", "*.part", "*.partial", "*.aria2", "*.crdownload", "*.download")
_DOWNLOADS = Path(".cache", "huggingface", "download")  # where huggingface_hub keeps what it has not finished
_FETCH = "download the folder again, all its files"


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder, which may be a link into the folder, or into the `blobs` of Hugging Face's cache.

    `folder` must be resolved. Raises: FileFormatError: the name or the link leads elsewhere.
    """
    path = folder / name
    homes = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as e:  # a loop of links, a NUL in the name
        raise FileFormatError(f"{name[:80]!r} cannot be followed: {e}", hint=_FETCH) from None
    if Path(name).is_absolute() or ".." in Path(name).parts or not any(real.is_relative_to(home) for home in homes):
        raise FileFormatError(
            f"{name[:80]!r} leads out of the folder {folder.name}", hint="only files within the folder are read: copy it there"
        )
    return path


class Checkpoint:
    """All tensors of a folder, mapped. Make one with `open`; close it after use."""

    def __init__(self, files: Mapping[str, SafetensorsFile]) -> None:
        """`files`: by their name in the folder. Raises: FileFormatError: a tensor is in two of them."""
        self._home: dict[str, SafetensorsFile] = {}
        for file in files.values():
            for name in file.tensors:
                if name in self._home:
                    raise FileFormatError(
                        f"tensor {name} is in {self._home[name].path.name} and in {file.path.name}", hint=_FETCH
                    )
                self._home[name] = file
        self._files = tuple(files.values())
        self.n_file, self.nbytes = len(self._files), sum(f.nbytes for f in self._files)
        self.tensors: Mapping[str, Stored] = MappingProxyType({name: f.tensors[name] for name, f in self._home.items()})

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Map the folder's weights. `folder` must be resolved.

        Raises: FileFormatError: no weights, a missing, damaged or half-finished file, an index that contradicts them, or a path
        that leads out of the folder; UnsupportedModelError: pickle files only.
        """
        weight_map = _weight_map(folder)
        names = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        files: dict[str, SafetensorsFile] = {}
        try:
            for name in names:
                files[name] = SafetensorsFile.open(_existing(folder, name))
            if weight_map:
                _check_index(weight_map, files)
            return cls(files)
        except BaseException:
            for file in files.values():
                file.close()
            raise

    def data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, uint8 [nbytes]: a read-only view of its file's map."""
        return self._home[name].data(name)

    def release(self, name: str) -> None:
        """Tell the kernel that the pages of a tensor will not be needed soon."""
        self._home[name].release(name)

    def close(self) -> None:
        """Unmap all files. Views that are still alive stay valid."""
        for file in self._files:
            file.close()


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor from the index; empty where there is no index. A single file wins over an index."""
    if (folder / SINGLE).exists() or not (folder / INDEX).exists():
        return {}
    entries = Fields(read(inside(folder, INDEX)), INDEX).fields("weight_map").pairs
    if not entries or not all(isinstance(file, str) and file.endswith(".safetensors") for file in entries.values()):
        raise FileFormatError(f"{INDEX}: weight_map must name a .safetensors file for each tensor", hint=_FETCH)
    return dict(entries)


def _existing(folder: Path, name: str) -> Path:
    """The path of a weight file that must be there."""
    path = inside(folder, name)
    if path.exists():
        return path
    refuse_unfinished(folder, name)
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern) if p.is_file())
    if name == SINGLE and pickles:
        raise UnsupportedModelError(
            f"{folder.name} holds pickle files ({pickles[0]}), which can run code: they are never opened",
            hint="download the model's .safetensors files, or a GGUF file",
        )
    if name == SINGLE:
        raise FileFormatError(f"{folder.name} holds neither {SINGLE} nor {INDEX}", hint=_FETCH)
    raise FileFormatError(f"{name} is missing, which {INDEX} lists", hint=_FETCH)


def refuse_unfinished(folder: Path, missing: str) -> None:
    """A file is missing: if a download was broken off, say so. Raises: FileFormatError: it was."""
    found = (p.name for place in (folder, folder / _DOWNLOADS) for pattern in PARTIAL for p in place.glob(pattern))
    partial = min(found, default="")
    if partial:
        raise FileFormatError(
            f"{missing} is missing, and {partial} is a half-finished download",
            hint="finish it: `vkllm pull` resumes where it stopped",
        )


def _check_index(weight_map: Mapping[str, str], files: Mapping[str, SafetensorsFile]) -> None:
    """Index and files name the same tensors in the same places."""
    for name, file in weight_map.items():
        if name not in files[file].tensors:
            raise FileFormatError(f"{INDEX} looks for {name} in {file}, which does not hold it", hint=_FETCH)
    for file, opened in files.items():
        extra = [name for name in opened.tensors if weight_map.get(name) != file]
        if extra:
            where = weight_map.get(extra[0])
            other = f"{INDEX} places it in {where}" if where else f"{INDEX} does not list it"
            raise FileFormatError(f"{file} holds {extra[0]}, but {other}", hint=_FETCH)
