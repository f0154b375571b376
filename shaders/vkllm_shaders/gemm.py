"""Weights times activations for many tokens on GPUs: tiles in shared memory, on cooperative matrices or in registers.

    y[t, row] = epilogue(sum_k weight[row, k] * norm(x)[t, k] + bias[row])

What matmul does, from the same weights packed for lane_chunk, with the same bindings, push constants and epilogues. A workgroup
makes `rows` x `tokens` of y: step after step of 64 columns, it dequantizes its weights and copies its x into shared memory, where
each is read many times.

Two kernels of one frame:
- Plain: f32 in shared memory; an invocation owns 4 rows of some tokens. As exact as matmul.
- Cooperative (VK_KHR_cooperative_matrix, f16 x f16 -> f32): weights and x are rounded to f16, sums are f32. The rounding costs an
  NMSE of about 8e-8. f16 holds no more than 65,504 and little below 6e-5: a token whose largest |x * norm weight| lies outside of
  LEAST … MOST is multiplied by a power of two that brings it near 1. That is found out while multiplying, and the workgroup then
  does its tile a second time; tokens of real models rarely need it. A weight beyond f16, like an x that is not finite, makes
  results that are not finite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from vkllm_codegen import Block, Buffer, Kernel, Value, Var, coop, f16, f32, f32x4, trace, u32
from vkllm_codegen.errors import KernelError
from vkllm_codegen.trace.value import Shared
from vkllm_codegen.types import CoopType
from vkllm_shaders.formats import SLOTS, STEP, StepWeights, format_of
from vkllm_shaders.matmul import MatmulSpec, push_constants
from vkllm_shaders.matmul.body import Body
from vkllm_shaders.matmul.epilogue import Finish
from vkllm_shaders.matmul.spec import bindings
from vkllm_shaders.sums import tree_sum

MIN_TOKENS = 16
"""Fewer tokens leave most of a tile empty: matmul is for them."""

QUAD = 4  # rows that an invocation finishes together; whole pairs
PARTS = 4  # into which the 16 slots of a step are cut, for more invocations to dequantize
SPREAD = SLOTS + 1  # f32x4 from row to row of a tile in shared memory: neighbours lie in different banks
SPREAD_F16 = STEP + 8  # the same in f16
LEAST, MOST = 2.0**-8, 65504.0  # of a token's largest |x|, where f16 rounds to its 11 bits
LEAST_BITS, MOST_BITS = 0x3B800000, 0x477FE000

CoopShape = tuple[int, int, int]


@dataclass(frozen=True)
class GemmSpec:
    """What one kernel does; every field makes a new module.

    product: the product, as matmul would do it; rows, tokens: of y that a workgroup makes; invocations: of a workgroup;
    coop: M, N, K of the cooperative matrices (M along rows), or None for the plain kernel.
    """

    product: MatmulSpec
    rows: int = 64
    tokens: int = 64
    invocations: int = 128
    coop: CoopShape | None = None

    def __post_init__(self) -> None:
        p = self.product
        if p.on_lavapipe or p.experts or p.activations != "f32":
            raise KernelError(f"a gemm of {p.name}", hint="expected lane_chunk, f32 activations, no experts")
        wrong = self._wrong()
        if wrong:
            raise KernelError(
                f"a gemm of {self.rows} x {self.tokens} by {self.invocations} invocations, {self.coop or 'plain'}: {wrong}",
                hint="let gemm.fitted choose",
            )

    def _wrong(self) -> str:
        """What does not divide; nothing where all does."""
        fits = {
            "invocations, by 16 slots": self.invocations % SLOTS == 0,
            "x over invocations": self.tokens * SLOTS % self.invocations == 0,
            "rows into groups and quads": self.rows % max(self.product.layout.rows, QUAD) == 0,
        }
        if self.coop is None:
            fits["tile over invocations"] = self.rows // QUAD * self.tokens % self.invocations == 0
            fits["tokens, at most 64"] = self.tokens <= SPREAD * QUAD
            fits["quads over invocations"] = self.invocations % max(1, self.rows // QUAD) == 0
        else:
            m, n, k = self.coop
            fits["whole subgroups"] = self.invocations % self.product.subgroup == 0
            fits["rows into matrices"] = self.rows % (m * max(1, self.subgroups)) == 0 and m % QUAD == 0
            fits["tokens into matrices"] = self.tokens % n == 0
            fits["a step into matrices"] = STEP % k == 0 and k % 8 == 0
            fits["room to add up"] = self.subgroups * m >= SLOTS
        return ", ".join(what for what, fit in fits.items() if not fit)

    @property
    def subgroups(self) -> int:
        return self.invocations // self.product.subgroup

    @property
    def own_tokens(self) -> int:
        """Tokens of an invocation in the plain kernel."""
        return self.rows // QUAD * self.tokens // self.invocations

    @property
    def shared_nbytes(self) -> int:
        """Shared memory of a workgroup."""
        if self.coop is None:
            norm = self.tokens * (SLOTS + 1) * 4 if self.product.norm else 0
            return (self.rows + self.tokens) * SPREAD * 16 + norm
        stage = self.subgroups * self.coop[0] * self.tokens * 4
        return (self.rows + self.tokens) * SPREAD_F16 * 2 + stage + self.tokens * 8 + 4

    @property
    def name(self) -> str:
        kind = "x".join(map(str, self.coop)) if self.coop else "plain"
        tile = f"{self.rows}x{self.tokens}_by{self.invocations}"
        return f"gemm_{kind}_{tile}_{self.product.name.removeprefix('matmul_')}"

    def groups(self, n_packed_row: int, n_token: int) -> tuple[int, int, int]:
        """Workgroups of a dispatch. `n_packed_row`: the length of the row order."""
        return -(-n_packed_row // self.rows), -(-n_token // self.tokens), 1


MOST_SUMS = 64  # of an invocation: more leave too few registers
TILES = ((128, 64), (64, 64), (64, 32), (32, 32), (32, 16), (16, 16))
"""Rows and tokens of a workgroup, the best first where all fit."""


@cache
def fitted(
    product: MatmulSpec,
    n_token: int,
    max_shared_bytes: int,
    max_invocations: int,
    coop_shapes: tuple[tuple[int, int, int, str, str, str, str], ...] = (),
) -> GemmSpec | None:
    """The kernel for a product on a device of these limits, on cooperative matrices where it has them.

    Args: coop_shapes: as in DeviceLimits. Returns: None where matmul must do it: few tokens, experts, 8-bit activations, no room.
    """
    if n_token < MIN_TOKENS or product.on_lavapipe or product.experts or product.activations != "f32":
        return None
    product = replace(product, tile=1, subgroups=1)
    shapes: list[CoopShape | None] = [s[:3] for s in coop_shapes if s[3:] == ("f16", "f16", "f32", "f32")]
    shapes.sort(key=lambda shape: shape != (16, 16, 16))
    for shape in [*shapes, None]:
        for rows, tokens in TILES:
            if tokens > 16 and tokens >= 2 * n_token:
                continue
            for invocations in (128, 64, 32, 16):
                try:
                    spec = GemmSpec(product, rows, tokens, invocations, shape)
                except KernelError:
                    continue
                crowded = rows * tokens > MOST_SUMS * invocations
                if not crowded and spec.shared_nbytes <= max_shared_bytes and invocations <= max_invocations:
                    return spec
    return None


@cache
def gemm(spec: GemmSpec) -> Kernel:
    """The kernel of a spec; bindings and push constants are those of `matmul(spec.product)`.

    Dispatch: spec.groups(length of the row order, n_token). The device's subgroup size must be product.subgroup where `coop` is.
    """
    tile = _CoopTile if spec.coop else _PlainTile

    def body(b: Block, bufs: dict[str, Buffer], push: dict[str, Value]) -> None:
        tile(b, spec, bufs, push).emit()

    doc = "y[t, row] = epilogue(sum_k weight[row, k] * norm(x)[t, k] + bias[row]), a tile of y a workgroup"
    return trace(spec.name, bindings(spec.product), push_constants(spec.product), {}, spec.invocations, body, doc)


class _Tile(Body):
    """What both kernels share: the loop over columns, the loads into shared memory, the sums of squares and the epilogue."""

    def __init__(self, b: Block, gemm: GemmSpec, bufs: dict[str, Buffer], push: dict[str, Value]) -> None:
        self.b, self.gemm, self.spec, self.bufs, self.push = b, gemm, gemm.product, bufs, push
        self.fmt, self.rows, self.tile = format_of(self.spec.fmt), self.spec.layout.rows, gemm.tokens
        self.local = b.local_index()
        self.first_row = b.workgroup_id(0) * gemm.rows
        self.first_token = b.workgroup_id(1) * gemm.tokens
        self.expert_group = None
        # An invocation loads one slot of x, of every `per_load`th token.
        self.slot, self.own_token = self.local % SLOTS, self.local // SLOTS
        self.per_load = gemm.invocations // SLOTS
        self.loads = range(gemm.tokens // self.per_load)
        self.x_start = [self._x_row(self.own_token + i * self.per_load) * push["x_stride"] for i in self.loads]
        self.squares = [b.var(f32, 0.0) for _ in self.loads] if self.spec.norm else []

    # To shared memory

    def put_weight(self, row: Value, slot: int, value: Value) -> None:
        """f32x4 of a row of the tile."""
        raise NotImplementedError

    def put_x(self, load: int, token: Value, value: Value) -> None:
        """f32x4 of this invocation's slot of a token of the tile."""
        raise NotImplementedError

    def multiply(self) -> None:
        """What is in shared memory."""
        raise NotImplementedError

    def walk(self) -> None:
        """All columns, a step at a time."""
        b, f = self.b, self.fmt
        for var in self.squares:
            var.set(0.0)
        with b.range(0, self.push["n_chunk"] * f.steps) as at:
            chunk, step = (at, 0) if f.steps == 1 else (at // f.steps, at % f.steps)
            self._load_weights(at, chunk, step)
            self._load_x(chunk, step)
            b.barrier("the step is in shared memory")
            self.multiply()
            b.barrier("shared memory may be written again")

    def _load_weights(self, at: Value, chunk: Value, step: Value | int) -> None:
        """A task is a part of the slots of a row group."""
        b, n_group = self.b, self.gemm.rows // self.rows
        with b.range(self.local, n_group * PARTS, step=self.gemm.invocations) as task:
            within = task % n_group
            group = b.min(self.first_row // self.rows + within, self.push["n_group"] - 1)
            for part in range(PARTS):
                with b.when(task // n_group == part):
                    weights = self._step_weights(group, at, chunk, step)
                    for slot in range(part * SLOTS // PARTS, (part + 1) * SLOTS // PARTS):
                        for r in range(self.rows):
                            value = b.vec(*(self._weight(weights, r, slot, comp) for comp in range(4)))
                            self.put_weight(within * self.rows + r, slot, value)

    def _step_weights(self, group: Value, at: Value, chunk: Value, step: Value | int) -> StepWeights:
        f, w, n_chunk = self.fmt, self.bufs["w"], self.push["n_chunk"]
        base, n_step = group * (n_chunk * f.n_texel(self.rows)), n_chunk * f.steps
        body = base + n_chunk * f.n_head(self.rows) + at
        return StepWeights(f, self.b, lambda j: w[base + n_chunk * j + chunk], lambda j: w[body + n_step * j], self.rows, step)

    def _load_x(self, chunk: Value, step: Value | int) -> None:
        index = chunk * (self.fmt.chunk // 4) + self.fmt.texel(step, self.slot)
        norm = self.bufs["norm_w"][index] if self.spec.norm else None
        for i, start in enumerate(self.x_start):
            x = self.bufs["x"][start + index]
            if norm is not None:
                self.squares[i].add(tree_sum([x[c] * x[c] for c in range(4)]))
                x = x * norm
            self.put_x(i, self.own_token + i * self.per_load, x)

    # After the loop

    def norm_scale(self, squares: Value) -> Value:
        return self.b.rsqrt(squares / self.push["n_col"].to(f32) + self.push["eps"])

    def finish(self, values: list[Value], row: Value, token: Value) -> None:
        """Four rows of a token, `row` counted within the tile."""
        step, last = 2 if self.spec.paired else 1, Finish(self)
        for e in range(0, QUAD, step):
            packed = self.first_row + row + e
            last.one(values[e : e + step], packed, packed // step, token)


class _PlainTile(_Tile):
    """f32 in shared memory, sums in registers."""

    def __init__(self, b: Block, gemm: GemmSpec, bufs: dict[str, Buffer], push: dict[str, Value]) -> None:
        super().__init__(b, gemm, bufs, push)
        self.weights = b.shared(f32x4, gemm.rows * SPREAD, name="weights")
        self.x = b.shared(f32x4, gemm.tokens * SPREAD, name="x_tile")
        n_quad = gemm.rows // QUAD
        self.quad, self.column = self.local % n_quad, self.local // n_quad
        self.stride = gemm.invocations // n_quad  # between the tokens of an invocation
        self.acc = [[b.var(f32, 0.0) for _ in range(QUAD)] for _ in range(gemm.own_tokens)]

    def emit(self) -> None:
        self.walk()
        scales = self._norm_scales() if self.spec.norm else None
        b, n_quad = self.b, self.gemm.rows // QUAD
        for t, sums in enumerate(self.acc):  # neighbours shall store neighbouring rows of y: over shared memory
            self.weights[(self.column + t * self.stride) * n_quad + self.quad] = b.vec(*(var.get() for var in sums))
        b.barrier("all sums are in shared memory")
        with b.range(self.local, self.gemm.tokens * n_quad, step=self.gemm.invocations) as i:
            token, value = i // n_quad, self.weights[i]
            value = value if scales is None else value * scales[token]
            self.finish([value[e] for e in range(QUAD)], i % n_quad * QUAD, token)

    def put_weight(self, row: Value, slot: int, value: Value) -> None:
        self.weights[row * SPREAD + slot] = value

    def put_x(self, load: int, token: Value, value: Value) -> None:
        self.x[token * SPREAD + self.slot] = value

    def multiply(self) -> None:
        b = self.b
        with b.range(0, SLOTS) as slot:
            weights = [self.weights[(self.quad * QUAD + r) * SPREAD + slot] for r in range(QUAD)]
            for t, token in enumerate(self.acc):
                x = self.x[(self.column + t * self.stride) * SPREAD + slot]
                for w, var in zip(weights, token, strict=True):
                    value = var.get()
                    for comp in range(4):
                        value = b.fma(w[comp], x[comp], value)
                    var.set(value)

    def _norm_scales(self) -> Shared:
        """Shared f32 [tokens]: what to multiply each token's sums with."""
        b = self.b
        parts = b.shared(f32, self.gemm.tokens * SLOTS, name="squares")
        scales = b.shared(f32, self.gemm.tokens, name="scales")
        for i, var in enumerate(self.squares):
            parts[(self.own_token + i * self.per_load) * SLOTS + self.slot] = var.get()
        b.barrier("all sums of squares are in shared memory")
        with b.range(self.local, self.gemm.tokens, step=self.gemm.invocations) as token:
            scales[token] = self.norm_scale(tree_sum([parts[token * SLOTS + i] for i in range(SLOTS)]))
        return scales


class _CoopTile(_Tile):
    """f16 in shared memory, sums in cooperative matrices: a subgroup owns its share of the rows, with all tokens."""

    def __init__(self, b: Block, gemm: GemmSpec, bufs: dict[str, Buffer], push: dict[str, Value]) -> None:
        super().__init__(b, gemm, bufs, push)
        assert gemm.coop is not None
        self.m, self.n, self.k = gemm.coop
        self.weights = b.shared(f16, gemm.rows * SPREAD_F16, name="weights")
        self.x = b.shared(f16, gemm.tokens * SPREAD_F16, name="x_tile")
        self.stage = b.shared(f32, gemm.subgroups * self.m * gemm.tokens, name="stage")
        self.x_scales = b.shared(f32, gemm.tokens, name="x_scales")
        self.scales = b.shared(f32, gemm.tokens, name="scales")
        self.again = b.shared(u32, 1, name="again")
        self.own_rows = gemm.rows // gemm.subgroups
        self.largest = [b.var(u32, 0) for _ in self.loads]
        n_band, n_column = self.own_rows // self.m, gemm.tokens // self.n
        zero = b.coop_fill(self._sums, 0.0)
        self.sums: list[list[Var]] = [[b.var(self._sums, zero) for _ in range(n_column)] for _ in range(n_band)]

    @property
    def _sums(self) -> CoopType:
        return coop(f32, self.m, self.n, "acc")

    @property
    def _first_row(self) -> Value:
        """The subgroup's first row within the tile."""
        return self.b.subgroup_id() * self.own_rows

    def emit(self) -> None:
        b = self.b
        with b.range(self.local, self.gemm.tokens, step=self.gemm.invocations) as token:
            self.x_scales[token] = b.const(f32, 1.0)
        with b.when(self.local == 0):
            self.again[0] = b.const(u32, 0)
        b.barrier("all scales are one")
        second = b.var(u32, 0)
        with b.loop():
            for var in [v for band in self.sums for v in band]:
                var.set(b.coop_fill(self._sums, 0.0))
            self.walk()
            self._look_for_extremes(second.get() == 0)
            b.break_if(b.assume_uniform((self.again[0] == 0) | (second.get() == 1)))
            second.set(1)
        self._find_scales()
        for i, band in enumerate(self.sums):
            self._finish_band(i, band)

    def put_weight(self, row: Value, slot: int, value: Value) -> None:
        for comp in range(4):
            self.weights[row * SPREAD_F16 + slot * 4 + comp] = value[comp].to(f16)

    def put_x(self, load: int, token: Value, value: Value) -> None:
        b, var = self.b, self.largest[load]
        bits = [value[comp].bitcast(u32) & 0x7FFFFFFF for comp in range(4)]
        var.set(b.max(var.get(), b.max(b.max(bits[0], bits[1]), b.max(bits[2], bits[3]))))
        value = value * self.x_scales[token]
        for comp in range(4):
            self.x[token * SPREAD_F16 + self.slot * 4 + comp] = value[comp].to(f16)

    def multiply(self) -> None:
        b, first = self.b, self._first_row
        left, right = coop(f16, self.m, self.k, "a"), coop(f16, self.k, self.n, "b")
        with b.range(0, STEP, step=self.k) as k:  # a loop: unrolled, it takes lavapipe's compiler half a minute
            xs = [
                b.coop_load(self.x, k + i * self.n * SPREAD_F16, SPREAD_F16, right, row_major=False)
                for i in range(self.gemm.tokens // self.n)
            ]
            for i, band in enumerate(self.sums):
                w = b.coop_load(self.weights, (first + i * self.m) * SPREAD_F16 + k, SPREAD_F16, left)
                for x, var in zip(xs, band, strict=True):
                    var.set(b.coop_mul_add(w, x, var.get()))

    def _look_for_extremes(self, first: Value) -> None:
        """Tokens that f16 does not hold well get a scale, and the tile is done again."""
        b = self.b
        for i, var in enumerate(self.largest):
            self._part(i, var.get().bitcast(f32))
        b.barrier("all largest values are in shared memory")
        with b.range(self.local, self.gemm.tokens, step=self.gemm.invocations) as token:
            most = b.const(u32, 0)
            for i in range(SLOTS):
                most = b.max(most, self.stage[token * SLOTS + i].bitcast(u32))
            extreme = (most > MOST_BITS) | ((most < LEAST_BITS) & (most > 0))
            with b.when(first & extreme):
                exponent = b.min(b.max(most >> 23, 14), 240)  # 2^(127 - exponent): the largest becomes 1 … 2
                self.x_scales[token] = ((254 - exponent) << 23).bitcast(f32)
                self.again[0] = b.const(u32, 1)
        b.barrier("all scales are known")

    def _part(self, load: int, value: Value) -> None:
        self.stage[(self.own_token + load * self.per_load) * SLOTS + self.slot] = value

    def _find_scales(self) -> None:
        """What to multiply each token's sums with."""
        b = self.b
        for i, var in enumerate(self.squares):
            self._part(i, var.get())
        b.barrier("all sums of squares are in shared memory")
        with b.range(self.local, self.gemm.tokens, step=self.gemm.invocations) as token:
            scale = 1.0 / self.x_scales[token]
            if self.spec.norm:
                scale = scale * self.norm_scale(tree_sum([self.stage[token * SLOTS + i] for i in range(SLOTS)]))
            self.scales[token] = scale
        b.barrier("all scales are in shared memory")

    def _finish_band(self, i: int, band: list[Var]) -> None:
        """M rows of each subgroup: over its part of the stage, f32 [tokens, M]."""
        b, m, lane = self.b, self.m, self.b.subgroup_lane()
        start = b.subgroup_id() * (self.gemm.tokens * m)
        for column, var in enumerate(band):
            b.coop_store(self.stage, start + column * self.n * m, m, var.get(), row_major=False)
        b.barrier("the band is on the stage")
        with b.range(lane, self.gemm.tokens * m // QUAD, step=self.spec.subgroup) as at:
            token = at // (m // QUAD)
            values = [self.stage[start + at * QUAD + e] * self.scales[token] for e in range(QUAD)]
            self.finish(values, self._first_row + i * m + at % (m // QUAD) * QUAD, token)
        b.barrier("the stage may be written again")
