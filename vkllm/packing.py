"""Weights on their way to the device: which matrices are packed together, in which row order, and the upload itself.

A file's blocks are the interchange format. At load each matrix is repacked for the device's schedule, slab by slab, straight into
device memory where it is mapped, through a bounded buffer where it is not; the file's pages are dropped once they are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from vkllm.expand import SLAB_WEIGHTS, expand_rows
from vkllm.files.model_file import ModelFile
from vkllm.plan import Part
from vkllm.vk import Buffer, Device
from vkllm_shaders.formats import Layout, pack, pack_vector, packed_nbytes

SLAB_BYTES = 16 << 20  # of packed weights at a time: what a device without mapped memory stages


@dataclass(frozen=True, eq=False)
class Matrix:
    """One packed buffer: the rows of one or more weights of equal type, reordered for a kernel's epilogue.

    `order` [n_group * rows a group] gives for each packed row its row in the concatenated parts, or -1 for padding. Experts
    follow one another, each padded to whole groups.
    """

    name: str
    parts: tuple[Part, ...]
    fmt: str
    layout: Layout
    order: NDArray[np.int64]

    @classmethod
    def of(cls, parts: tuple[Part, ...], fmt: str, layout: Layout, order: NDArray[np.int64]) -> Matrix:
        """`order`: of the parts of a single expert."""
        name = "+".join(f"{p.weight}[{p.rows.start}:{p.rows.stop}]" if p.rows_of else p.weight for p in parts)
        n_expert = parts[0].n_expert
        return cls(name, parts, fmt, layout, _for_experts(order, [p.n_row for p in parts], n_expert) if n_expert else order)

    @property
    def n_col(self) -> int:
        return self.parts[0].n_col

    @property
    def n_row(self) -> int:
        """Rows, of one expert where there are several."""
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
        rows = np.concatenate(
            [vectors[p.bias][p.rows] if p.bias else np.zeros(p.rows.stop - p.rows.start, np.float32) for p in self.parts]
        )
        return pack_vector(rows, self.order)


def _for_experts(order: NDArray[np.int64], n_rows: Sequence[int], n_expert: int) -> NDArray[np.int64]:
    """The order of all experts' rows, from that of one: part p, expert e, row r is row e * n_rows[p] + r of the part's tensor."""
    part = np.searchsorted(np.cumsum(n_rows), order, side="right").clip(max=len(n_rows) - 1)
    before = np.cumsum([0, *n_rows[:-1]])  # rows of one expert's parts before this one
    first = order + before[part] * (n_expert - 1)
    experts = np.arange(n_expert)[:, None]
    return np.where(order >= 0, first + experts * np.asarray(n_rows)[part], -1).reshape(-1)


def load_weights(device: Device, file: ModelFile, matrices: Sequence[Matrix], *, progress: bool) -> dict[str, Buffer]:
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
        for _ in pool.map(lambda m: upload(file, m, buffers[m.name], lambda n: bar.advance(task, n)), matrices):
            pass
    return buffers


def upload(file: ModelFile, matrix: Matrix, buffer: Buffer, advance: Callable[[int], object]) -> None:
    """Pack one matrix into its buffer, slab by slab, in place where it is mapped. `advance` hears of each slab's bytes."""
    parts, layout = [file.data(part.weight)[part.rows] for part in matrix.parts], matrix.layout
    kinds = [file.tensors[part.weight].type for part in matrix.parts]
    expands = any(kind != matrix.fmt for kind in kinds)
    group_bytes = matrix.nbytes // matrix.n_group
    step = max(1, SLAB_WEIGHTS // (layout.group_rows * matrix.n_col) if expands else SLAB_BYTES // group_bytes)
    mapped = buffer.view() if buffer.mapped else None
    staged = np.empty(0 if buffer.mapped else min(step, matrix.n_group) * group_bytes, np.uint8)
    for first in range(0, matrix.n_group, step):
        order = matrix.order[first * layout.group_rows : (first + step) * layout.group_rows]
        start, size = first * group_bytes, len(order) // layout.group_rows * group_bytes
        used = staged[:size] if mapped is None else mapped[start : start + size]
        rows, order = expand_rows(parts, kinds, order) if expands else (parts, order)
        pack(matrix.fmt, rows, matrix.n_col, layout, used, order, threads=1)
        if mapped is None:
            buffer.write(used, offset=start)
        advance(size)
    for part in matrix.parts:
        file.release(part.weight)
