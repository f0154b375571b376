"""Weights times activations, matvec and GEMM in one: every format of formats, with the work around the product fused in.

    y[t, row] = epilogue(sum_k weight[row, k] * norm(x)[t, k] + bias[row])

`matmul(spec)` makes the kernel for a `tile` of tokens. The two schedules share all arithmetic; they differ in where a lane's
weights and x come from and in who adds up:
- "lane_row" (lavapipe): one subgroup a workgroup; a lane owns `rows` rows and walks along them; each slot of x (one texel)
  lies in one lane and reaches the others by a shuffle from a constant lane. No reduction over lanes, no shared memory.
- "lane_chunk" (GPUs): a subgroup owns `rows` rows; lane after lane takes a step of 64 weights, reads its own x, and the lanes
  are added at the end. `subgroups` subgroups a workgroup, each with its own rows.

Arithmetic. One or two tokens on lavapipe: products of raw numbers are added up within a block and scaled once (zero points and
minimums by the block's sum of x). Else a weight is dequantized once and multiplied with every token's x.
activations="int8": x is rounded to 8 bits with a scale for each 32 values (GROUP slots of a step), products and their sums are
integers, scaled a block at a time; F32, F16 and BF16 weights have no blocks and keep f32.
RMSNorm needs no pass of its own: sum(x²) is gathered in the same loop and scales the result.

Source: KERNELS.md's measurements and those in bench/LOG.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from vkllm_codegen import (
    Binding,
    Block,
    Buffer,
    DType,
    Kernel,
    Value,
    f16,
    f32,
    f32x4,
    i32,
    read,
    readwrite,
    texel,
    trace,
    u32,
    u32x4,
    write,
)  # fmt: skip
from vkllm_codegen.errors import KernelError
from vkllm_shaders.formats import SLOTS, Format, Layout, StepWeights, format_of
from vkllm_shaders.quantize import SCALE_ROWS

DEQUANTIZE_TOKENS = 3
NO_SLOT = 0xFFFFFFFF
GROUP = 8  # slots (32 values) of x that share a scale in 8 bits
ALIGN_COLUMNS = 64  # rows of x are padded with zeros to a multiple of this

DEFAULT_LAYOUT = Layout()

OAI_LIMIT, OAI_ALPHA = 7.0, 1.702  # of gpt-oss's gated unit

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
        if self.quantized and (not plain or self.norm or self.gather or self.experts):
            raise KernelError(
                f"quantized x with {self.fmt}, {self.layout.kind}, tile {self.tile}, {self.activations}, norm {self.norm}",
                hint=f"expected lane_row, int8, a type of blocks, a tile up to {SCALE_ROWS}, no norm, gather or experts",
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
    names += ["n_col"] if spec.norm else []
    names += ["n_share"] if spec.experts else []
    names += ["capacity"] if spec.gather or spec.epilogue == "qkv" else []
    names += ["n_head", "n_kv_head"] if spec.epilogue == "qkv" else ["y_stride"]
    return dict.fromkeys(names, u32) | ({"eps": f32} if spec.norm else {})


def _bindings(spec: MatmulSpec) -> dict[str, Binding]:
    bulk = texel if spec.on_lavapipe else read
    found: dict[str, Binding] = {"w": (texel if spec.large else bulk)(u32x4), "x": bulk(f32x4)}
    if spec.quantized:
        found |= {"x": texel(u32x4), "scales": texel(f32x4)}
    found |= {"norm_w": bulk(f32x4)} if spec.norm else {}
    found |= {"bias": read(f32)} if spec.bias else {}
    if spec.epilogue == "qkv":
        found |= {"q": write(f32), "k": write(f16), "v": write(f16), "rope": bulk(f32x4), "params": read(u32)}
    else:
        found |= {"y": readwrite(f32) if spec.epilogue == "residual" else write(f32)}
        found |= {"params": read(u32)} if spec.gather else {}
        found |= {"ids": read(u32)} if spec.experts else {}
        found |= {"rows": read(u32)} if spec.in_tiles else {}
    return found


@cache
def matmul(spec: MatmulSpec) -> Kernel:
    """The kernel of a spec. Dispatch: spec.groups(length of the row order, n_token).

    Bindings, in this order, those not needed left out (texels in lane_row, storage buffers in lane_chunk):
        w       u32x4 texels, packed by formats.pack with row_order(epilogue, …)
        x       f32x4 texels [row, x_stride]. The row must be zero (not NaN) from n_col to the next multiple of 64 floats: the
                padding of w is zero too, but NaN times zero is NaN, and sum(x²) counts it.
        norm_w  f32x4 texels [n_col], padded like x: finite there
        bias    f32 in packed row order (formats.pack_vector)
        y       f32 [n_token, y_stride]; "residual" adds to it; or, for "qkv":
        q       f32 [n_token, n_head * head_dim]; k, v: f16 [slots, n_kv_head, head_dim];
        rope    f32x4 texels of f32 [positions, head_dim / 2, 2]
        ids     u32 [n_token]: for experts, the one of each row of y; or, for tiles, u32 [n_tile] the one of each tile, and
        rows    u32 [n_tile, tile]: its rows of y; NO_SLOT for none, in both (anything, where the tile has no expert)
        params  u32 [6, capacity]: for "qkv" (positions, slots) and for gather (output rows)
    Push: n_chunk: chunks a row (Format.n_chunk); n_group: row groups of w; x_stride: texels a row of x; n_token: rows to compute;
        n_row: rows of y that these weights make ("swiglu": of the gate; "qkv": of the parts together); first_row: y's first of
        them ("qkv": counted over q, k, v one below the other); n_col and eps: for the norm; capacity: T of params;
        y_stride: floats a row of y. For experts n_token counts rows of y (tokens times experts used), n_group and n_row are
        those of one expert, and row i of y reads row i // n_share of x.
    Nothing is written for rows from n_row and tokens from n_token on; a cache slot of 0xFFFFFFFF is not written.
    """
    local = spec.lanes * (1 if spec.on_lavapipe else spec.subgroups)
    doc = "y[t, row] = epilogue(sum_k weight[row, k] * norm(x)[t, k] + bias[row])"

    def body(b: Block, bufs: dict[str, Buffer], push: dict[str, Value]) -> None:
        _Body(b, spec, bufs, push).emit()

    return trace(spec.name, _bindings(spec), push_constants(spec), {}, local, body, doc)


class _Body:
    """The tracing of one kernel. Lists are indexed [token of the tile][row of the lane]."""

    def __init__(self, b: Block, spec: MatmulSpec, bufs: dict[str, Buffer], push: dict[str, Value]) -> None:
        self.b, self.spec, self.bufs, self.push = b, spec, bufs, push
        self.fmt: Format = format_of(spec.fmt)
        self.rows, self.tile = spec.layout.rows, spec.tile
        self.lane = b.subgroup_lane()
        self.group = b.workgroup_id(0) if spec.on_lavapipe else b.workgroup_id(0) * spec.subgroups + b.subgroup_id()
        self.first_token = b.workgroup_id(1) * spec.tile
        self.expert_group = self._find_expert() if spec.experts else None
        self.acc = [[b.var(f32, 0.0) for _ in range(self.rows)] for _ in range(self.tile)]
        self.squares = [b.var(f32, 0.0) for _ in range(self.tile)] if spec.norm else []
        # Memory could deliver large weights faster than the loop asks for them: touch the next chunk's cache lines, one a lane.
        # The largest half of a word seen is kept, so that the loads are.
        large = self.fmt.block_bytes >= self.fmt.block
        self.ahead = b.var(u32, 0) if spec.on_lavapipe and large and self.tile <= 2 else None
        self.x_start = [self._x_row(t) * self.push["x_stride"] for t in range(self.tile)]

    def emit(self) -> None:
        (self._walk_rows if self.spec.on_lavapipe else self._walk_steps)()
        _Epilogue(self).emit()

    def _find_expert(self) -> Value:
        """The first row group of the expert's weights. A tile without one has no chunks to walk along, and no rows to write."""
        expert = self.bufs["ids"][self.b.workgroup_id(1)]
        if self.spec.in_tiles:
            left_over = {name: self.b.select(expert == NO_SLOT, 0, self.push[name]) for name in ("n_chunk", "n_token")}
            self.push = self.push | left_over
            expert = self.b.select(expert == NO_SLOT, 0, expert)
        return expert * self.push["n_group"]

    def token(self, t: Value | int) -> Value:
        """The row of y; not below n_token: none."""
        return self.bufs["rows"][self.first_token + t] if self.spec.in_tiles else self.first_token + t

    def _x_row(self, t: int) -> Value:
        token = self.b.min(self.token(t), self.push["n_token"] - 1)
        if self.spec.experts:
            return token // self.push["n_share"]
        return self.bufs["params"][self.push["capacity"] * 5 + token] if self.spec.gather else token

    def of_expert(self, group: Value) -> Value:
        """A row group of w, from its number within the expert."""
        return group if self.expert_group is None else group + self.expert_group

    # lane_row

    def _walk_rows(self) -> None:
        """Each lane along its own rows."""
        b, f, s = self.b, self.fmt, self.spec.lanes
        n_texel, n_head, n_body = f.n_texel(self.rows), f.n_head(self.rows), f.n_body(self.rows)
        w, start = self.bufs["w"], self.of_expert(self.group) * self.push["n_chunk"]
        last = self.of_expert(self.push["n_group"]) * self.push["n_chunk"] * (n_texel * s) - 1
        with b.range(0, self.push["n_chunk"]) as chunk:
            base = (start + chunk) * (n_texel * s) + self.lane
            if self.ahead is not None:
                for line in range(0, n_texel, 4):
                    far = base + self.lane * 3 + (n_texel + line) * s
                    self.ahead.set(b.max(self.ahead.get(), w[b.min(far, last)][0] >> 1))

            heads = [w[base + j * s] for j in range(n_head)]

            def step(i: Value | int) -> None:
                first = base + (i * n_body + n_head) * s
                weights = StepWeights(f, b, heads.__getitem__, lambda j: w[first + j * s], self.rows, i)
                x = _LaneRowQuantized if self.spec.quantized else _LaneRowX
                self._step(weights, x(self, chunk * (f.chunk // 4), i))

            if f.steps == 1:
                step(0)
            else:
                with b.range(0, f.steps) as i:
                    step(i)

    # lane_chunk

    def _walk_steps(self) -> None:
        """Each lane a step of the subgroup's rows, then the lanes are added."""
        b, f = self.b, self.fmt
        n_chunk = self.push["n_chunk"]
        n_step, w = n_chunk * f.steps, self.bufs["w"]
        group = b.min(self.group, self.push["n_group"] - 1)
        base = self.of_expert(group) * (n_chunk * f.n_texel(self.rows))
        with b.range(self.lane, n_step, step=self.spec.lanes) as at:
            chunk, step = (at, 0) if f.steps == 1 else (at >> 2, at & 3)
            body = base + n_chunk * f.n_head(self.rows) + at
            weights = StepWeights(f, b, lambda j: w[base + n_chunk * j + chunk], lambda j: w[body + n_step * j], self.rows, step)
            self._step(weights, _LaneChunkX(self, chunk * (f.chunk // 4), step))
        for var in [v for token in self.acc for v in token] + self.squares:
            var.set(b.subgroup_add(var.get()))

    # arithmetic, the same for both

    def _step(self, w: StepWeights, x: _X) -> None:
        if self.spec.norm:
            for t, var in enumerate(self.squares):
                var.add(x.squares(t))
        if self.fmt.n_sub and self.spec.activations == "int8":
            self._multiply_integers(w, x)
        elif self.fmt.n_sub == 0 or self.tile >= DEQUANTIZE_TOKENS or not self.spec.on_lavapipe:
            self._multiply_weights(w, x)
        else:
            self._multiply_raw(w, x)

    def _multiply_weights(self, w: StepWeights, x: _X) -> None:
        """Dequantize a weight, multiply it with every token."""
        b = self.b
        acc = [[var.get() for var in token] for token in self.acc]
        for slot in range(SLOTS):
            for comp in range(4):
                xs = [x.value(t, slot, comp) for t in range(self.tile)]
                for r in range(self.rows):
                    weight = self._weight(w, r, slot, comp)
                    for t in range(self.tile):
                        acc[t][r] = b.fma(weight, xs[t], acc[t][r])
        for token, values in zip(self.acc, acc, strict=True):
            for var, value in zip(token, values, strict=True):
                var.set(value)

    def _weight(self, w: StepWeights, r: int, slot: int, comp: int) -> Value:
        f = self.fmt
        if not f.n_sub:
            return w.raw(r, slot, comp)
        raw, exponent = (w.raw(r, slot, comp), f.exponent(r, comp)) if self.spec.on_lavapipe else w.magic(r, slot, comp)
        factor, offset = self._affine(w, r, slot * f.n_sub // SLOTS, exponent)
        return self.b.fma(raw, factor, offset)

    def _affine(self, w: StepWeights, r: int, sub: int, exponent: int) -> tuple[Value, Value]:
        """weight = raw * factor + offset."""

        def offset() -> Value:
            zero = w.scale(r, sub) * float(-self.fmt.zero) if self.fmt.zero else None
            minimum = w.minimum(r, sub)
            if minimum is None or zero is None:
                found = -minimum if minimum is not None else zero
                assert found is not None
                return found
            return zero - minimum

        factor = w.keep(("factor", r, sub, exponent), lambda: w.scale(r, sub) * 2.0**-exponent)
        return factor, w.keep(("offset", r, sub), offset)

    def _multiply_raw(self, w: StepWeights, x: _X) -> None:
        """Add up raw numbers times x within a block, apply scale and offset once."""
        b, f = self.b, self.fmt
        for sub in range(f.n_sub):
            width = SLOTS // f.n_sub
            sums: dict[tuple[int, int, int], Value] = {}
            for slot in range(sub * width, (sub + 1) * width):
                for comp in range(4):
                    xs = [x.value(t, slot, comp) for t in range(self.tile)]
                    for r in range(self.rows):
                        raw, e = w.raw(r, slot, comp), f.exponent(r, comp)
                        for t in range(self.tile):
                            sums[t, r, e] = b.fma(raw, xs[t], sums[t, r, e]) if (t, r, e) in sums else raw * xs[t]
            for t in range(self.tile):
                x_sum = x.total(t, sub)
                for r in range(self.rows):
                    mine = [(v, e) for (tt, rr, e), v in sums.items() if (tt, rr) == (t, r)]
                    self.acc[t][r].add(self._scaled(mine, w, r, sub, x_sum))

    def _scaled(self, sums: list[tuple[Value, int]], w: StepWeights, r: int, sub: int, x_sum: Value) -> Value:
        """scale * (sum(raw * x) - zero * sum(x)) - minimum * sum(x), the raw sums given by their exponent."""
        least = min(e for _, e in sums)
        total: Value | None = None
        for value, e in sums:
            part = value if e == least else value * 2.0 ** (least - e)
            total = part if total is None else total + part
        assert total is not None
        total = total * 2.0**-least if least else total
        if self.fmt.zero:
            total = total - x_sum * float(self.fmt.zero)
        total = total * w.scale(r, sub)
        minimum = w.minimum(r, sub)
        return total if minimum is None else total - minimum * x_sum

    def _multiply_integers(self, w: StepWeights, x: _X) -> None:
        """Integer products with x in 8 bits, scaled a block at a time."""
        f = self.fmt
        for sub in range(f.n_sub):
            slots = range(sub * SLOTS // f.n_sub, (sub + 1) * SLOTS // f.n_sub)
            in_pairs = f.pairs or self.spec.on_lavapipe
            sums = self._pair_products(w, x, slots) if in_pairs else self._dot_products(w, x, slots)
            for t in range(self.tile):
                x_scale = x.scale(t, slots[0])
                x_sum = x.integer_total(t, slots).to(f32) if f.has_minimum else None
                for r in range(self.rows):
                    value = sums[t][r].to(f32) * (w.scale(r, sub) * x_scale)
                    minimum = w.minimum(r, sub)
                    self.acc[t][r].add(value if minimum is None or x_sum is None else value - minimum * (x_scale * x_sum))

    def _dot_products(self, w: StepWeights, x: _X, slots: range) -> list[list[Value]]:
        """Q8_0 on GPUs: four signed bytes at a time."""
        sums: list[list[Value]] = [[] for _ in range(self.tile)]
        for slot in slots:
            words = [w.fmt.word(w, r, slot) ^ 0x80808080 for r in range(self.rows)]  # type: ignore[attr-defined]
            for t in range(self.tile):
                products = [self.b.dot_i8(word, x.integer_word(t, slot)) for word in words]
                sums[t] = added(sums[t], products)
        return sums

    def _pair_products(self, w: StepWeights, x: _X, slots: range) -> list[list[Value]]:
        """Two rows in the halves of a word: p = high * 2**16 + low, read off before low leaves 16 bits.

        Weights counted from the middle of their range stay small longest: middle * sum(x) is taken off the sums of p.
        The sum of the p, which may overflow, and that of the highs give the sum of the lows.
        """
        middle = 1 << (self.fmt.bits - 1)
        limit = 32767 // (127 * middle)  # weights, at least two
        n_slot = max(1, min(limit // 4, len(slots)))
        parts = [(range(i, i + n_slot), range(c, min(4, c + limit))) for i in slots[::n_slot] for c in range(0, 4, limit)]
        words: list[list[Value]] = [[] for _ in range(self.tile)]
        highs: list[list[Value]] = [[] for _ in range(self.tile)]
        for some, comps in parts:
            packed: list[list[Value]] = [[] for _ in range(self.tile)]
            for slot, comp in [(slot, comp) for slot in some for comp in comps]:
                both = [w.both(pair, slot, comp) for pair in range(self.rows // 2)]
                for t in range(self.tile):
                    xs = x.integer(t, slot, comp)
                    packed[t] = added(packed[t], [v * xs for v in both])
            for t in range(self.tile):
                offset = x.integer_total(t, some, comps) * (middle * 0x10001)
                packed[t] = [p - offset for p in packed[t]]
                highs[t] = added(highs[t], [(p + 0x8000) >> 16 for p in packed[t]])
                words[t] = added(words[t], packed[t])
        rest = middle - self.fmt.zero
        sums: list[list[Value]] = []
        for t in range(self.tile):
            centered = [v for p, high in zip(words[t], highs[t], strict=True) for v in (p - (high << 16), high)]
            sums.append([v + x.integer_total(t, slots) * rest for v in centered] if rest else centered)
        return sums


def added(sums: list[Value], values: list[Value]) -> list[Value]:
    """Sums (none yet: an empty list) plus values."""
    return [a + v for a, v in zip(sums, values, strict=True)] if sums else values


class _X:
    """The x of one step, for every token of the tile, times the norm weight."""

    def __init__(self, body: _Body, chunk_start: Value, step: Value | int) -> None:
        self.body, self.b, self.chunk_start, self.step = body, body.b, chunk_start, step
        self.load()

    def load(self) -> None: ...

    def value(self, t: int, slot: int, comp: int) -> Value:
        """x of this token, slot and component, in every lane that needs it."""
        raise NotImplementedError

    def total(self, t: int, sub: int) -> Value:
        """Sum of x over a block's slots, for formats with zero points or minimums."""
        raise NotImplementedError

    def squares(self, t: int) -> Value:
        """This lane's share of sum(x²), before the norm weight."""
        raise NotImplementedError

    # In 8 bits: x = scale * integer over GROUP slots. The largest bits of |x| are taken as integers, so that NaN and infinity win
    # and reach the result through the scale.

    def scale(self, t: int, slot: int) -> Value:
        """f32: the scale of a slot's group."""
        raise NotImplementedError

    def integer(self, t: int, slot: int, comp: int) -> Value:
        """i32: like value, in units of the scale."""
        raise NotImplementedError

    def integer_word(self, t: int, slot: int) -> Value:
        """u32: a slot's four integers as signed bytes (lane_chunk)."""
        raise NotImplementedError

    def integer_total(self, t: int, slots: range, comps: range = range(4)) -> Value:
        """i32: the sum of some components over slots of one group."""
        raise NotImplementedError

    def _largest(self, v: Value) -> Value:
        """u32 bits of the largest |component|."""
        bits = [v[i].bitcast(u32) & 0x7FFFFFFF for i in range(4)]
        return self.b.max(self.b.max(bits[0], bits[1]), self.b.max(bits[2], bits[3]))

    def _inverse(self, largest: Value) -> Value:
        return self.b.select(largest > 0.0, 127.0 / largest, 0.0)

    def _round(self, v: Value, inverse: Value) -> list[Value]:
        return [self.b.round(v[i] * inverse).to(i32) for i in range(4)]

    @staticmethod
    def _bytes(q: list[Value]) -> Value:
        u = [(v & 0xFF).bitcast(u32) for v in q]
        return (u[0] | (u[1] << 8)) | ((u[2] << 16) | (u[3] << 24))

    def _index(self, slot: Value | int) -> Value:
        return self.chunk_start + self.body.fmt.texel(self.step, slot)


class _LaneRowX(_X):
    """A lane holds a slot (two loads hold 16 slots in 8 lanes); values come by shuffles."""

    def load(self) -> None:
        body, s = self.body, self.body.spec.lanes
        self.raw: list[list[Value]] = [[] for _ in range(body.tile)]
        self.scaled: list[list[Value]] = [[] for _ in range(body.tile)]
        for first in range(0, SLOTS, s):
            index = self._index(body.lane + first if first else body.lane)
            norm = body.bufs["norm_w"][index] if body.spec.norm else None
            for t in range(body.tile):
                x = body.bufs["x"][body.x_start[t] + index]
                self.raw[t].append(x)
                self.scaled[t].append(x if norm is None else x * norm)
        self.sums: dict[tuple[int, int], Value] = {}
        self.scales: dict[tuple[int, int], Value] = {}
        self.quantized: list[list[list[Value]]] = []
        if body.spec.activations == "int8" and body.fmt.n_sub:
            self.quantized = [[self._quantize(t, i, v) for i, v in enumerate(token)] for t, token in enumerate(self.scaled)]

    def _quantize(self, t: int, load: int, v: Value) -> list[Value]:
        b, s = self.b, self.body.spec.lanes
        mine, largest = None, self._largest(v)
        for first in range(0, s, GROUP):
            lanes = [b.subgroup_shuffle(largest, lane) for lane in range(first, first + GROUP)]
            while len(lanes) > 1:
                lanes = [b.max(p, q) for p, q in zip(lanes[::2], lanes[1::2], strict=True)]
            most = lanes[0].bitcast(f32)
            self.scales[t, load * (s // GROUP) + first // GROUP] = most * (1.0 / 127.0)
            inverse = self._inverse(most)
            mine = inverse if mine is None else b.select(self.body.lane < first, mine, inverse)
        assert mine is not None
        return self._round(v, mine)

    def scale(self, t: int, slot: int) -> Value:
        return self.scales[t, slot // GROUP]

    def integer(self, t: int, slot: int, comp: int) -> Value:
        s = self.body.spec.lanes
        return self.b.subgroup_shuffle(self.quantized[t][slot // s][comp], slot % s)

    def integer_total(self, t: int, slots: range, comps: range = range(4)) -> Value:
        s = self.body.spec.lanes
        lane_sum = tree_sum([self.quantized[t][slots[0] // s][comp] for comp in comps])
        return tree_sum([self.b.subgroup_shuffle(lane_sum, slot % s) for slot in slots])

    def value(self, t: int, slot: int, comp: int) -> Value:
        s = self.body.spec.lanes
        return self.b.subgroup_shuffle(self.scaled[t][slot // s][comp], slot % s)

    def total(self, t: int, sub: int) -> Value:
        s, width = self.body.spec.lanes, SLOTS // self.body.fmt.n_sub
        slots = range(sub * width, (sub + 1) * width)
        load = slots[0] // s
        if (t, load) not in self.sums:
            v = self.scaled[t][load]
            self.sums[t, load] = (v[0] + v[1]) + (v[2] + v[3])
        lanes = [self.b.subgroup_shuffle(self.sums[t, load], slot % s) for slot in slots]
        return tree_sum(lanes)

    def squares(self, t: int) -> Value:
        return tree_sum([v[i] * v[i] for v in self.raw[t] for i in range(4)])


class _LaneRowQuantized(_X):
    """x comes in 8 bits (quantize.py): four slots (16 values, a texel) of a token lie in a lane, `lanes / 4` tokens in a load."""

    def load(self) -> None:
        body, b = self.body, self.b
        place = self._index(body.lane % 4 * 4)  # of this lane's four slots, in words; every format keeps four slots together
        self.per_load = body.spec.lanes // 4
        self.words: list[list[Value]] = []
        for first in range(0, body.tile, self.per_load):
            token = b.min(body.first_token + b.min(body.lane // 4 + first, body.tile - 1), body.push["n_token"] - 1)
            word = body.bufs["x"][token * body.push["x_stride"] + (place >> 2)]
            self.words.append([word[i].bitcast(i32) for i in range(4)])
        n_group = body.push["x_stride"] >> 1
        self.scales = body.bufs["scales"][body.first_token // SCALE_ROWS * n_group + place // GROUP]
        self.integers: dict[tuple[int, int, int], Value] = {}
        self.totals: dict[tuple[int, tuple[int, ...], range], Value] = {}

    def _own(self, load: int, word: int, comp: int) -> Value:
        """i32: of this lane's slots, one component."""
        key = load, word, comp
        if key not in self.integers:
            bits = self.words[load][word]
            self.integers[key] = (bits if comp == 3 else bits << (24 - 8 * comp)) >> 24
        return self.integers[key]

    def _lane(self, t: int, slot: int) -> int:
        return t % self.per_load * 4 + slot // 4

    def scale(self, t: int, slot: int) -> Value:
        return self.b.subgroup_shuffle(self.scales[t % SCALE_ROWS], slot // 4)

    def integer(self, t: int, slot: int, comp: int) -> Value:
        return self.b.subgroup_shuffle(self._own(t // self.per_load, slot % 4, comp), self._lane(t, slot))

    def integer_total(self, t: int, slots: range, comps: range = range(4)) -> Value:
        load, sums = t // self.per_load, []
        for quad in dict.fromkeys(slot // 4 for slot in slots):
            words = tuple(slot % 4 for slot in slots if slot // 4 == quad)
            key = load, words, comps
            if key not in self.totals:
                self.totals[key] = tree_sum([self._own(load, word, comp) for word in words for comp in comps])
            sums.append(self.b.subgroup_shuffle(self.totals[key], self._lane(t, quad * 4)))
        return tree_sum(sums)


class _LaneChunkX(_X):
    """A lane reads the x of its own step, a slot at a time."""

    def load(self) -> None:
        self.slots: dict[tuple[int, int], Value] = {}
        self.groups: dict[tuple[int, int], tuple[Value, list[list[Value]]]] = {}
        self.norms: dict[int, Value] = {}

    def _slot(self, t: int, slot: int) -> Value:
        if (t, slot) not in self.slots:
            bufs, index = self.body.bufs, self._index(slot)
            x = bufs["x"][self.body.x_start[t] + index]
            if self.body.spec.norm:
                var = self.body.squares[t]
                var.add(tree_sum([x[i] * x[i] for i in range(4)]))
                if slot not in self.norms:
                    self.norms[slot] = bufs["norm_w"][index]
                x = x * self.norms[slot]
            self.slots[t, slot] = x
        return self.slots[t, slot]

    def value(self, t: int, slot: int, comp: int) -> Value:
        return self._slot(t, slot)[comp]

    def total(self, t: int, sub: int) -> Value:
        width = SLOTS // self.body.fmt.n_sub
        return tree_sum([self.value(t, slot, c) for slot in range(sub * width, (sub + 1) * width) for c in range(4)])

    def squares(self, t: int) -> Value:
        return self.b.const(f32, 0.0)  # added slot by slot

    def _group(self, t: int, slot: int) -> tuple[Value, list[list[Value]]]:
        group = slot // GROUP
        if (t, group) not in self.groups:
            values = [self._slot(t, i) for i in range(group * GROUP, (group + 1) * GROUP)]
            most = self._largest(values[0])
            for v in values[1:]:
                most = self.b.max(most, self._largest(v))
            inverse = self._inverse(most.bitcast(f32))
            self.groups[t, group] = most.bitcast(f32) * (1.0 / 127.0), [self._round(v, inverse) for v in values]
        return self.groups[t, group]

    def scale(self, t: int, slot: int) -> Value:
        return self._group(t, slot)[0]

    def integer(self, t: int, slot: int, comp: int) -> Value:
        return self._group(t, slot)[1][slot % GROUP][comp]

    def integer_word(self, t: int, slot: int) -> Value:
        return self._bytes(self._group(t, slot)[1][slot % GROUP])

    def integer_total(self, t: int, slots: range, comps: range = range(4)) -> Value:
        return tree_sum([self.integer(t, slot, comp) for slot in slots for comp in comps])


def tanh(b: Block, v: Value) -> Value:
    """tanh by one exponential: right for any finite number, and NaN stays NaN where a driver's exp loses it."""
    return b.select(b.isnan(v), v, 1.0 - 2.0 / (b.exp(v * 2.0) + 1.0))


def at_most(b: Block, v: Value, limit: float) -> Value:
    """The smaller of the two; NaN stays NaN, which min may hide."""
    return b.select(v > limit, limit, v)


def tree_sum(values: Sequence[Value]) -> Value:
    """The sum, pairwise: short chains."""
    values = list(values)
    while len(values) > 1:
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=False)] + ([values[-1]] if len(values) % 2 else [])
    return values[0]


class _Epilogue:
    """What happens to the sums: norm scale, bias, then store, add, gate, or rotate and cache."""

    def __init__(self, body: _Body) -> None:
        self.body, self.b, self.spec, self.bufs, self.push = body, body.b, body.spec, body.bufs, body.push

    def emit(self) -> None:
        body, b = self.body, self.b
        values = [[var.get() for var in token] for token in body.acc]
        if body.ahead is not None:  # never so
            values[0][0] = b.select(body.ahead.get() == 0xFFFFFFFF, 0.0, values[0][0])
        if self.spec.norm:
            for t, token in enumerate(values):
                scale = b.rsqrt(self._sum_lanes(body.squares[t].get()) / self.push["n_col"].to(f32) + self.push["eps"])
                values[t] = [v * scale for v in token]
        if self.spec.on_lavapipe:
            self._each(values)
        else:
            self._spread(values)

    def _sum_lanes(self, v: Value) -> Value:
        if not self.spec.on_lavapipe:
            return v  # already added over the subgroup
        return tree_sum([self.b.subgroup_shuffle(v, lane) for lane in range(self.spec.lanes)])

    def _each(self, values: list[list[Value]]) -> None:
        """Every lane its own rows."""
        step = 2 if self.spec.paired else 1
        for t, token in enumerate(values):
            for r in range(0, self.body.rows, step):
                packed = (self.body.group * self.body.rows + r) * self.spec.layout.lanes + self.body.lane
                self._one(token[r : r + step], packed, t, r)

    def _spread(self, values: list[list[Value]]) -> None:
        """All lanes hold all sums: each lane takes one (token, row or pair) and stores it."""
        b, step, rows = self.b, 2 if self.spec.paired else 1, self.body.rows
        n = rows // step * len(values)
        with b.range(self.body.lane, n, step=self.spec.lanes) as i:
            picked = []
            for e in range(step):
                flat = [token[r] for token in values for r in range(e, rows, step)]
                v = flat[0]
                for j, other in enumerate(flat[1:], 1):
                    v = b.select(i == j, other, v)
                picked.append(v)
            r = i % (rows // step) * step
            self._one(picked, self.body.group * rows + r, i // (rows // step), r)

    def _one(self, values: list[Value], packed: Value, t: Value | int, r: Value | int) -> None:
        """Finish one row or pair. `packed`: packed row of the first."""
        b, lanes = self.b, self.spec.layout.lanes
        token = self.body.token(t)
        if not self.spec.paired:
            row = packed
        elif lanes == 1:
            row = packed // 2
        else:
            assert isinstance(r, int)
            row = (self.body.group * (self.body.rows // 2) + r // 2) * lanes + self.body.lane
        n_row = self.push["n_row"]
        inside = row * 2 < n_row if self.spec.epilogue == "qkv" else row < n_row
        with b.when(inside & (token < self.push["n_token"])):
            if self.spec.bias:
                at = packed
                if self.body.expert_group is not None:
                    at = at + self.body.expert_group * self.spec.layout.group_rows
                values = [v + self.bufs["bias"][at + e * lanes] for e, v in enumerate(values)]
            if self.spec.epilogue == "qkv":
                self._rotate_and_cache(values[0], values[1], row, token)
                return
            at = token * self.push["y_stride"] + self.push["first_row"] + row
            y = self.bufs["y"]
            if self.spec.scale != 1.0:
                values = [v * self.spec.scale for v in values]
            if self.spec.softcap:
                values = [tanh(b, v * (1.0 / self.spec.softcap)) * self.spec.softcap for v in values]
            if self.spec.epilogue == "swiglu":
                y[at] = values[0] / (b.exp(-values[0]) + 1.0) * values[1]
            elif self.spec.epilogue == "geglu":
                gate, up = values
                inner = (gate * gate * 0.044715 + 1.0) * gate * math.sqrt(2.0 / math.pi)
                y[at] = (tanh(b, inner) + 1.0) * gate * 0.5 * up
            elif self.spec.epilogue == "swiglu_oai":
                gate, up = at_most(b, values[0], OAI_LIMIT), -at_most(b, -at_most(b, values[1], OAI_LIMIT), OAI_LIMIT)
                y[at] = gate / (b.exp(gate * -OAI_ALPHA) + 1.0) * (up + 1.0)
            elif self.spec.epilogue == "residual":
                y[at] = y[at] + values[0]
            else:
                y[at] = values[0]

    def _rotate_and_cache(self, a: Value, c: Value, pair: Value, token: Value) -> None:
        """RoPE on a pair of q or k; q is stored, k and v go to the cache."""
        b, push, spec = self.b, self.push, self.spec
        half = spec.head_dim // 2
        pair = pair + (push["first_row"] >> 1)
        head, i = pair // half, pair % half
        first, distance = (i * 2, 1) if spec.rope_pairing == "interleaved" else (i, half)
        capacity = push["capacity"]
        position, slot = self.bufs["params"][capacity + token], self.bufs["params"][capacity * 2 + token]
        turn = self.bufs["rope"][(position * half + i) >> 1]
        odd = (i & 1) == 1
        cos, sin = b.select(odd, turn[2], turn[0]), b.select(odd, turn[3], turn[1])
        ra, rc = a * cos - c * sin, a * sin + c * cos
        n_head, n_kv = push["n_head"], push["n_kv_head"]
        with b.when(head < n_head):
            at = (token * n_head + head) * spec.head_dim + first
            self.bufs["q"][at] = ra
            self.bufs["q"][at + distance] = rc
        with b.when((head >= n_head) & (slot != NO_SLOT)):
            kv_head = (head - n_head) % n_kv
            at = (slot * n_kv + kv_head) * spec.head_dim + first
            with b.when(head < n_head + n_kv):
                self.bufs["k"][at] = ra.to(f16)
                self.bufs["k"][at + distance] = rc.to(f16)
            with b.when(head >= n_head + n_kv):
                self.bufs["v"][at] = a.to(f16)
                self.bufs["v"][at + distance] = c.to(f16)


__all__ = ["ALIGN_COLUMNS", "Epilogue", "MatmulSpec", "best_tile", "matmul", "push_constants"]
