"""vkllm tune: the search with given timings and a clock of its own; what is kept, for whom, and what is not believed."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vkllm import kernels, tune
from vkllm import tuned as store
from vkllm.chain import ModelChain, Rows, Span
from vkllm.cli import app
from vkllm.config import ModelConfig, RuntimeConfig
from vkllm.files import open_model
from vkllm.kv_cache import BlockPool, BlockTable
from vkllm.models import build_graph
from vkllm.plan import Linear, Qkv
from vkllm.tune import N_DECODE, N_PROMPT, DeviceTimer, Experiment, Outcome, axes, model_shapes, product_spec, search
from vkllm.tune_cli import AXES, _show
from vkllm.tuned import ALLOWED, Choices, Shape, default_choices, path, save, tuned
from vkllm.vk import Device, NullDevice, Recording
from vkllm.vk.types import MINIMUM_LIMITS, DeviceInfo, DeviceLimits
from vkllm_codegen.errors import KernelError
from vkllm_shaders.formats import Layout

START = Choices()
SHAPES = (Shape("Q8_0", 64, 128), Shape("Q4_K", 256, 256))
DEVICE = DeviceInfo(0, "a device", "cpu", 1, 2, "driver", "build 1", 7, (1, 3, 0), b"", None, 1, 1, MINIMUM_LIMITS)


def timings(by_axis: dict[str, dict[object, float]]) -> Any:
    """A timer that takes the seconds of an axis from a table."""
    return lambda choices, axis: by_axis[axis][getattr(choices, axis)]


def test_the_fastest_of_each_is_chosen() -> None:
    timer = timings({"rows": {4: 1.0, 2: 0.8, 8: 0.5}, "tile": {4: 1.0, 2: 0.7, 8: 2.0}})
    found = search(START, {"rows": (2, 4, 8), "tile": (2, 4, 8)}, timer, 60, clock=lambda: 0.0)
    assert found.choices == replace(START, rows=8, tile=2)
    assert found.finished
    assert [(e.axis, e.value, e.best, e.seconds, e.kept) for e in found.experiments] == [
        ("rows", 2, 1.0, 0.8, True),
        ("rows", 8, 0.8, 0.5, True),
        ("tile", 2, 1.0, 0.7, True),
        ("tile", 8, 0.7, 2.0, False),
    ]


def test_what_is_hardly_faster_is_noise() -> None:
    found = search(START, {"rows": (2,)}, timings({"rows": {4: 1.0, 2: 0.98}}), 60, clock=lambda: 0.0)
    assert found.choices == START
    assert not found.experiments[0].kept


def test_later_choices_are_tried_with_earlier_winners() -> None:
    seen = []

    def timer(choices: Choices, axis: str) -> float:
        seen.append((axis, choices.rows, choices.tile))
        return 1.0 / (choices.rows * choices.tile)

    search(START, {"rows": (8,), "tile": (8,)}, timer, 60, clock=lambda: 0.0)
    assert seen == [("rows", 4, 4), ("rows", 8, 4), ("tile", 8, 4), ("tile", 8, 8)]


def test_the_search_ends_when_its_time_is_up() -> None:
    now = iter(range(100))
    found = search(START, {"rows": (2, 8), "tile": (2, 8)}, lambda *_: 1.0, 3, clock=lambda: float(next(now)))
    assert not found.finished
    assert [(e.axis, e.value) for e in found.experiments] == [("rows", 2)]
    assert search(START, {"rows": (2,)}, lambda *_: 1.0, 0, clock=lambda: 0.0).experiments == ()


def test_what_cannot_run_is_left_out_and_told() -> None:
    def timer(choices: Choices, axis: str) -> float:
        if choices.rows == 8:
            raise KernelError("too many rows", hint="")
        return 1.0

    found = search(START, {"rows": (8,)}, timer, 60, clock=lambda: 0.0)
    assert found.choices == START
    assert (found.experiments[0].seconds, found.experiments[0].problem) == (None, "too many rows")


def test_choices_come_back(tmp_path: Path) -> None:
    chosen = Choices(rows=8, tile=2, side_by_side=1, attention_tile=16, split=256, activations="int8")
    save(chosen, DEVICE, SHAPES, tmp_path)
    assert tuned(DEVICE, SHAPES, True, tmp_path) == chosen
    assert tuned(DEVICE, reversed(SHAPES), True, tmp_path) == chosen  # an order means nothing


@pytest.mark.parametrize(
    "other",
    [
        replace(DEVICE, name="another"),
        replace(DEVICE, driver_version=8),
        replace(DEVICE, driver_info="build 2"),
        replace(DEVICE, limits=replace(MINIMUM_LIMITS, subgroup_size=16)),
    ],
)
def test_another_device_or_driver_has_its_defaults(other: DeviceInfo, tmp_path: Path) -> None:
    save(Choices(rows=8), DEVICE, SHAPES, tmp_path)
    assert tuned(other, SHAPES, False, tmp_path) == default_choices(False)


def test_other_shapes_have_their_defaults(tmp_path: Path) -> None:
    save(Choices(rows=8), DEVICE, SHAPES, tmp_path)
    assert tuned(DEVICE, SHAPES[:1], False, tmp_path) == default_choices(False)


def test_another_version_of_the_kernels_has_its_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(Choices(rows=8), DEVICE, SHAPES, tmp_path)

    class Other:
        def __init__(self, folder: Path | None) -> None:
            self.folder = Path("kernels-of-another-version")

    monkeypatch.setattr(store, "KernelCache", Other)
    assert tuned(DEVICE, SHAPES, False, tmp_path) == default_choices(False)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", json.dumps({"rows": 2}), json.dumps(asdict(START) | {"more": 1})]
    + [json.dumps(asdict(START) | {name: bad}) for name in ALLOWED for bad in (3, True, 4.0, "x", None, [4])],
)
def test_a_damaged_file_is_ignored(text: str, tmp_path: Path) -> None:
    path(DEVICE, SHAPES, tmp_path).write_text(text)
    assert tuned(DEVICE, SHAPES, True, tmp_path) == default_choices(True)


def test_choices_that_cannot_run_are_ignored(tmp_path: Path) -> None:
    device = replace(DEVICE, limits=replace(MINIMUM_LIMITS, subgroup_size=32))
    save(Choices(attention_tile=8), device, SHAPES, tmp_path)
    for lane_row in (True, False):
        assert tuned(device, SHAPES, lane_row, tmp_path) == default_choices(lane_row)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    save(START, DEVICE, SHAPES, tmp_path / "file")


def limits(lanes: int, least: int = 0, most: int = 0) -> DeviceLimits:
    """Of a device with subgroups of so many lanes, or of `least` to `most` where it is asked."""
    features = MINIMUM_LIMITS.features | {"subgroup_size_control"}
    sizes = {"subgroup_size": lanes, "min_subgroup_size": least or lanes, "max_subgroup_size": most or lanes}
    return replace(MINIMUM_LIMITS, features=features, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("lane_row", [True, False])
def test_what_is_tried_may_be_kept(lane_row: bool) -> None:
    for some in (limits(8), limits(16, 8, 32), limits(32, 32, 64)):
        assert all(value in ALLOWED[axis] for axis, values in axes(lane_row, some).items() for value in values)


def test_what_integer_products_choose_is_tried_where_they_are() -> None:
    assert axes(True, limits(8))["side_by_side"] == (1, 2, 4)
    assert axes(True, limits(8))["tile"] == (4, 8, 16)
    assert not {"activations", "side_by_side"} & set(axes(True, limits(16)))
    assert "side_by_side" not in axes(False, limits(32))


def test_other_subgroup_sizes_are_tried_where_there_are_some(tmp_path: Path) -> None:
    """And a choice of one that the device does not have is not believed."""
    assert axes(False, limits(16, 8, 32))["lanes"] == (8, 32)
    assert axes(False, limits(64, 32, 64))["lanes"] == (32,)
    assert not any("lanes" in axes(row, limits(32)) for row in (True, False))
    for least, kept in ((32, True), (64, False)):
        device = replace(DEVICE, kind="discrete", limits=limits(64, least, 64))
        save(Choices(lanes=32), device, SHAPES, tmp_path)
        assert (tuned(device, SHAPES, False, tmp_path) == Choices(lanes=32)) is kept


def test_the_subgroup_size_that_was_chosen_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = NullDevice(limits=limits(64, 32, 64))
    device.info = replace(device.info, kind="discrete")
    monkeypatch.setattr(kernels, "tuned", lambda *_: Choices(lanes=32))
    asked: list[int | None] = []
    pipeline = device.pipeline

    def watched(*args: Any, required_subgroup_size: int | None = None, **more: Any) -> Any:
        asked.append(required_subgroup_size)
        return pipeline(*args, required_subgroup_size=required_subgroup_size, **more)

    monkeypatch.setattr(device, "pipeline", watched)
    with open_model("tiny") as file:
        graph = build_graph(ModelConfig.from_gguf(file), file.tensors)
        chain = ModelChain(device, graph, file, RuntimeConfig(n_ctx=64))  # type: ignore[arg-type]
        table = BlockTable(32)
        BlockPool(chain.n_block, 32).extend(table, 8)
        chain.forward(Rows.of(Span([1], 0, table, n_output=1)))
    assert set(asked) == {32}
    assert any("_s32_" in d.kernel.name for r in chain._recorded.values() for d in r.dispatches(0))


@pytest.mark.parametrize(
    ("threads", "n_group", "expected"),
    [("2", 1, 1), ("2", 28, 2), ("2", 32, 4), ("2", 304, 4), ("16", 64, 4), ("16", 32, 2), ("0", 4, 4)],
)
def test_row_groups_are_shared_out_evenly(threads: str, n_group: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """28 groups: 4 rounds of four for the busier thread, or 7 of two, which cost less."""
    monkeypatch.setenv("LP_NUM_THREADS", threads)
    pair = Layout("lane_pair")
    assert START.groups_of("Q4_K", pair, 1, n_group) == expected
    assert START.groups_of("Q4_K", pair, 1, n_group, at_least=2) == max(2, expected)
    assert replace(START, side_by_side=1).groups_of("Q4_K", pair, 1, n_group) == 1
    assert START.groups_of("F16", Layout("lane_row"), 1, n_group) == 1
    assert START.groups_of("Q4_K", pair, 8, n_group) == 2
    assert START.groups_of("Q6_K", pair, 8, n_group) == 1


CHOSEN = [
    (schedule, Choices(rows=rows, tile=tile, side_by_side=side_by_side, activations=activations))
    for schedule, rows, tile, side_by_side in (("lane_row", 4, 8, 4), ("lane_row", 2, 4, 1), ("lane_chunk", 8, 16, 2))
    for activations in ("f32", "int8")
]


@pytest.mark.parametrize("extra", [(), ("int64", "int64_vectors")], ids=["", "wide"])
@pytest.mark.parametrize(("schedule", "choices"), CHOSEN, ids=str)
def test_what_is_timed_is_what_the_engine_runs(
    schedule: Any, choices: Choices, extra: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same products, but for what is fused into them."""
    features = MINIMUM_LIMITS.features | set(extra)
    info = replace(DEVICE, limits=replace(MINIMUM_LIMITS, subgroup_size=8, features=features))
    monkeypatch.setattr(kernels, "tuned", lambda *_: choices)
    with open_model("tiny") as file:
        graph = build_graph(ModelConfig.from_gguf(file), file.tensors)
        runtime = RuntimeConfig(schedule=schedule, activations=choices.activations)
        lower = kernels.Lowering(graph, file, info, runtime, n_ctx=256)
        ops = [op for op in graph.ops if isinstance(op, Linear | Qkv)]
        for op, matrix, n_row in itertools.product(ops, lower.matrices, (1, 64)):
            if matrix not in lower._by_op[op.name]:
                continue
            fused = lower._spec(op, matrix, op.epilogue if isinstance(op, Linear) else "qkv", n_row)
            plain = replace(fused, norm=False, bias=False, epilogue="store", head_dim=0, rope_pairing="interleaved")
            n_packed = lower._n_packed(matrix)
            assert product_spec(matrix.fmt, choices, n_packed, n_row, schedule == "lane_row", info.limits) == plain


