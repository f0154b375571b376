"""IR → SPIR-V: walks the regions in order and appends instructions.

Everything that a function may compute once (built-ins, push constants, texel-buffer handles) is loaded in its first block.
Source: SPIR-V specification 1.3; Vulkan specification, appendix "Vulkan Environment for SPIR-V".
"""

from __future__ import annotations

from collections.abc import Callable

from ..ir import LEAVES, Op, OpCode, Program, Region
from ..types import CoopType, DType, boolean, f32, i32, i64, u32, u64, vec
from . import select
from .features import declare, program_features
from .interface import Interface
from .module import GLSL_STD_450, OPCODES, VALUES, Module, string_words

NONE = 0
SEMANTICS = VALUES["MemorySemantics"]
BARRIER_SEMANTICS = SEMANTICS["AcquireRelease"] | SEMANTICS["UniformMemory"] | SEMANTICS["WorkgroupMemory"]
FENCE_SEMANTICS = SEMANTICS["AcquireRelease"] | SEMANTICS["UniformMemory"] | SEMANTICS["ImageMemory"]
VISIBLE = SEMANTICS["MakeAvailable"] | SEMANTICS["MakeVisible"]
VULKAN_BARRIER_SEMANTICS, VULKAN_FENCE_SEMANTICS = BARRIER_SEMANTICS | VISIBLE, FENCE_SEMANTICS | VISIBLE
SIGNED_OPERANDS = ("MatrixASigned", "MatrixBSigned", "MatrixCSigned", "MatrixResultSigned")


def emit_module(program: Program) -> bytes:
    """The SPIR-V module of a program."""
    features = program_features(program)
    module = Module()
    declare(module, features)
    _Function(module, program, "coopmat" in features).emit()
    return module.finish()


