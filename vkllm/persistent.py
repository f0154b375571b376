"""A layer in one dispatch, where waking threads up costs more than the work between two barriers: on CPUs.

`merged` puts the dispatches of each layer that follow one another into persistent kernels (see vkllm_codegen.persistent), and
`Patience` says for how long to do without them after one was given up.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from vkllm.kernel_cache import CompiledKernel, KernelCache, Recipe
from vkllm.schedule import Barrier, Dispatch, order
from vkllm.vk import DeviceLimits
from vkllm_codegen import Binding, Kernel
from vkllm_codegen.persistent import COUNTERS, Stage, persistent

SYNC = "sync"  # the buffer that persistent kernels count in
MAX_TURNS = 40_000  # of a workgroup's loops, beside those that wait: lavapipe ends all loops after 65,535 together
LAYER_BUFFERS = {"storage": 16, "texel": 20}  # what a layer of a dense model binds, and some more
PUSH_FORMATS = {"u32": "I", "i32": "i", "f32": "f"}


@dataclass(frozen=True)
class Part:
    """A dispatch as a part of a persistent kernel, as vkllm_codegen's Stage. Its repr tells kernels apart."""

    recipe: Recipe
    groups: tuple[int, int, int]
    push: tuple[tuple[str, int | float], ...]
    bindings: tuple[int, ...]
    waits: bool


def layer(bindings: tuple[Binding, ...], parts: tuple[Part, ...]) -> Kernel:
    """The persistent kernel of some parts."""
    stages = [Stage(part.recipe.make(), part.groups, dict(part.push), part.bindings, part.waits) for part in parts]
    return persistent(f"persistent{len(parts)}_{stages[0].kernel.name}", {b.name: b for b in bindings}, stages)


def holds_a_layer(limits: DeviceLimits) -> bool:
    """Can a kernel bind as many buffers as a layer has?"""
    return limits.max_storage_buffers >= LAYER_BUFFERS["storage"] and limits.max_texel_buffers >= LAYER_BUFFERS["texel"]


@dataclass(frozen=True, slots=True)
class Merged:
    """Dispatches, some of them of persistent kernels; n_sync: elements (u32) of the buffer that they count in, 0 for none."""

    dispatches: list[Dispatch]
    n_sync: int


def merged(dispatches: Iterable[Dispatch], kernels: KernelCache, n_workgroup: int, limits: DeviceLimits) -> Merged:
    """The same work, in fewer dispatches where they belong to one layer. n_workgroup: how many run at the same time."""
    found, n_sync = list[Dispatch](), COUNTERS
    for run in _runs(dispatches, n_workgroup, limits):
        if len(run) == 1:
            found += run
            continue
        waits = _waits(run)
        found.append(_one(run, waits, kernels, n_workgroup, n_sync))
        n_sync += sum(waits)
    return Merged(found, n_sync if n_sync > COUNTERS else 0)


def _runs(dispatches: Iterable[Dispatch], n_workgroup: int, limits: DeviceLimits) -> Iterator[list[Dispatch]]:
    """Neighbours that fit into one kernel."""
    run: list[Dispatch] = []
    for dispatch in dispatches:
        if run and not _fit([*run, dispatch], n_workgroup, limits):
            yield run
            run = []
        run.append(dispatch)
    if run:
        yield run


def _fit(run: Sequence[Dispatch], n_workgroup: int, limits: DeviceLimits) -> bool:
    """Do dispatches make one persistent kernel?"""
    layers = {_layer(d) for d in run}
    if len(layers) > 1 or None in layers or any(d.kernel.stage_size != limits.subgroup_size for d in run):
        return False
    turns = 0
    for d in run:
        if d.turns is None:
            return False
        x, y, z = d.groups
        turns += -(-x * y * z // n_workgroup) * (d.turns + 1)
    kinds = [b.kind for b in _bindings(run).values()]
    storage, texels = kinds.count("storage") + 1, kinds.count("texel")
    return turns <= MAX_TURNS and storage <= limits.max_storage_buffers and texels <= limits.max_texel_buffers


def _layer(dispatch: Dispatch) -> str | None:
    """The layer of a dispatch's op: "blk.3"."""
    name, _, rest = dispatch.op.partition(".")
    return f"{name}.{rest.partition('.')[0]}" if name == "blk" else None


def _bindings(run: Sequence[Dispatch]) -> dict[tuple[str, str, str], Binding]:
    """One binding for each way in which a buffer is seen (see _places)."""
    found: dict[tuple[str, str, str], Binding] = {}
    written = {name for d in run for name in d.writes}
    for d in run:
        for key, b in zip(_places(d), d.kernel.bindings, strict=True):
            known = found.get(key) or Binding(f"b{len(found)}_{b.name}", b.kind, b.dtype, b.access, (), key[0] in written)
            found[key] = known if known.access == b.access else replace(known, access="readwrite")
    return found


def _places(dispatch: Dispatch) -> list[tuple[str, str, str]]:
    """Of each of its bindings the buffer's name, the kind and the element type."""
    return [(name, b.kind, repr(b.dtype)) for name, b in zip(dispatch.buffers, dispatch.kernel.bindings, strict=True)]


def _waits(run: Sequence[Dispatch]) -> list[bool]:
    """Of each dispatch: must those before it be finished?"""
    steps = order(run)
    return [isinstance(before, Barrier) for before, step in pairwise([None, *steps]) if isinstance(step, Dispatch)]


def _one(run: Sequence[Dispatch], waits: Sequence[bool], kernels: KernelCache, n_workgroup: int, counter: int) -> Dispatch:
    """A persistent kernel in place of some dispatches."""
    bindings, parts = _bindings(run), []
    places = list(bindings)
    for d, wait in zip(run, waits, strict=True):
        assert d.kernel.recipe is not None
        own = tuple(places.index(place) for place in _places(d))
        parts.append(Part(d.kernel.recipe, d.groups, _push_of(d.kernel, d.push), own, wait))
    kernel = kernels.get(layer, tuple(bindings.values()), tuple(parts))
    buffers = (*(name for name, _, _ in places), SYNC)
    op, push = _layer(run[0]), kernel.pack_push(counter=counter)
    assert op is not None
    return Dispatch(op, kernel, buffers, push, (n_workgroup, 1, 1), sum(d.cost_us for d in run))


def _push_of(kernel: CompiledKernel, data: bytes) -> tuple[tuple[str, int | float], ...]:
    """The values of push constants, by name."""
    return tuple((name, *struct.unpack_from(f"<{PUSH_FORMATS[repr(t)]}", data, offset)) for name, t, offset in kernel.push)


class Patience:
    """After a persistent kernel was given up, so many steps go without: twice as many each time, until a while goes well."""

    SHORTEST, LONGEST, WHILE = 8, 4096, 256

    def __init__(self) -> None:
        self._next, self._left, self._well = self.SHORTEST, 0, 0

    def ready(self) -> bool:
        """May the next step use them?"""
        self._left = max(0, self._left - 1)
        return self._left == 0

    def told(self, gave_up: bool) -> None:
        """What became of a step that did."""
        if gave_up:
            self._left, self._next, self._well = self._next, min(2 * self._next, self.LONGEST), 0
            return
        self._well += 1
        if self._well >= self.WHILE:
            self._next = self.SHORTEST
