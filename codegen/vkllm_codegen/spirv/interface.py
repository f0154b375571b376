"""The outside of an entry point: bindings, push and specialization constants, built-ins, the workgroup size.

Each comes into being at its first use; what must be loaded is loaded in the function's first block.
"""

from __future__ import annotations

from ..ir import Binding, Op, OpCode, Program
from ..types import DType, f32, i32, u32, vec
from .module import OPCODES, VALUES, Module
from .select import BUILTINS, TEXEL_FORMATS


class Interface:
    """Declares on demand what a function uses of the outside."""

    def __init__(self, module: Module, program: Program, prologue: list[int]) -> None:
        self.m = module
        self.program = program
        self.prologue = prologue
        self.entry_variables: list[int] = []  # inputs: the entry point must list them
        self._known: dict[tuple[str, object], int] = {}

    def _load(self, type_id: int, pointer: int) -> int:
        result = self.m.new_id()
        self.prologue += ((4 << 16) | OPCODES["Load"], type_id, result, pointer)
        return result

    def leaf(self, op: Op) -> int:
        """The id of a leaf operation."""
        assert isinstance(op.dtype, DType)
        if op.code is OpCode.CONST:
            return self.m.constant(op.dtype, op.arg)
        if op.code is OpCode.SPEC:
            return self.spec(op.arg)
        if op.code is OpCode.PUSH:
            return self._push(op.arg)
        return self._builtin(*op.arg)

    # specialization

    def spec(self, name: str) -> int:
        key = ("spec", name)
        if key not in self._known:
            number, dtype, default = self.program.spec[name]
            self._known[key] = self.m.spec_constant(dtype, number, default, name)
        return self._known[key]

    def product(self, dims: tuple[Op, ...]) -> int:
        """The id of the constant dims[0] * dims[1] * …, for array lengths."""
        fixed = 1
        specs: list[int] = []
        for dim in dims:
            if dim.code is OpCode.CONST:
                fixed *= dim.arg
            else:
                specs.append(self.spec(dim.arg))
        if not specs:
            return self.m.constant(u32, fixed)
        total = specs[0]
        for factor in specs[1:] + ([self.m.constant(u32, fixed)] if fixed != 1 else []):
            result = self.m.new_id()
            self.m.add("globals", "SpecConstantOp", self.m.type(u32), result, OPCODES["IMul"], total, factor)
            total = result
        return total

    def workgroup_size(self, main: int) -> None:
        """LocalSize, and for a specialized size the built-in constant that overrides it."""
        mode = VALUES["ExecutionMode"]["LocalSize"]
        self.m.add("modes", "ExecutionMode", main, mode, *self.program.default_local_size)
        first, y, z = self.program.local_size
        if isinstance(first, str):
            parts = (self.spec(first), self.m.constant(u32, y), self.m.constant(u32, z))
            result = self.m.new_id()
            self.m.add("globals", "SpecConstantComposite", self.m.type(vec(u32, 3)), result, *parts)
            self.m.decorate(result, "BuiltIn", VALUES["BuiltIn"]["WorkgroupSize"])

    # push constants and built-ins

    def _push(self, name: str) -> int:
        index = next(i for i, (n, _, _) in enumerate(self.program.push) if n == name)
        type_id = self.m.type(self.program.push[index][1])
        pointer, chain = self.m.pointer("PushConstant", type_id), self.m.new_id()
        words = (pointer, chain, self._push_block(), self.m.constant(i32, index))
        self.prologue += ((5 << 16) | OPCODES["AccessChain"], *words)
        result = self._load(type_id, chain)
        self.m.name(result, name)
        return result

    def _push_block(self) -> int:
        key = ("push", None)
        if key not in self._known:
            block = self.m.intern("TypeStruct", *(self.m.type(t) for _, t, _ in self.program.push), key=("push",))
            self.m.decorate(block, "Block")
            for i, (_, _, offset) in enumerate(self.program.push):
                self.m.decorate_member(block, i, "Offset", offset)
            self._known[key] = self.m.global_variable("PushConstant", block, "push")
        return self._known[key]

    def _builtin(self, name: str, dimension: int) -> int:
        spirv_name, is_vector = BUILTINS[name]
        dtype = vec(u32, 3) if is_vector else u32
        value = self._builtin_value(name, spirv_name, self.m.type(dtype))
        if not is_vector:
            return value
        result = self.m.new_id()
        self.prologue += ((5 << 16) | OPCODES["CompositeExtract"], self.m.type(u32), result, value, dimension)
        return result

    def _builtin_value(self, name: str, spirv_name: str, type_id: int) -> int:
        key = ("builtin", name)
        if key not in self._known:
            if name in ("subgroup_lane", "subgroup_id", "subgroup_size", "num_subgroups"):
                self.m.capability("GroupNonUniform")
            variable = self.m.global_variable("Input", type_id, name)
            self.m.decorate(variable, "BuiltIn", VALUES["BuiltIn"][spirv_name])
            self.entry_variables.append(variable)
            self._known[key] = self._load(type_id, variable)
        return self._known[key]

    # bindings

    def _bind(self, number: int, variable: int) -> None:
        self.m.decorate(variable, "DescriptorSet", 0)
        self.m.decorate(variable, "Binding", number)
        if self.program.bindings[number].coherent:
            self.m.decorate(variable, "Coherent")

    def storage_buffer(self, number: int) -> int:
        """The variable of a storage buffer."""
        key = ("buffer", number)
        if key not in self._known:
            binding = self.program.bindings[number]
            self._known[key] = self.m.global_variable("StorageBuffer", self._block(binding), binding.name)
            self._bind(number, self._known[key])
        return self._known[key]

    def _block(self, binding: Binding) -> int:
        """struct { elem data[]; }, one per element type and access."""
        key = ("block", (binding.dtype, binding.access))
        if key not in self._known:
            self._known[key] = self._declare_block(binding)
        return self._known[key]

    def _declare_block(self, binding: Binding) -> int:
        array = self._runtime_array(binding.dtype)
        block = self.m.intern("TypeStruct", array, key=(binding.access,))
        self.m.decorate(block, "Block")
        self.m.decorate_member(block, 0, "Offset", 0)
        decoration = {"read": "NonWritable", "write": "NonReadable"}.get(binding.access)
        if decoration:
            self.m.decorate_member(block, 0, decoration)
        return block

    def _runtime_array(self, dtype: DType) -> int:
        key = ("array", dtype)
        if key not in self._known:
            self._known[key] = self.m.intern("TypeRuntimeArray", self.m.type(dtype))
            self.m.decorate(self._known[key], "ArrayStride", dtype.itemsize)
        return self._known[key]

    def image(self, number: int) -> int:
        """The loaded handle of a texel buffer."""
        key = ("image", number)
        if key not in self._known:
            binding = self.program.bindings[number]
            image_type = self._image_type(binding)
            variable = self.m.global_variable("UniformConstant", image_type, binding.name)
            self._bind(number, variable)
            if binding.kind == "texel":
                self.m.decorate(variable, "NonWritable")
            self._known[key] = self._load(image_type, variable)
        return self._known[key]

    def _image_type(self, binding: Binding) -> int:
        storage = binding.kind == "texel"
        self.m.capability("ImageBuffer" if storage else "SampledBuffer")
        kind = TEXEL_FORMATS[repr(binding.dtype)]
        image_format = VALUES["ImageFormat"][kind if storage else "Unknown"]
        sampled = self.m.type({"float": f32, "int": i32, "uint": u32}[binding.dtype.kind])
        return self.m.intern("TypeImage", sampled, VALUES["Dim"]["Buffer"], 0, 0, 0, 2 if storage else 1, image_format)