class _Function:
    """Emits the entry point."""

    def __init__(self, module: Module, program: Program, vulkan_memory: bool) -> None:
        """vulkan_memory: the module uses the Vulkan memory model, where memory shared between invocations must be marked."""
        self.m = module
        self.vulkan_memory = vulkan_memory
        self.non_private = (VALUES["MemoryAccess"]["NonPrivatePointer"],) if vulkan_memory else ()
        self.program = program
        self.ids: dict[Op, int] = {}
        self.variables: list[int] = []  # OpVariable instructions: they open the first block
        self.prologue: list[int] = []  # loads done once, after them
        self.body: list[int] = []
        self.interface = Interface(module, program, self.prologue)
        self.label = 0
        self.breaks: list[int] = []  # merge labels of the loops around
        self.chains: list[dict[tuple[int, ...], int]] = []  # access chains by scope

    def emit(self) -> None:
        m = self.m
        function_type = m.intern("TypeFunction", m.intern("TypeVoid"))
        main, entry = m.new_id(), m.new_id()
        m.name(main, "main")
        self.label = entry
        self.region(self.program.body)
        self.interface.workgroup_size(main)
        words = (*string_words("main"), *self.interface.entry_variables)
        m.add("entry_points", "EntryPoint", VALUES["ExecutionModel"]["GLCompute"], main, *words)
        m.add("function", "Function", m.intern("TypeVoid"), main, NONE, function_type)
        m.add("function", "Label", entry)
        for part in (self.variables, self.prologue, self.body):
            m.extend("function", part)
        m.add("function", "Return")
        m.add("function", "FunctionEnd")

    # instructions

    def put(self, op: str, *words: int) -> None:
        self.body += ((len(words) + 1) << 16 | OPCODES[op], *words)

    def result(self, op: str, dtype: DType | CoopType, *words: int) -> int:
        """An instruction with a result."""
        result = self.m.new_id()
        self.body += ((len(words) + 3) << 16 | OPCODES[op], self.m.type(dtype), result, *words)
        return result

    def id(self, op: Op) -> int:
        """The id of an operand; leaves come into being here."""
        found = self.ids.get(op)
        if found is None:
            assert op.code in LEAVES, f"{op!r} is used before it is computed"
            found = self.ids[op] = self.interface.leaf(op)
        return found

    def start_block(self, label: int) -> None:
        self.put("Label", label)
        self.label = label

    # regions

    def region(self, region: Region) -> None:
        self.chains.append({})
        for op in region.ops:
            handler = HANDLERS.get(op.code)
            result = handler(self, op) if handler else self.simple(op)
            if result:
                self.ids[op] = result
        self.chains.pop()

    def simple(self, op: Op) -> int:
        """An operation that is one instruction from the tables."""
        assert op.dtype is not None
        first = op.src[0].dtype
        assert isinstance(first, DType)
        key, operands = (op.code, first.kind), [self.id(s) for s in op.src]
        instruction = select.INSTRUCTIONS.get(key)
        if instruction is not None:
            return self.result(instruction, op.dtype, *operands)
        return self.result("ExtInst", op.dtype, self.m.glsl_import(), GLSL_STD_450[select.EXTENDED[key]], *operands)

    # conversions

    def cast(self, op: Op) -> int:
        """Through 32 bits: narrow types are only resized, as the storage capabilities demand. To 64 bits only from integers."""
        source, target = op.src[0].dtype, op.dtype
        assert isinstance(source, DType) and isinstance(target, DType)
        value = self.id(op.src[0])
        if source.is_bool:
            value, source = self._from_bool(value, target)
        bits = 64 if target.bits == 64 or (target.is_bool and source.bits == 64) else 32
        if source.bits != bits:
            source = _wide(source, bits)
            value = self.result(select.RESIZES[source.kind], source, value)
        if target.is_bool:
            return self._to_bool(value, source, target)
        if source.kind != target.kind:
            conversion = select.CONVERSIONS[source.kind, target.kind]
            value = self.result(conversion, _wide(target, bits), value)
        if target.bits < 32:
            value = self.result(select.RESIZES[target.kind], target, value)
        return value

    def _from_bool(self, value: int, target: DType) -> tuple[int, DType]:
        wide = _wide(target, max(32, target.bits))
        one, zero = (self._splat(wide, n) for n in (1, 0))
        return self.result("Select", wide, value, one, zero), wide

    def _to_bool(self, value: int, source: DType, target: DType) -> int:
        return self.result("FUnordNotEqual" if source.is_float else "INotEqual", target, value, self._splat(source, 0))

    def _splat(self, dtype: DType, value: int) -> int:
        return self.m.constant(dtype, value if dtype.count == 1 else (value,) * dtype.count)

    def extract(self, op: Op) -> int:
        assert op.dtype is not None
        return self.result("CompositeExtract", op.dtype, self.id(op.src[0]), op.arg)

    def uniform(self, op: Op) -> int:
        return self.id(op.src[0])

    def dot(self, op: Op) -> int:
        assert op.dtype is not None
        a, b = (self.id(s) for s in op.src)
        packed = VALUES["PackedVectorFormat"]["PackedVectorFormat4x8Bit"]
        if op.code is OpCode.DOT_I8:
            return self.result("SDotKHR", op.dtype, a, b, packed)
        return self.result("SUDotKHR", op.dtype, b, a, packed)

    # memory

    def variable(self, op: Op) -> int:
        """VAR and ARRAY: a variable of the function; VAR is set where it stands."""
        assert isinstance(op.dtype, (DType, CoopType))
        held = self.m.type(op.dtype)
        if op.code is OpCode.ARRAY:
            held = self.m.intern("TypeArray", held, self.m.constant(u32, op.arg))
        pointer, result = self.m.pointer("Function", held), self.m.new_id()
        storage = VALUES["StorageClass"]["Function"]
        self.variables += ((4 << 16) | OPCODES["Variable"], pointer, result, storage)
        self.m.name(result, op.name)
        if op.code is OpCode.VAR:
            self.put("Store", result, self.id(op.src[0]))
        return result

    def shared(self, op: Op) -> int:
        assert isinstance(op.dtype, DType)
        held = self.m.intern("TypeArray", self.m.type(op.dtype), self.interface.product(op.src), key=("shared",))
        return self.m.global_variable("Workgroup", held, op.name)

    def var_load(self, op: Op) -> int:
        assert op.dtype is not None
        return self.result("Load", op.dtype, self.id(op.src[0]))

    def var_store(self, op: Op) -> None:
        self.put("Store", self.id(op.src[0]), self.id(op.src[1]))

    def chain(self, storage: str, element: DType | CoopType, base: int, *indices: int) -> int:
        """A pointer to an element; computed once in a scope and the scopes inside it."""
        key = (base, *indices)
        for scope in self.chains:
            if key in scope:
                return scope[key]
        pointer = self.m.pointer(storage, self.m.type(element))
        result = self.m.new_id()
        self.put("AccessChain", pointer, result, base, *indices)
        self.chains[-1][key] = result
        return result

    def element_pointer(self, op: Op) -> int:
        """The address of an ARRAY_ or SHARED_ operation."""
        array = op.src[0]
        storage = "Function" if array.code is OpCode.ARRAY else "Workgroup"
        assert array.dtype is not None
        return self.chain(storage, array.dtype, self.id(array), self.id(op.src[1]))

    def element_load(self, op: Op) -> int:
        assert op.dtype is not None
        return self.result("Load", op.dtype, self.element_pointer(op), *self.visibility(op))

    def element_store(self, op: Op) -> None:
        self.put("Store", self.element_pointer(op), self.id(op.src[2]), *self.visibility(op))

    def visibility(self, op: Op) -> tuple[int, ...]:
        """The memory operands of an ARRAY_ or SHARED_ operation."""
        return self.non_private if op.src[0].code is OpCode.SHARED else ()

    def buffer_pointer(self, number: int, index: Op) -> int:
        """The address of an element of a storage buffer."""
        base = self.interface.storage_buffer(number)
        return self.chain("StorageBuffer", self.program.bindings[number].dtype, base, self.m.constant(u32, 0), self.id(index))

    def buf_load(self, op: Op) -> int:
        assert op.dtype is not None
        return self.result("Load", op.dtype, self.buffer_pointer(op.arg, op.src[0]), *self.non_private)

    def buf_store(self, op: Op) -> None:
        self.put("Store", self.buffer_pointer(op.arg, op.src[0]), self.id(op.src[1]), *self.non_private)

    def texel_load(self, op: Op) -> int:
        assert isinstance(op.dtype, DType)
        read = "ImageRead" if self.program.bindings[op.arg].kind == "texel" else "ImageFetch"
        four = vec(op.dtype.scalar, 4)
        value = self.result(read, four, self.interface.image(op.arg), self.id(op.src[0]))
        return value if op.dtype is four else self.result("CompositeExtract", op.dtype, value, 0)

    def atomic(self, op: Op) -> int:
        assert isinstance(op.dtype, DType)
        scope = self.m.constant(u32, VALUES["Scope"]["QueueFamily" if self.vulkan_memory else "Device"])
        relaxed = self.m.constant(u32, NONE)
        pointer, value = self.buffer_pointer(op.arg, op.src[0]), self.id(op.src[1])
        return self.result(select.ATOMICS[op.code, op.dtype.kind], op.dtype, pointer, scope, relaxed, value)

    # subgroup and workgroup

    def subgroup_arithmetic(self, op: Op) -> int:
        assert isinstance(op.dtype, DType)
        self.m.capability("GroupNonUniform")
        self.m.capability("GroupNonUniformArithmetic")
        scope = self.m.constant(u32, VALUES["Scope"]["Subgroup"])
        instruction = select.SUBGROUP_ARITHMETIC[op.code, op.dtype.kind]
        return self.result(instruction, op.dtype, scope, VALUES["GroupOperation"]["Reduce"], self.id(op.src[0]))

    def subgroup_other(self, op: Op) -> int:
        assert op.dtype is not None
        instruction, capability = select.SUBGROUP_OTHER[op.code]
        self.m.capability("GroupNonUniform")
        self.m.capability(capability)
        scope = self.m.constant(u32, VALUES["Scope"]["Subgroup"])
        return self.result(instruction, op.dtype, scope, *(self.id(s) for s in op.src))

    def barrier(self, op: Op) -> None:
        scope = self.m.constant(u32, VALUES["Scope"]["Workgroup"])
        semantics = VULKAN_BARRIER_SEMANTICS if self.vulkan_memory else BARRIER_SEMANTICS
        self.put("ControlBarrier", scope, scope, self.m.constant(u32, semantics))

    def fence(self, op: Op) -> None:
        scope = VALUES["Scope"]["QueueFamily" if self.vulkan_memory else "Device"]
        semantics = VULKAN_FENCE_SEMANTICS if self.vulkan_memory else FENCE_SEMANTICS
        self.put("MemoryBarrier", self.m.constant(u32, scope), self.m.constant(u32, semantics))

    # cooperative matrices

    def coop_fill(self, op: Op) -> int:
        assert op.dtype is not None
        return self.result("CompositeConstruct", op.dtype, self.id(op.src[0]))

    def coop_place(self, op: Op, src: tuple[Op, ...]) -> tuple[int, ...]:
        """Pointer, layout, stride and memory operands; `src` is ([shared memory], offset, stride)."""
        number, row_major = op.arg
        if number is None:
            assert src[0].dtype is not None
            pointer = self.chain("Workgroup", src[0].dtype, self.id(src[0]), self.id(src[1]))
        else:
            pointer = self.buffer_pointer(number, src[0])
        layout = VALUES["CooperativeMatrixLayout"]["RowMajorKHR" if row_major else "ColumnMajorKHR"]
        return pointer, self.m.constant(u32, layout), self.id(src[-1]), *self.non_private

    def coop_load(self, op: Op) -> int:
        assert op.dtype is not None
        return self.result("CooperativeMatrixLoadKHR", op.dtype, *self.coop_place(op, op.src))

    def coop_store(self, op: Op) -> None:
        pointer, *rest = self.coop_place(op, op.src[1:])
        self.put("CooperativeMatrixStoreKHR", pointer, self.id(op.src[0]), *rest)

    def coop_muladd(self, op: Op) -> int:
        assert op.dtype is not None
        flags = 0
        for name, matrix in zip(SIGNED_OPERANDS, (*op.src, op), strict=True):
            if isinstance(matrix.dtype, CoopType) and matrix.dtype.element.is_signed:
                flags |= VALUES["CooperativeMatrixOperands"][name + "ComponentsKHR"]
        operands = [self.id(s) for s in op.src]
        return self.result("CooperativeMatrixMulAddKHR", op.dtype, *operands, *((flags,) if flags else ()))

    # control

    def range(self, op: Op) -> None:
        region, m = op.regions[0], self.m
        index = region.index
        assert index is not None and isinstance(index.dtype, DType)
        start, stop, step = (self.id(s) for s in op.src)
        before, header, body, proceed, merge = self.label, *(m.new_id() for _ in range(4))
        number, following = m.new_id(), m.new_id()
        self.ids[index] = number
        self.put("Branch", header)
        self.start_block(header)
        self.put("Phi", m.type(index.dtype), number, start, before, following, proceed)
        inside = self.result("SLessThan" if index.dtype.is_signed else "ULessThan", boolean, number, stop)
        self.put("LoopMerge", merge, proceed, NONE)
        self.put("BranchConditional", inside, body, merge)
        self.loop_body(region, body, proceed, merge)
        self.put("IAdd", m.type(index.dtype), following, number, step)
        self.put("Branch", header)
        self.start_block(merge)

    def loop(self, op: Op) -> None:
        header, body, proceed, merge = (self.m.new_id() for _ in range(4))
        self.put("Branch", header)
        self.start_block(header)
        self.put("LoopMerge", merge, proceed, NONE)
        self.put("Branch", body)
        self.loop_body(op.regions[0], body, proceed, merge)
        self.put("Branch", header)
        self.start_block(merge)

    def loop_body(self, region: Region, body: int, proceed: int, merge: int) -> None:
        """The body's blocks, up to the label of the continue target."""
        self.breaks.append(merge)
        self.start_block(body)
        self.region(region)
        self.put("Branch", proceed)
        self.start_block(proceed)
        self.breaks.pop()

    def branch(self, op: Op) -> None:
        """IF with one or two regions."""
        labels = [self.m.new_id() for _ in op.regions]
        merge = self.m.new_id()
        self.put("SelectionMerge", merge, NONE)
        self.put("BranchConditional", self.id(op.src[0]), labels[0], labels[1] if len(labels) > 1 else merge)
        for label, region in zip(labels, op.regions, strict=True):
            self.start_block(label)
            self.region(region)
            self.put("Branch", merge)
        self.start_block(merge)

    def break_if(self, op: Op) -> None:
        leave, stay = self.m.new_id(), self.m.new_id()
        self.put("SelectionMerge", stay, NONE)
        self.put("BranchConditional", self.id(op.src[0]), leave, stay)
        self.start_block(leave)
        self.put("Branch", self.breaks[-1])
        self.start_block(stay)


