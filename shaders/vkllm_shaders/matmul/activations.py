"""The x of one step of a matrix product: where a lane finds it in f32, and how lane_chunk rounds it to 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vkllm_codegen import Value, f32, i32
from vkllm_shaders.formats import SLOTS
from vkllm_shaders.records import as_bytes, largest_of
from vkllm_shaders.sums import tree_sum

if TYPE_CHECKING:
    from vkllm_shaders.matmul.body import Body


GROUP = 8  # slots that share a scale in 8 bits


class X:
    """The x of one step, for every token of the tile, times the norm weight."""

    def __init__(self, body: Body, chunk_start: Value, step: Value | int) -> None:
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

    def _index(self, slot: Value | int) -> Value:
        return self.chunk_start + self.body.fmt.texel(self.step, slot)


class LaneRowX(X):
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


class LaneChunkX(X):
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
            slots = [self._slot(t, i) for i in range(group * GROUP, (group + 1) * GROUP)]
            values = [[v[i] for i in range(4)] for v in slots]
            largest = largest_of(self.b, [v for slot in values for v in slot]).bitcast(f32)
            inverse = self.b.select(largest > 0.0, 127.0 / largest, 0.0)
            whole = [[self.b.round(v * inverse).to(i32) for v in slot] for slot in values]
            self.groups[t, group] = largest * (1.0 / 127.0), whole
        return self.groups[t, group]

    def scale(self, t: int, slot: int) -> Value:
        return self._group(t, slot)[0]

    def integer(self, t: int, slot: int, comp: int) -> Value:
        return self._group(t, slot)[1][slot % GROUP][comp]

    def integer_word(self, t: int, slot: int) -> Value:
        return as_bytes(self._group(t, slot)[1][slot % GROUP])

    def integer_total(self, t: int, slots: range, comps: range = range(4)) -> Value:
        return tree_sum([self.integer(t, slot, comp) for slot in slots for comp in comps])
