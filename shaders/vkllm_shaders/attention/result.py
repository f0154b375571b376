"""Where the results of a workgroup go: the output itself, also in 8 bits where asked, or a place in the scratch buffer."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from vkllm_codegen import Block, Buffer, Value
from vkllm_shaders.attention.rows import CHUNK_DIMS
from vkllm_shaders.attention.softmax import with_sink
from vkllm_shaders.attention.spec import AttentionSpec
from vkllm_shaders.records import GROUP, OWN, largest_of, over_lanes, scale_bits, whole_numbers, write_record
from vkllm_shaders.sums import tree_sum

GROUP_CHUNKS = GROUP // CHUNK_DIMS


@dataclass(frozen=True)
class Records:
    """The output in 8 bits: of `row`, which has `n_group` groups."""

    buffer: Buffer
    row: Value
    n_group: Value


@dataclass(frozen=True)
class Result:
    """The place of one (row, KV head) `pair`; `used`: it has positions; sinks, records: there where the spec has them."""

    b: Block
    spec: AttentionSpec
    out: Buffer
    pair: Value
    kv_head: Value
    used: Value
    direct: bool
    sinks: Buffer | None = None
    records: Records | None = None

    def finish(self, g: Value | int, highest: Value, total: Value) -> Value:
        """The sum of weights to divide by, from head `g`'s largest score (in log2 units) and its positions' sum."""
        if self.sinks is None or not self.direct:
            return total
        return with_sink(self.b, self.sinks[self.kv_head * self.spec.group + g], highest, total)

    def store(self, g: Value | int, dim: Value, value: Value, total: Value) -> None:
        """One dim of head `g`; `total`: as `finish` gives it."""
        self._store(g, dim, self._share(value, total))

    def store_chunk(self, g: Value | int, chunk: Value, values: Sequence[Value], total: Value, owned: Value) -> None:
        """The 8 dims of a chunk of head `g` where `owned`, which all lanes call: neighbours hold the chunks of a record."""
        shares = [self._share(value, total) for value in values]
        with self.b.when(owned):
            for i, share in enumerate(shares):
                self._store(g, chunk * CHUNK_DIMS + i, share)
        if self.records:
            self._store_records(self.records, g, chunk, shares, owned)

    def _share(self, value: Value, total: Value) -> Value:
        return self.b.select(self.used, value / total, 0.0) if self.direct else value

    def _store(self, g: Value | int, dim: Value, share: Value) -> None:
        base = (self.pair * self.spec.group + g) * self.spec.head_dim if self.direct else self._base(g) + 2
        self.out[base + dim] = share

    def _store_records(self, to: Records, g: Value | int, chunk: Value, shares: Sequence[Value], owned: Value) -> None:
        b = self.b
        bits = scale_bits(b, over_lanes(b, b.max, largest_of(b, shares), GROUP_CHUNKS))
        whole = whole_numbers(b, shares, bits)
        total = over_lanes(b, operator.add, tree_sum(whole), GROUP_CHUNKS)
        group = (self.kv_head * self.spec.group + g) * (self.spec.head_dim // GROUP) + chunk // GROUP_CHUNKS
        lane = chunk % GROUP_CHUNKS * (CHUNK_DIMS // OWN)
        with b.when(owned):
            for i in range(0, CHUNK_DIMS, OWN):
                place = to.row, to.n_group, group, lane + i // OWN
                write_record(b, to.buffer, place, whole[i : i + OWN], total, bits)

    def store_state(self, g: Value | int, highest: Value, total: Value) -> None:
        """The largest score (in log2 units) and the sum of weights of head `g`; nothing when `direct`."""
        if not self.direct:
            self.out[self._base(g)] = highest
            self.out[self._base(g) + 1] = total

    def _base(self, g: Value | int) -> Value:
        place = self.pair * self.b.num_workgroups(0) + self.b.workgroup_id(0)
        return (place * self.spec.group + g) * (self.spec.head_dim + 2)
