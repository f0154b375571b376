"""`vkllm import`: a model file with its tensors in other types, read and written a slab of rows at a time.

Several slabs are quantized at once, and only as many as there are workers wait to be written: memory stays small, however
large the model. The result replaces nothing before it is complete.
"""

from __future__ import annotations

import glob
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from vkllm.errors import FileFormatError, UnsupportedQuantError
from vkllm.files.model_file import ModelFile, TensorInfo
from vkllm.files.split import SHARD
from vkllm.files.types import TYPES
from vkllm.files.writer import GGUFWriter, raw_metadata
from vkllm.quantize import TARGETS, quantize
from vkllm.quantize.mixes import FLOATS, NUMBERS, FileType, Model, choose_types, may_quantize

SLAB_WEIGHTS = 1 << 17  # a worker's share: its arrays stay in the cache of a core
RELEASE_BYTES = 32 << 20  # of a large tensor's pages stay mapped
QUANTIZATION_VERSION = 2  # of ggml's block formats

Slab = NDArray[np.uint8]
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import made: sizes in bytes, how many tensors have each type, and those that could not have their mix's type."""

    path: str
    file_type: str
    source_bytes: int
    file_bytes: int
    bits_per_weight: float
    types: dict[str, int]
    fallbacks: tuple[str, ...]
    requantized: int


@dataclass(frozen=True, slots=True)
class Plan:
    """An import that can be carried out: the type of each tensor, in the order of the file."""

    source: ModelFile
    target: FileType
    types: Mapping[str, str]

    @classmethod
    def of(cls, source: ModelFile, target: FileType, *, allow_requantize: bool = False) -> Plan:
        """Raises: UnsupportedQuantError: the source is quantized already, or holds what cannot be read; ConfigError."""
        plan = cls(source, target, choose_types(source.tensors, Model.from_metadata(source.metadata), target))
        again = plan.requantized
        if again and not allow_requantize:
            raise UnsupportedQuantError(
                f"{again[0]} is {source.tensors[again[0]].type} already; quantizing it again loses more than from the original",
                hint="give the F16, BF16 or F32 file, or --allow-requantize",
            )
        return plan

    @property
    def requantized(self) -> list[str]:
        """Tensors that change from one quantized type to another."""
        tensors = self.source.tensors
        return [name for name, kind in self.types.items() if tensors[name].type not in (*FLOATS, kind)]

    @property
    def fallbacks(self) -> list[str]:
        """Matrices whose rows are no whole blocks of what the mix wants for them."""
        size = TYPES[self.target.base].block_size
        tensors = (self.source.tensors[name] for name in self.types)
        return [t.name for t in tensors if may_quantize(t) and t.shape[-1] % size]

    def layout(self) -> list[tuple[str, tuple[int, ...], str]]:
        return [(name, self.source.tensors[name].shape, kind) for name, kind in self.types.items()]

    def metadata(self) -> dict[str, object]:
        """The source's, with the file's type; a split file becomes one. A GGUF source's values are copied as they stand."""
        files = _files(self.source)
        pairs: dict[str, object] = {**raw_metadata(files[0])} if self.source.path.is_file() else dict(self.source.metadata)
        added = {"general.quantization_version": QUANTIZATION_VERSION, "general.file_type": self.target.id}
        return {key: value for key, value in pairs.items() if key not in added and not key.startswith("split.")} | added


def write_model(plan: Plan, out: Path, *, force: bool = False, threads: int = 0, advance: Advance = lambda _: None) -> Imported:
    """Carry the plan out. `advance` hears how many bytes of the source were read; `threads` 0: one a CPU.

    Raises: FileFormatError: the target is the source, is there already, has no space, or a tensor holds NaN or infinity;
        UnsupportedQuantError: weights too large for their type. Nothing is left behind then.
    """
    source = plan.source
    if out.exists() and any(out.samefile(file) for file in _files(source)):
        raise FileFormatError(f"{out} belongs to the source itself", hint="give another name")
    writer = GGUFWriter(out, plan.metadata(), plan.layout(), force=force)
    with writer:
        pool = ThreadPoolExecutor(threads or os.cpu_count() or 1)
        try:
            for slab, read in _in_order(pool, plan):
                writer.write(slab)
                advance(read)
        finally:
            pool.shutdown(cancel_futures=True)
    n_weight = sum(int(np.prod(t.shape)) for t in source.tensors.values())
    return Imported(
        path=str(out),
        file_type=plan.target.name,
        source_bytes=sum(t.nbytes for t in source.tensors.values()),
        file_bytes=writer.nbytes,
        bits_per_weight=8 * writer.nbytes / n_weight,
        types=dict(Counter(plan.types.values())),
        fallbacks=tuple(plan.fallbacks),
        requantized=len(plan.requantized),
    )


def _files(source: ModelFile) -> list[Path]:
    """All files of a model, of a split one in order."""
    path = source.path
    if path.is_dir():
        return sorted(path.iterdir())
    part = SHARD.fullmatch(path.name)
    return sorted(path.parent.glob(f"{glob.escape(part['stem'])}-*-of-{part['count']}.gguf")) if part else [path]


def _in_order(pool: ThreadPoolExecutor, plan: Plan) -> Iterator[tuple[Slab, int]]:
    """Every slab of the target in the order of the file, and how many bytes of the source it took."""
    waiting: deque[tuple[Future[Slab], int]] = deque()
    most = 2 * pool._max_workers
    for name, kind in plan.types.items():
        info, data = plan.source.tensors[name], plan.source.data(name)
        step = max(1, SLAB_WEIGHTS // info.shape[-1])
        per_release = max(1, RELEASE_BYTES // (step * data.shape[1]))
        for i, first in enumerate(range(0, len(data), step)):
            rows = data[first : first + step]
            waiting.append((pool.submit(_converted, rows, info, kind), rows.nbytes))
            if len(waiting) >= most:
                future, read = waiting.popleft()
                yield future.result(), read
            if i % per_release == per_release - 1:
                plan.source.release(name)
        plan.source.release(name)
    while waiting:
        future, read = waiting.popleft()
        yield future.result(), read


def _converted(rows: Slab, info: TensorInfo, kind: str) -> Slab:
    """Rows of a tensor in another type; in the same one, only looked at."""
    if kind in NUMBERS:
        return rows
    values = _floats(rows, info.type)
    if kind == info.type or kind not in TARGETS:
        if not np.isfinite(values).all():
            raise FileFormatError(f"{info.name} holds NaN or infinity", hint="the file is damaged: download or convert it again")
        return rows
    return quantize(values, kind, info.name)


def _floats(rows: Slab, kind: str) -> NDArray[np.float32]:
    """Rows of any type as f32 [n_row, n_col]."""
    if kind == "F32":
        return rows.view("<f4")
    if kind == "F16":
        return rows.view("<f2").astype(np.float32)
    return np.asarray(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind]), np.float32)
