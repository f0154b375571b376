"""Where the results of a workgroup go: the output itself, or its place in the scratch buffer."""

from __future__ import annotations

from dataclasses import dataclass

from vkllm_codegen import Block, Buffer, Value
from vkllm_shaders.attention.softmax import with_sink
from vkllm_shaders.attention.spec import AttentionSpec


@dataclass(frozen=True)
class Result:
    """The place of one (row, KV head) `pair`; `used`: it has positions; `sinks`: bound where the spec has them."""

    b: Block
    spec: AttentionSpec
    out: Buffer
    pair: Value
    kv_head: Value
    used: Value
    direct: bool
    sinks: Buffer | None = None

    def finish(self, g: Value | int, highest: Value, total: Value) -> Value:
        """The sum of weights to divide by, from head `g`'s largest score (in log2 units) and its positions' sum."""
        if self.sinks is None or not self.direct:
            return total
        return with_sink(self.b, self.sinks[self.kv_head * self.spec.group + g], highest, total)

    def store(self, g: Value | int, dim: Value, value: Value, total: Value) -> None:
        """One dim of head `g`; `total`: as `finish` gives it."""
        if self.direct:
            share = self.b.select(self.used, value / total, 0.0)
            self.out[(self.pair * self.spec.group + g) * self.spec.head_dim + dim] = share
        else:
            self.out[self._base(g) + 2 + dim] = value

    def store_state(self, g: Value | int, highest: Value, total: Value) -> None:
        """The largest score (in log2 units) and the sum of weights of head `g`; nothing when `direct`."""
        if not self.direct:
            self.out[self._base(g)] = highest
            self.out[self._base(g) + 1] = total

    def _base(self, g: Value | int) -> Value:
        place = self.pair * self.b.num_workgroups(0) + self.b.workgroup_id(0)
        return (place * self.spec.group + g) * (self.spec.head_dim + 2)
