"""Rotary position embedding of a row's heads, in place. A model's chain fuses it into the QKV product; this is the plain one."""

from __future__ import annotations

from functools import cache
from typing import Literal

from vkllm_codegen import Block, Buffer, Kernel, Value, f32, kernel, read, readwrite, u32

Pairing = Literal["interleaved", "half"]


@cache
def rope(head_dim: int, pairing: Pairing, workgroup: int = 64) -> Kernel:
    """Turn each pair of x f32 [T, n_head, head_dim] by the angle of its row's position. Dispatch: (T, 1, 1).

    Pairs are (2j, 2j + 1) when "interleaved", (j, j + head_dim / 2) when "half". The angles come from `table`, f32
    [n_ctx, head_dim / 2, 2] of (cos, sin): frequency factors and partial rotation (cos 1, sin 0) are the host's business.
    `params` [n_token … 2 n_token) are the positions. Push: n_token, n_head. Source: RoFormer, arXiv 2104.09864.
    """
    n_pair = head_dim // 2

    @kernel(
        x=readwrite(f32),
        table=read(f32),
        params=read(u32),
        push={"n_token": u32, "n_head": u32},
        spec={"WG": workgroup},
        name=f"rope_{pairing}_d{head_dim}",
    )
    def body(b: Block, x: Buffer, table: Buffer, params: Buffer, *, n_token: Value, n_head: Value, WG: Value) -> None:
        row, lane = b.workgroup_id(0), b.local_id(0)
        angle = params[n_token + row] * head_dim
        with b.range(lane, n_head * n_pair, step=WG) as i:
            head, j = i // n_pair, i % n_pair
            start = (row * n_head + head) * head_dim
            first, second = (start + j * 2, start + j * 2 + 1) if pairing == "interleaved" else (start + j, start + j + n_pair)
            cos, sin = table[angle + j * 2], table[angle + j * 2 + 1]
            even, odd = x[first], x[second]
            x[first] = even * cos - odd * sin
            x[second] = even * sin + odd * cos

    return body
