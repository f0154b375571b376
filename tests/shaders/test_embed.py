"""Embedding lookup of every format and layout: rows come back as gguf dequantizes them, padding columns as zeros."""

from __future__ import annotations

import numpy as np
import pytest
from check import check_kernel, lanes
from test_formats import random_blocks

from vkllm_shaders.embed import embed, groups
from vkllm_shaders.formats import FORMATS, Layout, pack, packed_nbytes
from vkllm_shaders.reference_matmul import dequantize


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
        groups(fmt, n_col, len(ids)),
    )
