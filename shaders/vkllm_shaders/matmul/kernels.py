"""Matrix products as kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from vkllm_codegen import Block, Buffer, Kernel, Value, trace, u32
from vkllm_codegen.errors import KernelError
from vkllm_shaders.matmul.body import Body
from vkllm_shaders.matmul.integers import IntegerBody
from vkllm_shaders.matmul.spec import MatmulSpec, bindings, push_constants


@cache
def matmul(spec: MatmulSpec) -> Kernel:
    """The kernel of a spec. Dispatch: spec.groups(length of the row order, n_token).

    Bindings, in this order, those not needed left out (texels in lane_row, storage buffers in lane_chunk):
        w       u32x4 texels, packed by formats.pack with row_order(epilogue, …)
        x       f32x4 texels [row, x_stride]. The row must be zero (not NaN) from n_col to the next multiple of 64 floats: the
                padding of w is zero too, but NaN times zero is NaN, and sum(x²) counts it.
        norm_w  f32x4 texels [n_col], padded like x: finite there
        (lane_pair: x is the records of norm_w * x, and `squares` takes the place of norm_w, both as records.py says)
        bias    f32 in packed row order (formats.pack_vector)
        y       f32 [n_token, y_stride], in vectors of spec.neighbours; "residual" adds to it; or, for "qkv", q, k, v, rope:
        q       f32 [n_token, n_head * head_dim]; k, v: f16 [n_block, n_kv_head, block_size, head_dim];
        rope    f32x4 texels of f32 [positions, head_dim / 2, 2]
        ids     u32 [n_token]: for experts, the one of each row of y; or, for tiles, u32 [n_tile] the one of each tile, and
        rows    u32 [n_tile, tile]: its rows of y; NO_SLOT for none, in both (anything, where the tile has no expert)
        params  u32 [6, capacity]: for "qkv" (positions, cache rows of KV head 0) and for gather (output rows)
        with `records` y_record (of y), and for "residual" y_norm_w (f32x4 texels) and y_squares
    Push: n_chunk: chunks a row; n_group: row groups of w; x_stride: texels a row of x (lane_pair: groups of 32 columns);
        n_token: rows to compute; n_row: rows of y that these weights make ("swiglu": of the gate; "qkv": of the parts together);
        first_row: y's first of them ("qkv", "pairs": counted over q, k, v one below the other); n_col and eps: for the norm;
        capacity: T of params; y_stride: floats a row of y; squares_stride: texels a row of squares; y_squares_stride: floats.
        For experts n_token counts rows of y (tokens times experts used), n_group and n_row are those of one expert, and row i
        of y reads row i // n_share of x.
    Nothing is written for tokens from n_token on, nor for rows from n_row on, but the rest of a vector, which counts as zero
    (first_row and y_stride are whole vectors). A cache row of 0xFFFFFFFF is not written.
    """
    local = spec.lanes * (1 if spec.on_lavapipe else spec.subgroups)
    doc = "y[t, row] = epilogue(sum_k weight[row, k] * norm(x)[t, k] + bias[row])"

    def body(b: Block, bufs: dict[str, Buffer], push: dict[str, Value]) -> None:
        _body(spec)(b, spec, bufs, push).emit()

    return trace(spec.name, bindings(spec), push_constants(spec), {}, local, body, doc)


def _body(spec: MatmulSpec) -> type[Body]:
    return IntegerBody if spec.from_records else Body


OWN_BINDINGS, OWN_PUSH = ("w", "bias"), ("n_chunk", "n_group", "n_row", "first_row")
"""What the second product of a pair has of its own, under these names with `_2` at the end."""


def alike(first: MatmulSpec, second: MatmulSpec) -> bool:
    """Can these be a pair? Only the format may differ, and with it row groups side by side, and whether there is a bias."""
    return replace(second, fmt=first.fmt, bias=first.bias, side_by_side=first.side_by_side) == first


@cache
def matmul_pair(first: MatmulSpec, second: MatmulSpec) -> Kernel:
    """Two products of one x in a dispatch: their weights, and so their formats, differ. Dispatch: pair_groups.

    Bindings and push constants are those of `matmul(first)`, then those of OWN_BINDINGS and OWN_PUSH for the second, then
    n_first: workgroups of the first product.
    """
    if not alike(first, second):
        raise KernelError(f"a pair of {first.name} and {second.name}", hint="expected specs that differ in fmt and bias alone")
    shared = bindings(first)
    own = {f"{name}_2": binding for name, binding in bindings(second).items() if name in OWN_BINDINGS}
    push_names = push_constants(first) | dict.fromkeys((*(f"{name}_2" for name in OWN_PUSH), "n_first"), u32)
    local = first.lanes * (1 if first.on_lavapipe else first.subgroups)

    def body(b: Block, bufs: dict[str, Buffer], push: dict[str, Value]) -> None:
        workgroup = b.workgroup_id(first.row_axis)
        with b.when(workgroup < push["n_first"]):
            _body(first)(b, first, bufs, push).emit()
        with b.otherwise():
            other = {name.removesuffix("_2"): buffer for name, buffer in bufs.items() if name.endswith("_2")}
            numbers = {name: push[f"{name}_2"] for name in OWN_PUSH}
            _body(second)(b, second, bufs | other, push | numbers, workgroup - push["n_first"]).emit()

    name = f"{first.name}_and_{second.fmt.lower()}" + (f"_g{second.side_by_side}" if second.side_by_side > 1 else "")
    return trace(name, shared | own, push_names, {}, local, body, "two products of one x")


def pair_groups(first: MatmulSpec, second: MatmulSpec, n_packed: tuple[int, int], n_token: int) -> tuple[int, int, int]:
    """Workgroups of a pair's dispatch; see MatmulSpec.groups."""
    a, b = first.groups(n_packed[0], n_token), second.groups(n_packed[1], n_token)
    return (a[0] + b[0], *a[1:]) if first.row_axis == 0 else (a[0], a[1] + b[1], 1)
