"""Operations → GLSL expressions."""

from __future__ import annotations

from collections.abc import Callable

from ..ir import Op, OpCode
from ..types import DType, u32
from .names import type_name

INFIX = {
    OpCode.ADD: "+", OpCode.SUB: "-", OpCode.MUL: "*", OpCode.DIV: "/", OpCode.IDIV: "/", OpCode.MOD: "%", OpCode.AND: "&",
    OpCode.OR: "|", OpCode.XOR: "^", OpCode.SHL: "<<", OpCode.SHR: ">>", OpCode.EQ: "==", OpCode.NE: "!=", OpCode.LT: "<",
    OpCode.LE: "<=", OpCode.GT: ">", OpCode.GE: ">=",
}  # fmt: skip
LOGICAL = {OpCode.AND: "&&", OpCode.OR: "||", OpCode.XOR: "^^"}
VECTOR_COMPARE = {OpCode.EQ: "equal", OpCode.NE: "notEqual", OpCode.LT: "lessThan", OpCode.LE: "lessThanEqual",
                  OpCode.GT: "greaterThan", OpCode.GE: "greaterThanEqual"}  # fmt: skip
FUNCTIONS = {
    OpCode.FMA: "fma", OpCode.SQRT: "sqrt", OpCode.RSQRT: "inversesqrt", OpCode.EXP: "exp", OpCode.EXP2: "exp2",
    OpCode.LOG: "log", OpCode.LOG2: "log2", OpCode.SIN: "sin", OpCode.COS: "cos", OpCode.TANH: "tanh", OpCode.ABS: "abs",
    OpCode.MIN: "min", OpCode.MAX: "max", OpCode.CLAMP: "clamp", OpCode.FLOOR: "floor", OpCode.ROUND: "roundEven",
    OpCode.ISNAN: "isnan", OpCode.ISINF: "isinf", OpCode.UNPACK_HALF: "unpackHalf2x16", OpCode.PACK_HALF: "packHalf2x16",
    OpCode.DOT_I8: "dot_i8", OpCode.DOT_U8I8: "dot_u8i8", OpCode.SG_ADD: "subgroupAdd", OpCode.SG_MAX: "subgroupMax",
    OpCode.SG_MIN: "subgroupMin", OpCode.SHUFFLE: "subgroupShuffle", OpCode.SHUFFLE_XOR: "subgroupShuffleXor",
    OpCode.BROADCAST: "subgroupBroadcast", OpCode.SG_ANY: "subgroupAny", OpCode.SG_ALL: "subgroupAll",
    OpCode.SG_ELECT: "subgroupElect",
}  # fmt: skip
# The packed products in plain arithmetic: GL_EXT_integer_dot_product is newer than Debian 12's glslang.
HELPERS = {
    OpCode.DOT_I8: """\
int dot_i8(uint a, uint b) {
    int total = 0;
    for (int i = 0; i < 32; i += 8) total += bitfieldExtract(int(a), i, 8) * bitfieldExtract(int(b), i, 8);
    return total;
}""",
    OpCode.DOT_U8I8: """\
int dot_u8i8(uint a, uint b) {
    int total = 0;
    for (int i = 0; i < 32; i += 8) total += int(bitfieldExtract(a, i, 8)) * bitfieldExtract(int(b), i, 8);
    return total;
}""",
}
BUILTINS = {
    "workgroup_id": "gl_WorkGroupID", "local_id": "gl_LocalInvocationID", "global_id": "gl_GlobalInvocationID",
    "num_workgroups": "gl_NumWorkGroups", "local_index": "gl_LocalInvocationIndex", "subgroup_lane": "gl_SubgroupInvocationID",
    "subgroup_id": "gl_SubgroupID", "subgroup_size": "gl_SubgroupSize", "num_subgroups": "gl_NumSubgroups",
}  # fmt: skip


def builtin(name: str, dimension: int) -> str:
    """A built-in variable, with its component."""
    return BUILTINS[name] + (f".{'xyz'[dimension]}" if name.endswith(("_id", "workgroups")) and name != "subgroup_id" else "")


def expression(op: Op, args: list[str]) -> str:
    """The expression of a pure or subgroup operation on operand texts."""
    special = SPECIAL.get(op.code)
    if special is not None:
        return special(op, args)
    if op.code in FUNCTIONS:
        return f"{FUNCTIONS[op.code]}({', '.join(args)})"
    return _infix(op, args)


def _source(op: Op) -> DType:
    dtype = op.src[0].dtype
    assert isinstance(dtype, DType)
    return dtype


def _result(op: Op) -> DType:
    assert isinstance(op.dtype, DType)
    return op.dtype


