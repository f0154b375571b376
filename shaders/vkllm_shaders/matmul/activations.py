"""The x of one step of a matrix product: where a lane finds it, in f32 or in 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vkllm_codegen import Value, f32, i32
from vkllm_shaders.formats import SLOTS
from vkllm_shaders.quantize import GROUP, SCALE, SCALE_ROWS, as_bytes, inverse_scale, largest_bits, largest_over_lanes, rounded
from vkllm_shaders.sums import tree_sum

if TYPE_CHECKING:
    from vkllm_shaders.matmul.body import Body


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
        self.scales: dict[tuple[int, int], Value] = {}
        self.quantized: list[list[list[Value]]] = []
        if body.spec.activations == "int8" and body.fmt.n_sub:
            self.quantized = [[self._quantize(t, i, v) for i, v in enumerate(token)] for t, token in enumerate(self.scaled)]

    def _quantize(self, t: int, load: int, v: Value) -> list[Value]:
        b, s = self.b, self.body.spec.lanes
        mine, largest = None, largest_bits(b, v)
        for first in range(0, s, GROUP):
            most = largest_over_lanes(b, largest, first)
            self.scales[t, load * (s // GROUP) + first // GROUP] = most * SCALE
            inverse = inverse_scale(b, most)
            mine = inverse if mine is None else b.select(self.body.lane < first, mine, inverse)
        assert mine is not None
        return rounded(b, v, mine)

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


class LaneRowQuantized(X):
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
        group = (self.chunk_start + self.step * SLOTS) // GROUP + body.lane % 4 // 2
        self.scales = body.bufs["scales"][body.first_token // SCALE_ROWS * (body.push["x_stride"] >> 1) + group]
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
            values = [self._slot(t, i) for i in range(group * GROUP, (group + 1) * GROUP)]
            most = largest_bits(self.b, values[0])
            for v in values[1:]:
                most = self.b.max(most, largest_bits(self.b, v))
            inverse = inverse_scale(self.b, most.bitcast(f32))
            self.groups[t, group] = most.bitcast(f32) * SCALE, [rounded(self.b, v, inverse) for v in values]
        return self.groups[t, group]

    def scale(self, t: int, slot: int) -> Value:
        return self._group(t, slot)[0]

    def integer(self, t: int, slot: int, comp: int) -> Value:
        return self._group(t, slot)[1][slot % GROUP][comp]

    def integer_word(self, t: int, slot: int) -> Value:
        return as_bytes(self._group(t, slot)[1][slot % GROUP])

    def integer_total(self, t: int, slots: range, comps: range = range(4)) -> Value:
        return tree_sum([self.integer(t, slot, comp) for slot in slots for comp in comps])
