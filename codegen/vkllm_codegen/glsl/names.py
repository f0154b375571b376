"""GLSL spellings: types, constants, identifiers."""

from __future__ import annotations

import math
import struct
from typing import Any

from ..types import CoopType, DType

SCALARS = {
    ("float", 32): "float", ("float", 16): "float16_t", ("bool", 1): "bool", ("int", 32): "int", ("uint", 32): "uint",
    ("int", 16): "int16_t", ("uint", 16): "uint16_t", ("int", 8): "int8_t", ("uint", 8): "uint8_t",
    ("int", 64): "int64_t", ("uint", 64): "uint64_t",
}  # fmt: skip
VECTORS = {
    ("float", 32): "vec", ("float", 16): "f16vec", ("bool", 1): "bvec", ("int", 32): "ivec", ("uint", 32): "uvec",
    ("int", 16): "i16vec", ("uint", 16): "u16vec", ("int", 8): "i8vec", ("uint", 8): "u8vec",
    ("int", 64): "i64vec", ("uint", 64): "u64vec",
}  # fmt: skip
TEXEL_LAYOUTS = {"u32": "r32ui", "u32x4": "rgba32ui", "i32": "r32i", "i32x4": "rgba32i", "f32": "r32f", "f32x4": "rgba32f",
                 "f16x4": "rgba16f"}  # fmt: skip
RESERVED_WORDS = """
attribute const uniform varying buffer shared coherent volatile restrict readonly writeonly layout in out inout input output
sample flat smooth if else for while do switch case default break continue discard return struct void bool int uint float
double true false main push filter common partition active asm class union enum typedef template this resource goto inline
noinline public static extern external interface long short half fixed unsigned superp sizeof cast namespace using min max
abs exp exp2 log log2 sin cos tanh sqrt floor clamp mix fma step sign pow mod length dot any all not round
"""
RESERVED = frozenset(RESERVED_WORDS.split())


def type_name(dtype: DType | CoopType) -> str:
    """The GLSL type."""
    if isinstance(dtype, CoopType):
        use = {"a": "gl_MatrixUseA", "b": "gl_MatrixUseB", "acc": "gl_MatrixUseAccumulator"}[dtype.use]
        return f"coopmat<{type_name(dtype.element)}, gl_ScopeSubgroup, {dtype.rows}, {dtype.cols}, {use}>"
    key = (dtype.kind, dtype.bits)
    return SCALARS[key] if dtype.count == 1 else f"{VECTORS[key]}{dtype.count}"


def constant(dtype: DType, value: Any) -> str:
    """A constant expression of exactly this type and value."""
    if dtype.count > 1:
        return f"{type_name(dtype)}({', '.join(constant(dtype.scalar, v) for v in value)})"
    if dtype.is_bool:
        return "true" if value else "false"
    if dtype.is_float:
        return _float(dtype, value)
    if dtype.bits == 64:
        return f"{type_name(dtype)}({value & (1 << 64) - 1}ul)"
    text = f"{value}u" if dtype.kind == "uint" else f"({value})" if value < 0 else str(value)
    if value == -(1 << 31):
        text = "int(0x80000000u)"
    return text if dtype.bits == 32 else f"{type_name(dtype)}({text})"


def _float(dtype: DType, value: float) -> str:
    if math.isfinite(value):
        text = repr(value) if value >= 0 and not str(value).startswith("-") else f"({value!r})"
    else:
        text = f"uintBitsToFloat({struct.unpack('<I', struct.pack('<f', value))[0]:#010x}u)"
    return text if dtype.bits == 32 else f"float16_t({text})"


class Names:
    """Gives every identifier once."""

    def __init__(self) -> None:
        self.used: dict[str, int] = {}

    def new(self, wanted: str) -> str:
        """`wanted`, or it with a number when it is taken or reserved."""
        base = "".join(c if c.isalnum() else "_" for c in wanted)
        if base in RESERVED or base.startswith("gl_"):
            base += "_"
        count = self.used.get(base, 0)
        self.used[base] = count + 1
        return base if not count else self.new(f"{base}_{count}")

    def numbered(self, prefix: str) -> str:
        """prefix0, prefix1, …"""
        number = self.used.get("#" + prefix, 0)
        self.used["#" + prefix] = number + 1
        name = f"{prefix}{number}"
        return self.numbered(prefix) if self.used.setdefault(name, 0) else name
