"""What `vkllm tune` has found, on disk: the choices for a device, its driver, this version of the kernels, and a model's shapes.

Whatever is missing, damaged or was found by another version is as if nothing had been tuned: the defaults of the device's class.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from vkllm.kernel_cache import KernelCache
from vkllm.plan import Embed, Graph, Linear, parts_of
from vkllm.vk import DeviceInfo, DeviceLimits, cache
from vkllm_shaders.formats import CODED, Layout
from vkllm_shaders.records import LANES

MAX_FLOAT_TILE = 4  # tokens of a tile of f32 products on lavapipe: more need more registers than there are
COST_OF_GROUPS = {4: 1.0, 2: 1.13, 1: 1.3}  # of a row group, by how many share their x (bench/LOG.md)
MAX_DRIVER_THREADS = 16  # llvmpipe's LP_MAX_THREADS


def driver_threads() -> int:
    """Threads of lavapipe: a core each, if LP_NUM_THREADS does not say otherwise (0: the one that asks)."""
    told = os.environ.get("LP_NUM_THREADS", "")
    return min(max(1, int(told) if told.isdecimal() else len(os.sched_getaffinity(0))), MAX_DRIVER_THREADS)


@dataclass(frozen=True, slots=True)
class Shape:
    """One matrix of a model: its ggml type, rows and columns. `gather`: only a prompt's last token is multiplied with it."""

    fmt: str
    n_row: int
    n_col: int
    gather: bool = False


