"""Layout "lane_pair": codes come back from their words, and integer products are as exact as integers are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from check import device, lanes, run_on_device
from test_formats import Number, Numpy, random_blocks
from test_matmul import Case, spec_of

from vkllm_codegen import i32
from vkllm_shaders.formats import CODED, FORMATS, Layout, code_order, coded_of, pack, packed_nbytes, packed_shape
from vkllm_shaders.formats.coded import CodedWeights
from vkllm_shaders.matmul import OWN_BINDINGS, OWN_PUSH, matmul, matmul_pair, pair_groups
from vkllm_shaders.records import LANES, n_group, record_nbytes, squares_stride
from vkllm_shaders.reference_matmul import dequantize
from vkllm_shaders.to_records import to_records

PAIR = Layout("lane_pair", 8, 4)
UNWRITTEN = 0xDEADBEEF


class Selecting(Numpy):
    """A Block that can choose as well."""

    def select(self, condition: Number, a: Number, b: Number) -> Number:
        return Number(np.where(condition.a, a.a, b.a))


class Step(Number):
    """A step that a kernel knows only when it runs."""

    def __and__(self, other: int) -> Step:
        return Step(self.a & other)

    def __rshift__(self, other: int) -> Step:
        return Step(self.a >> other)

    def __add__(self, other: int) -> Step:
        return Step(self.a + other)

    def __eq__(self, other: object) -> Number:  # type: ignore[override]
        return Number(self.a == other)

    def __index__(self) -> int:
        return int(self.a)


def unpack(fmt: str, packed: np.ndarray, n_row: int, n_col: int) -> np.ndarray:
    """Packed texels → f32 [packed rows, n_col], by the expressions of the kernels."""
    coded = coded_of(fmt)
    groups, n_texel, s = packed_shape(fmt, n_row, n_col, PAIR)
    c = coded.n_chunk(n_col)
    texels = packed.view(np.uint32).reshape(groups, c, n_texel // c, s, 4)
    out = np.zeros((groups, PAIR.rows, s, c * coded.chunk), np.float32)
    lane = np.arange(s)
    order = code_order(coded.group)
    tails, factors = texels[:, :, :: coded.n_body], texels[:, :, 0]
    for step in range(coded.steps):
        if coded.carries:  # from the even step of two, and from the odd one before it; of the first two from the row's last
            late = tails[:, :, step - step % 2 - 1] if step > 1 else np.roll(tails[:, :, -1], 1, axis=1)
            factors = np.concatenate([tails[:, :, step - step % 2, :, 2:], late[..., 2:]], axis=-1)
        body = texels[:, :, coded.n_head + step * coded.n_body :]
        for dynamic in (False, True):
            w = CodedWeights(
                coded,
                Selecting(),  # type: ignore[arg-type]
                lambda j, head=factors: Number(head if coded.carries else texels[:, :, j]),  # type: ignore[misc]
                lambda j, body=body: Number(body[:, :, coded.place(j)]),  # type: ignore[misc]
                Step(np.uint32(step)) if dynamic else step,  # type: ignore[arg-type]
            )
            for r in range(PAIR.rows):
                for index, (q, j) in enumerate(order):
                    sub = index // coded.group
                    both = w.both(r // 2, index).bitcast(i32).a
                    value = w.scale(r, sub).a * (((both >> 16) if r % 2 else (both & 0xFFFF)) - coded.zero).astype(np.float32)
                    value = value - (w.minimum(r, sub).a if coded.minimum else 0)  # [group, chunk, lane]
                    columns = np.arange(c)[:, None] * coded.chunk + step * 32 + 4 * (lane ^ j) + q
                    out[:, r, lane, columns] = value
    return out.reshape(groups * PAIR.rows * s, -1)[:, :n_col]


@pytest.mark.parametrize("fmt", CODED)
def test_every_weight_comes_back(fmt: str) -> None:
    n_row, n_col = 37, 2 * FORMATS[fmt].block + (FORMATS[fmt].block == 32) * 32
    blocks = random_blocks(fmt, n_row, n_col)
    out = np.zeros(packed_nbytes(fmt, n_row, n_col, PAIR), np.uint8)
    pack(fmt, blocks, n_col, PAIR, out)
    got = unpack(fmt, out, n_row, n_col)
    np.testing.assert_allclose(got[:n_row], dequantize(fmt, blocks), rtol=1e-5, atol=1e-5)
    assert not got[n_row:].any()


def test_packing_costs_little_memory() -> None:
    """Against the file: 6-bit codes fill their words, 5-bit ones leave a bit in sixteen; Q4_K has its factors four times."""
    for fmt, most in (("Q4_0", 1.0), ("Q8_0", 1.0), ("Q5_0", 1.1), ("Q4_K", 1.12), ("Q5_K", 1.12), ("Q6_K", 1.01), ("Q2_K", 1.0)):
        assert packed_nbytes(fmt, 64, 1024, PAIR) <= most * 64 * FORMATS[fmt].row_bytes(1024), fmt


@pytest.mark.parametrize("side_by_side", [1, 2, 4])
@pytest.mark.parametrize("tile", [1, 2, 8])
@pytest.mark.parametrize("fmt", CODED)
def test_products_of_whole_numbers(fmt: str, tile: int, side_by_side: int) -> None:
    spec = spec_of(fmt, "lane_pair", tile=tile, side_by_side=side_by_side)
    for i, (n_row, n_token) in enumerate([(7, 1), (100, 2), (33, 3)] if tile == 1 else [(32, tile), (1, 3), (100, 13)]):
        n_col = FORMATS[fmt].block * (1, 3, 2)[i]
        Case(spec, (n_row,), n_col, n_token, seed=i).check(max_nmse=1e-11, interpreted=i == 0 and tile == 1)


WIDE = [fmt for fmt, coded in CODED.items() if coded.fits_wide]


@pytest.mark.parametrize("side_by_side", [1, 2])
@pytest.mark.parametrize("fmt", WIDE)
def test_four_rows_at_once_are_two_pairs(fmt: str, side_by_side: int) -> None:
    """To the bit; also with the largest sums that four fields can hold."""
    eight_lanes()
    if "int64" not in device().limits.features:
        pytest.skip("the device has no 64-bit integers")
    f = FORMATS[fmt]
    n_col, n_head = f.block * 2, f.block_bytes - f.block // 2  # of a block's bytes those before its codes
    for tile, n_token in ((2, 1), (8, 13)):
        case = Case(spec_of(fmt, "lane_pair", tile=tile, side_by_side=side_by_side), (100,), n_col, n_token)
        assert np.array_equal(bits(result_of(case, wide=True)["y"]), bits(result_of(case)["y"]))
        blocks = random_blocks(fmt, 100, n_col).reshape(100, 2, f.block_bytes)
        blocks[::3, :, n_head:], blocks[1::3, :, n_head:] = 0x00, 0xFF
        pack(fmt, blocks.reshape(100, -1), n_col, PAIR, case.buffers["w"].view(np.uint8).reshape(-1), case.order)
        case.x_all[:] = np.where(np.arange(case.capacity) % 2, -1.0, 1.0)[:, None]
        case.give_records()
        assert np.array_equal(bits(result_of(case, wide=True)["y"]), bits(result_of(case)["y"]))


@pytest.mark.parametrize("tile", [1, 2, 8])
@pytest.mark.parametrize(
    "fused",
    [
        {"norm": True, "bias": True},
        {"epilogue": "residual", "bias": True},
        {"epilogue": "swiglu", "norm": True},
        {"epilogue": "swiglu", "norm": True, "bias": True, "side_by_side": 2},
        {"epilogue": "swiglu", "norm": True, "bias": True, "side_by_side": 4},
        {"norm": True, "gather": True},
        {"scale": 0.25, "softcap": 30.0},
    ],
    ids=str,
)
def test_fused_work(fused: dict[str, Any], tile: int) -> None:
    fmt = {1: "Q5_0", 2: "Q4_K", 8: "Q8_0"}[tile]
    n_rows = (52, 52) if fused.get("epilogue") == "swiglu" else (52,)
    case = Case(spec_of(fmt, "lane_pair", tile=tile, **fused), n_rows, 256, 3)
    if "softcap" in fused:
        case.y = 30.0 * np.tanh(case.y * 0.25 / 30.0)
    case.check(max_nmse=1e-10)


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("tile", [1, 8])
def test_qkv_with_rope_and_cache(tile: int, pairing: str) -> None:
    fields: dict[str, Any] = {"norm": True, "bias": True, "epilogue": "qkv", "rope_pairing": pairing, "head_dim": 16}
    spec = spec_of("Q8_0", "lane_pair", tile=tile, side_by_side={1: 4, 8: 1}[tile], **fields)
    Case(spec, (48, 16, 16), 64, 5).check_qkv(3, 1)
    Case(spec, (32,), 64, 3).check_qkv(3, 2, first_head=5)


# -- results, to the bit ---------------------------------------------------------------------------------------------------------


def eight_lanes() -> None:
    if lanes() != LANES:
        pytest.skip(f"integer products are for subgroups of {LANES}; the device has {lanes()}")


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


def as_records(x: np.ndarray, norm_w: np.ndarray | None) -> dict[str, np.ndarray]:
    """x as a dispatch of its own makes records of it: record and, with a norm, squares; UNWRITTEN where nothing is written."""
    n_row, n_col = x.shape
    given: dict[str, Any] = {"x": x, "record": np.full(record_nbytes(n_row, n_col) // 4, UNWRITTEN, np.uint32)}
    push = {"x_stride": n_col // 4, "n_group": n_group(n_col)}
    if norm_w is not None:
        given |= {"norm_w": norm_w, "squares": np.full((n_row, squares_stride(n_col)), UNWRITTEN, np.uint32)}
        push["squares_stride"] = squares_stride(n_col)
    return run_on_device(to_records(norm_w is not None), given, push, {}, (n_row, 1, 1))


def result_of(case: Case, **fields: Any) -> dict[str, np.ndarray]:
    """What a case's kernel with other fields writes, y [n_token, n_row] starting as ones; `y_…` if it makes records."""
    spec = replace(case.spec, **fields)
    n_row = case.push["n_row"]
    stride = -(-n_row // 4) * 4
    buffers = case.buffers | {"params": case.params, "y": np.ones((case.n_token, stride), np.float32)}
    buffers["y_record"] = np.full(record_nbytes(case.n_token, n_row) // 4, UNWRITTEN, np.uint32)
    buffers["y_norm_w"] = np.linspace(-1.5, 1.5, n_row, dtype=np.float32)
    buffers["y_squares"] = np.full((case.n_token, squares_stride(n_row)), UNWRITTEN, np.uint32)
    push = case.push | {"y_stride": stride, "y_squares_stride": squares_stride(n_row), "capacity": case.capacity}
    kernel = matmul(spec)
    got = run_on_device(
        kernel,
        {b.name: buffers[b.name] for b in kernel.bindings},
        {name: push[name] for name, _, _ in kernel.push},
        {},
        spec.groups(len(case.order), case.n_token),
    )
    return got | {"y": got["y"].reshape(case.n_token, stride)[:, :n_row].copy()}


@pytest.mark.parametrize("n_row", [32, 96, 160])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("epilogue", "side_by_side"), [("residual", 1), ("residual", 4), ("swiglu", 2), ("swiglu", 4)])
def test_the_record_of_a_result_is_that_of_y(epilogue: Any, side_by_side: int, bias: bool, scaled: bool, n_row: int) -> None:
    """As to_records makes it of the y that was written, which is that without a record; an odd row's place is left alone."""
    eight_lanes()
    gated, scale = epilogue == "swiglu", 0.3 if scaled else 1.0
    spec = spec_of("Q4_K", "lane_pair", epilogue=epilogue, bias=bias, scale=scale, norm=gated, side_by_side=side_by_side)
    case = Case(spec, (n_row, n_row) if gated else (n_row,), 256, 3)
    plain, got = result_of(case), result_of(case, records=True)
    assert np.array_equal(bits(got["y"]), bits(plain["y"]))
    made = as_records(got["y"], None if gated else got["y_norm_w"])
    assert np.array_equal(got["y_record"], made["record"])
    assert gated or np.array_equal(got["y_squares"], made["squares"])


BIASED: dict[str, Any] = {"norm": True, "bias": True}
FUSED: list[tuple[str, dict[str, Any]]] = [(fmt, BIASED) for fmt in CODED]
FUSED += [("Q4_K", {"epilogue": "residual", "scale": 0.3}), ("Q6_K", {"epilogue": "swiglu", **BIASED})]


@pytest.mark.parametrize(("fmt", "fused"), FUSED, ids=str)
def test_a_row_has_the_same_bits_whatever_the_tile(fmt: str, fused: dict[str, Any]) -> None:
    """Of tokens, and of row groups; also where it is the only row."""
    eight_lanes()
    n_rows = (70, 70) if fused.get("epilogue") == "swiglu" else (70,)
    case = Case(spec_of(fmt, "lane_pair", **fused), n_rows, 512, 5)
    y = result_of(case)["y"]
    for tile, side_by_side in ((1, 2), (1, 4), (2, 1), (4, 1), (8, 1), (2, 2), (16, 1)):
        other = result_of(case, tile=tile, side_by_side=side_by_side)["y"]
        assert np.array_equal(bits(other), bits(y)), f"tile {tile}, {side_by_side} side by side"
    case.n_token = case.push["n_token"] = 1
    assert np.array_equal(bits(result_of(case, side_by_side=4)["y"]), bits(y[:1]))


@pytest.mark.parametrize("pair", [("Q4_K", "Q6_K"), ("Q5_0", "Q8_0")])
@pytest.mark.parametrize("tile", [1, 8])
def test_a_pair_gives_the_bits_of_its_products(pair: tuple[str, str], tile: int) -> None:
    eight_lanes()
    fields: dict[str, Any] = {"tile": tile, "norm": True, "side_by_side": 4 if tile == 1 else 1}
    first, second = (Case(spec_of(fmt, "lane_pair", **fields), (n,), 256, 3) for fmt, n in zip(pair, (70, 40), strict=True))
    assert np.array_equal(first.buffers["x"], second.buffers["x"])
    second.push["first_row"] = 70
    push = first.push | {f"{name}_2": second.push[name] for name in OWN_PUSH} | {"y_stride": 110}
    push |= {"n_first": first.spec.groups(len(first.order), 3)[first.spec.row_axis]}
    buffers = first.buffers | {f"{name}_2": second.buffers[name] for name in OWN_BINDINGS if name in second.buffers}
    kernel = matmul_pair(first.spec, second.spec)
    got = run_on_device(
        kernel,
        {b.name: (buffers | {"y": np.ones((3, 110), np.float32)})[b.name] for b in kernel.bindings},
        {name: push[name] for name, _, _ in kernel.push},
        {},
        pair_groups(first.spec, second.spec, (len(first.order), len(second.order)), 3),
    )["y"]
    second.push["first_row"] = 0
    assert np.array_equal(bits(got), bits(np.concatenate([result_of(first)["y"], result_of(second)["y"]], axis=1)))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("fmt", ["Q4_0", "Q4_K", "Q8_0", "Q6_K"])
@pytest.mark.parametrize("tile", [1, 2, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_non_finite_is_hidden(bad: float, tile: int, fmt: str, norm: bool) -> None:
    """It reaches every number of its row of y, and none of another, though two rows lie side by side in a record."""
    eight_lanes()
    case = Case(spec_of(fmt, "lane_pair", tile=tile, norm=norm), (40,), 256, 3)
    norm_w = np.linspace(0.5, 1.5, 256, dtype=np.float32) if norm else None

    def product(x: np.ndarray) -> np.ndarray:
        made = as_records(x, norm_w)
        case.buffers["x"] = made["record"].reshape(-1, 4)
        if norm:
            case.buffers["squares"] = made["squares"]
        return result_of(case)["y"]

    x = case.x_all[:3].copy()
    sound = product(x)
    assert np.isfinite(sound).all()
    x[1, 77] = bad
    y = product(x)
    assert not np.isfinite(y[1]).any()
    assert np.array_equal(bits(y[[0, 2]]), bits(sound[[0, 2]]))
