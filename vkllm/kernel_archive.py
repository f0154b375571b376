"""The kernels that come with the package: a ZIP file. A member is a few kernels, compressed as one; an index tells which."""

from __future__ import annotations

import json
import lzma
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

INDEX = "index.json"
TOGETHER = 8  # kernels of a member: neighbours are much alike, and only one member is read for a kernel


def write(file: Path, version: str, kernels: Iterable[tuple[str, bytes]]) -> None:
    """Names and data, those next to each other that are alike; the same bytes for the same kernels. Raises: OSError."""
    index: dict[str, tuple[str, int, int]] = {}
    members: dict[str, bytes] = {}
    for i, (name, data) in enumerate(kernels):
        member = f"{i // TOGETHER}.kernels"
        before = members.get(member, b"")
        members[member] = before + data
        index[name] = (member, len(before), len(data))
    members[INDEX] = json.dumps(index).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for member, data in members.items():
            archive.writestr(zipfile.ZipInfo(member), data, zipfile.ZIP_LZMA)
        archive.comment = version.encode()


class KernelArchive:
    """An archive, if there is one of this version that is whole; else as if it were empty."""

    def __init__(self, file: Path, version: str) -> None:
        self._file, self._index = file, dict[str, Any]()
        if file.exists():
            self._index = json.loads(self._read(INDEX, version) or b"{}")

    def find(self, name: str) -> bytes | None:
        """A kernel's data."""
        if name not in self._index:
            return None
        member, start, size = self._index[name]
        data = self._read(member)
        return data[start : start + size] if data else None

    def _read(self, member: str, version: str | None = None) -> bytes | None:
        try:
            with zipfile.ZipFile(self._file) as archive:
                return archive.read(member) if version is None or archive.comment == version.encode() else None
        except (OSError, ValueError, KeyError, EOFError, lzma.LZMAError, zipfile.BadZipFile):
            return None
