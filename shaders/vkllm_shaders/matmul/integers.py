"""Products of codes with x in 8 bits, for lavapipe: two rows in the halves of a word, one multiplication for both.

p = high * 2**16 + low is a sum of products of both rows; it is read off before low leaves 16 bits. Codes are counted from the
middle of their range, where they stay small longest.

Where the processor multiplies 64 bits as quickly (AMD's AVX-512), tiles may take four rows at once (MatmulSpec.wide). The pipes
have no less to do, but the instructions of a step are a fifth less: on a core whose other thread is busy too that decides.
"""

from __future__ import annotations

import operator
from functools import partial

from vkllm_codegen import Block, Buffer, Value, f32, i32, i64, u32, u32x2, u64
from vkllm_shaders.formats import FIELDS, STEP_COLUMNS, Coded, CodedWeights, code_order, coded_of
from vkllm_shaders.formats.base import Load
from vkllm_shaders.matmul.body import Body
from vkllm_shaders.matmul.spec import MatmulSpec
from vkllm_shaders.records import LANES, over_lanes
from vkllm_shaders.sums import added, tree_sum

SHORT_HEAD = 2  # texels that cost less in every step than a loop in a loop, where tokens are few
CENTER_TOKENS = 4  # from so many on it is cheaper to take the middle from each code than from each part of a sum


