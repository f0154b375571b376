"""The loops and the arithmetic of a matrix product; one class traces one kernel."""

from __future__ import annotations

from vkllm_codegen import Block, Buffer, Value, f32, u32
from vkllm_shaders.formats import SLOTS, Format, StepWeights, format_of
from vkllm_shaders.matmul.activations import LaneChunkX, LaneRowX, X
from vkllm_shaders.matmul.epilogue import Finish
from vkllm_shaders.matmul.spec import NO_SLOT, MatmulSpec
from vkllm_shaders.sums import added

DEQUANTIZE_TOKENS = 3


class Body:
    """The tracing of one kernel, or of a part of one: `workgroup` counts within it.

    Lists are indexed [token of the tile][row of the lane].
    """

    def __init__(
        self, b: Block, spec: MatmulSpec, bufs: dict[str, Buffer], push: dict[str, Value], workgroup: Value | None = None
    ) -> None:
        self.b, self.spec, self.bufs, self.push = b, spec, bufs, push
        self.fmt: Format = format_of(spec.fmt)
        self.rows, self.tile = spec.layout.rows, spec.tile
        self.lane = b.subgroup_lane()
        workgroup = b.workgroup_id(spec.row_axis) if workgroup is None else workgroup
        self.groups = self._own_groups(workgroup)
        self.first_token = b.workgroup_id(1 - spec.row_axis) * spec.tile
        self.expert_group = self._find_expert() if spec.experts else None
        self.acc = [[b.var(f32, 0.0) for _ in range(self.rows * spec.side_by_side)] for _ in range(self.tile)]
        self.squares = [b.var(f32, 0.0) for _ in range(self.tile)] if spec.norm and not spec.from_records else []
        # Memory could deliver large weights faster than the loop asks for them: touch the next chunk's cache lines, one a lane.
        # The largest half of a word seen is kept, so that the loads are.
        large = self.fmt.block_bytes >= self.fmt.block
        self.ahead = b.var(u32, 0) if spec.layout.kind == "lane_row" and large and self.tile <= 2 else None
        self.x_rows = [self._x_row(t) for t in range(self.tile)]
        self.x_start = [row * self.push["x_stride"] for row in self.x_rows]

    def emit(self) -> None:
        self.walk()
        Finish(self).emit()

    def walk(self) -> None:
        """Add up the products."""
        (self._walk_rows if self.spec.on_lavapipe else self._walk_steps)()

    def _own_groups(self, workgroup: Value) -> list[Value]:
        """The row groups that are multiplied side by side. They lie far apart, so that workgroups which follow one another read
        on where the last one stopped: what a processor's own reading ahead expects. Gated rows need two groups, which follow
        one another in this list, half of all groups apart (see row_order)."""
        spec, n_group = self.spec, self.push["n_group"]
        if not spec.on_lavapipe:
            return [workgroup * spec.subgroups + self.b.subgroup_id()]
        if spec.side_by_side == 1:
            return [workgroup]
        halves = 2 if spec.gated else 1
        n_place = spec.side_by_side // halves
        apart = (n_group // halves + (n_place - 1)) // n_place
        places = [workgroup + apart * i if i else workgroup for i in range(n_place)]
        return [place + n_group // 2 if late else place for place in places for late in range(halves)]

    def _find_expert(self) -> Value:
        """The first row group of the expert's weights. A tile without one has no chunks to walk along, and no rows to write."""
        expert = self.bufs["ids"][self.b.workgroup_id(1 - self.spec.row_axis)]
        if self.spec.in_tiles:
            left_over = {name: self.b.select(expert == NO_SLOT, 0, self.push[name]) for name in ("n_chunk", "n_token")}
            self.push = self.push | left_over
            expert = self.b.select(expert == NO_SLOT, 0, expert)
        return expert * self.push["n_group"]

    def token(self, t: Value | int) -> Value:
        """The row of y; not below n_token: none."""
        return self.bufs["rows"][self.first_token + t] if self.spec.in_tiles else self.first_token + t

    def _x_row(self, t: Value | int) -> Value:
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
        w, start = self.bufs["w"], self.of_expert(self.groups[0]) * self.push["n_chunk"]
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
                self._step(weights, LaneRowX(self, chunk * (f.chunk // 4), i))

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
        group = b.min(self.groups[0], self.push["n_group"] - 1)
        base = self.of_expert(group) * (n_chunk * f.n_texel(self.rows))
        with b.range(self.lane, n_step, step=self.spec.lanes) as at:
            chunk, step = (at, 0) if f.steps == 1 else (at >> 2, at & 3)
            body = base + n_chunk * f.n_head(self.rows) + at
            weights = StepWeights(f, b, lambda j: w[base + n_chunk * j + chunk], lambda j: w[body + n_step * j], self.rows, step)
            self._step(weights, LaneChunkX(self, chunk * (f.chunk // 4), step))
        for var in [v for token in self.acc for v in token] + self.squares:
            var.set(b.subgroup_add(var.get()))

    # arithmetic, the same for both

    def _step(self, w: StepWeights, x: X) -> None:
        for t, var in enumerate(self.squares):
            var.add(x.squares(t))
        if self.fmt.n_sub and self.spec.activations == "int8":
            self._multiply_integers(w, x)
        elif self.fmt.n_sub == 0 or self.tile >= DEQUANTIZE_TOKENS or not self.spec.on_lavapipe:
            self._multiply_weights(w, x)
        else:
            self._multiply_raw(w, x)

    def _multiply_weights(self, w: StepWeights, x: X) -> None:
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

    def _multiply_raw(self, w: StepWeights, x: X) -> None:
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

    def _multiply_integers(self, w: StepWeights, x: X) -> None:
        """Integer products with x in 8 bits, scaled a block at a time."""
        f = self.fmt
        for sub in range(f.n_sub):
            slots = range(sub * SLOTS // f.n_sub, (sub + 1) * SLOTS // f.n_sub)
            sums = self._pair_products(w, x, slots) if f.pairs else self._dot_products(w, x, slots)
            for t in range(self.tile):
                x_scale = x.scale(t, slots[0])
                x_sum = x.integer_total(t, slots).to(f32) if f.has_minimum else None
                for r in range(self.rows):
                    value = sums[t][r].to(f32) * (w.scale(r, sub) * x_scale)
                    minimum = w.minimum(r, sub)
                    self.acc[t][r].add(value if minimum is None or x_sum is None else value - minimum * (x_scale * x_sum))

    def _dot_products(self, w: StepWeights, x: X, slots: range) -> list[list[Value]]:
        """Q8_0 on GPUs: four signed bytes at a time."""
        sums: list[list[Value]] = [[] for _ in range(self.tile)]
        for slot in slots:
            words = [w.fmt.word(w, r, slot) ^ 0x80808080 for r in range(self.rows)]  # type: ignore[attr-defined]
            for t in range(self.tile):
                products = [self.b.dot_i8(word, x.integer_word(t, slot)) for word in words]
                sums[t] = added(sums[t], products)
        return sums

    def _pair_products(self, w: StepWeights, x: X, slots: range) -> list[list[Value]]:
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
