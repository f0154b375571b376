"""Embedding lookup of every format and layout: rows come back as gguf dequantizes them, padding columns as zeros."""

from __future__ import annotations

import numpy as np
import pytest
from check import check_kernel, lanes, run_on_device
from test_formats import random_blocks

from vkllm_shaders.embed import embed, embed_codes, groups
from vkllm_shaders.formats import CODED, FORMATS, Layout, coded_of, pack, packed_nbytes, row_order
from vkllm_shaders.records import GROUP, n_group, record_nbytes, squares_stride
from vkllm_shaders.reference_matmul import dequantize
from vkllm_shaders.to_records import to_records


@pytest.mark.parametrize("kind", ["lane_row", "lane_chunk"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_come_back(fmt: str, kind: str) -> None:
    layout = Layout("lane_row", lanes(), 4) if kind == "lane_row" else Layout("lane_chunk", 1, 2)
    f = FORMATS[fmt]
    n_row, n_col = 45, {1: 172, 32: 96, 256: 512}[f.block]
    blocks = random_blocks(fmt, n_row, n_col)
    packed = np.zeros(packed_nbytes(fmt, n_row, n_col, layout), np.uint8)
    pack(fmt, blocks, n_col, layout, packed)
    ids = np.array([0, 44, 7, 8, 31, 32, 33], np.uint32)
    width = -(-n_col // 64) * 64
    expected = np.zeros((len(ids), width))
    expected[:, :n_col] = dequantize(fmt, blocks)[ids]
    buffers = {
        "w": packed.view(np.uint32).reshape(-1, 4),
        "params": np.concatenate([ids, ids[::-1]]),
        "x": np.full((len(ids), width), np.nan, np.float32),
    }
    check_kernel(
        embed(fmt, layout),
        {"x": expected},
        buffers,
        {"n_chunk": f.n_chunk(n_col), "x_stride": width // 4},
        {},
        groups(fmt, layout, n_col, len(ids)),
    )


@pytest.mark.parametrize("with_records", [False, True])
@pytest.mark.parametrize("fmt", CODED)
def test_rows_come_back_from_codes(fmt: str, with_records: bool) -> None:
    layout, f = Layout("lane_pair"), FORMATS[fmt]
    n_row, n_col = 45, {32: 96, 256: 512}[f.block]
    blocks, order = random_blocks(fmt, n_row, n_col), row_order("store", layout, [n_row])
    packed = np.zeros(packed_nbytes(fmt, len(order), n_col, layout), np.uint8)
    pack(fmt, blocks, n_col, layout, packed, order)
    ids = np.array([0, 44, 7, 8, 31, 32, 33], np.uint32)
    width = -(-n_col // 64) * 64
    x = np.full((len(ids), width), np.nan, np.float32)
    rows = dequantize(fmt, blocks)[ids].astype(np.float32)
    expected = {"x": np.where(np.arange(width) < n_col, np.pad(rows, ((0, 0), (0, width - n_col))), np.nan).astype(np.float64)}
    buffers = {"w": packed.view(np.uint32).reshape(-1, 4), "params": ids, "x": x}
    push = {"n_chunk": coded_of(fmt).n_chunk(n_col), "x_stride": width // 4, "n_group": n_group(n_col)}
    if with_records:
        norm, stride = np.random.default_rng(0).uniform(0.5, 1.5, width).astype(np.float32), squares_stride(n_col)
        buffers |= {"norm_w": norm, "record": np.zeros((record_nbytes(len(ids), n_col) // 4), np.uint32)}
        buffers |= {"squares": np.full((len(ids), stride), np.nan, np.float32)}
        expected["squares"] = np.full((len(ids), stride), np.nan)
        expected["squares"][:, : n_group(n_col)] = (rows.astype(np.float64).reshape(len(ids), -1, GROUP) ** 2).sum(axis=-1)
        push["squares_stride"] = stride
    got = check_kernel(embed_codes(fmt, records=with_records), expected, buffers, push, {}, groups(fmt, layout, n_col, len(ids)))
    if with_records:  # the same as from a dispatch of its own, to the bit
        given = {"x": got["x"], "norm_w": norm, "record": buffers["record"], "squares": buffers["squares"]}
        pushed = {"x_stride": width // 4, "n_group": n_group(n_col), "squares_stride": stride}
        other = run_on_device(to_records(norm=True), given, pushed, {}, (len(ids), 1, 1))
        for name in ("record", "squares"):
            assert np.array_equal(got[name].view(np.uint32), other[name].view(np.uint32)), name
