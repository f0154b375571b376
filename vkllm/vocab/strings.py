"""Many strings in little memory: a vocabulary's 300,000 take 4 MB instead of 25."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Strings(Sequence[str]):
    """The bytes of strings, one behind the other, decoded when one is asked for. Stray bytes survive as surrogate escapes."""

    def __init__(self, data: bytes, ends: ArrayLike) -> None:
        """`ends`: where each string ends in `data`."""
        self._data = data
        self._ends: NDArray[np.unsignedinteger] = np.asarray(ends, np.min_scalar_type(len(data)))

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        """The same strings. Raises: UnicodeEncodeError: a surrogate that stands for no byte."""
        parts = [text.encode("utf-8", "surrogateescape") for text in texts]
        return cls(b"".join(parts), list(accumulate(map(len, parts))))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        i = range(len(self))[at]
        return self._decode(int(self._ends[i - 1]) if i else 0, int(self._ends[i]))

    def __iter__(self) -> Iterator[str]:
        return (self._decode(before, end) for before, end in pairwise([0, *self._ends.tolist()]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"<{len(self)} strings>"

    def find(self, wanted: Collection[str]) -> Iterator[tuple[int, str]]:
        """(place, string) of each that is `wanted`, in their order. Only strings that look like one of those are decoded."""
        if not wanted:
            return iter(())
        marks, known = self._marks(), np.sort(Strings.of(wanted)._marks())
        alike = known[np.searchsorted(known, marks).clip(max=len(known) - 1)] == marks  # np.isin imports more than it does
        return ((i, text) for i in np.flatnonzero(alike).tolist() if (text := self[i]) in wanted)

    def _decode(self, before: int, end: int) -> str:
        return self._data[before:end].decode("utf-8", "surrogateescape")

    def _marks(self) -> NDArray[np.int64]:
        """A number a string, of its length and its first, middle and last byte: equal strings have equal ones."""
        ends = self._ends.astype(np.int64)
        starts = np.concatenate([[0], ends])[:-1]
        sizes, data = ends - starts, np.frombuffer(self._data or b"\0", np.uint8)
        marks = sizes
        for at in (starts, starts + sizes // 2, ends - 1):
            marks = marks << 8 | data[at.clip(0, len(data) - 1)]
        return np.where(sizes, marks, 0)


def find(texts: Sequence[str], wanted: Collection[str]) -> Iterator[tuple[int, str]]:
    """(place, string) of each of `texts` that is `wanted`, in their order."""
    if isinstance(texts, Strings):
        return texts.find(wanted)
    return ((i, text) for i, text in enumerate(texts) if text in wanted)
