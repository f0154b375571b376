"""Formats without blocks: F32, F16, BF16."""

from __future__ import annotations

import numpy as np

from vkllm_codegen import Value, f32
from vkllm_shaders.formats.base import STEP, U16, U32, Format, StepWeights
from vkllm_shaders.formats.words import put_texels


class Float(Format):
    """F32, F16, BF16: rows of words, nothing else."""

    @property
    def words(self) -> int:
        """Words of a row in a step."""
        return STEP * self.block_bytes // 4

    def n_body(self, rows: int) -> int:
        return rows * self.words // 4

    def raw(self, w: StepWeights, r: int, slot: int, comp: int) -> Value:
        first = r * self.words
        if self.name == "F32":
            return w.body(first + slot * 4 + comp).bitcast(f32)
        word = w.body(first + slot * 2 + comp // 2)
        if self.name == "BF16":
            return (word & 0xFFFF0000 if comp % 2 else word << 16).bitcast(f32)
        return w.keep(("f16", r, slot, comp // 2), lambda: w.b.unpack_half2x16(word))[comp % 2]

    def pack(self, rows: U16, head: U32, body: U32) -> None:
        put_texels(rows.reshape(*rows.shape[:4], 1, -1).view(np.uint32), body[:, :, 0])
