"""Packing: every weight of every format comes back, through the very expressions that the kernels use, run here in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from vkllm_codegen.errors import KernelError
from vkllm_shaders.formats import (
    CODED,
    FORMATS,
    SLOTS,
    STEP,
    Layout,
    StepWeights,
    format_of,
    pack,
    pack_vector,
    packed_nbytes,
    packing,
    row_order,
)
from vkllm_shaders.reference_matmul import dequantize

LANE_ROW, LANE_CHUNK = Layout("lane_row", 8, 4), Layout("lane_chunk", 1, 2)


class Number:
    """Stands in for a kernel's Value: the same operators on numpy arrays of 32-bit lanes."""

    def __init__(self, a: Any) -> None:
        self.a = np.asarray(a)

    def _other(self, other: Any) -> Any:
        return other.a if isinstance(other, Number) else np.asarray(other).astype(self.a.dtype)

    def __getitem__(self, i: int) -> Number:
        return Number(self.a[..., i])

    def __and__(self, o: Any) -> Number:
        return Number(self.a & self._other(o))

    def __or__(self, o: Any) -> Number:
        return Number(self.a | self._other(o))

    def __xor__(self, o: Any) -> Number:
        return Number(self.a ^ self._other(o))

    def __invert__(self) -> Number:
        return Number(~self.a)

    def __lshift__(self, o: Any) -> Number:
        return Number(self.a << self._other(o))

    def __rshift__(self, o: Any) -> Number:
        return Number(self.a >> self._other(o))

    def __mul__(self, o: Any) -> Number:
        return Number(self.a * self._other(o))

    def __neg__(self) -> Number:
        return Number(-self.a)

    def bitcast(self, dtype: Any) -> Number:
        return Number(self.a.view(dtype.numpy))

    def to(self, dtype: Any) -> Number:
        return Number(self.a.astype(dtype.numpy))


class Numpy:
    """Stands in for a kernel's Block."""

    def unpack_half2x16(self, v: Number) -> Number:
        return Number(np.ascontiguousarray(v.a)[..., None].view(np.float16).astype(np.float32))


