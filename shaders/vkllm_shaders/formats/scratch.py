"""Memory that a packer's arrays use again and again: to be given fresh pages costs more than all that is done with them."""

from __future__ import annotations

import threading
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class _Kept(threading.local):
    def __init__(self) -> None:
        self.arrays: dict[str, NDArray[np.uint8]] = {}


_KEPT = _Kept()  # it goes with its thread


def scratch(name: str, shape: tuple[int, ...], dtype: DTypeLike = np.uint64) -> NDArray[Any]:
    """This thread's array of a name; whatever is left in it from the last use."""
    nbytes = prod(shape) * np.dtype(dtype).itemsize
    if name not in _KEPT.arrays or _KEPT.arrays[name].nbytes < nbytes:
        _KEPT.arrays[name] = np.empty(nbytes, np.uint8)
    return _KEPT.arrays[name][:nbytes].view(dtype).reshape(shape)
