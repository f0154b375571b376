"""RMS normalization of rows: alone, and added to a residual. Most norms are fused into the matrix product that follows."""

from __future__ import annotations

from functools import cache

from vkllm_codegen import Block, Buffer, Kernel, Value, f32, f32x4, kernel, read, readwrite, texel, u32, write


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


@cache
def rmsnorm_add(workgroup: int = 64) -> Kernel:
    """y[r] += x[r] * rsqrt(mean(x[r]²) + eps) * w. One workgroup a row. Dispatch: (n_row, 1, 1).

    x: f32x4 texels, rows of x_stride floats (a multiple of 4); w: f32x4 texels of n_col floats; what lies beyond n_col in either
    is read and not used. y: f32 rows of y_stride floats. Push: n_row, n_col, x_stride, y_stride, eps.
    """

    @kernel(
        x=texel(f32x4),
        w=texel(f32x4),
        y=readwrite(f32),
        push={"n_row": u32, "n_col": u32, "x_stride": u32, "y_stride": u32, "eps": f32},
        spec={"WG": workgroup},
        name="rmsnorm_add",
    )
    def body(
        b: Block,
        x: Buffer,
        w: Buffer,
        y: Buffer,
        *,
        n_row: Value,
        n_col: Value,
        x_stride: Value,
        y_stride: Value,
        eps: Value,
        WG: Value,
    ) -> None:
        row, lane, n_texel = b.workgroup_id(0), b.local_id(0), (n_col + 3) // 4
        start = row * (x_stride // 4)

        # 1. Each invocation sums a strided slice, four columns at a time, in f32.
        total = b.var(f32, 0.0)
        with b.range(lane, n_texel, step=WG) as i:
            four = x[start + i]
            parts = [b.select(i * 4 + c < n_col, four[c], 0.0) for c in range(4)]
            total.add((parts[0] * parts[0] + parts[1] * parts[1]) + (parts[2] * parts[2] + parts[3] * parts[3]))

        # 2. Combine across the workgroup (all invocations arrive).
        scale = b.rsqrt(b.workgroup_reduce_add(total.get()) / n_col.to(f32) + eps)

        # 3. Scale and add.
        with b.range(lane, n_texel, step=WG) as i:
            added = x[start + i] * w[i] * scale
            for c in range(4):
                with b.when(i * 4 + c < n_col):
                    at = row * y_stride + i * 4 + c
                    y[at] = y[at] + added[c]

    return body
