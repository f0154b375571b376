"""What happens to the sums of a matrix product: norm scale, bias, then store, add, gate, or rotate and cache."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vkllm_codegen import Value, f16, f32
from vkllm_shaders.matmul.spec import NO_SLOT
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
            for t, token in enumerate(values):
                scale = self._norm(t)
                values[t] = [v * scale for v in token]
        if self.spec.on_lavapipe:
            self._each(values)
        else:
            self._spread(values)

    def _norm(self, t: int) -> Value:
        """1 / sqrt(mean(x²) + eps) of a token: from its squares, or as quantize.py left it."""
        if self.spec.quantized:
            return self.bufs["norms"][self.b.min(self.body.token(t), self.push["n_token"] - 1)]
        squares = self._sum_lanes(self.body.squares[t].get())
        return self.b.rsqrt(squares / self.push["n_col"].to(f32) + self.push["eps"])

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
                self.one(token[r : r + step], packed, t, r)

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
            self.one(picked, self.body.group * rows + r, i // (rows // step), r)

    def one(self, values: list[Value], packed: Value, t: Value | int, r: Value | int) -> None:
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