@dataclass(frozen=True, slots=True)
class Choices:
    """How kernels are made where several ways give the same results.

    `rows`: of a matrix, that a lane owns. `tile`: tokens a workgroup in prefill. `side_by_side`: row groups of an integer product
    that a workgroup takes together in decode, where there are enough of them. `attention_tile`: positions a turn (0: one a lane).
    `split`: positions a workgroup of split attention. `dequantize`: where a GPU's products of many tokens do that: in "shared"
    memory, once a workgroup (a tiled GEMM, on cooperative matrices where there are any), or each subgroup in its registers.
    `lanes`: subgroup size, where a device has several (0: its usual one). `dispatches`: what a dispatch of a decode step does, an
    op or as much of a "layer" as one kernel can (vkllm/persistent.py). `activations`: what "auto" means for this model.
    """

    rows: int = 4
    tile: int = 4
    side_by_side: int = 4
    attention_tile: int = 0
    split: int = 512
    dequantize: Literal["shared", "registers"] = "shared"
    lanes: int = 0
    dispatches: Literal["op", "layer"] = "op"
    activations: Literal["f32", "int8"] = "f32"

    def layout(self, fmt: str, lane_row: bool, lanes: int, integers: bool) -> Layout:
        """Where the weights of a type lie, `integers`: with activations in 8 bits."""
        if not lane_row:
            return Layout("lane_chunk", 1, self.rows)
        return Layout("lane_pair") if integers and fmt in CODED and lanes == LANES else Layout("lane_row", lanes, self.rows)

    def tile_of(self, layout: Layout, n_row: int, wide: bool = False) -> int:
        """Tokens a workgroup of a matrix product, for a bucket of rows: a power of two. Wide products are so much shorter that
        twice the tokens still fit the instruction caches."""
        best = min(self.tile, MAX_FLOAT_TILE) if layout.kind == "lane_row" else min(16, 2 * self.tile) if wide else self.tile
        return min(best, 1 << (n_row - 1).bit_length()) if layout.kind == "lane_pair" or n_row <= 2 else best

    def groups_of(self, fmt: str, layout: Layout, tile: int, n_group: int, at_least: int = 1) -> int:
        """Row groups, of `n_group`, that an integer product takes together. In tiles of tokens two, where the code stays small
        enough; else as many as let the busiest of the driver's threads, which share out workgroups evenly, finish first."""
        if layout.kind != "lane_pair":
            return 1
        if tile > 1:
            return min(2, self.side_by_side) if tile == 2 else 2 if CODED[fmt].bits in (4, 5) else 1
        counts = [n for n in COST_OF_GROUPS if at_least <= n <= max(at_least, self.side_by_side)]
        return min(counts, key=lambda n: -(-n_group // (n * driver_threads())) * n * COST_OF_GROUPS[n])


def multiplies_wide(fmt: str, layout: Layout, n_row: int, limits: DeviceLimits) -> bool:
    """Do integer products take four rows at once? In tiles, where vectors of 64 bits cost no more than twice those of 32."""
    return layout.kind == "lane_pair" and n_row > 1 and CODED[fmt].fits_wide and "int64_vectors" in limits.features


ALLOWED: dict[str, tuple[object, ...]] = {
    "rows": (2, 4, 8),
    "tile": (2, 4, 8, 16),
    "side_by_side": (1, 2, 4),
    "attention_tile": (0, 8, 16, 32, 64),
    "split": (128, 256, 512, 1024, 2048),
    "dequantize": ("shared", "registers"),
    "lanes": (0, 4, 8, 16, 32, 64, 128),
    "dispatches": ("op", "layer"),
    "activations": ("f32", "int8"),
}


def subgroup_sizes(limits: DeviceLimits) -> tuple[int, ...]:
    """The subgroup sizes that a kernel may ask for: none where the device has only one."""
    if limits.min_subgroup_size == limits.max_subgroup_size or "subgroup_size_control" not in limits.features:
        return ()
    return tuple(n for n in ALLOWED["lanes"] if isinstance(n, int) and limits.min_subgroup_size <= n <= limits.max_subgroup_size)


def default_choices(lane_row: bool) -> Choices:
    """What was measured to be good for a class of devices: lane_row is for CPUs."""
    return Choices(tile=8, dispatches="layer", activations="int8") if lane_row else Choices()


def product_shapes(graph: Graph, types: Mapping[str, str]) -> Counter[Shape]:
    """The matrices of a model's products by shape, and how many there are; of experts, as many as a token uses.

    `types`: a weight's type on the device, by name.
    """
    shapes: Counter[Shape] = Counter()
    for op in graph.ops:
        gather = isinstance(op, Linear) and op.gather
        for part in () if isinstance(op, Embed) else parts_of(op):
            n = graph.config.n_expert_used if part.n_expert else 1
            shapes[Shape(types[part.weight], part.n_row, part.n_col, gather)] += n
    return shapes


def path(device: DeviceInfo, shapes: Iterable[Shape], folder: Path | None = None) -> Path:
    """The file of a device and a model's shapes. Its name holds driver version and subgroup size, and a hash of the kernels'
    sources, of the driver's build and of the shapes."""
    known = f"{device.name}|{device.driver_name}|{device.driver_info}|{device.vendor_id}|{device.device_id}"
    listed = sorted({(s.fmt, s.n_row, s.n_col, s.gather) for s in shapes})
    digest = hashlib.sha256(f"{known}|{KernelCache(folder).folder.name}|{listed}".encode()).hexdigest()[:24]
    return (folder or cache.directory()) / f"tuned-{device.driver_version:08x}-s{device.limits.subgroup_size}-{digest}.json"


def save(choices: Choices, device: DeviceInfo, shapes: Iterable[Shape], folder: Path | None = None) -> Path:
    """Keep the choices. A folder that cannot be written is no error. Returns the file."""
    file = path(device, shapes, folder)
    cache.replace(file, json.dumps(asdict(choices)).encode())
    return file


def tuned(device: DeviceInfo, shapes: Iterable[Shape], lane_row: bool, folder: Path | None = None) -> Choices:
    """What was found for this device and these shapes; the defaults where nothing was, or what was is not valid."""
    try:
        found = json.loads(path(device, shapes, folder).read_text())
        names = {field.name for field in fields(Choices)}
        if set(found) == names and all(_is_allowed(name, found[name]) for name in names):
            choices = Choices(**found)
            lanes = choices.lanes or device.limits.subgroup_size
            if choices.attention_tile % lanes == 0 and lanes in (device.limits.subgroup_size, *subgroup_sizes(device.limits)):
                return choices
    except (OSError, ValueError, TypeError):
        pass
    return default_choices(lane_row)


def _is_allowed(name: str, value: object) -> bool:
    return not isinstance(value, bool | float) and value in ALLOWED[name]
