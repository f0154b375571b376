"""vkllm_codegen: a small typed kernel language in Python, compiled to SPIR-V without external tools.

A Python function is traced once into an IR (`trace/`, `ir`), checked (`verify`), optimized (`passes/`) and written as SPIR-V
(`spirv/`) or GLSL (`glsl/`). `interpret` runs the same IR in numpy. This package knows nothing of Vulkan or of models.
"""

from .errors import HintedError, KernelError, TraceError, VerifyError
from .ir import Binding
from .trace import (
    Block,
    Buffer,
    Kernel,
    PrivateArray,
    Shared,
    Value,
    Var,
    kernel,
    pack_push,
    read,
    readwrite,
    texel,
    trace,
    write,
)
from .types import (
    CoopType,
    DType,
    boolean,
    coop,
    f16,
    f16x2,
    f16x4,
    f32,
    f32x2,
    f32x3,
    f32x4,
    i8,
    i8x2,
    i8x4,
    i16,
    i16x2,
    i16x4,
    i32,
    i32x2,
    i32x3,
    i32x4,
    i64,
    u8,
    u8x2,
    u8x4,
    u16,
    u16x2,
    u16x4,
    u32,
    u32x2,
    u32x3,
    u32x4,
    u64,
    vec,
)

__all__ = [
    "Binding", "Block", "Buffer", "CoopType", "DType", "HintedError", "Kernel", "KernelError", "PrivateArray", "Shared",
    "TraceError", "Value", "Var", "VerifyError", "boolean", "coop", "f16", "f16x2", "f16x4", "f32", "f32x2", "f32x3", "f32x4",
    "i8", "i8x2", "i8x4", "i16", "i16x2", "i16x4", "i32", "i32x2", "i32x3", "i32x4", "i64", "kernel", "pack_push", "read",
    "readwrite", "texel", "trace", "u8", "u8x2", "u8x4", "u16", "u16x2", "u16x4", "u32", "u32x2", "u32x3", "u32x4", "u64", "vec",
    "write",
]  # fmt: skip
