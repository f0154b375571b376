"""Weights on their way to the device: which matrices are packed together, in which row order, and the upload itself.

A file's blocks are the interchange format. At load each matrix is repacked for the device's schedule, slab by slab, straight into
device memory where it is mapped, through a bounded buffer where it is not; the file's pages are dropped once they are packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from vkllm.files.gguf import GGUFFile
from vkllm.plan import Part
from vkllm.vk import Buffer, Device
from vkllm_shaders.formats import Layout, pack, pack_vector, packed_nbytes

SLAB_BYTES = 16 << 20  # of packed weights at a time: what a device without mapped memory stages


@dataclass(frozen=True, eq=False)
class Matrix:
    """One packed buffer: the rows of one or more weights of equal type, reordered for a kernel's epilogue.

    `order` [n_group * rows a group] gives for each packed row its row in the concatenated parts, or -1 for padding.
    """

    name: str
    parts: tuple[Part, ...]
    fmt: str
    layout: Layout
    order: NDArray[np.int64]

    @property
    def n_col(self) -> int:
        return self.parts[0].n_col

    @property
    def n_row(self) -> int:
        return sum(part.n_row for part in self.parts)

    @property
    def n_group(self) -> int:
        """Row groups: workgroups of one dispatch over the whole matrix."""
        return len(self.order) // self.layout.group_rows

    @property
    def nbytes(self) -> int:
        return packed_nbytes(self.fmt, len(self.order), self.n_col, self.layout)

    def bias(self, vectors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32] | None:
        """The parts' biases in packed row order, zero where there is none; None when no part has one."""
        if not any(part.bias for part in self.parts):
            return None
        rows = np.concatenate([vectors[p.bias] if p.bias else np.zeros(p.n_row, np.float32) for p in self.parts])
        return pack_vector(rows, self.order)


def load_weights(device: Device, file: GGUFFile, matrices: Sequence[Matrix], *, progress: bool) -> dict[str, Buffer]:
    """Pack and upload all matrices. Returns a buffer for each, by name.

    Raises: OutOfDeviceMemoryError.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )
    buffers: dict[str, Buffer] = {}
    with bar, ThreadPoolExecutor(2) as pool:
        task = bar.add_task("loading", total=sum(m.nbytes for m in matrices))
        for matrix in matrices:
            buffers[matrix.name] = device.buffer(matrix.nbytes, name=matrix.name)
        for done in pool.map(lambda m: upload(file, m, buffers[m.name]), matrices):
            bar.advance(task, done)
    return buffers


def upload(file: GGUFFile, matrix: Matrix, buffer: Buffer) -> int:
    """Pack one matrix into its buffer: in place where it is mapped, else slab by slab. Returns its bytes."""
    parts, layout = [file.data(part.weight) for part in matrix.parts], matrix.layout
    group_bytes = matrix.nbytes // matrix.n_group
    step = matrix.n_group if buffer.mapped else max(1, SLAB_BYTES // group_bytes)
    slab = buffer.view() if buffer.mapped else np.empty(step * group_bytes, np.uint8)
    for first in range(0, matrix.n_group, step):
        order = matrix.order[first * layout.group_rows : (first + step) * layout.group_rows]
        used = slab[: len(order) // layout.group_rows * group_bytes]
        pack(matrix.fmt, parts, matrix.n_col, layout, used, order, threads=1)
        if not buffer.mapped:
            buffer.write(used, offset=first * group_bytes)
    for part in matrix.parts:
        file.release(part.weight)
    return matrix.nbytes