def random_blocks(fmt: str, n_row: int, n_col: int, seed: int = 0) -> np.ndarray:
    """Random, finite rows of a type: random bits, then scales of reasonable size."""
    f = FORMATS[fmt]
    rng = np.random.default_rng(seed)
    if f.n_sub == 0:
        values = rng.standard_normal((n_row, n_col), dtype=np.float32)
        if fmt == "BF16":
            return np.ascontiguousarray((values.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8)
        return values.astype(np.float16 if fmt == "F16" else np.float32).view(np.uint8)
    blocks = rng.integers(0, 256, (n_row, n_col // f.block, f.block_bytes), dtype=np.uint8)
    if fmt == "MXFP4":
        blocks[..., 0] = rng.integers(119, 123, blocks.shape[:2])
    else:
        at = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(fmt, 0)
        for i in range(2 if f.has_minimum else 1):
            d = rng.uniform(-0.02, 0.02, blocks.shape[:2]).astype(np.float16)
            blocks[..., at + 2 * i : at + 2 * i + 2] = d[..., None].view(np.uint8)
    return blocks.reshape(n_row, -1)


def unpack(fmt: str, packed: np.ndarray, n_row: int, n_col: int, layout: Layout) -> np.ndarray:
    """Packed texels → f32 [packed rows, n_col]."""
    f, rows, s = FORMATS[fmt], layout.rows, layout.lanes
    g, c, nh, nb = layout.n_group(n_row), f.n_chunk(n_col), f.n_head(rows), f.n_body(rows)
    texels = packed.view(np.uint32)
    if layout.kind == "lane_row":
        whole = texels.reshape(g, c, nh + f.steps * nb, s, 4)
        heads = whole[:, :, :nh].transpose(0, 1, 3, 2, 4)  # [group, chunk, lane, head texel]
        bodies = whole[:, :, nh:].reshape(g, c, f.steps, nb, s, 4).transpose(0, 1, 2, 4, 3, 5)
    else:
        flat = texels.reshape(g, -1, 4)
        heads = flat[:, : nh * c].reshape(g, nh, c, 1, 4).transpose(0, 2, 3, 1, 4)
        bodies = flat[:, nh * c :].reshape(g, nb, c, f.steps, 1, 4).transpose(0, 2, 3, 4, 1, 5)
    out = np.zeros((g, rows, s, c * f.chunk), np.float32)
    at = out.reshape(g, rows, s, c, f.chunk)
    for step in range(f.steps):
        head, body = heads, bodies[:, :, step]
        w = StepWeights(f, Numpy(), lambda j, h=head: Number(h[..., j, :]), lambda j, d=body: Number(d[..., j, :]), rows, step)
        for r in range(rows):
            for slot in range(SLOTS):
                sub = slot * f.n_sub // SLOTS
                for comp in range(4):
                    value = w.raw(r, slot, comp).a.astype(np.float32)
                    if f.n_sub:
                        value = w.scale(r, sub).a * (value * np.float32(2.0 ** -f.exponent(r, comp)) - f.zero)
                        value = value - (w.minimum(r, sub).a if f.has_minimum else 0)
                    at[:, r, :, :, f.texel(step, slot) * 4 + comp] = value.transpose(0, 2, 1)
    return out.reshape(g * rows * s, -1)[:, :n_col]


@pytest.mark.parametrize("layout", [LANE_ROW, Layout("lane_row", 16, 2), LANE_CHUNK, Layout("lane_chunk", 1, 4)], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_weight_comes_back(fmt: str, layout: Layout) -> None:
    n_row, n_col = 37, 172 if FORMATS[fmt].block == 1 else 2 * FORMATS[fmt].block + (FORMATS[fmt].block == 32) * 32
    blocks = random_blocks(fmt, n_row, n_col)
    out = np.zeros(packed_nbytes(fmt, n_row, n_col, layout), np.uint8)
    pack(fmt, blocks, n_col, layout, out)
    got = unpack(fmt, out, n_row, n_col, layout)
    np.testing.assert_allclose(got[:n_row], dequantize(fmt, blocks), rtol=1e-5, atol=1e-5)
    assert not got[n_row:].any()


@settings(max_examples=25, deadline=None)
@given(
    fmt=st.sampled_from(sorted(FORMATS)), sizes=st.lists(st.integers(1, 50), min_size=1, max_size=3), n=st.integers(1, 4),
    lanes=st.sampled_from([1, 8]), rows=st.sampled_from([2, 4, 8]), data=st.data(),
)  # fmt: skip
def test_parts_orders_and_slabs(fmt: str, sizes: list[int], n: int, lanes: int, rows: int, data: Any) -> None:
    """Any order of rows, from several parts, through any number of slabs."""
    layout = Layout("lane_row" if lanes > 1 else "lane_chunk", lanes, rows)
    n_col = n * max(FORMATS[fmt].block, 4)
    parts = [random_blocks(fmt, size, n_col, i) for i, size in enumerate(sizes)]
    order = np.array(data.draw(st.lists(st.integers(-1, sum(sizes) - 1), min_size=1, max_size=70)))
    out = np.full(packed_nbytes(fmt, len(order), n_col, layout), 7, np.uint8)
    pack(fmt, parts, n_col, layout, out, order)
    weights = dequantize(fmt, np.concatenate(parts))
    got = unpack(fmt, out, len(order), n_col, layout)[_packed_index(len(order), layout)]
    np.testing.assert_allclose(got, np.where(order[:, None] >= 0, weights[np.maximum(order, 0)], 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", CODED)
def test_slabs_and_parts_of_lane_pair(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows from several parts, group by group, are packed as a matrix of these rows is in one go."""
    layout, n_col = Layout("lane_pair"), 3 * FORMATS[fmt].block
    parts = [random_blocks(fmt, size, n_col, size) for size in (40, 5, 77)]
    order = np.random.default_rng(1).integers(-1, 122, 300)
    zeros = np.zeros((1, parts[0].shape[1]), np.uint8)
    whole, slabs = (np.full(packed_nbytes(fmt, len(order), n_col, layout), fill, np.uint8) for fill in (1, 2))
    pack(fmt, np.concatenate([*parts, zeros])[order], n_col, layout, whole)
    monkeypatch.setattr(packing, "SLAB_BYTES", 1)
    pack(fmt, parts, n_col, layout, slabs, order)
    assert np.array_equal(whole, slabs)


def _packed_index(n: int, layout: Layout) -> np.ndarray:
    return np.arange(n)  # packed rows are counted as (group, row of the lane, lane)


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_row_orders(pairing: str) -> None:
    layout = Layout("lane_row", 8, 4)
    order = row_order("qkv", layout, (64, 16, 16), head_dim=16, rope_pairing=pairing)
    assert len(order) % layout.group_rows == 0
    assert sorted(order[order >= 0]) == list(range(96))
    first, second = order.reshape(-1, 2, 2, 8)[:, :, 0], order.reshape(-1, 2, 2, 8)[:, :, 1]
    assert np.all(second - first == (1 if pairing == "interleaved" else 8))
    swiglu = row_order("swiglu", layout, (20, 20)).reshape(-1, 2, 2, 8)
    gate, up = swiglu[:, :, 0].reshape(-1), swiglu[:, :, 1].reshape(-1)
    assert list(gate[:20]) == list(range(20))
    assert list(up[:20]) == list(range(20, 40))
    assert np.all(gate[20:] == -1)
    assert list(pack_vector(np.arange(3, dtype=np.float32), np.array([2, -1, 0]))) == [2, 0, 0]


def test_every_scale_of_mxfp4_comes_back() -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (256, 17), dtype=np.uint8)
    blocks[:, 0] = np.arange(256).clip(max=251)  # 12 times the next is no f32
    for layout in (LANE_ROW, LANE_CHUNK):
        out = np.zeros(packed_nbytes("MXFP4", 256, 32, layout), np.uint8)
        pack("MXFP4", blocks, 32, layout, out)
        np.testing.assert_array_equal(unpack("MXFP4", out, 256, 32, layout), dequantize("MXFP4", blocks))


@pytest.mark.parametrize("layout", [LANE_ROW, Layout("lane_chunk", 1, 4)], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_packed_weights_are_hardly_larger_than_the_file(fmt: str, layout: Layout) -> None:
    assert packed_nbytes(fmt, 1024, 1024, layout) <= 1.06 * 1024 * FORMATS[fmt].row_bytes(1024)


def test_unknown_formats_and_sizes_are_refused_by_name() -> None:
    with pytest.raises(KernelError, match="IQ2_S"):
        format_of("IQ2_S")
    with pytest.raises(KernelError, match="multiple of 32"):
        packed_nbytes("Q4_0", 1, 33, LANE_ROW) and format_of("Q4_0").row_bytes(33)
    with pytest.raises(KernelError, match="bytes of uint8"):
        pack("Q8_0", random_blocks("Q8_0", 4, 32), 32, LANE_ROW, np.zeros(16, np.uint8))
    with pytest.raises(KernelError, match="rows must be"):
        Layout("lane_row", 8, 3)
    with pytest.raises(KernelError, match="gate and up"):
        row_order("swiglu", LANE_ROW, (3, 4))
    with pytest.raises(KernelError, match="head"):
        row_order("qkv", LANE_ROW, (30,), head_dim=16)


def test_quantization_of_the_oracle_is_gguf() -> None:
    blocks = random_blocks("Q4_0", 2, 64)
    assert np.array_equal(dequantize("Q4_0", blocks), quants.dequantize(blocks, GGMLQuantizationType.Q4_0).astype(np.float64))
    assert STEP == 4 * SLOTS
