"""Write codegen/vkllm_codegen/spirv/tables.py from the JSON grammars of Debian's spirv-headers package.

Usage: python tools/gen_spirv_tables.py [--check] [GRAMMAR_DIR]
With --check nothing is written: the exit status is 1 when the file in the tree differs.
Only what the compiler uses is taken, so that the table stays short enough to read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

OPS = """
Extension ExtInstImport MemoryModel EntryPoint ExecutionMode Capability Name Decorate MemberDecorate MemberName
TypeVoid TypeBool TypeInt TypeFloat TypeVector TypeImage TypeArray TypeRuntimeArray TypeStruct TypePointer TypeFunction
ConstantTrue ConstantFalse Constant ConstantComposite ConstantNull SpecConstantTrue SpecConstantFalse SpecConstant
SpecConstantComposite SpecConstantOp Function FunctionEnd Variable Load Store AccessChain
VectorExtractDynamic CompositeConstruct CompositeExtract ExtInst ImageFetch ImageRead
ConvertFToU ConvertFToS ConvertSToF ConvertUToF UConvert SConvert FConvert Bitcast
SNegate FNegate IAdd FAdd ISub FSub IMul FMul UDiv SDiv FDiv UMod SRem Select
VectorTimesScalar LogicalEqual LogicalNotEqual LogicalOr LogicalAnd LogicalNot IEqual INotEqual
UGreaterThan SGreaterThan UGreaterThanEqual SGreaterThanEqual ULessThan SLessThan ULessThanEqual SLessThanEqual
FOrdEqual FUnordNotEqual FOrdLessThan FOrdGreaterThan FOrdLessThanEqual FOrdGreaterThanEqual IsNan IsInf
ShiftRightLogical ShiftRightArithmetic ShiftLeftLogical BitwiseOr BitwiseXor BitwiseAnd Not
BitFieldSExtract BitFieldUExtract ControlBarrier MemoryBarrier AtomicIAdd AtomicSMin AtomicUMin AtomicSMax AtomicUMax
Phi LoopMerge SelectionMerge Label Branch BranchConditional Return
GroupNonUniformElect GroupNonUniformAll GroupNonUniformAny GroupNonUniformBroadcast GroupNonUniformShuffle
GroupNonUniformShuffleXor GroupNonUniformIAdd GroupNonUniformFAdd GroupNonUniformSMin GroupNonUniformUMin
GroupNonUniformFMin GroupNonUniformSMax GroupNonUniformUMax GroupNonUniformFMax SDotKHR UDotKHR SUDotKHR
"""

ENUMS = {
    "Capability": """Shader Float16 Int8 Int16 Int64 StorageBuffer16BitAccess StorageBuffer8BitAccess ImageBuffer SampledBuffer
        StorageImageExtendedFormats GroupNonUniform GroupNonUniformVote GroupNonUniformArithmetic GroupNonUniformBallot
        GroupNonUniformShuffle DotProductKHR DotProductInput4x8BitPackedKHR VulkanMemoryModel""",
    "Decoration": """SpecId Block ArrayStride BuiltIn Coherent NonWritable NonReadable Binding DescriptorSet Offset
        NoContraction""",
    "BuiltIn": """NumWorkgroups WorkgroupSize WorkgroupId LocalInvocationId GlobalInvocationId LocalInvocationIndex
        SubgroupSize NumSubgroups SubgroupId SubgroupLocalInvocationId""",
    "StorageClass": "UniformConstant Input Workgroup Function PushConstant StorageBuffer Private",
    "ExecutionModel": "GLCompute",
    "ExecutionMode": "LocalSize",
    "AddressingModel": "Logical",
    "MemoryModel": "GLSL450 Vulkan",
    "Dim": "Buffer",
    "ImageFormat": "Unknown Rgba32f Rgba16f R32f Rgba32i R32i Rgba32ui R32ui",
    "Scope": "Device Workgroup Subgroup QueueFamily",
    "GroupOperation": "Reduce",
    "PackedVectorFormat": "PackedVectorFormat4x8Bit",
    "MemorySemantics": "None AcquireRelease UniformMemory WorkgroupMemory ImageMemory MakeAvailable MakeVisible",
    "SelectionControl": "None",
    "LoopControl": "None Unroll DontUnroll",
    "FunctionControl": "None",
    "MemoryAccess": "None NonPrivatePointer",
    "FPFastMathMode": "None",
}

GLSL = """RoundEven FAbs SAbs Floor Sin Cos Tanh Exp Log Exp2 Log2 Sqrt InverseSqrt FMin UMin SMin FMax UMax SMax
FClamp UClamp SClamp Fma PackHalf2x16 UnpackHalf2x16"""


def number(value: int | str) -> int:
    """A grammar's number: an int, or a mask as "0x0008"."""
    return value if isinstance(value, int) else int(value, 0)


def operands(instruction: dict) -> tuple[str, ...]:
    """Operand kinds in order, each with its quantifier ("", "?" or "*") at the end."""
    return tuple(o["kind"] + o.get("quantifier", "") for o in instruction.get("operands", ()))


def op_lines(core: dict) -> list[str]:
    known = {i["opname"][2:]: i for i in core["instructions"]}
    return [line for n in OPS.split() for line in op_line(n, known[n]["opcode"], operands(known[n]))]


def op_line(name: str, number: int, kinds: tuple[str, ...]) -> list[str]:
    """One table entry, wrapped where it is long."""
    line = f'    "{name}": ({number}, {kinds!r}),'.replace("'", '"')
    if len(line) <= 130:
        return [line]
    entries = [f'            "{kind}",' for kind in kinds]
    return [f'    "{name}": (', f"        {number},", "        (", *entries, "        ),", "    ),"]


def enum_lines(core: dict) -> list[str]:
    kinds = {k["kind"]: {e["enumerant"]: number(e["value"]) for e in k.get("enumerants", ())} for k in core["operand_kinds"]}
    lines = []
    for kind, wanted in ENUMS.items():
        lines.append(f'    "{kind}": {{')
        lines += [f'        "{name}": {kinds[kind][name]},' for name in wanted.split()]
        lines.append("    },")
    return lines


def glsl_lines(ext: dict) -> list[str]:
    known = {i["opname"]: i["opcode"] for i in ext["instructions"]}
    return [f'    "{n}": {known[n]},' for n in GLSL.split()]


def render(core: dict, ext: dict) -> str:
    """The whole text of tables.py."""
    return "\n".join(
        [
            '"""SPIR-V numbers. Generated by tools/gen_spirv_tables.py from the grammar of spirv-headers: do not edit."""',
            "",
            "from __future__ import annotations",
            "",
            "# name → (opcode, operand kinds)",
            "OPS: dict[str, tuple[int, tuple[str, ...]]] = {",
            *op_lines(core),
            "}",
            "",
            "ENUMS: dict[str, dict[str, int]] = {",
            *enum_lines(core),
            "}",
            "",
            "# extended instruction set GLSL.std.450",
            "GLSL_STD_450: dict[str, int] = {",
            *glsl_lines(ext),
            "}",
            "",
        ]
    )


def main(args: list[str]) -> int:
    check = "--check" in args
    paths = [a for a in args if a != "--check"]
    grammar = Path(paths[0] if paths else "/usr/include/spirv/unified1")
    core = json.loads((grammar / "spirv.core.grammar.json").read_text())
    ext = json.loads((grammar / "extinst.glsl.std.450.grammar.json").read_text())
    target = Path(__file__).parents[1] / "codegen/vkllm_codegen/spirv/tables.py"
    text = render(core, ext)
    if check:
        return int(target.read_text() != text)
    target.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
