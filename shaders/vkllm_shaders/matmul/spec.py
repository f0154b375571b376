"""The shape and the schedule of a matrix product: what makes a module, what it binds, what it is pushed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vkllm_codegen import Binding, DType, f16, f32, f32x4, read, readwrite, texel, u32, u32x2, u32x4, write
from vkllm_codegen.errors import KernelError
from vkllm_shaders.formats import Layout, coded_of, format_of

NO_SLOT = 0xFFFFFFFF
ALIGN_COLUMNS = 64  # rows of x are padded with zeros to a multiple of this

DEFAULT_LAYOUT = Layout()

Epilogue = Literal["store", "residual", "swiglu", "geglu", "swiglu_oai", "qkv", "pairs"]


@dataclass(frozen=True)
class MatmulSpec:
    """What one kernel does; every field makes a new module.

    fmt: ggml type; layout: how the weights are packed; tile: tokens a workgroup; norm, bias, epilogue: what is fused;
    activations: "f32" or "int8"; gather: x row i is params[5 T + i]; large: w comes through a texel view, which
    reaches further than a storage buffer (lane_row always does so); experts: w holds several matrices of equal shape, one behind
    the other, and each row of y names the one that it wants (tile > 1: each tile of rows, see experts.tiles);
    side_by_side: row groups that a workgroup of lane_pair takes together, sharing their x; wide: it multiplies four rows at once,
    in 64 bits, instead of two (tiles of formats whose sums leave room for that: Coded.fits_wide); records: what y becomes is
    written as records as well, for the next product ("residual", and "swiglu" two groups side by side);
    scale, softcap (0: none): of the product, before it is stored or added: softcap * tanh(y * scale / softcap);
    rope_pairing, head_dim: for "qkv", and for "pairs": the same weights, for a product that is stored as it is;
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
    side_by_side: int = 1
    wide: bool = False
    records: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    rope_pairing: str = "interleaved"
    head_dim: int = 0
    subgroup: int = 32
    subgroups: int = 4

    def __post_init__(self) -> None:
        if self.tile not in range(1, 17):
            raise KernelError(f"matmul with a tile of {self.tile} tokens", hint="expected 1 … 16")
        if self.experts and (self.gather or self.epilogue in ("residual", "qkv", "pairs")):
            raise KernelError(
                f"experts with gather {self.gather}, {self.epilogue}", hint="expected no gather, and an epilogue that stores"
            )
        if self.layout.kind == "lane_pair":
            coded_of(self.fmt)  # raises where there are no codes
            if self.tile > 1 and self.tile % 2:
                raise KernelError(f"{self.tile} tokens a tile of lane_pair", hint="expected 1 or an even number")
        if (self.activations == "int8") != (self.layout.kind == "lane_pair") and self.layout.kind != "lane_chunk":
            raise KernelError(
                f"{self.activations} activations in {self.layout.kind}", hint="lane_pair is for int8, lane_row for f32"
            )
        allowed: tuple[int, ...] = (1, 2, 4) if self.layout.kind == "lane_pair" else (1,)
        if self.records:
            allowed = {"residual": (1, 2, 4), "swiglu": (2, 4)}.get(self.epilogue, ())
        if self.side_by_side not in allowed:
            raise KernelError(
                f"{self.side_by_side} row groups side by side, {self.epilogue}{', records' * self.records}",
                hint="expected 1, 2 or 4 of lane_pair; records come from residual, or from swiglu with 2 or 4",
            )
        if self.wide and not (self.from_records and self.tile > 1 and coded_of(self.fmt).fits_wide):
            raise KernelError(
                f"wide products of {self.fmt}, tile {self.tile}, {self.layout.kind}",
                hint="expected 4-bit codes in tiles of lane_pair",
            )
        if self.records and self.experts:
            raise KernelError("records of experts", hint="expected a dispatch of to_records behind them")
        if self.of_heads and (self.head_dim < 4 or self.head_dim % 4):
            raise KernelError(f"{self.epilogue} with head_dim {self.head_dim}", hint="expected a multiple of 4")

    @property
    def paired(self) -> bool:
        """Does a lane hold its rows in pairs (see formats.row_order)?"""
        return self.gated or self.of_heads

    @property
    def of_heads(self) -> bool:
        """Are the pairs those that RoPE turns?"""
        return self.epilogue in ("qkv", "pairs")

    @property
    def gated(self) -> bool:
        """Is a row made of two rows of w, a gate and what it lets through?"""
        return self.epilogue in ("swiglu", "geglu", "swiglu_oai")

    @property
    def neighbours(self) -> int:
        """Rows of y that a lane writes at once, because they follow one another."""
        if not self.from_records or not (self.gated or self.epilogue == "residual"):
            return 1
        return self.layout.rows // 2 if self.gated and self.side_by_side == 1 else self.layout.rows

    @property
    def in_tiles(self) -> bool:
        """Are the rows of a tile those of one expert, as experts.tiles has put them together?"""
        return self.experts and self.tile > 1

    @property
    def on_lavapipe(self) -> bool:
        return self.layout.kind != "lane_chunk"

    @property
    def from_records(self) -> bool:
        """Does x come in 8 bits (records.py)?"""
        return self.layout.kind == "lane_pair"

    @property
    def picks_rows(self) -> bool:
        """Are the rows of x named by a buffer?"""
        return self.gather or self.experts

    @property
    def lanes(self) -> int:
        """Invocations of a subgroup."""
        return self.layout.lanes if self.on_lavapipe else self.subgroup

    @property
    def name(self) -> str:
        parts = ["matmul", self.fmt.lower(), self.layout.kind, f"s{self.lanes}", f"r{self.layout.rows}", f"t{self.tile}"]
        parts += [] if self.on_lavapipe else [f"n{self.subgroups}"]
        parts += [word for word in ("norm", "bias", "gather", "large", "experts", "records", "wide") if getattr(self, word)]
        parts += [self.epilogue] + ([f"{self.rope_pairing}{self.head_dim}"] if self.of_heads else [])
        parts += [f"g{self.side_by_side}"] if self.side_by_side > 1 else []
        parts += [f"scale{self.scale:.9g}"] if self.scale != 1.0 else []
        parts += [f"cap{self.softcap:.9g}"] if self.softcap else []
        return "_".join(parts + (["int8"] if self.activations == "int8" else []))

    def groups(self, n_packed_row: int, n_token: int) -> tuple[int, int, int]:
        """Workgroups of a dispatch. `n_packed_row`: the length of the row order (of one expert); `n_token`: rows of y, or of
        all tiles where experts.tiles made them."""
        n_group = self.layout.n_group(n_packed_row)
        together = self.side_by_side if self.on_lavapipe else self.subgroups
        counts = -(-n_group // together), -(-n_token // self.tile)
        return counts[self.row_axis], counts[1 - self.row_axis], 1

    def turns(self, n_chunk: int) -> int:
        """Turns of a workgroup's loops, at most."""
        steps = coded_of(self.fmt).steps if self.from_records else format_of(self.fmt).steps
        return n_chunk * (1 + steps)

    @property
    def row_axis(self) -> int:
        """Which dimension of the grid counts row groups; the other counts tiles of tokens. Where a row group's weights fit a
        cache, and a prompt's x too, the tiles go first."""
        return int(self.from_records and self.tile > 1)


def push_constants(spec: MatmulSpec) -> dict[str, DType]:
    """See `matmul`."""
    names = ["n_chunk", "n_group", "x_stride", "n_token", "n_row", "first_row"]
    names += ["n_col"] if spec.norm else []
    names += ["squares_stride"] if spec.norm and spec.from_records else []
    names += ["y_squares_stride"] if spec.records and spec.epilogue == "residual" else []
    names += ["n_share"] if spec.experts else []
    names += ["capacity"] if spec.gather or spec.epilogue == "qkv" else []
    names += ["n_head", "n_kv_head", "block_size"] if spec.epilogue == "qkv" else ["y_stride"]
    return dict.fromkeys(names, u32) | ({"eps": f32} if spec.norm else {})


def bindings(spec: MatmulSpec) -> dict[str, Binding]:
    bulk = texel if spec.on_lavapipe else read
    found: dict[str, Binding] = {"w": (texel if spec.large else bulk)(u32x4), "x": bulk(f32x4)}
    if spec.from_records:
        found |= {"x": texel(u32x4)} | ({"squares": texel(f32x4)} if spec.norm else {})
    elif spec.norm:
        found |= {"norm_w": bulk(f32x4)}
    found |= {"bias": read(f32)} if spec.bias else {}
    if spec.epilogue == "qkv":
        found |= {"q": write(f32), "k": write(f16), "v": write(f16), "rope": bulk(f32x4), "params": read(u32)}
    else:
        access = readwrite if spec.epilogue == "residual" else write
        found |= {"y": access(f32.with_count(spec.neighbours))}
        found |= {"y_record": write(u32x2)} if spec.records else {}
        found |= {"y_norm_w": texel(f32x4), "y_squares": write(f32)} if spec.records and spec.epilogue == "residual" else {}
        found |= {"params": read(u32)} if spec.gather else {}
        found |= {"ids": read(u32)} if spec.experts else {}
        found |= {"rows": read(u32)} if spec.in_tiles else {}
    return found
