"""GEMM for GPUs against float64: formats, awkward shapes, every epilogue, on cooperative matrices where the device has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from check import device, lanes
from test_matmul import Case

from vkllm_codegen.errors import KernelError
from vkllm_shaders.formats import FORMATS, Layout
from vkllm_shaders.gemm import TILES, GemmSpec, fitted, gemm
from vkllm_shaders.matmul import MatmulSpec
from vkllm_shaders.reference_matmul import linear

F16_NMSE = 5e-7  # two roundings to 11 bits: about 8e-8 in the mean, more where few values make the sum


def spec_of(fmt: str, path: str, rows: int = 16, tokens: int = 16, **fields: Any) -> GemmSpec:
    """A small tile, for whatever subgroups the device has. Skips where it has no cooperative matrices."""
    product = MatmulSpec(fmt, Layout("lane_chunk", 1, fields.pop("layout_rows", 4)), subgroup=lanes(), subgroups=1, **fields)
    if path == "plain":
        return GemmSpec(product, rows, tokens, 16)
    shapes = [s[:3] for s in device().limits.coop_shapes if s[3:] == ("f16", "f16", "f32", "f32")]
    if not shapes or "coopmat" not in device().limits.features:
        pytest.skip("the device has no cooperative matrices of f16 x f16 -> f32 (Mesa's lavapipe has them from 25 on)")
    shape = min(shapes)
    invocations = max(16, 2 * lanes())
    rows = max(rows, invocations // lanes() * shape[0])
    return GemmSpec(product, rows, max(tokens, shape[1], invocations // 16), invocations, shape)


class GemmCase(Case):
    """A case of matmul, done by a gemm."""

    def __init__(self, spec: GemmSpec, n_rows: tuple[int, ...], n_col: int, n_token: int, seed: int = 0) -> None:
        super().__init__(spec.product, n_rows, n_col, n_token, seed)
        self.gemm = spec

    def run(self, outputs: dict[str, np.ndarray], max_nmse: float = 1e-6, **options: Any) -> dict[str, np.ndarray]:
        groups = self.gemm.groups(len(self.order), self.n_token)
        return self.run_kernel(gemm(self.gemm), groups, outputs, max_nmse=max_nmse, subgroup_size=lanes(), **options)


PATHS = ["plain", "coop"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_formats(fmt: str, path: str, figure: Any) -> None:
    f = FORMATS[fmt]
    found = GemmCase(spec_of(fmt, path), (19,), max(64, f.block) + f.block, 17).check(interpreted=False)
    figure(fmt, "gguf's dequantize, float64", f"NMSE, gemm, {path}", found, 1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("n_row", "n_col", "n_token"),
    [(1, 32, 1), (15, 64, 16), (16, 96, 15), (17, 32, 17), (31, 160, 2), (32, 64, 70), (61, 352, 33), (113, 64, 5)],
)
def test_shapes(n_row: int, n_col: int, n_token: int, path: str) -> None:
    GemmCase(spec_of("Q8_0", path), (n_row,), n_col, n_token, seed=n_row).check(interpreted=n_row == 17)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("rows", "tokens"), [(32, 16), (32, 32), (64, 32)])
def test_tiles(rows: int, tokens: int, path: str) -> None:
    GemmCase(spec_of("Q4_0", path, rows, tokens, norm=True), (rows + 3,), 128, tokens + 1).check(interpreted=False)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("fmt", "rows"), [("Q5_0", 2), ("Q6_K", 8)])
def test_layouts(fmt: str, rows: int, path: str) -> None:
    GemmCase(spec_of(fmt, path, layout_rows=rows), (18,), 512, 17).check(interpreted=False)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "fused",
    [
        {"norm": True, "bias": True},
        {"epilogue": "residual", "bias": True},
        {"epilogue": "swiglu", "norm": True},
        {"norm": True, "gather": True},
        {"large": True},
    ],
    ids=str,
)
def test_fused_work(fused: dict[str, Any], path: str) -> None:
    n_rows = (21, 21) if fused.get("epilogue") == "swiglu" else (21,)
    GemmCase(spec_of("Q8_0", path, **fused), n_rows, 96, 19).check(interpreted=False)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_qkv_with_rope_and_cache(pairing: str, path: str) -> None:
    spec = spec_of("Q8_0", path, norm=True, bias=True, epilogue="qkv", rope_pairing=pairing, head_dim=16)
    GemmCase(spec, (48, 16, 16), 64, 13).check_qkv(3, 1)
    GemmCase(spec, (32,), 64, 3).check_qkv(3, 2, first_head=5)  # v alone, of another type than q and k


@pytest.mark.parametrize("path", PATHS)
def test_tokens_beyond_the_range_of_f16(path: str) -> None:
    """Tokens of all sizes in one tile: each has its own scale, and an error of its own."""
    case = GemmCase(spec_of("Q8_0", path), (24,), 96, 7)
    sizes = 10.0 ** np.array([-12, -5, 0, 4, 6, 12, 30])
    case.buffers["x"][:7] *= sizes[:, None].astype(np.float32)
    case.buffers["y"] = np.zeros((7, 24), np.float32)
    case.push |= {"y_stride": 24, "first_row": 0}
    x = case.buffers["x"][:7, :96].astype(np.float64)
    got = case.run({}, interpreted=False)["y"].astype(np.float64)
    expected = linear(case.weights, x)
    error = np.sum((got - expected) ** 2, axis=1) / np.sum(expected**2, axis=1)
    assert error.max() <= F16_NMSE


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_nan_is_hidden(bad: float, path: str) -> None:
    case = GemmCase(spec_of("Q8_0", path), (24,), 96, 3)
    case.buffers["x"][1, 40] = bad
    case.buffers["y"] = np.zeros((3, 24), np.float32)
    case.push |= {"y_stride": 24, "first_row": 0}
    got = case.run({}, interpreted=False)["y"].reshape(3, 24)
    assert not np.isfinite(got[1]).any()
    assert np.isfinite(got[[0, 2]]).all()


def test_a_weight_beyond_f16_is_not_silent() -> None:
    case = GemmCase(spec_of("F32", "coop"), (24,), 64, 3)
    case.buffers["w"].view(np.float32).reshape(-1)[0] = 1e9
    case.buffers["y"] = np.zeros((3, 24), np.float32)
    case.push |= {"y_stride": 24, "first_row": 0}
    got = case.run({}, interpreted=False)["y"].reshape(3, 24)
    assert (~np.isfinite(got)).sum() == 3  # one row of weights


def test_cooperative_is_exact_but_for_the_rounding_to_f16() -> None:
    """Against x and weights rounded to f16 beforehand, only f32 sums are left."""
    case = GemmCase(spec_of("Q8_0", "coop"), (24,), 256, 20)
    weights, x = case.weights.astype(np.float16).astype(np.float64), case.x.astype(np.float16).astype(np.float64)
    case.y = linear(weights, x)
    case.check(max_nmse=1e-10, interpreted=False)


def test_a_kernel_for_every_device() -> None:
    """The largest tile that fits; none where a tile would be mostly empty, or matmul has kernels that gemm has not."""
    product = MatmulSpec("Q4_K", Layout("lane_chunk", 1, 4), norm=True, subgroup=32)
    wide = tuple((16, n, 16, "f16", "f16", kind, kind) for kind in ("f16", "f32") for n in (8, 16))
    best = fitted(product, 512, 49152, 1024, wide)
    assert best is not None and (best.rows, best.tokens, best.coop) == (128, 64, (16, 16, 16))
    for shared in (49152, 32768, 16384):
        for shapes in ((), wide):
            for n_token in (16, 33, 512):
                spec = fitted(product, n_token, shared, 128, shapes)
                assert spec is not None and spec.shared_nbytes <= shared and (spec.rows, spec.tokens) in TILES
                assert spec.tokens < 2 * n_token
                assert spec.coop is None if not shapes else spec.coop is not None
    assert fitted(product, 15, 49152, 1024, wide) is None
    assert fitted(product, 512, 2048, 1024, wide) is None
    assert fitted(MatmulSpec("Q8_0", product.layout, activations="int8"), 512, 49152, 1024, wide) is None


def test_what_does_not_fit_is_named() -> None:
    product = MatmulSpec("Q8_0", Layout("lane_chunk", 1, 4), subgroup=8)
    with pytest.raises(KernelError, match="a gemm of matmul_q8_0_lane_row"):
        GemmSpec(MatmulSpec("Q8_0"))
    with pytest.raises(KernelError, match="rows into matrices"):
        GemmSpec(product, 24, 16, 16, (16, 16, 16))
    with pytest.raises(KernelError, match="whole subgroups"):
        GemmSpec(MatmulSpec("Q8_0", product.layout, subgroup=32), 16, 16, 16, (16, 16, 16))
