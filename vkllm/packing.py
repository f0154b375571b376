"""Weights on their way to the device: which matrices are packed together, in which row order, and the upload itself.

A file's blocks are the interchange format. At load each matrix is repacked for the device's schedule, slab by slab, straight into
device memory where it is mapped, through a bounded buffer where it is not; the file's pages are dropped once they are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Thread

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from vkllm.expand import SLAB_WEIGHTS, expand_rows
from vkllm.files.model_file import ModelFile
from vkllm.packed_cache import PackedCache, PackedMap, PackedWriter
from vkllm.plan import Part
from vkllm.vk import Buffer, Device
from vkllm_shaders.formats import FORMATS, Layout, coded_of, pack, pack_vector, packed_nbytes

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
    def n_chunk(self) -> int:
        """Chunks of a row."""
        return (coded_of(self.fmt) if self.layout.kind == "lane_pair" else FORMATS[self.fmt]).n_chunk(self.n_col)

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


def load_weights(
    device: Device, file: ModelFile, matrices: Sequence[Matrix], *, progress: bool, cached: bool = False
) -> dict[str, Buffer]:
    """A buffer for each matrix, by name: from the cache of packed weights where it has them (`cached`), else packed and uploaded.

    Raises: OutOfDeviceMemoryError.
    """
    cache = PackedCache.of(file, matrices) if cached else None
    if cache is not None and (packed := cache.open()) is not None:
        if device.limits.unified_memory:
            packed.fetch()
        return {matrix.name: _from_cache(device, packed, matrix) for matrix in matrices}
    writer = cache.writer() if cache is not None else None
    try:
        buffers = _pack_all(device, file, matrices, writer, progress=progress)
    except BaseException:
        if writer:
            writer.discard()
        raise
    if writer:  # views outlive the model, and the thread is no daemon: a short run, too, writes the file to its end
        views = {m.name: buffers[m.name].view()[: m.nbytes] for m in matrices if _reads_back(device, buffers[m.name])}
        Thread(target=_write_cache, args=(writer, views), name="keep packed weights").start()
    return buffers


def _from_cache(device: Device, packed: PackedMap, matrix: Matrix) -> Buffer:
    """A matrix used where it is mapped, on devices that share the host's memory; else copied, slab by slab."""
    if device.limits.unified_memory:
        imported = device.import_buffer(packed.pages(matrix.name), matrix.nbytes, matrix.name)
        if imported is not None:
            return imported
    buffer = device.buffer(matrix.nbytes, name=matrix.name)
    for offset, slab in packed.slabs(matrix.name):
        buffer.write(slab, offset)
    return buffer


def _reads_back(device: Device, buffer: Buffer) -> bool:
    """Is a mapped buffer as quick to read as host memory? On a discrete device it is not."""
    return buffer.mapped and device.limits.unified_memory


def _write_cache(writer: PackedWriter, views: Mapping[str, NDArray[np.uint8]]) -> None:
    """What was not written while it was packed, beside the first steps of the model; then the file is whole."""
    for name, view in views.items():
        writer.write(name, 0, view)
    writer.publish()


def _pack_all(
    device: Device, file: ModelFile, matrices: Sequence[Matrix], writer: PackedWriter | None, *, progress: bool
) -> dict[str, Buffer]:
    """Pack and upload all matrices; what will not be read back goes to the `writer` on the way."""
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
        tees = {m.name: None if _reads_back(device, buffers[m.name]) else writer for m in matrices}
        for _ in pool.map(lambda m: upload(file, m, buffers[m.name], lambda n: bar.advance(task, n), tees[m.name]), matrices):
            pass
    return buffers


def upload(
    file: ModelFile, matrix: Matrix, buffer: Buffer, advance: Callable[[int], object], tee: PackedWriter | None = None
) -> None:
    """Pack one matrix into its buffer, slab by slab, in place where it is mapped and nobody else wants it (`tee`).

    `advance` hears of each slab's bytes.
    """
    parts, layout = [file.data(part.weight)[part.rows] for part in matrix.parts], matrix.layout
    kinds = [file.tensors[part.weight].type for part in matrix.parts]
    expands = any(kind != matrix.fmt for kind in kinds)
    group_bytes = matrix.nbytes // matrix.n_group
    step = max(1, SLAB_WEIGHTS // (layout.group_rows * matrix.n_col) if expands else SLAB_BYTES // group_bytes)
    mapped = buffer.view() if buffer.mapped and tee is None else None
    staged = np.empty(0 if mapped is not None else min(step, matrix.n_group) * group_bytes, np.uint8)
    for first in range(0, matrix.n_group, step):
        order = matrix.order[first * layout.group_rows : (first + step) * layout.group_rows]
        start, size = first * group_bytes, len(order) // layout.group_rows * group_bytes
        used = staged[:size] if mapped is None else mapped[start : start + size]
        rows, order = expand_rows(parts, kinds, order) if expands else (parts, order)
        pack(matrix.fmt, rows, matrix.n_col, layout, used, order, threads=1)
        if mapped is None:
            buffer.write(used, offset=start)
        if tee is not None:
            tee.write(matrix.name, start, used)
        advance(size)
    for part in matrix.parts:
        file.release(part.weight)
