"""RMS normalization of rows. In a model's chain it is fused into the matrix product that follows; this is the plain one."""

from __future__ import annotations

from functools import cache

from vkllm_codegen import Block, Buffer, Kernel, Value, f32, kernel, read, u32, write


@cache
def rmsnorm(workgroup: int = 64) -> Kernel:
    """y[r] = x[r] * rsqrt(mean(x[r]²) + eps) * w. One workgroup a row. Dispatch: (n_row, 1, 1). Source: arXiv 1910.07467."""

    @kernel(
        x=read(f32, "n_row", "n_col"),
        w=read(f32, "n_col"),
        y=write(f32, "n_row", "n_col"),
        push={"n_row": u32, "n_col": u32, "eps": f32},
        spec={"WG": workgroup},
        name="rmsnorm",
    )
    def body(b: Block, x: Buffer, w: Buffer, y: Buffer, *, n_row: Value, n_col: Value, eps: Value, WG: Value) -> None:
        row, lane = b.workgroup_id(0), b.local_id(0)

        # 1. Each invocation sums a strided slice, in f32.
        total = b.var(f32, 0.0)
        with b.range(lane, n_col, step=WG) as i:
            total.add(x[row, i] * x[row, i])

        # 2. Combine across the workgroup (all invocations arrive).
        scale = b.rsqrt(b.workgroup_reduce_add(total.get()) / n_col.to(f32) + eps)

        # 3. Scale and store.
        with b.range(lane, n_col, step=WG) as i:
            y[row, i] = x[row, i] * scale * w[i]

    return body
