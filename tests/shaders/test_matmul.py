"""Matmul of every format, tile, shape, epilogue and schedule against float64 on gguf-dequantized weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from check import check_kernel, lanes, nmse
from test_formats import random_blocks

from vkllm_codegen import Kernel
from vkllm_codegen.errors import KernelError
from vkllm_shaders.experts import TileSpec
from vkllm_shaders.formats import CODED, FORMATS, Layout, coded_of, pack, pack_vector, packed_nbytes, row_order
from vkllm_shaders.matmul import ALIGN_COLUMNS, OWN_BINDINGS, OWN_PUSH, MatmulSpec, alike, matmul, matmul_pair, pair_groups
from vkllm_shaders.records import GROUP, n_group, squares_stride
from vkllm_shaders.reference import NO_ID, tiles
from vkllm_shaders.reference_matmul import dequantize, experts, linear, rmsnorm, rotate, swiglu, swiglu_oai

EPS = 1e-5
NAN = np.float32(np.nan)


def records(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """v f32 [n_row, n_col] as records.py has it, and as f64 what they stand for."""
    groups = v.reshape(len(v), -1, GROUP)
    bits = (np.abs(groups).max(axis=-1) * np.float32(1 / 126.5)).view(np.uint32) & 0xFFFF0000
    scale = bits.view(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    whole = np.rint(groups * inverse[..., None]).astype(np.int8)
    totals = whole.sum(axis=-1, dtype=np.int32).view(np.uint32) & 0xFFFF
    out = np.zeros((-(-len(v) // 2), 2, groups.shape[1], 8, 2), np.uint32)  # [row pair, odd, group, lane, (bytes, tail)]
    for i in range(len(v)):
        out[i // 2, i % 2, :, :, 0] = whole[i].reshape(-1, 8, 4).view(np.uint32)[..., 0]
        out[i // 2, i % 2, :, :, 1] = (bits[i] | totals[i])[:, None]
    rounded = whole.astype(np.float64) * scale[..., None].astype(np.float64)
    return np.ascontiguousarray(out.transpose(0, 2, 3, 1, 4)).reshape(-1, 4), rounded.reshape(v.shape)


class Case:
    """Random weights of some parts, packed, with an x and what a kernel needs beside them."""

    def __init__(self, spec: MatmulSpec, n_rows: tuple[int, ...], n_col: int, n_token: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        f = FORMATS[spec.fmt]
        self.spec, self.n_rows, self.n_col, self.n_token = spec, n_rows, n_col, n_token
        parts = [random_blocks(spec.fmt, n, n_col, seed + i) for i, n in enumerate(n_rows)]
        self.weights = dequantize(spec.fmt, np.concatenate(parts))
        self.order = row_order(spec.epilogue, spec.layout, n_rows, spec.head_dim, spec.rope_pairing)
        packed = np.zeros(packed_nbytes(f, len(self.order), n_col, spec.layout), np.uint8)
        pack(f, parts, n_col, spec.layout, packed, self.order)
        self.capacity = n_token + 2
        self.rows = rng.permutation(self.capacity)[:n_token] if spec.gather else np.arange(n_token)
        self.x_all = rng.standard_normal((self.capacity, n_col)).astype(np.float32)
        width = -(-n_col // ALIGN_COLUMNS) * ALIGN_COLUMNS
        x = np.zeros((self.capacity, width), np.float32)
        x[:, :n_col] = self.x_all
        self.x = self.x_all[self.rows].astype(np.float64)
        self.buffers: dict[str, Any] = {"w": packed.view(np.uint32).reshape(-1, 4), "x": x}
        self.push: dict[str, Any] = {
            "n_chunk": f.n_chunk(n_col),
            "n_group": spec.layout.n_group(len(self.order)),
            "x_stride": width // 4,
            "n_token": n_token,
            "n_row": n_rows[0] if spec.epilogue == "swiglu" else sum(n_rows),
            "first_row": 0,
        }
        self.norm = self.bias = None
        if spec.norm:
            self.norm = rng.uniform(0.5, 1.5, n_col)
            self.buffers["norm_w"] = np.zeros(width, np.float32)
            self.buffers["norm_w"][:n_col] = self.norm
            self.push |= {"n_col": n_col, "eps": EPS}
        if spec.bias:
            self.bias = rng.standard_normal(sum(n_rows)).astype(np.float32)
            self.buffers["bias"] = pack_vector(self.bias, self.order)
        self.params = rng.integers(0, 1 << 31, (6, self.capacity)).astype(np.uint32)
        self.params[5, :n_token] = self.rows
        self.y = linear(self.weights, self.x, self.bias, self.norm, EPS)
        if spec.from_records:
            self.give_records()

    def give_records(self) -> None:
        """x as records; then `y` is what these multiply to."""
        norm = np.ones(self.n_col) if self.norm is None else self.norm
        self.buffers["x"], rounded = records(self.x_all * norm.astype(np.float32))
        self.push |= {"x_stride": n_group(self.n_col), "n_chunk": coded_of(self.spec.fmt).n_chunk(self.n_col)}
        factor = np.ones((self.n_token, 1))
        if self.norm is not None:
            stride = squares_stride(self.n_col)
            self.buffers["squares"] = np.zeros((self.capacity, stride), np.float32)
            by_group = self.x_all.astype(np.float64).reshape(self.capacity, -1, GROUP)
            self.buffers["squares"][:, : n_group(self.n_col)] = (by_group**2).sum(axis=-1)
            self.push["squares_stride"] = stride // 4
            factor = 1.0 / np.sqrt(np.mean(self.x**2, axis=1, keepdims=True) + EPS)
        self.y = linear(self.weights, rounded[self.rows]) * factor + (0 if self.bias is None else self.bias)

    def run(self, outputs: dict[str, np.ndarray], max_nmse: float = 1e-6, **options: Any) -> dict[str, np.ndarray]:
        size = None if self.spec.on_lavapipe else self.spec.subgroup
        groups = self.spec.groups(len(self.order), self.n_token)
        return self.run_kernel(matmul(self.spec), groups, outputs, max_nmse=max_nmse, subgroup_size=size, **options)

    def run_kernel(self, kernel: Kernel, groups: tuple[int, int, int], outputs: dict[str, np.ndarray], **options: Any) -> Any:
        """This case on any kernel with the bindings and push constants of matmul."""
        if any(b.name == "params" for b in kernel.bindings):
            self.buffers["params"] = self.params
            self.push["capacity"] = self.capacity
        buffers = {b.name: self.buffers[b.name] for b in kernel.bindings}
        return check_kernel(kernel, outputs, buffers, self.push, {}, groups, **options)

    def check(self, max_nmse: float = 1e-6, first_row: int = 3, **options: Any) -> float:
        """The row-wise epilogues, into a y with room to the left and right that must stay as it is. Returns: the NMSE.

        The rest of a vector of neighbours counts as a result: zero, or zero more.
        """
        spec, rng, near = self.spec, np.random.default_rng(1), self.spec.neighbours
        n = int(self.push["n_row"])
        first_row = -(-first_row // near) * near
        end = -(-(first_row + n) // near) * near
        width = end + -(-2 // near) * near
        rows, rest = slice(first_row, first_row + n), slice(first_row + n, end)
        self.push |= {"y_stride": width, "first_row": first_row}
        before = rng.standard_normal((self.n_token, width)).astype(np.float32)
        if spec.epilogue == "swiglu":
            result = swiglu(self.y[:, :n], self.y[:, n:])
        else:
            result = self.y + (before[:, rows] if spec.epilogue == "residual" else 0)
        expected = before.astype(np.float64)
        expected[:, rows] = result
        if spec.gated:
            expected[:, rest] = 0.0
        self.buffers["y"] = before
        got = self.run({"y": expected}, max_nmse, **options)["y"].reshape(before.shape)
        assert np.array_equal(np.delete(got, rows, axis=1), np.delete(expected, rows, axis=1).astype(np.float32))
        return nmse(got[:, rows], result)

    def check_qkv(self, n_head: int, n_kv: int, first_head: int = 0) -> None:
        """q, and the cache rows of k and v; `first_head`: where in q;k;v these parts begin."""
        spec, rng, hd, t = self.spec, np.random.default_rng(2), self.spec.head_dim, self.n_token
        n_slot, n_position, block_size = 16, 32, 4
        slots = rng.permutation(n_slot)[:t].astype(np.uint32)
        slots[t // 2] = 0xFFFFFFFF if t > 1 else slots[t // 2]
        positions = rng.integers(0, n_position, t)
        first_rows = slots // block_size * block_size * n_kv + slots % block_size
        self.params[1, :t], self.params[2, :t] = positions, np.where(slots < n_slot, first_rows, slots)
        angle = rng.uniform(-3, 3, (n_position, hd // 2))
        table = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
        whole = np.zeros((t, (n_head + 2 * n_kv) * hd))
        start = first_head * hd
        whole[:, start : start + self.y.shape[1]] = self.y
        rotated = rotate(whole, table[positions].astype(np.float64), hd, spec.rope_pairing)
        q_end, k_end = n_head * hd, (n_head + n_kv) * hd
        have = np.zeros(whole.shape[1], bool)
        have[start : start + self.y.shape[1]] = True
        before = {
            "q": rng.standard_normal((t, q_end)).astype(np.float32),
            "k": rng.standard_normal((n_slot, n_kv * hd)).astype(np.float16),
            "v": rng.standard_normal((n_slot, n_kv * hd)).astype(np.float16),
        }
        expected = {name: a.astype(np.float64) for name, a in before.items()}
        expected["q"][:, have[:q_end]] = rotated[:, :q_end][:, have[:q_end]]
        for name, values, mask in (("k", rotated[:, q_end:k_end], have[q_end:k_end]), ("v", whole[:, k_end:], have[k_end:])):
            for i in range(t):
                if slots[i] != 0xFFFFFFFF:
                    expected[name][slots[i], mask] = values[i, mask]
        self.buffers |= before | {"rope": table}
        self.push |= {"n_head": n_head, "n_kv_head": n_kv, "block_size": block_size, "first_row": start}
        for arrays in (self.buffers, expected):
            for name in "kv":
                by_slot = arrays[name].reshape(n_slot // block_size, block_size, n_kv, hd)
                arrays[name] = by_slot.swapaxes(1, 2).copy()
        self.run(expected, 1e-6)


def layout_row() -> Layout:
    return Layout("lane_row", lanes(), 4)


def spec_of(fmt: str, kind: str, **fields: Any) -> MatmulSpec:
    if kind == "lane_row":
        return MatmulSpec(fmt, layout_row(), **fields)
    if kind == "lane_pair":
        return MatmulSpec(fmt, Layout("lane_pair", 8, 4), activations="int8", **fields)
    return MatmulSpec(fmt, Layout("lane_chunk", 1, fields.pop("rows", 4)), subgroup=lanes(), subgroups=2, **fields)


INT8: dict[str, dict[str, Any]] = {"lane_chunk": {"activations": "int8"}, "lane_pair": {}}
SHAPES = {1: (172, 32, 256), 32: (32, 896, 64), 256: (256, 768, 256)}


@pytest.mark.parametrize("kind", ["lane_row", "lane_chunk"])
@pytest.mark.parametrize("tile", [1, 8])
@pytest.mark.parametrize("fmt", FORMATS)
def test_formats_and_shapes(fmt: str, tile: int, kind: str, figure: Any) -> None:
    spec, errors = spec_of(fmt, kind, tile=tile), []
    for i, (n_row, n_token) in enumerate([(7, 1), (100, 2), (33, 3)] if tile == 1 else [(32, 8), (1, 3), (100, 13)]):
        case = Case(spec, (n_row,), SHAPES[FORMATS[fmt].block][i], n_token, seed=i)
        errors.append(case.check(interpreted=i == 0 and tile == 1))
    product = "matvec" if tile == 1 else "GEMM"
    figure(fmt, "gguf's dequantize, float64", f"NMSE, {product}, {kind}, f32 activations", max(errors), 1e-6)


@pytest.mark.parametrize("kind", ["lane_row", "lane_chunk"])
@pytest.mark.parametrize("tile", [1, 2, 4])
@pytest.mark.parametrize(
    "fused",
    [
        {"norm": True, "bias": True},
        {"epilogue": "residual", "bias": True},
        {"epilogue": "swiglu", "norm": True},
        {"norm": True, "gather": True},
    ],
    ids=str,
)
def test_fused_work(fused: dict[str, Any], tile: int, kind: str) -> None:
    fmt = {1: "Q5_0", 2: "Q4_K", 4: "Q8_0"}[tile]
    n_rows = (52, 52) if fused.get("epilogue") == "swiglu" else (52,)
    Case(spec_of(fmt, kind, tile=tile, **fused), n_rows, 256, 3).check()


@pytest.mark.parametrize("kind", ["lane_row", "lane_chunk"])
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("tile", [1, 4])
def test_qkv_with_rope_and_cache(tile: int, pairing: str, kind: str) -> None:
    spec = spec_of("Q8_0", kind, tile=tile, norm=True, bias=True, epilogue="qkv", rope_pairing=pairing, head_dim=16)
    Case(spec, (48, 16, 16), 64, 5).check_qkv(3, 1)
    Case(spec, (48,), 64, 1).check_qkv(3, 1)
    Case(spec, (32,), 64, 3).check_qkv(3, 2, first_head=5)  # v alone, of another type than q and k


@pytest.mark.parametrize("kind", ["lane_row", "lane_pair", "lane_chunk"])
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("tile", [1, 4])
def test_pairs_are_stored_where_heads_expect_them(tile: int, pairing: str, kind: str) -> None:
    """The weights of "qkv", the product of "store"."""
    spec = spec_of("Q8_0", kind, tile=tile, norm=True, bias=True, epilogue="pairs", rope_pairing=pairing, head_dim=16)
    Case(spec, (48, 16, 16), 64, 5).check(first_row=16)
    Case(spec, (32,), 64, 3).check(first_row=0)


@pytest.mark.parametrize("kind", ["lane_row", "lane_pair", "lane_chunk"])
@pytest.mark.parametrize(("tile", "n_token"), [(1, 1), (4, 6)])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, False)])
def test_two_formats_in_one_dispatch(biases: tuple[bool, bool], tile: int, n_token: int, kind: str) -> None:
    """Rows of Q5_0, then rows of Q8_0, side by side in y; both have the same x and norm."""
    first, second = (
        Case(spec_of(fmt, kind, tile=tile, norm=True, bias=bias), (n_row,), 128, n_token, seed=3)
        for fmt, n_row, bias in (("Q5_0", 70, biases[0]), ("Q8_0", 33, biases[1]))
    )
    assert np.array_equal(first.x, second.x)
    second.push["first_row"] = 70
    kernel = matmul_pair(first.spec, second.spec)
    groups = pair_groups(first.spec, second.spec, (len(first.order), len(second.order)), n_token)
    push = first.push | {f"{name}_2": second.push[name] for name in OWN_PUSH}
    push |= {"y_stride": 103, "n_first": first.spec.groups(len(first.order), n_token)[first.spec.row_axis]}
    buffers = first.buffers | {f"{name}_2": second.buffers[name] for name in OWN_BINDINGS if name in second.buffers}
    buffers["y"] = np.full((n_token, 103), np.nan, np.float32)
    check_kernel(
        kernel,
        {"y": np.concatenate([first.y, second.y], axis=1)},
        {b.name: buffers[b.name] for b in kernel.bindings},
        {name: push[name] for name, _, _ in kernel.push},
        {},
        groups,
        subgroup_size=first.spec.subgroup if kind == "lane_chunk" else None,
    )


def test_a_pair_must_be_alike() -> None:
    assert alike(spec_of("Q4_K", "lane_row"), spec_of("Q6_K", "lane_row"))
    assert alike(spec_of("Q4_K", "lane_pair"), spec_of("Q6_K", "lane_pair"))
    assert not alike(spec_of("Q4_K", "lane_pair"), spec_of("F16", "lane_row"))
    spec = spec_of("Q5_0", "lane_row", norm=True)
    with pytest.raises(KernelError, match="a pair of"):
        matmul_pair(spec, spec_of("Q8_0", "lane_row"))


def as_q8(x: np.ndarray) -> np.ndarray:
    """x as llama.cpp's CPU backend sees it: 8 bits for each 32 values, with an f16 scale."""
    blocks = x.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    return (np.round(blocks / scale) * scale.astype(np.float16)).reshape(x.shape)


