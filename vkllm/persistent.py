"""A layer in one dispatch, where waking threads up costs more than the work between two barriers: on CPUs.

`merged` puts the dispatches of each layer that follow one another into persistent kernels (see vkllm_codegen.persistent), one for
all layers that have most of their stages in common; `Patience` says for how long to do without them after one was given up.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cached_property
from itertools import groupby, pairwise

from vkllm.kernel_cache import CompiledKernel, KernelCache, Recipe
from vkllm.schedule import Barrier, Dispatch, order
from vkllm.vk import DeviceLimits
from vkllm_codegen import Binding, Kernel
from vkllm_codegen.persistent import COUNTERS, MAX_STAGES, Stage, persistent

SYNC = "sync"  # the buffer that persistent kernels count in
MAX_TURNS = 40_000  # of a workgroup's loops, beside those that wait: lavapipe ends all loops after 65,535 together
LAYER_BUFFERS = {"storage": 16, "texel": 20}  # what a layer of a dense model binds, and some more
PUSH_FORMATS = {"u32": "I", "i32": "i", "f32": "f"}

Run = tuple[Dispatch, ...]  # of one layer, one after the other
View = tuple[str, str, str]  # how a kernel sees a buffer: its name, kind and element type


@dataclass(frozen=True)
class Part:
    """A dispatch as a part of a persistent kernel, as vkllm_codegen's Stage. Its repr tells kernels apart."""

    recipe: Recipe
    groups: tuple[int, int, int]
    push: tuple[tuple[str, int | float], ...]
    bindings: tuple[int, ...]
    waits: bool
    optional: bool


def layer(bindings: tuple[Binding, ...], parts: tuple[Part, ...]) -> Kernel:
    """The persistent kernel of some parts."""
    stages = [Stage(p.recipe.make(), p.groups, dict(p.push), p.bindings, p.waits, p.optional) for p in parts]
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
    runs = list(_runs(dispatches, n_workgroup, limits))
    users = Counter(name for run in runs for name in {name for d in run for name in d.buffers})
    roles = [_roles(run, users) for run in runs]
    made = {own: (family, _kernel_of(family, kernels)) for family in _families(roles, n_workgroup, limits) for own in family.runs}
    found, n_sync = list[Dispatch](), COUNTERS
    for run, own in zip(runs, roles, strict=True):
        if own not in made:
            found += run
            continue
        family, kernel = made[own]
        found.append(_one(run, own, family, kernel, n_workgroup, n_sync))
        n_sync += sum(family.waits)
    return Merged(found, n_sync if n_sync > COUNTERS else 0)


# -- which dispatches go together


def _runs(dispatches: Iterable[Dispatch], n_workgroup: int, limits: DeviceLimits) -> Iterator[Run]:
    """Neighbours that fit into one kernel."""
    for name, group in groupby(dispatches, _layer):
        rest = tuple(group)
        while rest:
            n = len(rest) if name else 1
            while n > 1 and not _fit(rest[:n], n_workgroup, limits):
                n -= 1
            yield rest[:n]
            rest = rest[n:]


