"""The router's choice and the sum over experts: awkward counts, ties, and logits that are no numbers."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from check import check_kernel, lanes
from hypothesis import given, settings
from hypothesis import strategies as st

from vkllm_codegen.errors import KernelError
from vkllm_shaders import reference
from vkllm_shaders.experts import MAX_TILED_ROWS, RouteSpec, TileSpec, combine, combine_groups, route, tiles

COUNTS = [(1, 1), (2, 2), (7, 3), (8, 1), (9, 8), (31, 16), (32, 4), (128, 8), (256, 16)]


def check_route(logits: np.ndarray, spec: RouteSpec, padding: int = 3, *, on_device: bool = True) -> dict[str, np.ndarray]:
    """Rows of logits with room behind them that must not matter."""
    n_token = len(logits)
    ids, weights = reference.route(logits, spec.n_used, spec.softmax)
    buffers = {
        "logits": np.pad(logits, ((0, 0), (0, padding)), constant_values=1e30),
        "ids": np.full((n_token, spec.n_used), 0xFFFFFFFF, np.uint32),
        "weights": np.full((n_token, spec.n_used), np.nan, np.float32),
    }
    push = {"x_stride": logits.shape[1] + padding}
    groups, size = (n_token, 1, 1), spec.lanes
    return check_kernel(
        route(spec), {"ids": ids, "weights": weights}, buffers, push, {}, groups, on_device=on_device, subgroup_size=size
    )


@pytest.mark.parametrize("softmax", ["all", "used"])
@pytest.mark.parametrize("n_expert, n_used", COUNTS)
def test_route(n_expert: int, n_used: int, softmax: Literal["all", "used"]) -> None:
    logits = np.random.default_rng(n_expert).standard_normal((5, n_expert)).astype(np.float32) * 4
    check_route(logits, RouteSpec(n_expert, n_used, softmax, lanes()))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), lane_count=st.sampled_from([4, 8, 32]), softmax=st.sampled_from(["all", "used"]))
def test_ties_go_to_the_lowest_id(data: st.DataObject, lane_count: int, softmax: Literal["all", "used"]) -> None:
    n_expert = data.draw(st.integers(1, 70))
    spec = RouteSpec(n_expert, data.draw(st.integers(1, min(16, n_expert))), softmax, lane_count)
    values = st.sampled_from([-3.0, 0.0, 0.5, 80.0, -float("inf")])
    row = data.draw(st.lists(values, min_size=n_expert, max_size=n_expert).filter(lambda r: max(r) > -1e30))
    check_route(np.array([row], np.float32), spec, on_device=False)


def test_ids_are_those_of_experts_whatever_the_logits() -> None:
    spec = RouteSpec(9, 5, "used", lanes())
    logits = np.full((3, 9), np.nan, np.float32)
    logits[1, 6], logits[2, :3] = 1.0, (2.0, np.inf, 2.0)
    expected = np.array([[0, 1, 2, 3, 4], [6, 0, 1, 2, 3], [1, 0, 2, 3, 4]], np.uint32)
    buffers = {"logits": logits, "ids": np.zeros((3, 5), np.uint32), "weights": np.zeros((3, 5), np.float32)}
    got = check_kernel(route(spec), {"ids": expected}, buffers, {"x_stride": 9}, {}, (3, 1, 1), subgroup_size=spec.lanes)
    assert np.isnan(got["weights"]).all()  # one NaN is enough: it must be found


def test_counts_without_kernels_are_refused() -> None:
    for n_expert, n_used in ((257, 8), (64, 17), (4, 5), (4, 0)):
        with pytest.raises(KernelError, match=f"{n_used} of {n_expert} experts"):
            RouteSpec(n_expert, n_used)


def check_tiles(ids: np.ndarray, spec: TileSpec, **where: bool) -> None:
    n_tile = spec.n_tile(len(ids)) + 2
    experts, rows = reference.tiles(ids, spec.tile, n_tile)
    buffers = {"ids": ids, "experts": np.full(n_tile, 7, np.uint32), "rows": np.full((n_tile, spec.tile), 9, np.uint32)}
    rows[experts == reference.NO_ID] = 9
    push = {"n_row": len(ids), "n_tile": n_tile}
    check_kernel(tiles(spec), {"experts": experts, "rows": rows}, buffers, push, subgroup_size=spec.lanes, **where)


@pytest.mark.parametrize("n_expert, n_row, tile", [(1, 1, 4), (8, 7, 2), (9, 64, 4), (128, 517, 4), (256, 100, 8)])
def test_tiles(n_expert: int, n_row: int, tile: int) -> None:
    rng = np.random.default_rng(n_row)
    ids = (rng.integers(0, n_expert, n_row) * rng.integers(0, 2, n_row)).astype(np.uint32)  # many rows of the first
    check_tiles(ids, TileSpec(n_expert, tile, lanes()))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), lane_count=st.sampled_from([4, 8, 32]), tile=st.sampled_from([2, 3, 4]))
def test_tiles_hold_any_rows(data: st.DataObject, lane_count: int, tile: int) -> None:
    n_expert = data.draw(st.integers(1, 40))
    ids = data.draw(st.lists(st.integers(0, n_expert - 1), min_size=1, max_size=70))
    check_tiles(np.array(ids, np.uint32), TileSpec(n_expert, tile, lane_count), on_device=False)


def test_as_many_rows_as_lavapipe_has_turns() -> None:
    ids = np.random.default_rng(0).integers(0, 9, MAX_TILED_ROWS).astype(np.uint32)
    check_tiles(ids, TileSpec(9, 2, lanes()), interpreted=False)
    with pytest.raises(KernelError, match="lower prefill_chunk"):
        TileSpec(9).n_tile(MAX_TILED_ROWS + 1)


@pytest.mark.parametrize("kind", ["lane_row", "lane_chunk"])
@pytest.mark.parametrize("n_col, n_used, n_token", [(1, 1, 1), (127, 2, 3), (128, 8, 2), (516, 16, 2)])
def test_combine(n_col: int, n_used: int, n_token: int, kind: str) -> None:
    rng = np.random.default_rng(n_col)
    x, y, weights = (np.float32(rng.standard_normal(s)) for s in ((n_token, n_used, n_col), (n_token, n_col), (n_token, n_used)))
    wide = -(-n_col // 4) * 4
    x_room = np.pad(x, ((0, 0), (0, 0), (0, wide + 8 - n_col)))
    y_room = np.pad(y, ((0, 0), (0, wide + 4 - n_col)))
    expected = np.pad(reference.combine(y, x, weights), ((0, 0), (0, wide + 4 - n_col)))
    push = {"n_texel": wide // 4, "x_stride": wide // 4 + 2, "y_stride": wide // 4 + 1}
    buffers = {"x": x_room, "weights": weights, "y": y_room}
    check_kernel(combine(n_used, kind), {"y": expected}, buffers, push, {}, combine_groups(n_col, n_token))
