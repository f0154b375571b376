"""`vkllm tune`: tries, on the user's device, what can be chosen without changing results, and keeps what was faster.

One choice after the other, each alternative beside the best so far, until the time is up. The search knows no device: it is
given a timer and a clock. The timer runs the kernels alone, on weights of the model's shapes that no cache holds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from vkllm.config import ModelConfig
from vkllm.errors import VkllmError
from vkllm.expand import device_type
from vkllm.files.model_file import ModelFile
from vkllm.kernel_cache import compiled, pipeline_of
from vkllm.kernels import PREFILL_CPU, PREFILL_GPU, gemm_of, texel_format
from vkllm.models import build_graph
from vkllm.persistent import holds_a_layer
from vkllm.tuned import Choices, Shape, driver_threads, multiplies_wide, product_shapes, subgroup_sizes
from vkllm.vk import Binding, Buffer, Device, DeviceLimits
from vkllm_codegen import Binding as KernelBinding
from vkllm_codegen import Kernel
from vkllm_codegen.errors import KernelError
from vkllm_codegen.persistent import COUNTERS, GAVE_UP, Stage, persistent
from vkllm_shaders.attention import AttentionSpec, cache_row_nbytes, direct, partial
from vkllm_shaders.formats import FORMATS, coded_of, packed_nbytes
from vkllm_shaders.gemm import GemmSpec, gemm
from vkllm_shaders.matmul import MatmulSpec, matmul
from vkllm_shaders.records import LANES, n_group, record_nbytes

MARGIN = 0.03  # a new choice must be faster by this share: less is noise
N_DECODE, N_PROMPT = 64, 256  # tokens of the request to make fast
DEPTH = 4096
COLD_BYTES = 96 << 20  # of distinct weights in one measurement, so that none is in a cache
ONES = 0x3C  # fills weights and activations: finite, not denormal in any format
TRIES = 5

Timer = Callable[[Choices, str], float]


@dataclass(frozen=True, slots=True)
class Experiment:
    """One alternative: what was changed, and seconds before and after. `seconds` None: it cannot run here, `problem` says why."""

    axis: str
    value: object
    best: float
    seconds: float | None
    kept: bool
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The choices to keep, and the experiments in order. `finished`: the time sufficed for all."""

    choices: Choices
    experiments: tuple[Experiment, ...]
    finished: bool


def axes(lane_row: bool, limits: DeviceLimits) -> dict[str, tuple[object, ...]]:
    """What to try for each choice, the ones that matter most first. Integer products of lane_row need 8 lanes."""
    lanes = limits.subgroup_size
    integers = lanes == LANES or not lane_row
    others = () if lane_row else tuple(n for n in subgroup_sizes(limits) if n != lanes)
    return {
        **({"lanes": others} if others else {}),
        **({"activations": ("f32", "int8")} if integers else {}),
        "rows": (2, 4, 8),
        **({} if lane_row else {"dequantize": ("shared", "registers")}),
        "tile": (4, 8, 16) if integers else (2, 4),
        **({"side_by_side": (1, 2, 4)} if integers and lane_row else {}),
        **({"attention_tile": (0, 2 * lanes)} if lane_row else {"split": (256, 512, 1024)}),
        **({"dispatches": ("op", "layer")} if lane_row and driver_threads() > 1 and holds_a_layer(limits) else {}),
    }


