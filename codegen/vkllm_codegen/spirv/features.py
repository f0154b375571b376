"""What a program needs from a device, and the SPIR-V capabilities that say so."""

from __future__ import annotations

from ..ir import Binding, Op, OpCode, Program, walk
from ..types import CoopType, DType
from .module import VALUES, Module

STORAGE_ONLY_RESULTS = frozenset({OpCode.BUF_LOAD, OpCode.CAST})
STORAGE_ONLY_USES = frozenset({OpCode.BUF_STORE, OpCode.CAST})
SIZED = {("float", 16): "float16", ("int", 16): "int16", ("uint", 16): "int16", ("int", 8): "int8", ("uint", 8): "int8",
         ("int", 64): "int64", ("uint", 64): "int64"}  # fmt: skip
CAPABILITIES = {"float16": "Float16", "int16": "Int16", "int8": "Int8", "int64": "Int64", "storage16": "StorageBuffer16BitAccess",
                "storage8": "StorageBuffer8BitAccess"}  # fmt: skip
OPERATION_FEATURES = {
    OpCode.SG_ADD: "subgroup_arith", OpCode.SG_MAX: "subgroup_arith", OpCode.SG_MIN: "subgroup_arith",
    OpCode.SHUFFLE: "subgroup_shuffle", OpCode.SHUFFLE_XOR: "subgroup_shuffle", OpCode.DOT_I8: "dot8", OpCode.DOT_U8I8: "dot8",
    OpCode.COOP_FILL: "coopmat", OpCode.COOP_LOAD: "coopmat", OpCode.COOP_STORE: "coopmat", OpCode.COOP_MULADD: "coopmat",
}  # fmt: skip


def program_features(program: Program) -> frozenset[str]:
    """The feature words of a program (Kernel.features)."""
    words = {w for b in program.bindings if (w := _storage_feature(b))}
    for op in walk(program.body):
        words |= _op_features(op)
    return frozenset(words)


def _storage_feature(binding: Binding) -> str:
    if binding.kind != "storage" or binding.dtype.bits not in (8, 16):
        return ""
    return f"storage{binding.dtype.bits}"


def _sized(dtype: DType | CoopType | None) -> str | None:
    if isinstance(dtype, CoopType):
        dtype = dtype.element
    return SIZED.get((dtype.kind, dtype.bits)) if dtype is not None else None


def _op_features(op: Op) -> set[str]:
    """Narrow types may be loaded, stored and resized with the storage features alone; computing needs more."""
    words = {OPERATION_FEATURES.get(op.code, "")}
    if op.code not in STORAGE_ONLY_RESULTS:
        words.add(_sized(op.dtype) or "")
    if op.code not in STORAGE_ONLY_USES:
        words |= {_sized(s.dtype) or "" for s in op.src}
    else:
        words |= {_sized(s.dtype) or "" for s in op.src if s.code is OpCode.CONST}
    return words - {""}


def declare(module: Module, features: frozenset[str]) -> None:
    """The capabilities, extensions and memory model of these features."""
    module.capability("Shader")
    for word in sorted(features & CAPABILITIES.keys()):
        module.capability(CAPABILITIES[word])
    if "storage8" in features:
        module.extension("SPV_KHR_8bit_storage")
    if "dot8" in features:
        module.capability("DotProductKHR")
        module.capability("DotProductInput4x8BitPackedKHR")
        module.extension("SPV_KHR_integer_dot_product")
    if "coopmat" in features:
        module.capability("CooperativeMatrixKHR")
        module.capability("VulkanMemoryModel")  # the extension asks for it
        module.extension("SPV_KHR_cooperative_matrix")
        module.extension("SPV_KHR_vulkan_memory_model")
    model = "Vulkan" if "coopmat" in features else "GLSL450"
    module.add("memory_model", "MemoryModel", VALUES["AddressingModel"]["Logical"], VALUES["MemoryModel"][model])
