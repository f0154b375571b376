"""The value of a pure operation on constants, exactly as a device with correctly rounded arithmetic computes it.

Sums, products, quotients and square roots of f32 or f16 numbers are computed in double precision and rounded once more: a double
has more than twice their digits, so this rounds correctly. What a device may round otherwise (exp, sin, …) is not folded.
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable
from typing import Any

from ..ir import COMPARISONS, Op, OpCode
from ..types import DType, round_float, wrap_integer

INTEGER: dict[OpCode, Callable[..., int]] = {
    OpCode.ADD: operator.add, OpCode.SUB: operator.sub, OpCode.MUL: operator.mul, OpCode.NEG: operator.neg,
    OpCode.AND: operator.and_, OpCode.OR: operator.or_, OpCode.XOR: operator.xor, OpCode.NOT: operator.invert,
    OpCode.MIN: min, OpCode.MAX: max, OpCode.ABS: abs, OpCode.CLAMP: lambda x, low, high: min(max(x, low), high),
}  # fmt: skip
FLOAT: dict[OpCode, Callable[..., float]] = {
    OpCode.ADD: operator.add, OpCode.SUB: operator.sub, OpCode.MUL: operator.mul, OpCode.DIV: operator.truediv,
    OpCode.NEG: operator.neg, OpCode.ABS: abs, OpCode.SQRT: math.sqrt, OpCode.FLOOR: math.floor, OpCode.ROUND: round,
}  # fmt: skip
BOOLEAN: dict[OpCode, Callable[..., bool]] = {
    OpCode.AND: operator.and_, OpCode.OR: operator.or_, OpCode.XOR: operator.xor, OpCode.NOT: operator.not_,
}  # fmt: skip
COMPARE: dict[OpCode, Callable[[Any, Any], bool]] = {
    OpCode.EQ: operator.eq, OpCode.NE: operator.ne, OpCode.LT: operator.lt, OpCode.LE: operator.le, OpCode.GT: operator.gt,
    OpCode.GE: operator.ge,
}  # fmt: skip
FORMATS = {("float", 16): "e", ("float", 32): "f", ("int", 8): "b", ("uint", 8): "B", ("int", 16): "h", ("uint", 16): "H",
           ("int", 32): "i", ("uint", 32): "I", ("int", 64): "q", ("uint", 64): "Q"}  # fmt: skip


def evaluate(op: Op) -> Any:
    """The constant that `op` computes (a tuple for a vector), or None where that must be left to the device."""
    assert isinstance(op.dtype, DType)
    values = [s.arg for s in op.src]
    if op.code is OpCode.VEC:
        return tuple(values)
    if op.code is OpCode.BITCAST:
        return _bitcast(op.src[0].dtype, op.dtype, values[0])
    if op.dtype.count > 1 or any(isinstance(v, tuple) for v in values):
        return None
    try:
        return _scalar(op, op.dtype, values)
    except (ZeroDivisionError, ValueError, OverflowError):
        return None


def _scalar(op: Op, dtype: DType, values: list[Any]) -> Any:
    source = op.src[0].dtype
    assert isinstance(source, DType)
    if op.code in COMPARISONS:
        return COMPARE[op.code](*values)
    if op.code is OpCode.CAST:
        return _cast(source, dtype, values[0])
    if op.code is OpCode.SELECT:
        return values[1] if values[0] else values[2]
    if dtype.is_bool:
        return BOOLEAN[op.code](*values) if op.code in BOOLEAN else None
    if dtype.is_float:
        return _float(op.code, dtype, values)
    return _integer(op.code, dtype, values)


def _float(code: OpCode, dtype: DType, values: list[float]) -> float | None:
    if code not in FLOAT:
        return None
    result = round_float(dtype, float(FLOAT[code](*values)))
    if not math.isfinite(result) or (result == 0 and code in (OpCode.ROUND, OpCode.FLOOR)):
        return None  # infinities, NaN and the sign of a zero are the device's
    return result


def _integer(code: OpCode, dtype: DType, values: list[int]) -> int | None:
    if code in INTEGER:
        return wrap_integer(dtype, INTEGER[code](*values))
    if code in (OpCode.SHL, OpCode.SHR):
        return _shift(code, dtype, *values)
    if code in (OpCode.IDIV, OpCode.MOD):
        quotient = abs(values[0]) // abs(values[1]) * (-1 if (values[0] < 0) != (values[1] < 0) else 1)
        return wrap_integer(dtype, quotient if code is OpCode.IDIV else values[0] - quotient * values[1])
    return None


def _shift(code: OpCode, dtype: DType, value: int, count: int) -> int | None:
    if not 0 <= count < dtype.bits:
        return None
    return wrap_integer(dtype, value << count if code is OpCode.SHL else value >> count)


def _cast(source: DType, dtype: DType, value: Any) -> Any:
    if dtype.is_bool:
        return bool(value)
    if dtype.is_float:
        result = round_float(dtype, float(value))
        return result if math.isfinite(result) else None
    number = int(value)
    return wrap_integer(dtype, number) if not source.is_float or wrap_integer(dtype, number) == number else None


def _bitcast(source: Any, dtype: DType, value: Any) -> Any:
    parts = value if isinstance(value, tuple) else (value,)
    data = struct.pack("<" + FORMATS[source.kind, source.bits] * source.count, *parts)
    result = struct.unpack("<" + FORMATS[dtype.kind, dtype.bits] * dtype.count, data)
    if any(isinstance(r, float) and r != r for r in result):
        return None
    return result if dtype.count > 1 else result[0]