def search(
    start: Choices,
    candidates: Mapping[str, Sequence[object]],
    timer: Timer,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    tell: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Change one choice at a time and keep what is faster by MARGIN. `timer(choices, axis)`: seconds of what `axis` concerns."""
    end, best = clock() + seconds, start
    experiments: list[Experiment] = []
    for axis, values in candidates.items():
        if clock() >= end:
            return Outcome(best, tuple(experiments), finished=False)
        fastest = timer(best, axis)
        for value in (v for v in values if v != getattr(start, axis)):
            if clock() >= end:
                return Outcome(best, tuple(experiments), finished=False)
            tell(f"{axis} {value}")
            changed = _with(best, axis, value)
            tried = _try(changed, axis, fastest, timer)
            experiments.append(tried)
            if tried.kept and tried.seconds is not None:
                best, fastest = changed, tried.seconds
    return Outcome(best, tuple(experiments), finished=True)


def _with(choices: Choices, axis: str, value: object) -> Choices:
    """The same with one choice changed."""
    return Choices(**(asdict(choices) | {axis: value}))


def _try(choices: Choices, axis: str, fastest: float, timer: Timer) -> Experiment:
    value = getattr(choices, axis)
    try:
        found = timer(choices, axis)
    except (KernelError, VkllmError) as error:
        return Experiment(axis, value, fastest, None, False, error.message)
    return Experiment(axis, value, fastest, found, found < fastest * (1 - MARGIN))


def model_shapes(file: ModelFile) -> Counter[Shape]:
    """A file's matrices by shape, as kernels see them, and how many there are."""
    graph = build_graph(ModelConfig.from_gguf(file), file.tensors)
    return product_shapes(graph, {part.weight: device_type(file.tensors[part.weight].type) for part in graph.parts()})


def product_spec(fmt: str, choices: Choices, n_row: int, n_token: int, lane_row: bool, limits: DeviceLimits) -> MatmulSpec:
    """The product of so many tokens that the engine would choose, with nothing fused."""
    lanes = choices.lanes or limits.subgroup_size
    integers = choices.activations == "int8" and bool(FORMATS[fmt].n_sub)
    layout = choices.layout(fmt, lane_row, lanes, integers)
    integers = integers and layout.kind != "lane_row"
    wide = multiplies_wide(fmt, layout, n_token, limits)
    tile = choices.tile_of(layout, n_token, wide)
    together = choices.groups_of(fmt, layout, tile, layout.n_group(n_row))
    activations: Literal["f32", "int8"] = "int8" if integers else "f32"
    return MatmulSpec(fmt, layout, tile, activations=activations, side_by_side=together, wide=wide, subgroup=lanes)


@dataclass(frozen=True)
class Use:
    """A kernel, the buffers that it needs by name and size, what it may be pushed, and its grid."""

    kernel: Kernel
    sizes: dict[str, int]
    push: Mapping[str, int | float]
    groups: tuple[int, int, int]

    @property
    def values(self) -> dict[str, int | float]:
        """What it is pushed."""
        return {name: self.push[name] for name, _, _ in self.kernel.push}

    @property
    def pushed(self) -> bytes:
        return self.kernel.pack_push(**self.values)

    def bound(self, buffers: Mapping[str, Buffer]) -> list[Binding]:
        return [Binding(buffers[b.name], format=texel_format(b)) for b in self.kernel.bindings]


def _layer(uses: Sequence[Use]) -> Kernel:
    """All of them in one persistent kernel, each with bindings of its own."""
    bindings, stages = dict[str, KernelBinding](), list[Stage]()
    for i, use in enumerate(uses):
        numbers = range(len(bindings), len(bindings) + len(use.kernel.bindings))
        bindings |= {f"{b.name}_{i}": b for b in use.kernel.bindings}
        stages.append(Stage(use.kernel, use.groups, use.values, tuple(numbers)))
    return persistent("layer", bindings, stages)


class DeviceTimer:
    """Seconds of a request's matrix products or attention on a device, for some choices: the best of TRIES runs each."""

    def __init__(self, device: Device, config: ModelConfig, shapes: Mapping[Shape, int], lane_row: bool) -> None:
        self._device, self._config, self._shapes, self._lane_row = device, config, shapes, lane_row
        self._chunk = PREFILL_CPU if lane_row else PREFILL_GPU
        self._known: dict[object, float] = {}

    def __call__(self, choices: Choices, axis: str) -> float:
        if axis in ("attention_tile", "split"):
            return self._once((axis, choices.attention_tile, choices.split, choices.lanes), lambda: self._attention(choices))
        if axis == "dispatches":
            return self._once((axis, choices), lambda: self._layers(choices))
        return sum(count * self._product(shape, choices, axis) for shape, count in self._shapes.items())

    def _lanes(self, choices: Choices) -> int:
        return choices.lanes or self._device.limits.subgroup_size

    def _product(self, shape: Shape, choices: Choices, axis: str) -> float:
        """A matrix in a whole request. Tiles and dequantization concern prefill alone, row groups side by side decode."""
        decode = 0.0 if axis in ("tile", "dequantize") else N_DECODE * self._matmul(shape, choices, 1)
        once = shape.gather or axis == "side_by_side"
        return decode + (0.0 if once else N_PROMPT / self._chunk * self._matmul(shape, choices, self._chunk))

    def _once(self, key: object, measure: Callable[[], float]) -> float:
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]

    def _matmul(self, shape: Shape, choices: Choices, n_token: int) -> float:
        spec = product_spec(shape.fmt, choices, shape.n_row, n_token, self._lane_row, self._device.limits)
        tiled = gemm_of(spec, n_token, self._device.limits, choices)
        return self._once((spec, tiled, shape, n_token), lambda: self._run_matmul(spec, tiled, shape, n_token))

    def _run_matmul(self, spec: MatmulSpec, tiled: GemmSpec | None, shape: Shape, n_token: int) -> float:
        use, nbytes = self._use(spec, tiled, shape, n_token)
        copies = max(1, min(64, COLD_BYTES // nbytes)) if n_token == 1 else 1
        return self._time(use, spec.lanes, {"w": nbytes}, copies)

    def _use(self, spec: MatmulSpec, tiled: GemmSpec | None, shape: Shape, n_token: int) -> tuple[Use, int]:
        """A matrix product, and the bytes of its matrix."""
        f, groups = coded_of(shape.fmt) if spec.from_records else FORMATS[shape.fmt], spec.layout.n_group(shape.n_row)
        n_packed = groups * spec.layout.group_rows
        nbytes, width = packed_nbytes(shape.fmt, n_packed, shape.n_col, spec.layout), -(-shape.n_col // 64) * 64
        sizes = {"x": record_nbytes(n_token, shape.n_col) if spec.from_records else 4 * n_token * width}
        sizes |= {"y": 4 * n_token * shape.n_row + 256}
        push = {"n_chunk": f.n_chunk(shape.n_col), "n_group": groups, "n_token": n_token, "n_row": shape.n_row, "first_row": 0}
        push |= {"x_stride": n_group(shape.n_col) if spec.from_records else width // 4, "y_stride": shape.n_row}
        kernel = gemm(tiled) if tiled else matmul(spec)
        return Use(kernel, sizes, push, (tiled or spec).groups(n_packed, n_token)), nbytes

    def _layers(self, choices: Choices) -> float:
        """Products of one row, a matrix of each shape, behind one another as layers are: an op or a layer in a dispatch."""
        shapes = [shape for shape in self._shapes if not shape.gather]
        specs = [product_spec(s.fmt, choices, s.n_row, 1, self._lane_row, self._device.limits) for s in shapes]
        uses = [self._use(spec, None, shape, 1) for spec, shape in zip(specs, shapes, strict=True)]
        copies = max(1, min(16, COLD_BYTES // sum(nbytes for _, nbytes in uses)))
        device, lanes = self._device, specs[0].lanes
        buffers = [
            {name: self._filled(name, nbytes) for name, nbytes in (use.sizes | {"w": matrix}).items()}
            for _ in range(copies)
            for use, matrix in uses
        ]
        sync = device.buffer(4 * (COUNTERS + copies * len(uses)), host=True, name="sync")
        plain, whole = device.recording("an op a dispatch"), device.recording("a layer a dispatch")
        try:
            for (use, _), own in zip(uses * copies, buffers, strict=True):
                plain.dispatch(pipeline_of(device, compiled(use.kernel), lanes), use.bound(own), use.groups, use.pushed)
                plain.barrier()
            layer = compiled(_layer([use for use, _ in uses]))
            for i in range(copies):
                counter, held = COUNTERS + i * len(uses), buffers[i * len(uses) : (i + 1) * len(uses)]
                bound = [binding for (use, _), own in zip(uses, held, strict=True) for binding in use.bound(own)]
                push = layer.pack_push(counter=counter, stages=0)
                whole.dispatch(pipeline_of(device, layer, lanes), [*bound, Binding(sync)], (driver_threads(), 1, 1), push)
                whole.barrier()

            def step() -> None:
                if choices.dispatches == "layer":
                    sync.write(np.zeros(sync.nbytes, np.uint8))
                    whole.run()
                    if not sync.read(4, 4 * GAVE_UP, np.uint32)[0]:
                        return
                plain.run()

            step()
            return N_DECODE * self._config.n_layer * min(_seconds(step) for _ in range(TRIES)) / copies
        finally:
            for buffer in [sync, *(b for own in buffers for b in own.values())]:
                buffer.free()

    def _attention(self, choices: Choices) -> float:
        """All layers of N_DECODE tokens at DEPTH, but for the merge of the parts."""
        c, limits = self._config, self._device.limits
        group, tile = c.n_head // c.n_kv_head, choices.attention_tile
        schedule: Any = "lane_row" if self._lane_row else "lane_chunk"
        spec = AttentionSpec(c.head_dim, group, lanes=self._lanes(choices), schedule=schedule, split=choices.split, tile=tile)
        spec = spec if self._lane_row else spec.fitted(limits.max_shared_bytes, limits.max_workgroup_invocations)
        n_split = 1 if self._lane_row else spec.n_split(DEPTH)
        kept = DEPTH * c.n_kv_head * cache_row_nbytes(c.head_dim, "f16")
        sizes = {"q": 4 * c.n_head * c.head_dim, "block_table": 4 * DEPTH, "params": 64, "sinks": 4 * c.n_head}
        sizes["out"] = max(sizes["q"], spec.scratch_nbytes(1, c.n_kv_head, n_split))
        kernel = direct(spec) if self._lane_row else partial(spec)
        push = {"n_token": 1, "n_kv_head": c.n_kv_head}
        use = Use(kernel, sizes, push, (n_split, c.n_kv_head, 1))
        return N_DECODE * c.n_layer * self._time(use, spec.lanes, {"k": kept, "v": kept}, c.n_layer)

    def _time(self, use: Use, lanes: int, own: Mapping[str, int], copies: int) -> float:
        """Seconds of a dispatch. `own`: buffers by name and size that each of the `copies` in a run has for itself."""
        device, names = self._device, {b.name for b in use.kernel.bindings}
        common = {name: self._filled(name, nbytes) for name, nbytes in use.sizes.items() if name in names}
        each = [{name: self._filled(name, nbytes) for name, nbytes in own.items()} for _ in range(copies)]
        pipeline = pipeline_of(device, compiled(use.kernel), lanes)
        recording = device.recording(use.kernel.name)
        try:
            for buffers in each:
                recording.dispatch(pipeline, use.bound(common | buffers), use.groups, use.pushed)
            recording.barrier()
            recording.finish()
            recording.run()
            return min(_seconds(recording.run) for _ in range(TRIES)) / copies
        finally:
            for buffer in [*common.values(), *(b for buffers in each for b in buffers.values())]:
                buffer.free()

    def _filled(self, name: str, nbytes: int) -> Buffer:
        buffer = self._device.buffer(-(-nbytes // 256) * 256, name=name)
        if name == "block_table":
            values = np.arange(buffer.nbytes // 4, dtype=np.uint32)
        elif name == "params":
            values = np.zeros(buffer.nbytes // 4, np.uint32)
            values[3] = DEPTH  # of attention's only row: its length
        else:
            values = np.full(buffer.nbytes // 4, ONES * 0x01010101, np.uint32)
        buffer.write(values)
        return buffer


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
