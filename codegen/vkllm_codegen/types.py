"""Data types of the kernel language: scalars, vectors of 2 to 4 components, cooperative matrices.

Types are interned, so that `is`, `==` and hashing agree and cost nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """A scalar (count 1) or a vector. `kind` is "float", "int", "uint" or "bool"; `bits` are those of one component."""

    kind: str
    bits: int
    count: int = 1

    def __reduce__(self) -> tuple[Any, ...]:
        return _interned, (self.kind, self.bits, self.count)

    @property
    def itemsize(self) -> int:
        """Bytes in memory (a boolean has no memory layout; it counts as 4)."""
        return max(self.bits, 8) // 8 * self.count if self.kind != "bool" else 4 * self.count

    @property
    def scalar(self) -> DType:
        """The component type."""
        return _interned(self.kind, self.bits, 1)

    @property
    def numpy(self) -> np.dtype[Any]:
        """numpy's dtype of one component."""
        import numpy as np

        return np.dtype("bool" if self.kind == "bool" else f"{self.kind}{self.bits}")

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_bool(self) -> bool:
        return self.kind == "bool"

    @property
    def is_integer(self) -> bool:
        return self.kind in ("int", "uint")

    @property
    def is_signed(self) -> bool:
        return self.kind == "int"

    def with_count(self, count: int) -> DType:
        """The same component type, `count` of them."""
        return _interned(self.kind, self.bits, count)

    def __repr__(self) -> str:
        base = "boolean" if self.kind == "bool" else f"{self.kind[0]}{self.bits}"
        return base if self.count == 1 else f"{base}x{self.count}"


@dataclass(frozen=True, slots=True, eq=False)
class CoopType:
    """A matrix whose elements are spread over a subgroup. `use` is "a", "b" or "acc". Source: SPV_KHR_cooperative_matrix."""

    element: DType
    rows: int
    cols: int
    use: str

    def __repr__(self) -> str:
        return f"coop<{self.element!r}, {self.rows}x{self.cols}, {self.use}>"


@cache
def _interned(kind: str, bits: int, count: int) -> DType:
    return DType(kind, bits, count)


@cache
def coop(element: DType, rows: int, cols: int, use: str) -> CoopType:
    """The cooperative-matrix type of this element, shape and use ("a", "b" or "acc")."""
    if use not in ("a", "b", "acc"):
        raise ValueError(f"use is {use!r}; expected 'a', 'b' or 'acc'")
    return CoopType(element, rows, cols, use)


def vec(scalar: DType, count: int) -> DType:
    """The vector of `count` (2 to 4) components of type `scalar`."""
    if scalar.count != 1 or not 2 <= count <= 4:
        raise ValueError(f"no vector of {count} × {scalar!r}; expected 2 to 4 scalars")
    return scalar.with_count(count)


f16, f32 = _interned("float", 16, 1), _interned("float", 32, 1)
i8, i16, i32, i64 = (_interned("int", bits, 1) for bits in (8, 16, 32, 64))
u8, u16, u32, u64 = (_interned("uint", bits, 1) for bits in (8, 16, 32, 64))
boolean = _interned("bool", 1, 1)
f16x2, f16x4 = vec(f16, 2), vec(f16, 4)
f32x2, f32x3, f32x4 = (vec(f32, n) for n in (2, 3, 4))
i32x2, i32x3, i32x4 = (vec(i32, n) for n in (2, 3, 4))
u32x2, u32x3, u32x4 = (vec(u32, n) for n in (2, 3, 4))
i16x2, i16x4, u16x2, u16x4 = vec(i16, 2), vec(i16, 4), vec(u16, 2), vec(u16, 4)
i8x2, i8x4, u8x2, u8x4 = vec(i8, 2), vec(i8, 4), vec(u8, 2), vec(u8, 4)

Number = bool | int | float


def round_float(dtype: DType, value: float) -> float:
    """`value` rounded to the nearest f16 or f32 (to even), overflowing to infinity as the hardware does."""
    code = "<e" if dtype.bits == 16 else "<f"
    try:
        result: float = struct.unpack(code, struct.pack(code, value))[0]
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
    return result


def wrap_integer(dtype: DType, value: int) -> int:
    """`value` modulo 2**bits, in the range of `dtype`."""
    value &= (1 << dtype.bits) - 1
    return value - (1 << dtype.bits) if dtype.is_signed and value >> (dtype.bits - 1) else value


def convert_exactly(dtype: DType, value: Any) -> Number:
    """A Python (or numpy) number as a constant of the scalar type `dtype`.

    Raises: ValueError: it does not fit: a fraction for an integer, out of range, an integer no float of this size can hold.
    A Python float may be rounded to f16 or f32: decimal fractions mean "the nearest".
    """
    if dtype.is_bool:
        if value not in (0, 1):
            raise ValueError(f"{value!r} is not a boolean")
        return bool(value)
    if dtype.is_float:
        return _convert_float(dtype, value)
    number = int(value)
    if number != value or wrap_integer(dtype, number) != number:
        raise ValueError(f"{value!r} is not exactly representable as {dtype!r}")
    return number


def _convert_float(dtype: DType, value: Any) -> float:
    result = round_float(dtype, float(value))
    exact_wanted = hasattr(value, "__index__")
    overflowed = result in (float("inf"), float("-inf")) and float(value) != result
    if overflowed or (exact_wanted and result != value):
        raise ValueError(f"{value!r} is not representable as {dtype!r}")
    return result