class IntegerBody(Body):
    """The tracing of one kernel of layout "lane_pair". Lists of rows count over the row groups, one after the other."""

    def __init__(
        self, b: Block, spec: MatmulSpec, bufs: dict[str, Buffer], push: dict[str, Value], workgroup: Value | None = None
    ) -> None:
        super().__init__(b, spec, bufs, push, workgroup)
        self.coded: Coded = coded_of(spec.fmt)

    def walk(self) -> None:
        """A loop over the steps; or over chunks and their steps, so that a long head is loaded once."""
        b, c, push = self.b, self.coded, self.push
        if c.carries:
            self._walk_carrying()
            return
        last = push["n_group"] - 1
        starts = [self.of_expert(b.min(group, last)) * push["n_chunk"] for group in self.groups]

        def bases(chunk: Value) -> list[Value]:
            return [(start + chunk) * (c.n_texel * LANES) + self.lane for start in starts]

        n_step = b.min(push["x_stride"], push["n_chunk"] * c.steps)
        if c.n_head <= SHORT_HEAD or self.tile > 2:
            with b.range(0, n_step) as group:
                chunk, step = (group // c.steps, group % c.steps) if c.steps > 1 else (group, 0)
                weights = [self._weights(base, step, partial(self._texel, base)) for base in bases(chunk)]
                self._multiply(weights, Records(self, group))
            return
        with b.range(0, push["n_chunk"]) as chunk:
            first = chunk * c.steps
            heads = [(base, [self._texel(base, j) for j in range(c.n_head)]) for base in bases(chunk)]
            with b.range(0, b.min(n_step - first, c.steps)) as step:
                weights = [self._weights(base, step, partial(self._chosen, head)) for base, head in heads]
                self._multiply(weights, Records(self, first + step))

    def _walk_carrying(self) -> None:
        """A loop over the steps, in which factors of two rows come from the step before (Coded.scales)."""
        b, c, push = self.b, self.coded, self.push
        row_texels, last = push["n_chunk"] * (c.n_texel * LANES), push["n_group"] - 1
        starts = [self.of_expert(b.min(group, last)) * row_texels + self.lane for group in self.groups]
        carried = []
        to_last = b.max(row_texels, c.n_body * LANES) - c.n_body * LANES  # step; a tile without an expert has none
        for start in starts:
            tail = self.bufs["w"][start + to_last]
            carried.append([b.var(u32, 0), b.var(u32, 0), b.var(u32, tail[2]), b.var(u32, tail[3])])
        with b.range(0, b.min(push["x_stride"], push["n_chunk"] * c.steps)) as step:
            odd = (step & 1) == 1
            weights = []
            for start, held in zip(starts, carried, strict=True):
                base = start + step * (c.n_body * LANES)
                tail = self.bufs["w"][base]
                before = [var.get() for var in held]
                factors = [b.select(odd, before[i], tail[2 + i]) for i in range(2)] + before[2:]
                for i in range(2):
                    held[i].set(factors[i])
                    held[2 + i].set(b.select(odd, tail[2 + i], before[2 + i]))
                body = partial(self._beside_tail, base, tail)
                weights.append(CodedWeights(c, b, partial(_known, b.vec(*factors)), body, step))
            self._multiply(weights, Records(self, step))

    def _beside_tail(self, base: Value, tail: Value, j: int) -> Value:
        """A texel of a step whose tail is there already."""
        place = self.coded.place(j)
        return self._texel(base, place) if place else tail

    def _texel(self, base: Value, j: Value | int) -> Value:
        return self.bufs["w"][base + j * LANES]

    def _chosen(self, texels: list[Value], j: Value | int) -> Value:
        """One of the head's texels; where only the device knows which, one behind the first."""
        if isinstance(j, int):
            return texels[j]
        chosen = texels[-1]
        for i in range(len(texels) - 2, 0, -1):
            chosen = self.b.select(j <= i, texels[i], chosen)
        return chosen

    def _weights(self, base: Value, step: Value | int, head: Load) -> CodedWeights:
        c = self.coded
        body = base + (step * c.n_body + c.n_head) * LANES
        return CodedWeights(c, self.b, head, lambda j: self._texel(body, j), step)

    def _multiply(self, weights: list[CodedWeights], x: Records) -> None:
        """One step: whole numbers for every scale of it, then floats."""
        c, order = self.coded, code_order(self.coded.group)
        subs = [range(i * c.group, (i + 1) * c.group) for i in range(c.n_sub)]
        if c.signed and not c.minimum and not self._rest:
            self._add_whole(weights, x, [self._sums(weights, x, order, codes) for codes in subs])
            return
        for sub, codes in enumerate(subs):
            sums = self._sums(weights, x, order, codes)
            for t in range(self.tile):
                total = x.total(t, order, codes) if c.minimum or self._rest else None
                for r, whole in enumerate(sums[t]):
                    w, own = weights[r // self.rows], r % self.rows
                    self.acc[t][r].add(self._of_group(w, own, sub, whole, total, x.scale(t)))

    def _add_whole(self, weights: list[CodedWeights], x: Records, sums: list[list[list[Value]]]) -> None:
        """Add a step whose scales are whole numbers too. sums: [sub][token][row]."""
        for t in range(self.tile):
            for r, parts in enumerate(zip(*(sub[t] for sub in sums), strict=True)):
                w, own = weights[r // self.rows], r % self.rows
                whole = tree_sum([part * w.whole_scale(own, sub) for sub, part in enumerate(parts)])
                self.acc[t][r].add(whole.to(f32) * (w.factor(own) * x.scale(t)))

    @property
    def _rest(self) -> int:
        """What the middle of the codes' range stands for, beyond the zero point."""
        return (1 << (self.coded.bits - 1)) - self.coded.zero

    def _of_group(self, w: CodedWeights, r: int, sub: int, whole: Value, total: Value | None, x_scale: Value) -> Value:
        if total is None:
            return whole.to(f32) * (w.scale(r, sub) * x_scale)
        # scale * (whole + rest * total) - minimum * total
        per_total = w.keep(("per total", r, sub), lambda: self._per_total(w, r, sub))
        return (whole.to(f32) * w.scale(r, sub) + total.to(f32) * per_total) * x_scale

    def _per_total(self, w: CodedWeights, r: int, sub: int) -> Value:
        rest = w.scale(r, sub) * float(self._rest)
        return rest - w.minimum(r, sub) if self.coded.minimum else rest

    def _sums(self, weights: list[CodedWeights], x: Records, order: list[tuple[int, int]], codes: range) -> list[list[Value]]:
        """i32 [token][row]: sums over `codes` of centered code times x.

        Token after token: then all but a few values are constants of the step, which a compiler may keep in memory.
        """
        if self.spec.wide:
            return self._sums_of_four(weights, x, order)
        c, middle = self.coded, (1 << (self.coded.bits - 1)) * 0x10001
        center = c.limit < LANES or (self.tile >= CENTER_TOKENS and c.limit < STEP_COLUMNS)
        parts = [codes[i : i + c.limit] for i in range(0, len(codes), c.limit)]
        pairs = [(w, pair) for w in weights for pair in range(self.rows // 2)]
        kept: dict[int, list[Value]] = {}

        def both(index: int) -> list[Value]:
            if index not in kept:
                found = [w.both(pair, index) for w, pair in pairs]
                kept[index] = [v - middle for v in found] if center else found
            return kept[index]

        sums: list[list[Value]] = []
        for t in range(self.tile):
            words: list[Value] = []
            highs: list[Value] = []
            for part in parts:
                packed: list[Value] = []
                for index in part:
                    xs = x.integer(t, *order[index])
                    packed = added(packed, [v * xs for v in both(index)])
                # Half a unit of the high sum more, so that a negative low sum borrows nothing from it.
                more = 0x8000 if center else 0x8000 - x.total(t, order, part) * middle
                packed = [p + more for p in packed]
                highs = added(highs, [p >> 16 for p in packed])
                words = added(words, packed)
            if len(parts) == 1:
                lows = [(p & 0xFFFF) - 0x8000 for p in words]
            else:
                lows = [p - 0x8000 * len(parts) - (high << 16) for p, high in zip(words, highs, strict=True)]
            sums.append([v for pair in zip(lows, highs, strict=True) for v in pair])
        return sums

    def _sums_of_four(self, weights: list[CodedWeights], x: Records, order: list[tuple[int, int]]) -> list[list[Value]]:
        """The same sums over a whole step, the four rows of a lane in 16 bits each."""
        middle = (1 << (self.coded.bits - 1)) * FIELDS
        codes = [[w.four(index) for w in weights] for index in range(STEP_COLUMNS)]
        sums: list[list[Value]] = []
        for t in range(self.tile):
            packed: list[Value] = []
            for fours, place in zip(codes, order, strict=True):
                xs = x.wide(t, *place)
                packed = added(packed, [v * xs for v in fours])
            # Half a unit more in every field, so that negative sums borrow nothing from the next.
            more = 0x8000 * FIELDS - as_wide(x.total(t, order, range(STEP_COLUMNS))) * middle
            words = [(p + more).bitcast(u32x2)[i] for p in packed for i in range(2)]
            sums.append([v.bitcast(i32) - 0x8000 for word in words for v in (word & 0xFFFF, word >> 16)])
        return sums


def _known(texel: Value, _: Value | int) -> Value:
    return texel


def as_wide(v: Value) -> Value:
    """u64: an i32 with its sign."""
    return v.to(i64).bitcast(u64)


class Records:
    """The x of one step for every token of the tile, as records.py lays it out."""

    def __init__(self, body: IntegerBody, group: Value) -> None:
        self.b, self.body, spec = body.b, body, body.spec
        n_group, x = body.push["x_stride"], body.bufs["x"]
        self.words: list[tuple[Value, Value]] = []  # of each token: four bytes, the scale

        def load(row: Value) -> Value:
            return x[((row >> 1) * n_group + group) * LANES + body.lane]

        if spec.tile > 1 and not spec.picks_rows:
            for t in range(0, spec.tile, 2):
                texel = load(self.b.min(body.first_token + t, body.push["n_token"] - 1))
                self.words += [(texel[0], texel[1]), (texel[2], texel[3])]
        else:
            for row in body.x_rows:
                texel, odd = load(row), (row & 1) == 1
                self.words.append((self.b.select(odd, texel[2], texel[0]), self.b.select(odd, texel[3], texel[1])))
        self._own: dict[tuple[int, int], Value] = {}
        self._wide: dict[tuple[int, int], Value] = {}
        self._totals: dict[tuple[int, range], Value] = {}

    def own(self, t: int, q: int) -> Value:
        """i32: this lane's column 4 * lane + q."""
        if (t, q) not in self._own:
            bits = self.words[t][0].bitcast(i32)
            self._own[t, q] = (bits << (24 - 8 * q) if q < 3 else bits) >> 24
        return self._own[t, q]

    def integer(self, t: int, q: int, j: int) -> Value:
        """i32: column 4 * (lane ^ j) + q."""
        return self.b.subgroup_shuffle_xor(self.own(t, q), j) if j else self.own(t, q)

    def wide(self, t: int, q: int, j: int) -> Value:
        """u64: the same with its sign."""
        if (t, q) not in self._wide:
            self._wide[t, q] = as_wide(self.own(t, q))
        return self.b.subgroup_shuffle_xor(self._wide[t, q], j) if j else self._wide[t, q]

    def scale(self, t: int) -> Value:
        """f32."""
        return (self.words[t][1] & 0xFFFF0000).bitcast(f32)

    def total(self, t: int, order: list[tuple[int, int]], codes: range) -> Value:
        """i32: the sum over some codes' columns; for each q, whole aligned runs of lanes."""
        if len(codes) == STEP_COLUMNS:
            return (self.words[t][1].bitcast(i32) << 16) >> 16
        if (t, codes) not in self._totals:
            js = {order[i][1] for i in codes}
            qs = sorted({order[i][0] for i in codes})
            assert len(codes) == len(js) * len(qs)
            mine = tree_sum([self.own(t, q) for q in qs])
            run = over_lanes(self.b, operator.add, mine, len(js))
            self._totals[t, codes] = self.b.subgroup_shuffle_xor(run, min(js)) if min(js) else run
        return self._totals[t, codes]
