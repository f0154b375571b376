"""The shape and the schedule of a matrix product: what makes a module, what it binds, what it is pushed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vkllm_codegen import Binding, DType, f16, f32, f32x4, read, readwrite, texel, u32, u32x4, write
from vkllm_codegen.errors import KernelError
from vkllm_shaders.formats import Layout, format_of
from vkllm_shaders.quantize import SCALE_ROWS

NO_SLOT = 0xFFFFFFFF
ALIGN_COLUMNS = 64  # rows of x are padded with zeros to a multiple of this

DEFAULT_LAYOUT = Layout()

Epilogue = Literal["store", "residual", "swiglu", "geglu", "swiglu_oai", "qkv"]


def best_tile(n_token: int) -> int:
    """The tile for so many tokens: larger ones than 4 are no faster on lavapipe (registers) and take longer to compile."""
    return 1 if n_token <= 1 else 2 if n_token == 2 else 4


@dataclass(frozen=True)
class MatmulSpec:
    """What one kernel does; every field makes a new module.

    fmt: ggml type; layout: how the weights are packed; tile: tokens a workgroup; norm, bias, epilogue: what is fused;
    activations: "f32" or "int8"; gather: x row i is params[5 T + i]; large: w comes through a texel view, which
    reaches further than a storage buffer (lane_row always does so); experts: w holds several matrices of equal shape, one behind
    the other, and each row of y names the one that it wants (tile > 1: each tile of rows, see experts.tiles);
    quantized: x comes in 8 bits, see quantize.py;
    scale, softcap (0: none): of the product, before it is stored or added: softcap * tanh(y * scale / softcap);
    rope_pairing, head_dim: for "qkv";
    subgroup, subgroups: size and number of subgroups a workgroup of lane_chunk (lane_row: layout.lanes, one).
    """

    fmt: str
    layout: Layout = DEFAULT_LAYOUT
    tile: int = 1
    norm: bool = False
    bias: bool = False
    epilogue: Epilogue = "store"
    activations: Literal["f32", "int8"] = "f32"
    gather: bool = False
    large: bool = False
    experts: bool = False
    quantized: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    rope_pairing: str = "interleaved"
    head_dim: int = 0
    subgroup: int = 32
    subgroups: int = 4

    def __post_init__(self) -> None:
        if self.tile not in range(1, 17):
            raise KernelError(f"matmul with a tile of {self.tile} tokens", hint="expected 1 … 16")
        if self.experts and (self.gather or self.epilogue in ("residual", "qkv")):
            raise KernelError(
                f"experts with gather {self.gather}, {self.epilogue}", hint="expected no gather, and an epilogue that stores"
            )
        plain = self.activations == "int8" and self.on_lavapipe and self.tile <= SCALE_ROWS and format_of(self.fmt).n_sub
        if self.quantized and (not plain or self.gather or self.experts):
            raise KernelError(
                f"quantized x with {self.fmt}, {self.layout.kind}, tile {self.tile}, {self.activations}",
                hint=f"expected lane_row, int8, a type of blocks, a tile up to {SCALE_ROWS}, no gather or experts",
            )
        if self.epilogue == "qkv" and (self.head_dim < 4 or self.head_dim % 4):
            raise KernelError(f"qkv with head_dim {self.head_dim}", hint="expected a multiple of 4")

    @property
    def paired(self) -> bool:
        """Does a lane hold its rows in pairs (see formats.row_order)?"""
        return self.epilogue in ("swiglu", "geglu", "swiglu_oai", "qkv")

    @property
    def in_tiles(self) -> bool:
        """Are the rows of a tile those of one expert, as experts.tiles has put them together?"""
        return self.experts and self.tile > 1

    @property
    def on_lavapipe(self) -> bool:
        return self.layout.kind == "lane_row"

    @property
    def lanes(self) -> int:
        """Invocations of a subgroup."""
        return self.layout.lanes if self.on_lavapipe else self.subgroup

    @property
    def name(self) -> str:
        parts = ["matmul", self.fmt.lower(), self.layout.kind, f"s{self.lanes}", f"r{self.layout.rows}", f"t{self.tile}"]
        parts += [] if self.on_lavapipe else [f"n{self.subgroups}"]
        parts += [word for word in ("norm", "bias", "gather", "large", "experts", "quantized") if getattr(self, word)]
        parts += [self.epilogue] + ([f"{self.rope_pairing}{self.head_dim}"] if self.epilogue == "qkv" else [])
        parts += [f"scale{self.scale:.9g}"] if self.scale != 1.0 else []
        parts += [f"cap{self.softcap:.9g}"] if self.softcap else []
        return "_".join(parts + (["int8"] if self.activations == "int8" else []))

    def groups(self, n_packed_row: int, n_token: int) -> tuple[int, int, int]:
        """Workgroups of a dispatch. `n_packed_row`: the length of the row order (of one expert); `n_token`: rows of y, or of
        all tiles where experts.tiles made them."""
        n_group = self.layout.n_group(n_packed_row)
        return (n_group if self.on_lavapipe else -(-n_group // self.subgroups)), -(-n_token // self.tile), 1


def push_constants(spec: MatmulSpec) -> dict[str, DType]:
    """See `matmul`."""
    names = ["n_chunk", "n_group", "x_stride", "n_token", "n_row", "first_row"]
    in_loop = spec.norm and not spec.quantized
    names += ["n_col"] if in_loop else []
    names += ["n_share"] if spec.experts else []
    names += ["capacity"] if spec.gather or spec.epilogue == "qkv" else []
    names += ["n_head", "n_kv_head"] if spec.epilogue == "qkv" else ["y_stride"]
    return dict.fromkeys(names, u32) | ({"eps": f32} if in_loop else {})


def bindings(spec: MatmulSpec) -> dict[str, Binding]:
    bulk = texel if spec.on_lavapipe else read
    found: dict[str, Binding] = {"w": (texel if spec.large else bulk)(u32x4), "x": bulk(f32x4)}
    if spec.quantized:
        found |= {"x": texel(u32x4), "scales": texel(f32x4)} | ({"norms": read(f32)} if spec.norm else {})
    elif spec.norm:
        found |= {"norm_w": bulk(f32x4)}
    found |= {"bias": read(f32)} if spec.bias else {}
    if spec.epilogue == "qkv":
        found |= {"q": write(f32), "k": write(f16), "v": write(f16), "rope": bulk(f32x4), "params": read(u32)}
    else:
        found |= {"y": readwrite(f32) if spec.epilogue == "residual" else write(f32)}
        found |= {"params": read(u32)} if spec.gather else {}
        found |= {"ids": read(u32)} if spec.experts else {}
        found |= {"rows": read(u32)} if spec.in_tiles else {}
    return found
