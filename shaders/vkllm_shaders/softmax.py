"""Softmax over rows. Attention and sampling have their own; this is the plain one, and an example to read first."""

from __future__ import annotations

from functools import cache

from vkllm_codegen import Block, Buffer, Kernel, Value, f32, kernel, read, u32, write

LOWEST = -3.0e38
"""Below every finite score that occurs; finite, so that lanes without an element add 0, not NaN."""


@cache
def softmax(workgroup: int = 64) -> Kernel:
    """y[r] = exp(x[r] - max(x[r])) / sum(exp(x[r] - max(x[r]))). One workgroup a row. Dispatch: (n_row, 1, 1)."""

    @kernel(
        x=read(f32, "n_row", "n_col"),
        y=write(f32, "n_row", "n_col"),
        push={"n_row": u32, "n_col": u32},
        spec={"WG": workgroup},
        name="softmax",
    )
    def body(b: Block, x: Buffer, y: Buffer, *, n_row: Value, n_col: Value, WG: Value) -> None:
        row, lane = b.workgroup_id(0), b.local_id(0)

        # 1. The row's maximum, so that no exponential overflows.
        highest = b.var(f32, LOWEST)
        with b.range(lane, n_col, step=WG) as i:
            highest.set(b.max(highest.get(), x[row, i]))
        top = b.workgroup_reduce_max(highest.get())

        # 2. The sum of the exponentials.
        total = b.var(f32, 0.0)
        with b.range(lane, n_col, step=WG) as i:
            total.add(b.exp(x[row, i] - top))
        scale = b.const(f32, 1.0) / b.workgroup_reduce_add(total.get())

        # 3. Scale and store: computing exp twice is cheaper than a round trip through y.
        with b.range(lane, n_col, step=WG) as i:
            y[row, i] = b.exp(x[row, i] - top) * scale

    return body
