"""GGML's tensor types: how many bytes a block of weights takes. Numbers only; what the bytes mean is the kernels' business.

Source: ggml.h and ggml-common.h (the table is checked against the `gguf` package by a test).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TypeInfo:
    """A tensor type: its number in the file, and `block_size` weights in `block_bytes` bytes."""

    id: int
    name: str
    block_size: int
    block_bytes: int


_TABLE = (
    TypeInfo(0, "F32", 1, 4),
    TypeInfo(1, "F16", 1, 2),
    TypeInfo(2, "Q4_0", 32, 18),
    TypeInfo(3, "Q4_1", 32, 20),
    TypeInfo(6, "Q5_0", 32, 22),
    TypeInfo(7, "Q5_1", 32, 24),
    TypeInfo(8, "Q8_0", 32, 34),
    TypeInfo(9, "Q8_1", 32, 40),
    TypeInfo(10, "Q2_K", 256, 84),
    TypeInfo(11, "Q3_K", 256, 110),
    TypeInfo(12, "Q4_K", 256, 144),
    TypeInfo(13, "Q5_K", 256, 176),
    TypeInfo(14, "Q6_K", 256, 210),
    TypeInfo(15, "Q8_K", 256, 292),
    TypeInfo(16, "IQ2_XXS", 256, 66),
    TypeInfo(17, "IQ2_XS", 256, 74),
    TypeInfo(18, "IQ3_XXS", 256, 98),
    TypeInfo(19, "IQ1_S", 256, 50),
    TypeInfo(20, "IQ4_NL", 32, 18),
    TypeInfo(21, "IQ3_S", 256, 110),
    TypeInfo(22, "IQ2_S", 256, 82),
    TypeInfo(23, "IQ4_XS", 256, 136),
    TypeInfo(24, "I8", 1, 1),
    TypeInfo(25, "I16", 1, 2),
    TypeInfo(26, "I32", 1, 4),
    TypeInfo(27, "I64", 1, 8),
    TypeInfo(28, "F64", 1, 8),
    TypeInfo(29, "IQ1_M", 256, 56),
    TypeInfo(30, "BF16", 1, 2),
    TypeInfo(34, "TQ1_0", 256, 54),
    TypeInfo(35, "TQ2_0", 256, 66),
    TypeInfo(39, "MXFP4", 32, 17),
)

TYPES: dict[str, TypeInfo] = {t.name: t for t in _TABLE}
TYPES_BY_ID: dict[int, TypeInfo] = {t.id: t for t in _TABLE}