def _fit(run: Run, n_workgroup: int, limits: DeviceLimits) -> bool:
    """Do dispatches make one persistent kernel?"""
    turns = 0
    for d in run:
        if d.turns is None or d.kernel.stage_size != limits.subgroup_size:
            return False
        x, y, z = d.groups
        turns += -(-x * y * z // n_workgroup) * (d.turns + 1)
    kinds = [b.kind for b in _bindings(run).values()]
    enough = kinds.count("storage") < limits.max_storage_buffers and kinds.count("texel") <= limits.max_texel_buffers  # and sync
    return turns <= MAX_TURNS and enough and len(run) <= MAX_STAGES


def _layer(dispatch: Dispatch) -> str:
    """The layer of a dispatch's op, "blk.3"; of others ""."""
    name, _, rest = dispatch.op.partition(".")
    return f"{name}.{rest.partition('.')[0]}" if name == "blk" else ""


# -- what layers have in common


def _roles(run: Run, users: Mapping[str, int]) -> Run:
    """A run with ops and buffers named by what they are to their layer: equal where layers do the same.

    `users`: of how many runs a buffer is. One that is this run's alone is called after the binding that sees it first, of which
    kernel for which op: the n-th of these.
    """
    roles: dict[str, str] = {}
    taken = Counter[str]()
    for d in run:
        for name, b in zip(d.buffers, d.kernel.bindings, strict=True):
            if name in roles:
                continue
            role = name if users[name] > 1 else f"{b.name} of {d.kernel.name} for {_of_layer(d)}"
            taken[role] += 1
            roles[name] = f"{role}, {taken[role]}"
    return tuple(replace(d, op=_of_layer(d), buffers=tuple(roles[name] for name in d.buffers)) for d in run)


def _of_layer(dispatch: Dispatch) -> str:
    """An op's name within its layer."""
    return dispatch.op.removeprefix(f"{_layer(dispatch)}.")


@dataclass(frozen=True)
class Family:
    """Runs (of roles, no two equal) that share a kernel, and the stages in which all of them are found, in their order."""

    stages: Run
    runs: tuple[Run, ...]

    @cached_property
    def waits(self) -> list[bool]:
        """Of each stage: must those before it be finished?"""
        steps = order(self.stages)
        return [isinstance(before, Barrier) for before, step in pairwise([None, *steps]) if isinstance(step, Dispatch)]

    @cached_property
    def optional(self) -> list[bool]:
        """Of each stage: does a run leave it out?"""
        found = [self.places(run) for run in self.runs]
        return [any(i not in places for places in found) for i in range(len(self.stages))]

    @cached_property
    def views(self) -> list[View]:
        """Of all its stages, as its kernel binds them."""
        return list(_bindings(self.stages))

    def places(self, run: Run) -> list[int]:
        """Which of the stages a run of the family is."""
        rest = iter(enumerate(self.stages))
        return [next(i for i, stage in rest if stage == d) for d in run]


def _families(runs: Iterable[Run], n_workgroup: int, limits: DeviceLimits) -> list[Family]:
    """The families of all runs that have more than one dispatch."""
    families: list[Family] = []
    for run in dict.fromkeys(run for run in runs if len(run) > 1):
        for i, family in enumerate(families):
            union = _union(family.stages, run)
            shared = len(family.stages) + len(run) - len(union)
            if 2 * shared >= len(run) and _kinds(run) == _kinds(family.stages) and _fit(union, n_workgroup, limits):
                families[i] = Family(union, (*family.runs, run))
                break
        else:
            families.append(Family(run, (run,)))
    return families


def _union(first: Run, second: Run) -> Run:
    """The shortest sequence that difflib finds with both in it."""
    found: list[Dispatch] = []
    for _, start, stop, other_start, other_stop in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        same = first[start:stop] == second[other_start:other_stop]
        found += first[start:stop] if same else first[start:stop] + second[other_start:other_stop]
    return tuple(found)


def _kinds(run: Run) -> set[tuple[str, str]]:
    """Kinds and element types that are bound: each run must have something to bind where it leaves a stage out."""
    return {(kind, dtype) for _, kind, dtype in _bindings(run)}


# -- the kernel and its dispatches


def _bindings(run: Run) -> dict[View, Binding]:
    """One binding for each view of a buffer."""
    found: dict[View, Binding] = {}
    written = {name for d in run for name in d.writes}
    for d in run:
        for key, b in zip(_views(d), d.kernel.bindings, strict=True):
            known = found.get(key) or Binding(f"b{len(found)}_{b.name}", b.kind, b.dtype, b.access, (), key[0] in written)
            found[key] = known if known.access == b.access else replace(known, access="readwrite")
    return found


def _views(dispatch: Dispatch) -> list[View]:
    return [(name, b.kind, repr(b.dtype)) for name, b in zip(dispatch.buffers, dispatch.kernel.bindings, strict=True)]


def _kernel_of(family: Family, kernels: KernelCache) -> CompiledKernel:
    """The persistent kernel of a family: what _bindings says, and sync."""
    parts = list[Part]()
    for d, wait, optional in zip(family.stages, family.waits, family.optional, strict=True):
        assert d.kernel.recipe is not None
        own = tuple(family.views.index(view) for view in _views(d))
        parts.append(Part(d.kernel.recipe, d.groups, _push_of(d.kernel, d.push), own, wait, optional))
    return kernels.get(layer, tuple(_bindings(family.stages).values()), tuple(parts))


def _one(run: Run, roles: Run, family: Family, kernel: CompiledKernel, n_workgroup: int, counter: int) -> Dispatch:
    """A run in one dispatch, of the kernel of its family."""
    seen = [(view, name) for role, d in zip(roles, run, strict=True) for view, name in zip(_views(role), d.buffers, strict=True)]
    names, instead = dict(seen), {view[1:]: name for view, name in seen}  # instead: of what only a stage sees that is left out
    buffers = (*(names.get(view, instead[view[1:]]) for view in family.views), SYNC)
    values = {"counter": counter, "stages": sum(1 << i for i in family.places(roles))}
    push = kernel.pack_push(**{name: values[name] for name, _, _ in kernel.push})
    return Dispatch(_layer(run[0]), kernel, buffers, push, (n_workgroup, 1, 1), sum(d.cost_us for d in run))


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
