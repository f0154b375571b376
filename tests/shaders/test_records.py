"""Records: rows in 8 bits, against a numpy model of the format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from check import check_kernel, lanes, run_on_device

from vkllm_shaders.records import GROUP, LANES, n_group, record_nbytes, squares_stride
from vkllm_shaders.to_records import to_records

UNWRITTEN = 0xDEADBEEF
SPARE_TEXELS = 3  # of a row of x, past its columns


@pytest.fixture(autouse=True)
def eight_lanes() -> None:
    if lanes() != LANES:
        pytest.skip(f"records are made by subgroups of {LANES}; the device has {lanes()}")


def unpacked(record: np.ndarray, n_row: int, n_col: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Records → (integers i8 [n_row, n_col], scales u32 bits and sums [n_row, groups, lanes])."""
    texels = record.reshape(-1, n_group(n_col), LANES, 2, 2)  # row pair, group, lane, row of the pair, (bytes, tail)
    words, tails = (texels[..., part].transpose(0, 3, 1, 2).reshape(-1, n_group(n_col), LANES)[:n_row] for part in (0, 1))
    integers = np.ascontiguousarray(words).view(np.int8).reshape(n_row, n_col)
    return integers, tails & 0xFFFF0000, (tails & 0xFFFF).astype(np.uint16).view(np.int16)


