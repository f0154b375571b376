"""What happens to the sums of a matrix product: norm scale, bias, then store, add, gate, or rotate and cache."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vkllm_codegen import Value, f16, f32, u32
from vkllm_shaders.matmul.spec import NO_SLOT
from vkllm_shaders.records import GROUP, LANES, OWN, group_squares, norm_factors, write_group
from vkllm_shaders.sums import at_most, tanh, tree_sum

if TYPE_CHECKING:
    from vkllm_shaders.matmul.body import Body

OAI_LIMIT, OAI_ALPHA = 7.0, 1.702  # of gpt-oss's gated unit


class Finish:
    """What happens to the sums: norm scale, bias, then store, add, gate, or rotate and cache."""

    def __init__(self, body: Body) -> None:
        self.body, self.b, self.spec, self.bufs, self.push = body, body.b, body.spec, body.bufs, body.push

    def emit(self) -> None:
        body, b = self.body, self.b
        values = [[var.get() for var in token] for token in body.acc]
        if body.ahead is not None:  # never so
            values[0][0] = b.select(body.ahead.get() == 0xFFFFFFFF, 0.0, values[0][0])
        if self.spec.norm:
            values = [[v * scale for v in token] for token, scale in zip(values, self._norms(), strict=True)]
        if not self.spec.on_lavapipe:
            self._spread(values)
        elif self.spec.neighbours > 1:
            self._in_vectors(values)
        else:
            self._each(values)

    def _norms(self) -> list[Value]:
        """1 / sqrt(mean(x²) + eps) of the tokens: from their squares, gathered here or by who wrote their records."""
        push = self.push
        if self.spec.from_records:
            stride, n_col, eps = push["squares_stride"], push["n_col"], push["eps"]
            return norm_factors(self.b, self.bufs["squares"], self.body.x_rows, stride, self.body.lane, n_col, eps)
        squares = [self._sum_lanes(var.get()) for var in self.body.squares]
        return [self.b.rsqrt(v / push["n_col"].to(f32) + push["eps"]) for v in squares]

    def _sum_lanes(self, v: Value) -> Value:
        if not self.spec.on_lavapipe:
            return v  # already added over the subgroup
        return tree_sum([self.b.subgroup_shuffle(v, lane) for lane in range(self.spec.lanes)])

    def _each(self, values: list[list[Value]]) -> None:
        """Every lane its own rows."""
        step = 2 if self.spec.paired else 1
        for t, token in enumerate(values):
            for r in range(0, len(token), step):
                self.one(token[r : r + step], self._packed(r), self._row(r), t)

    def _packed(self, r: int) -> Value:
        """The packed row of one of a lane's rows."""
        layout = self.spec.layout
        return (self.body.groups[r // layout.rows] * layout.rows + r % layout.rows) * layout.lanes + self.body.lane

    def _row(self, r: int) -> Value:
        """The row of y (or the pair, for "qkv" and "pairs") of one of a lane's rows or pairs; the same as row_order tells."""
        layout, lane, packed = self.spec.layout, self.body.lane, self._packed(r)
        beside, r = divmod(r, layout.rows)
        group = self.body.groups[beside]
        if not self.spec.paired:
            return packed if layout.kind == "lane_row" else group * layout.group_rows + lane * layout.rows + r
        if layout.kind == "lane_row" or self.spec.of_heads:
            return (group * (layout.rows // 2) + r // 2) * layout.lanes + lane
        if self.spec.side_by_side > 1:
            place, late = self.body.groups[beside // 2 * 2], beside % 2
            return place * layout.group_rows + (lane * layout.rows + (r // 2 + late * 2))
        half = self.push["n_group"] // 2
        behind = self.b.select(group < half, self.b.const(u32, 0), 1)
        return (group - half * behind) * layout.group_rows + lane * layout.rows + (r // 2 + behind * 2)

    def _in_vectors(self, values: list[list[Value]]) -> None:
        """A lane's rows of y that follow one another at once, and their record."""
        b, push, spec = self.b, self.push, self.spec
        n = spec.neighbours
        step = 2 * n if spec.gated else n  # rows of w
        for t, token in enumerate(values):
            row = self.body.token(t)
            for first in range(0, len(token), step):
                at = self._row(first)
                with b.when((at < push["n_row"]) & (row < push["n_token"])):
                    own = [v for i in range(first, first + step, 2) for v in self._biased(token[i : i + 2], self._packed(i))]
                    own = self._scaled(own)
                    if spec.gated:
                        own = [self._gate(*own[i : i + 2]) for i in range(0, step, 2)]
                    place = (row * push["y_stride"] + push["first_row"] + at) // n
                    whole = b.vec(*own)
                    if spec.epilogue == "residual":
                        whole = self.bufs["y"][place] + whole
                    self.bufs["y"][place] = whole
                    if spec.records:
                        self._record(whole, row, at // GROUP)

    def _record(self, y: Value, row: Value, group: Value) -> None:
        """The record of a group of 32 columns of y, a lane its four; for a norm that of y * norm_w, and the squares of y."""
        b, push, lane = self.b, self.push, self.body.lane
        with_norm = self.spec.epilogue == "residual"
        scaled = y * self.bufs["y_norm_w"][group * LANES + lane] if with_norm else y
        groups = push["n_row"] // GROUP
        write_group(b, self.bufs["y_record"], row, groups, group, lane, [scaled[i] for i in range(OWN)])
        if with_norm:
            squares = group_squares(b, [y[i] for i in range(OWN)])
            with b.when(lane == 0):
                self.bufs["y_squares"][row * push["y_squares_stride"] + group] = squares

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
            packed = self.body.groups[0] * rows + i % (rows // step) * step
            self.one(picked, packed, packed // step, i // (rows // step))

    def one(self, values: list[Value], packed: Value, row: Value, t: Value | int) -> None:
        """Finish one row or pair. `packed`: packed row of the first."""
        b, token = self.b, self.body.token(t)
        n_row = self.push["n_row"]
        inside = row * 2 < n_row if self.spec.of_heads else row < n_row
        with b.when(inside & (token < self.push["n_token"])):
            values = self._biased(values, packed)
            if self.spec.epilogue == "qkv":
                self._rotate_and_cache(values[0], values[1], row, token)
                return
            y = self.bufs["y"]
            if self.spec.epilogue == "pairs":
                head, _, first, distance = self._of_head(row)
                at = token * self.push["y_stride"] + head * self.spec.head_dim + first
                y[at], y[at + distance] = values
                return
            at = token * self.push["y_stride"] + self.push["first_row"] + row
            values = self._scaled(values)
            if self.spec.gated:
                y[at] = self._gate(*values)
            elif self.spec.epilogue == "residual":
                y[at] = y[at] + values[0]
            else:
                y[at] = values[0]

    def _gate(self, gate: Value, up: Value) -> Value:
        """What a gate lets through."""
        b = self.b
        if self.spec.epilogue == "geglu":
            inner = (gate * gate * 0.044715 + 1.0) * gate * math.sqrt(2.0 / math.pi)
            return (tanh(b, inner) + 1.0) * gate * 0.5 * up
        if self.spec.epilogue == "swiglu_oai":
            gate, up = at_most(b, gate, OAI_LIMIT), -at_most(b, -at_most(b, up, OAI_LIMIT), OAI_LIMIT)
            return gate / (b.exp(gate * -OAI_ALPHA) + 1.0) * (up + 1.0)
        return gate / (b.exp(-gate) + 1.0) * up

    def _biased(self, values: list[Value], packed: Value) -> list[Value]:
        """Rows that follow one another in a lane, the first packed row given, plus their biases."""
        if not self.spec.bias:
            return values
        if self.body.expert_group is not None:
            packed = packed + self.body.expert_group * self.spec.layout.group_rows
        return [v + self.bufs["bias"][packed + e * self.spec.layout.lanes] for e, v in enumerate(values)]

    def _scaled(self, values: list[Value]) -> list[Value]:
        if self.spec.scale != 1.0:
            values = [v * self.spec.scale for v in values]
        if self.spec.softcap:
            values = [tanh(self.b, v * (1.0 / self.spec.softcap)) * self.spec.softcap for v in values]
        return values

    def _of_head(self, pair: Value) -> tuple[Value, Value, Value, int]:
        """A pair's head, counted over q, k and v; its number in the head, its first dim, and how far the second is from it."""
        half = self.spec.head_dim // 2
        pair = pair + (self.push["first_row"] >> 1)
        head, i = pair // half, pair % half
        return (head, i, i * 2, 1) if self.spec.rope_pairing == "interleaved" else (head, i, i, half)

    def _rotate_and_cache(self, a: Value, c: Value, pair: Value, token: Value) -> None:
        """RoPE on a pair of q or k; q is stored, k and v go to the cache."""
        b, push, spec = self.b, self.push, self.spec
        head, i, first, distance = self._of_head(pair)
        capacity = push["capacity"]
        position, cache_row = self.bufs["params"][capacity + token], self.bufs["params"][capacity * 2 + token]
        turn = self.bufs["rope"][(position * (spec.head_dim // 2) + i) >> 1]
        odd = (i & 1) == 1
        cos, sin = b.select(odd, turn[2], turn[0]), b.select(odd, turn[3], turn[1])
        ra, rc = a * cos - c * sin, a * sin + c * cos
        n_head, n_kv = push["n_head"], push["n_kv_head"]
        with b.when(head < n_head):
            at = (token * n_head + head) * spec.head_dim + first
            self.bufs["q"][at] = ra
            self.bufs["q"][at + distance] = rc
        with b.when((head >= n_head) & (cache_row != NO_SLOT)):
            kv_head = (head - n_head) % n_kv
            at = (cache_row + kv_head * push["block_size"]) * spec.head_dim + first
            with b.when(head < n_head + n_kv):
                self.bufs["k"][at] = ra.to(f16)
                self.bufs["k"][at + distance] = rc.to(f16)
            with b.when(head >= n_head + n_kv):
                self.bufs["v"][at] = a.to(f16)
                self.bufs["v"][at + distance] = c.to(f16)

