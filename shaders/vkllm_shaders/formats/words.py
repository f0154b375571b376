"""Words and texels: moved by numpy into packed order, and taken apart by a kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vkllm_codegen import Value
from vkllm_shaders.formats.base import U16, U32, StepWeights


def two_rows(rows: U16) -> U32:
    """[group, row, …] u16 → [group, pair, …] u32: row 2i below row 2i + 1."""
    words = rows[:, 1::2].astype(np.uint32)
    words <<= 16
    words |= rows[:, 0::2]
    return words


def put_words(words: U32, texels: U32) -> None:
    """words [group, row, lane, chunk] → the first texels [group, chunk, texel, lane, 4]: a word a row."""
    for i in range(0, words.shape[1], 4):
        part = words[:, i : i + 4]
        texels[:, :, i // 4, :, : part.shape[1]] = part.transpose(0, 3, 2, 1)


def put_texels(words: U32, texels: U32) -> None:
    """words [group, row or pair, lane, chunk, block, 4 k] → texels [group, chunk, (row or pair, block, k), lane, 4]."""
    source = words.view(np.complex128)  # a number of 16 bytes that numpy copies without looking at it
    p, n, k = source.shape[1], source.shape[4], source.shape[5]
    split_axis(texels.view(np.complex128)[..., 0], 2, (p, n, k))[...] = source.transpose(0, 3, 1, 4, 5, 2)


def put_steps(words: U32, texels: U32) -> None:
    """words [group, pair, lane, chunk, step, 4 k] → texels [group, chunk, step, (pair, k), lane, 4]."""
    source = words.view(np.complex128)
    p, k = source.shape[1], source.shape[5]
    split_axis(texels.view(np.complex128)[..., 0], 3, (p, k))[...] = source.transpose(0, 3, 4, 1, 5, 2)


def split_axis(a: NDArray[Any], axis: int, sizes: tuple[int, ...]) -> NDArray[Any]:
    """One axis as several, never a copy."""
    strides = [a.strides[axis] * int(np.prod(sizes[i + 1 :])) for i in range(len(sizes))]
    shape = (*a.shape[:axis], *sizes, *a.shape[axis + 1 :])
    return np.lib.stride_tricks.as_strided(a, shape, (*a.strides[:axis], *strides, *a.strides[axis + 1 :]))


def nibbles(w: StepWeights, word: int, high: int) -> Value:
    """The low or the high nibbles of a word, a nibble a byte."""
    q = w.body(word)
    return ((q >> 4) if high else q) & 0x0F0F0F0F


def bit_of_bytes(word: Value, index: int, place: int) -> Value:
    """Bit `index` of each byte, moved to bit `place`."""
    return ((word << (place - index)) if index < place else (word >> (index - place))) & (0x01010101 << place)