def _wide(dtype: DType, bits: int) -> DType:
    """The type of the same kind and length with components of 32 bits, or of 64 for integers; signed for booleans."""
    base = {("float", 32): f32, ("uint", 32): u32, ("uint", 64): u64, ("int", 64): i64}.get((dtype.kind, bits), i32)
    return base.with_count(dtype.count)


Handler = Callable[[_Function, Op], int | None]
HANDLERS: dict[OpCode, Handler] = {
    OpCode.CAST: _Function.cast,
    OpCode.EXTRACT: _Function.extract,
    OpCode.UNIFORM: _Function.uniform,
    OpCode.DOT_I8: _Function.dot,
    OpCode.DOT_U8I8: _Function.dot,
    OpCode.VAR: _Function.variable,
    OpCode.ARRAY: _Function.variable,
    OpCode.SHARED: _Function.shared,
    OpCode.VAR_LOAD: _Function.var_load,
    OpCode.VAR_STORE: _Function.var_store,
    OpCode.ARRAY_LOAD: _Function.element_load,
    OpCode.ARRAY_STORE: _Function.element_store,
    OpCode.SHARED_LOAD: _Function.element_load,
    OpCode.SHARED_STORE: _Function.element_store,
    OpCode.BUF_LOAD: _Function.buf_load,
    OpCode.BUF_STORE: _Function.buf_store,
    OpCode.TEXEL_LOAD: _Function.texel_load,
    OpCode.BARRIER: _Function.barrier,
    OpCode.FENCE: _Function.fence,
    OpCode.COOP_FILL: _Function.coop_fill,
    OpCode.COOP_LOAD: _Function.coop_load,
    OpCode.COOP_STORE: _Function.coop_store,
    OpCode.COOP_MULADD: _Function.coop_muladd,
    OpCode.RANGE: _Function.range,
    OpCode.LOOP: _Function.loop,
    OpCode.IF: _Function.branch,
    OpCode.BREAK_IF: _Function.break_if,
    **dict.fromkeys((OpCode.ATOMIC_ADD, OpCode.ATOMIC_MAX, OpCode.ATOMIC_MIN), _Function.atomic),
    **dict.fromkeys((OpCode.SG_ADD, OpCode.SG_MAX, OpCode.SG_MIN), _Function.subgroup_arithmetic),
    **dict.fromkeys(select.SUBGROUP_OTHER, _Function.subgroup_other),
}