def test_a_layer_in_one_dispatch_is_tried_where_a_cpu_has_threads_and_room(monkeypatch: pytest.MonkeyPatch) -> None:
    room = replace(limits(8), max_storage_buffers=32, max_texel_buffers=64)
    monkeypatch.setenv("LP_NUM_THREADS", "2")
    assert axes(True, room)["dispatches"] == ("op", "layer")
    assert "dispatches" not in axes(False, room) | axes(True, limits(8))
    monkeypatch.setenv("LP_NUM_THREADS", "1")
    assert "dispatches" not in axes(True, room)


def test_a_layer_that_is_given_up_costs_both_ways(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More workgroups than threads give up, and the plain dispatches run behind them: what the engine would do."""
    if device.info.kind != "cpu":
        pytest.skip("persistent kernels are for CPUs")
    with open_model("tiny") as file:
        config, shapes = ModelConfig.from_gguf(file), model_shapes(file)
    ran: list[str] = []
    run = Recording.run
    monkeypatch.setattr(Recording, "run", lambda self: (ran.append(self.name), run(self))[1])
    choices = replace(default_choices(True), dispatches="layer")
    for n_workgroup, names in ((1, {"a layer a dispatch"}), (4096, {"a layer a dispatch", "an op a dispatch"})):
        monkeypatch.setattr(tune, "driver_threads", lambda n=n_workgroup: n)
        ran.clear()
        assert DeviceTimer(device, config, shapes, True)(choices, "dispatches") > 0
        assert set(ran) == names
    ran.clear()
    assert DeviceTimer(device, config, shapes, True)(replace(choices, dispatches="op"), "dispatches") > 0
    assert set(ran) == {"an op a dispatch"}


def test_row_groups_side_by_side_concern_decode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = DeviceTimer(NullDevice(limits=MINIMUM_LIMITS), None, {SHAPES[0]: 2}, True)  # type: ignore[arg-type]
    monkeypatch.setattr(DeviceTimer, "_matmul", lambda self, shape, choices, n_token: 1.0 if n_token == 1 else 1000.0)
    assert timer(START, "side_by_side") == 2 * N_DECODE
    assert timer(START, "tile") == 2 * N_PROMPT / 64 * 1000.0
    assert timer(START, "rows") == timer(START, "side_by_side") + timer(START, "tile")


def test_the_report_has_a_table_for_each_axis(capsys: pytest.CaptureFixture[str]) -> None:
    tried = (
        Experiment("tile", 4, 0.02, 0.03, False),
        Experiment("tile", 16, 0.02, 0.01, True),
        Experiment("side_by_side", 1, 0.5, None, False, "does not compile"),
    )
    _show(Outcome(replace(START, tile=16), tried, finished=True), report=True)
    tables = [table.splitlines() for table in capsys.readouterr().out.split("\n\n")]
    assert [table[0].split("  ")[0] for table in tables[:2]] == [AXES["tile"], AXES["side_by_side"]]
    assert [line.split() for line in tables[0][1:]] == [["4", "20.00", "30.00"], ["16", "20.00", "10.00", "kept"]]
    assert "does not compile" in tables[1][1]
    assert "tile 16" in tables[2][0]


@pytest.mark.parametrize("lane_row", [True, False])
def test_every_axis_is_named_in_the_report(lane_row: bool) -> None:
    assert set(axes(lane_row, limits(8, 4, 16))) <= set(AXES)


@pytest.mark.parametrize("lane_row", [True, False])
def test_every_candidate_runs_on_the_device(device: Any, lane_row: bool) -> None:
    """On shapes of a real model's formats: one that never ran would never be chosen."""
    with open_model("tiny") as file:
        config, shapes = ModelConfig.from_gguf(file), model_shapes(file)
    assert sum(shapes.values()) == 7 * config.n_layer + 1
    few = {next(iter(shapes)): 1}
    timer = DeviceTimer(device, config, few, lane_row)
    tried = {axis: values for axis, values in axes(lane_row, device.limits).items() if axis != "rows"}
    found = search(default_choices(lane_row), tried, timer, 600)
    assert found.finished
    assert [e.problem for e in found.experiments] == [""] * len(found.experiments)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VKLLM_CACHE_DIR", str(tmp_path))
    result = CliRunner().invoke(app, ["tune", "tiny", "--minutes", "0", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["finished"] is False
    assert json.loads(Path(found["file"]).read_text()) == found["choices"]
    people = CliRunner().invoke(app, ["tune", "tiny", "--minutes", "0", "--report"])
    assert "rows 4" in people.stdout