def model(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a row holds, in the kernels' f32: (integers [n_row, n_col], scales f32 [n_row, groups])."""
    grouped = v.astype(np.float32).reshape(len(v), -1, GROUP)
    scales = ((np.abs(grouped).max(axis=-1) * np.float32(1.0 / 126.5)).view(np.uint32) & 0xFFFF0000).view(np.float32)
    inverse = np.divide(np.float32(1.0), scales, out=np.zeros_like(scales), where=scales > 0)
    return np.rint(grouped * inverse[..., None]).astype(int).reshape(v.shape), scales


def rows(n_row: int, n_col: int, seed: int = 0) -> np.ndarray:
    """Rows of different sizes, padded with what must not be read as a column."""
    rng = np.random.default_rng(seed)
    x = np.full((n_row, n_col + 4 * SPARE_TEXELS), np.nan, np.float32)
    x[:, :n_col] = rng.standard_normal((n_row, n_col)) * rng.uniform(0.01, 100.0, (n_row, 1))
    return x


def run(x: np.ndarray, n_col: int, norm_w: np.ndarray | None = None, source: np.ndarray | None = None) -> dict[str, Any]:
    """Make records of x [rows, stride], of rows `source` where given. Returns also `integers` and `scales`."""
    n_row = len(x) if source is None else len(source)
    given: dict[str, Any] = {"x": x, "record": np.full(record_nbytes(n_row, n_col) // 4, UNWRITTEN, np.uint32)}
    push = {"x_stride": x.shape[1] // 4, "n_group": n_group(n_col)}
    if norm_w is not None:
        given |= {"norm_w": norm_w, "squares": np.full((n_row, squares_stride(n_col)), UNWRITTEN, np.uint32)}
        push["squares_stride"] = squares_stride(n_col)
    if source is not None:
        capacity = n_row + 2
        given["params"] = np.full((6, capacity), 0xDEAD, np.uint32)
        given["params"][5, :n_row] = source
        push["capacity"] = capacity
    kernel = to_records(norm_w is not None, source is not None)
    got = run_on_device(kernel, given, push, {}, (n_row, 1, 1))
    integers, scales, totals = unpacked(got["record"], n_row, n_col)
    return got | {"integers": integers, "scales": scales, "totals": totals}


def check(got: dict[str, Any], v: np.ndarray) -> None:
    """The records are those of v; a quotient near a half may fall either way."""
    integers, scales = model(v)
    assert (got["scales"] == got["scales"][..., :1]).all(), "the lanes' scales differ"
    np.testing.assert_allclose(got["scales"][..., 0].view(np.float32), scales, rtol=2.0**-7)  # a last bit cut off more or less
    totals = got["integers"].reshape(*scales.shape, GROUP).sum(axis=-1)
    assert np.array_equal(got["totals"], np.repeat(totals[..., None], LANES, -1))
    assert np.abs(got["integers"]).max() <= 127
    assert np.abs(got["integers"] - integers).max() <= 1
    assert np.mean(got["integers"] != integers) < 1e-3


@pytest.mark.parametrize(("n_row", "n_col"), [(1, 32), (2, 64), (3, 96), (7, 896), (4, 4864)])
def test_rows_become_records(n_row: int, n_col: int) -> None:
    x = rows(n_row, n_col)
    got = run(x, n_col)
    check(got, x[:, :n_col])
    if n_row % 2:
        beside = got["record"].reshape(-1, n_group(n_col), LANES, 4)[-1, ..., 2:]
        assert (beside == UNWRITTEN).all(), "the row past the last was written"


@pytest.mark.parametrize(("n_row", "n_col"), [(1, 32), (5, 160), (3, 896)])
def test_norm(n_row: int, n_col: int) -> None:
    """The weight belongs to the record, not to the squares, whose padding stays as it was."""
    x, norm_w = rows(n_row, n_col), np.random.default_rng(1).uniform(-1.5, 1.5, n_col).astype(np.float32)
    got = run(x, n_col, norm_w)
    check(got, x[:, :n_col] * norm_w)
    squares = (x[:, :n_col].astype(np.float64) ** 2).reshape(n_row, -1, GROUP).sum(axis=-1)
    np.testing.assert_allclose(got["squares"][:, : n_group(n_col)].view(np.float32), squares, rtol=1e-6)
    assert (got["squares"][:, n_group(n_col) :] == UNWRITTEN).all()


@pytest.mark.parametrize("norm", [False, True])
def test_gathered_rows_are_those_rows(norm: bool) -> None:
    x, source = rows(6, 128), np.array([4, 0, 5, 5, 2])
    norm_w = np.linspace(0.5, 1.5, 128, dtype=np.float32) if norm else None
    got, expected = run(x, 128, norm_w, source), run(x[source], 128, norm_w)
    names = ("integers", "scales", "totals") + (("squares",) if norm else ())
    assert all(np.array_equal(got[name], expected[name]) for name in names)


@pytest.mark.parametrize("norm", [False, True])
def test_a_row_is_the_same_to_the_bit_whatever_the_others(norm: bool) -> None:
    x, n_col = rows(9, 416), 416
    norm_w = np.random.default_rng(2).uniform(0.5, 1.5, n_col).astype(np.float32) if norm else None
    together = run(x, n_col, norm_w)
    for i in range(len(x)):
        alone = run(x[i : i + 1], n_col, norm_w)
        for name in ("integers", "scales", "totals") + (("squares",) if norm else ()):
            assert np.array_equal(alone[name][0], together[name][i]), f"row {i}: {name}"


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("column", [32, 45, 63])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nothing_non_finite_is_hidden(bad: float, column: int, norm: bool) -> None:
    """It reaches its group's scale, and its sum of squares; the other groups are as without it."""
    x, norm_w = rows(3, 96), np.ones(96, np.float32) if norm else None
    sound = run(x, 96, norm_w)
    x[1, column] = bad
    got = run(x, 96, norm_w)
    wrong = np.zeros((3, 3), bool)
    wrong[1, 1] = True
    scales = got["scales"].view(np.float32)
    assert np.array_equal(np.isfinite(scales), np.broadcast_to(~wrong[..., None], scales.shape))
    assert np.array_equal(got["scales"][~wrong], sound["scales"][~wrong])
    if norm:
        assert np.array_equal(np.isfinite(got["squares"][:, :3].view(np.float32)), ~wrong)


def test_zeros_and_the_smallest_numbers() -> None:
    """A group of zeros has scale 0 and integers 0; numbers whose inverse overflows must not become NaN or large."""
    x = np.zeros((2, 64), np.float32)
    x[0, 40], x[1, :32] = 1e-37, -1e-30
    got = run(x, 64)
    scales = got["scales"].view(np.float32)
    assert (scales[0, 0] == 0).all() and (scales[1, 1] == 0).all()
    assert (got["integers"][0, :32] == 0).all() and (got["integers"][1, 32:] == 0).all()
    assert (got["integers"][1, :32] <= -126).all()
    assert np.isfinite(scales).all()


def test_the_interpreter_agrees() -> None:
    x, norm_w = rows(2, 64), np.linspace(-1.0, 1.0, 64, dtype=np.float32)
    integers, scales = model(x[:, :64] * norm_w)
    texels = np.zeros((1, 2, LANES, 2, 2), np.uint32)
    texels[..., 0] = integers.astype(np.int8).view(np.uint32).reshape(1, 2, 2, LANES).transpose(0, 2, 3, 1)
    tails = scales.view(np.uint32) | (integers.reshape(2, 2, GROUP).sum(axis=-1).astype(np.int32).view(np.uint32) & 0xFFFF)
    texels[..., 1] = tails.reshape(1, 2, 2, 1).transpose(0, 2, 3, 1)
    squares = np.full((2, 4), 7.0, np.float32)
    squares[:, :2] = (x[:, :64].reshape(2, 2, GROUP) ** 2).sum(axis=-1)
    given = {"x": x, "norm_w": norm_w, "record": np.zeros_like(texels), "squares": np.full((2, 4), 7.0, np.float32)}
    push = {"x_stride": x.shape[1] // 4, "n_group": 2, "squares_stride": 4}
    expected = {"record": texels, "squares": squares}
    check_kernel(to_records(norm=True), expected, given, push, groups=(2, 1, 1), max_nmse=1e-12, interpreted=True, glsl=True)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_names_and_bindings(norm: bool, gather: bool) -> None:
    kernel = to_records(norm, gather)
    assert kernel.name == "to_records" + "_norm" * norm + "_gather" * gather
    assert [b.name for b in kernel.bindings] == ["x"] + ["norm_w"] * norm + ["params"] * gather + ["record"] + ["squares"] * norm