@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize(
    ("fmt", "kind"), [(f.name, "lane_chunk") for f in FORMATS.values() if f.n_sub] + [(fmt, "lane_pair") for fmt in CODED]
)
def test_int8_activations_are_as_good_as_llama_cpp(fmt: str, kind: str, tile: int, figure: Any) -> None:
    case = Case(spec_of(fmt, kind, tile=tile, **INT8[kind]), (100,), 512, 5)
    case.y = linear(case.weights, case.x)
    peer = linear(case.weights, as_q8(case.x))
    error = np.sum((peer - case.y) ** 2) / np.sum(case.y**2)
    found, product = case.check(max_nmse=1.2 * error), "matvec" if tile == 1 else "GEMM"
    figure(fmt, "8 bits as llama.cpp's CPU backend rounds", f"NMSE, {product}, {kind}, int8 activations", found, 1.2 * error)


@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize(
    ("fmt", "kind"),
    [(fmt, kind) for fmt in ("Q4_0", "Q5_0", "Q8_0") for kind in INT8]
    + [("IQ4_NL", "lane_chunk"), ("Q6_K", "lane_pair"), ("Q3_K", "lane_pair")],
)
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x80, 0x7F])
def test_int8_sums_of_extremes_do_not_overflow(byte: int, fmt: str, kind: str, tile: int) -> None:
    f, spec = FORMATS[fmt], spec_of(fmt, kind, tile=tile, **INT8[kind])
    case = Case(spec, (100,), 256, 5)
    blocks = np.full((100, 256 // f.block, f.block_bytes), byte, np.uint8)
    blocks[::3] ^= 0xFF  # rows of both signs share a word
    at = {"Q3_K": 108, "Q6_K": 208}.get(fmt, 0)
    blocks[..., at : at + 2] = np.array([1.0], np.float16).view(np.uint8)
    flat = blocks.reshape(100, -1)
    pack(f, flat, 256, spec.layout, case.buffers["w"].view(np.uint8).reshape(-1), case.order)
    case.x = np.where(np.arange(5)[:, None] % 2, 1.0, -1.0) * np.ones(256)
    case.x_all[:5] = case.x
    case.weights = dequantize(fmt, flat)
    case.y = linear(case.weights, case.x)
    if spec.from_records:
        case.give_records()
    else:
        case.buffers["x"][:5] = case.x
    case.check()


def test_int8_activations_hide_no_nan() -> None:
    case = Case(spec_of("Q4_0", "lane_chunk", activations="int8"), (40,), 64, 1)
    for bad in (np.nan, np.inf):
        case.buffers["x"][0, 40] = bad
        case.buffers["y"] = np.zeros((1, 40), np.float32)
        case.push |= {"y_stride": 40, "first_row": 0}
        got = case.run({}, interpreted=False, glsl=False)["y"]
        assert not np.isfinite(got).any()


def check_experts(
    spec: MatmulSpec,
    n_expert: int,
    n_row: int,
    n_col: int,
    n_token: int,
    n_used: int,
    *,
    x_per_slot: bool,
    max_nmse: float = 1e-6,
) -> None:
    """Experts of random weights; gated ones of two parts. x has a row a token, or one for each token and slot."""
    rng, f, gated = np.random.default_rng(n_row), FORMATS[spec.fmt], spec.epilogue != "store"
    n_rows, n = (n_row, n_row) if gated else (n_row,), n_token * n_used
    order = row_order(spec.epilogue, spec.layout, n_rows)
    blocks = random_blocks(spec.fmt, n_expert * sum(n_rows), n_col).reshape(n_expert, sum(n_rows), -1)
    packed = np.zeros((n_expert, packed_nbytes(f, len(order), n_col, spec.layout)), np.uint8)
    for e in range(n_expert):
        pack(f, blocks[e], n_col, spec.layout, packed[e], order)
    ids = np.concatenate([rng.permutation(n_expert)[:n_used] for _ in range(n_token)]).astype(np.uint32)
    n_share = 1 if x_per_slot else n_used
    x = np.zeros((n // n_share, -(-n_col // ALIGN_COLUMNS) * ALIGN_COLUMNS), np.float32)
    x[:, :n_col] = rng.standard_normal((len(x), n_col))
    rows = np.repeat(x[:, :n_col].astype(np.float64), n_share, axis=0)
    bias = 4 * rng.standard_normal((n_expert, sum(n_rows))) if spec.bias else None
    norm = rng.uniform(0.5, 1.5, n_col)
    weights = np.stack([dequantize(spec.fmt, blocks[e]) for e in range(n_expert)])
    y = experts(weights, rmsnorm(rows, norm, EPS) if spec.norm else rows, ids, bias)
    gate = {"swiglu": swiglu, "swiglu_oai": swiglu_oai}.get(spec.epilogue)
    y = gate(y[:, :n_row], y[:, n_row:]) if gate else y
    buffers = {
        "w": packed.view(np.uint32).reshape(-1, 4),
        "x": x,
        "norm_w": np.pad(norm, (0, x.shape[1] - n_col)).astype(np.float32),
        "ids": ids,
        "y": rng.standard_normal((n, n_row + 5)).astype(np.float32),
    }
    n_tiled = n
    if spec.in_tiles:
        n_tile = TileSpec(n_expert, spec.tile).n_tile(n) + 1
        buffers["ids"], buffers["rows"] = tiles(ids, spec.tile, n_tile)
        buffers["rows"][buffers["ids"] == NO_ID] = 0  # what was there before
        n_tiled = n_tile * spec.tile
    if bias is not None:
        buffers["bias"] = np.concatenate([pack_vector(b.astype(np.float32), order) for b in bias])
    expected = buffers["y"].astype(np.float64)
    expected[:, 2 : 2 + n_row] = y
    push = {"n_chunk": f.n_chunk(n_col), "n_group": spec.layout.n_group(len(order)), "x_stride": x.shape[1] // 4}
    push |= {"n_token": n, "n_row": n_row, "first_row": 2, "y_stride": n_row + 5, "n_share": n_share, "n_col": n_col, "eps": EPS}
    if spec.from_records:
        buffers["x"], _ = records(x[:, :n_col])
        push |= {"x_stride": n_group(n_col), "n_chunk": coded_of(spec.fmt).n_chunk(n_col)}
    kernel = matmul(spec)
    check_kernel(
        kernel,
        {"y": expected},
        {b.name: buffers[b.name] for b in kernel.bindings},
        {name: push[name] for name, _, _ in kernel.push},
        {},
        spec.groups(len(order), n_tiled),
        max_nmse=max_nmse,
        subgroup_size=None if spec.on_lavapipe else spec.subgroup,
    )


@pytest.mark.parametrize("kind", ["lane_row", "lane_chunk"])
@pytest.mark.parametrize(
    "fmt, fused, sizes",
    [
        ("Q4_K", {"epilogue": "swiglu", "norm": True}, (5, 33, 256, 3, 2)),
        ("MXFP4", {"epilogue": "swiglu_oai", "norm": True, "bias": True}, (32, 40, 96, 2, 4)),
        ("MXFP4", {"bias": True}, (3, 7, 64, 1, 3)),
        ("Q8_0", {}, (1, 1, 32, 4, 1)),
        ("F16", {"epilogue": "swiglu"}, (7, 17, 36, 2, 6)),
    ],
    ids=str,
)
def test_experts(fmt: str, fused: dict[str, Any], sizes: tuple[int, ...], kind: str) -> None:
    check_experts(spec_of(fmt, kind, experts=True, **fused), *sizes, x_per_slot="epilogue" not in fused)


@pytest.mark.parametrize("kind", ["lane_row", "lane_chunk"])
@pytest.mark.parametrize(
    "fmt, tile, fused, sizes",
    [
        ("MXFP4", 4, {"epilogue": "swiglu_oai", "norm": True, "bias": True}, (5, 40, 96, 9, 2)),
        ("Q8_0", 2, {"bias": True}, (40, 7, 64, 5, 3)),
    ],
    ids=str,
)
def test_tiles_of_experts(fmt: str, tile: int, fused: dict[str, Any], sizes: tuple[int, ...], kind: str) -> None:
    check_experts(spec_of(fmt, kind, experts=True, tile=tile, **fused), *sizes, x_per_slot="epilogue" not in fused)


@pytest.mark.parametrize("tile", [1, 4])
def test_experts_with_int8_activations(tile: int) -> None:
    spec = spec_of("Q4_K", "lane_pair", experts=True, tile=tile)
    check_experts(spec, 6, 50, 512, 3, 2, x_per_slot=True, max_nmse=5e-5)


def test_experts_are_only_where_they_can_be() -> None:
    for fields in ({"gather": True}, {"epilogue": "residual"}):
        with pytest.raises(KernelError, match="experts"):
            MatmulSpec("Q8_0", experts=True, **fields)