def _infix(op: Op, args: list[str]) -> str:
    a, b = args
    source = _source(op)
    if source.is_bool and op.code in LOGICAL:
        return _each(op, lambda part: f"{a}{part} {LOGICAL[op.code]} {b}{part}")
    if source.count > 1 and op.code in VECTOR_COMPARE:
        return f"{VECTOR_COMPARE[op.code]}({a}, {b})"
    if op.code is OpCode.MOD and source.is_signed:
        return f"({a} - ({a} / {b}) * {b})"
    text = f"({a} {INFIX[op.code]} {b})"
    narrow = source.bits < 32 and source.is_integer and op.code not in VECTOR_COMPARE
    return f"{type_name(_result(op))}{text}" if narrow else text


def _each(op: Op, part: Callable[[str], str]) -> str:
    """An expression component by component, where GLSL has no operator for vectors."""
    count = _result(op).count
    if count == 1:
        return f"({part('')})"
    return f"{type_name(_result(op))}({', '.join(part('.' + 'xyzw'[i]) for i in range(count))})"


def _negate(op: Op, args: list[str]) -> str:
    return f"(-{args[0]})"


def _invert(op: Op, args: list[str]) -> str:
    if not _source(op).is_bool:
        return f"(~{args[0]})"
    return f"(!{args[0]})" if _source(op).count == 1 else f"not({args[0]})"


def _select(op: Op, args: list[str]) -> str:
    condition, x, y = args
    return f"({condition} ? {x} : {y})" if _result(op).count == 1 else f"mix({y}, {x}, {condition})"


def _construct(op: Op, args: list[str]) -> str:
    return f"{type_name(_result(op))}({', '.join(args)})"


def _extract(op: Op, args: list[str]) -> str:
    return f"{args[0]}.{'xyzw'[op.arg]}"


def _extract_dyn(op: Op, args: list[str]) -> str:
    return f"{args[0]}[{args[1]}]"


def _bit_extract(op: Op, args: list[str]) -> str:
    return f"bitfieldExtract({args[0]}, int({args[1]}), int({args[2]}))"


def _same(op: Op, args: list[str]) -> str:
    return args[0]


# bitcasts: (from kind, to kind) for components of one size
BITCASTS32 = {("float", "uint"): "floatBitsToUint", ("float", "int"): "floatBitsToInt", ("uint", "float"): "uintBitsToFloat",
              ("int", "float"): "intBitsToFloat"}  # fmt: skip
BITCASTS16 = {("float", "uint"): "float16BitsToUint16", ("float", "int"): "float16BitsToInt16",
              ("uint", "float"): "uint16BitsToFloat16", ("int", "float"): "int16BitsToFloat16"}  # fmt: skip


def _bitcast(op: Op, args: list[str]) -> str:
    source, target = _source(op), _result(op)
    if source.count == target.count:
        return _retype(args[0], source, target)
    return _from_words(_to_words(args[0], source), target)


def _retype(text: str, source: DType, target: DType) -> str:
    """Components of one size: another kind."""
    if source is target:
        return text
    table = BITCASTS32 if source.bits == 32 else BITCASTS16
    return f"{table.get((source.kind, target.kind)) or type_name(target)}({text})"


def _to_words(text: str, source: DType) -> list[str]:
    """The bits as 32-bit unsigned expressions."""
    if source.bits == 64:
        return [f"unpackUint2x32(uint64_t({text})).{c}" for c in "xy"]
    if source.bits == 32:
        parts = [text] if source.count == 1 else [f"{text}.{c}" for c in "xyzw"[: source.count]]
        return [_retype(p, source.scalar, u32) for p in parts]
    step = 32 // source.bits
    parts = [f"{text}.{'xyzw'[i : i + step]}" for i in range(0, source.count, step)]
    if source.is_float:
        return [f"packFloat2x16({p})" for p in parts]
    return [f"uint(pack32({p}))" for p in parts]


def _from_words(words: list[str], target: DType) -> str:
    """A vector or scalar of these bits."""
    if target.bits == 64:
        return f"{type_name(target)}(packUint2x32(uvec2({', '.join(words)})))"
    if target.bits == 32:
        parts = [_retype(w, u32, target.scalar) for w in words]
    elif target.is_float:
        parts = [f"unpackFloat2x16({w})" for w in words]
    else:
        unpack = f"unpack{target.bits}"
        parts = [f"{unpack}({w})" if target.kind == "uint" else f"{unpack}(int({w}))" for w in words]
    return parts[0] if len(parts) == 1 else f"{type_name(target)}({', '.join(parts)})"


SPECIAL: dict[OpCode, Callable[[Op, list[str]], str]] = {
    OpCode.NEG: _negate, OpCode.NOT: _invert, OpCode.SELECT: _select, OpCode.VEC: _construct, OpCode.CAST: _construct,
    OpCode.EXTRACT: _extract, OpCode.EXTRACT_DYN: _extract_dyn, OpCode.BIT_EXTRACT: _bit_extract, OpCode.UNIFORM: _same,
    OpCode.BITCAST: _bitcast,
}  # fmt: skip
