"""Which SPIR-V instruction computes which IR operation: tables only."""

from __future__ import annotations

from ..ir import OpCode as O

# (opcode, kind of the first operand's components) → instruction with (result type, result, operands…)
INSTRUCTIONS: dict[tuple[O, str], str] = {}
# the same for GLSL.std.450's extended instructions
EXTENDED: dict[tuple[O, str], str] = {}


def _all(table: dict[tuple[O, str], str], code: O, **by_kind: str) -> None:
    for kind, name in by_kind.items():
        table[code, kind] = name


def _integer(table: dict[tuple[O, str], str], code: O, name: str) -> None:
    _all(table, code, int=name, uint=name)


for _code, _name in {O.AND: "And", O.OR: "Or", O.XOR: "Xor"}.items():
    _integer(INSTRUCTIONS, _code, "Bitwise" + _name)
_all(INSTRUCTIONS, O.AND, bool="LogicalAnd")
_all(INSTRUCTIONS, O.OR, bool="LogicalOr")
_all(INSTRUCTIONS, O.XOR, bool="LogicalNotEqual")
_all(INSTRUCTIONS, O.NOT, int="Not", uint="Not", bool="LogicalNot")
_all(INSTRUCTIONS, O.ADD, float="FAdd", int="IAdd", uint="IAdd")
_all(INSTRUCTIONS, O.SUB, float="FSub", int="ISub", uint="ISub")
_all(INSTRUCTIONS, O.MUL, float="FMul", int="IMul", uint="IMul")
_all(INSTRUCTIONS, O.NEG, float="FNegate", int="SNegate", uint="SNegate")
_all(INSTRUCTIONS, O.DIV, float="FDiv")
_all(INSTRUCTIONS, O.IDIV, int="SDiv", uint="UDiv")
_all(INSTRUCTIONS, O.MOD, int="SRem", uint="UMod")
_integer(INSTRUCTIONS, O.SHL, "ShiftLeftLogical")
_all(INSTRUCTIONS, O.SHR, int="ShiftRightArithmetic", uint="ShiftRightLogical")
_all(INSTRUCTIONS, O.EQ, float="FOrdEqual", int="IEqual", uint="IEqual", bool="LogicalEqual")
_all(INSTRUCTIONS, O.NE, float="FUnordNotEqual", int="INotEqual", uint="INotEqual", bool="LogicalNotEqual")
for _code, _name in {O.LT: "LessThan", O.LE: "LessThanEqual", O.GT: "GreaterThan", O.GE: "GreaterThanEqual"}.items():
    _all(INSTRUCTIONS, _code, float="FOrd" + _name, int="S" + _name, uint="U" + _name)
_all(INSTRUCTIONS, O.ISNAN, float="IsNan")
_all(INSTRUCTIONS, O.ISINF, float="IsInf")
_all(INSTRUCTIONS, O.SELECT, bool="Select")
_all(INSTRUCTIONS, O.BIT_EXTRACT, int="BitFieldSExtract", uint="BitFieldUExtract")
for _kind in ("float", "int", "uint", "bool"):
    INSTRUCTIONS[O.BITCAST, _kind] = "Bitcast"
    INSTRUCTIONS[O.VEC, _kind] = "CompositeConstruct"
    INSTRUCTIONS[O.EXTRACT_DYN, _kind] = "VectorExtractDynamic"

for _code, _name in {
    O.FMA: "Fma", O.SQRT: "Sqrt", O.RSQRT: "InverseSqrt", O.EXP: "Exp", O.EXP2: "Exp2", O.LOG: "Log", O.LOG2: "Log2",
    O.SIN: "Sin", O.COS: "Cos", O.TANH: "Tanh", O.FLOOR: "Floor", O.ROUND: "RoundEven", O.PACK_HALF: "PackHalf2x16",
}.items():  # fmt: skip
    EXTENDED[_code, "float"] = _name
EXTENDED[O.UNPACK_HALF, "uint"] = "UnpackHalf2x16"
_all(EXTENDED, O.ABS, float="FAbs", int="SAbs")
for _code, _name in {O.MIN: "Min", O.MAX: "Max", O.CLAMP: "Clamp"}.items():
    _all(EXTENDED, _code, float="F" + _name, int="S" + _name, uint="U" + _name)

# 32-bit conversions between kinds: (from, to) → instruction
CONVERSIONS: dict[tuple[str, str], str] = {
    ("float", "int"): "ConvertFToS", ("float", "uint"): "ConvertFToU", ("int", "float"): "ConvertSToF",
    ("uint", "float"): "ConvertUToF", ("int", "uint"): "Bitcast", ("uint", "int"): "Bitcast",
}  # fmt: skip
RESIZES: dict[str, str] = {"float": "FConvert", "int": "SConvert", "uint": "UConvert"}

# subgroup arithmetic: (opcode, kind) → instruction; the rest: opcode → (instruction, capability)
SUBGROUP_ARITHMETIC: dict[tuple[O, str], str] = {}
_all(SUBGROUP_ARITHMETIC, O.SG_ADD, float="GroupNonUniformFAdd", int="GroupNonUniformIAdd", uint="GroupNonUniformIAdd")
_all(SUBGROUP_ARITHMETIC, O.SG_MAX, float="GroupNonUniformFMax", int="GroupNonUniformSMax", uint="GroupNonUniformUMax")
_all(SUBGROUP_ARITHMETIC, O.SG_MIN, float="GroupNonUniformFMin", int="GroupNonUniformSMin", uint="GroupNonUniformUMin")
SUBGROUP_OTHER: dict[O, tuple[str, str]] = {
    O.SHUFFLE: ("GroupNonUniformShuffle", "GroupNonUniformShuffle"),
    O.SHUFFLE_XOR: ("GroupNonUniformShuffleXor", "GroupNonUniformShuffle"),
    O.BROADCAST: ("GroupNonUniformBroadcast", "GroupNonUniformBallot"),
    O.SG_ANY: ("GroupNonUniformAny", "GroupNonUniformVote"),
    O.SG_ALL: ("GroupNonUniformAll", "GroupNonUniformVote"),
    O.SG_ELECT: ("GroupNonUniformElect", "GroupNonUniform"),
}

ATOMICS: dict[tuple[O, str], str] = {}
_integer(ATOMICS, O.ATOMIC_ADD, "AtomicIAdd")
_all(ATOMICS, O.ATOMIC_MAX, int="AtomicSMax", uint="AtomicUMax")
_all(ATOMICS, O.ATOMIC_MIN, int="AtomicSMin", uint="AtomicUMin")

# built-in → (SPIR-V name, has three components)
BUILTINS: dict[str, tuple[str, bool]] = {
    "workgroup_id": ("WorkgroupId", True),
    "local_id": ("LocalInvocationId", True),
    "global_id": ("GlobalInvocationId", True),
    "num_workgroups": ("NumWorkgroups", True),
    "local_index": ("LocalInvocationIndex", False),
    "subgroup_lane": ("SubgroupLocalInvocationId", False),
    "subgroup_id": ("SubgroupId", False),
    "subgroup_size": ("SubgroupSize", False),
    "num_subgroups": ("NumSubgroups", False),
}

# texel element type → (image format, type of the four components read)
TEXEL_FORMATS: dict[str, str] = {
    "u32": "R32ui", "u32x4": "Rgba32ui", "i32": "R32i", "i32x4": "Rgba32i", "f32": "R32f", "f32x4": "Rgba32f",
    "f16x4": "Rgba16f",
}  # fmt: skip
