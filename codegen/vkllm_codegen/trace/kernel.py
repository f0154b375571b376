"""`kernel` and `trace`: from a Python function to a `Kernel`, the compiled object that the engine uses."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from ..ir import Binding, OpCode, Program, leaf, walk
from ..types import DType, boolean, f32, i32, u32
from .block import Block
from .value import Buffer, Value, fail

MAX_PUSH_BYTES = 128
UNSTAGEABLE = frozenset({OpCode.SPEC, OpCode.SHARED, OpCode.BARRIER, OpCode.FENCE, OpCode.COOP_LOAD, OpCode.COOP_STORE})
Dim = int | str
Body = Callable[[Block, dict[str, Buffer], dict[str, Value]], object]


def read(dtype: DType, *dims: Dim) -> Binding:
    """A storage buffer that the kernel only reads."""
    return Binding("", "storage", dtype, "read", dims)


def write(dtype: DType, *dims: Dim) -> Binding:
    """A storage buffer that the kernel only writes."""
    return Binding("", "storage", dtype, "write", dims)


def readwrite(dtype: DType, *dims: Dim) -> Binding:
    """A storage buffer that the kernel reads and writes."""
    return Binding("", "storage", dtype, "readwrite", dims)


def texel(dtype: DType, *dims: Dim, uniform: bool = False) -> Binding:
    """A texel buffer, read only: the quick way to read bulk data on lavapipe. u32, i32, f32 or a vector of 4 of them.

    f16x4 is stored as half floats and arrives as f32x4. uniform: a uniform texel buffer instead of a storage texel buffer.
    """
    return Binding("", "uniform_texel" if uniform else "texel", dtype, "read", dims)


class Kernel:
    """A traced and optimized kernel. Everything that it can be turned into is computed once, on demand."""

    def __init__(self, traced: Program) -> None:
        from ..passes import optimize

        self.traced = traced
        self.program = optimize(traced)

    def __repr__(self) -> str:
        return f"Kernel({self.name})"

    @property
    def name(self) -> str:
        return self.program.name

    @property
    def bindings(self) -> tuple[Binding, ...]:
        return self.program.bindings

    @property
    def push(self) -> tuple[tuple[str, DType, int], ...]:
        """(name, type, byte offset) of each push constant."""
        return self.program.push

    @property
    def push_bytes(self) -> int:
        return max((offset + dtype.itemsize for _, dtype, offset in self.push), default=0)

    @property
    def spec(self) -> dict[str, tuple[int, int | float | bool]]:
        """name → (constant id, default)."""
        return {name: (number, default) for name, (number, _, default) in self.program.spec.items()}

    @property
    def local_size(self) -> tuple[int, int, int]:
        """The workgroup size with specialization constants at their defaults."""
        return self.program.default_local_size

    @cached_property
    def stage_size(self) -> int:
        """Invocations of a workgroup, where it can be a stage of a persistent kernel (see persistent.py); else 0."""
        first, y, z = self.local_size
        used = [x for op in walk(self.program.body) for x in (op, *op.src)]
        ok = y == z == 1 and not any(x.code in UNSTAGEABLE or x.arg == ("global_id", 0) for x in used)
        return first if ok else 0

    @cached_property
    def _module(self) -> bytes:
        from ..spirv.emit import emit_module

        return emit_module(self.program)

    def spirv(self) -> bytes:
        """The SPIR-V module."""
        return self._module

    @cached_property
    def features(self) -> frozenset[str]:
        """What the device must offer: words such as "float16", "storage16", "dot8", "subgroup_shuffle", "coopmat"."""
        from ..spirv.features import program_features

        return program_features(self.program)

    def ir(self) -> str:
        """The optimized program as text."""
        from ..printer import program_text

        return program_text(self.program)

    def spvasm(self) -> str:
        """The module as text."""
        from ..spirv.disassemble import disassemble

        return disassemble(self.spirv())

    def glsl(self) -> str:
        """The same kernel as GLSL."""
        from ..glsl.emit import emit_glsl

        return emit_glsl(self.program)

    def pack_push(self, **values: int | float) -> bytes:
        """The push-constant bytes of these values; all must be given."""
        return pack_push(self.name, self.push, values)


def pack_push(kernel: str, push: tuple[tuple[str, DType, int], ...], values: Mapping[str, int | float]) -> bytes:
    """Push-constant bytes of (name, type, offset) entries. Raises: TraceError: a value is missing or unknown."""
    names = [name for name, _, _ in push]
    if sorted(values) != sorted(names):
        fail(f"push constants of {kernel} are {names}, found {sorted(values)}")
    data = bytearray(max((offset + dtype.itemsize for _, dtype, offset in push), default=0))
    for name, dtype, offset in push:
        struct.pack_into("<" + _PUSH_FORMAT[dtype], data, offset, values[name])
    return bytes(data)


_PUSH_FORMAT = {u32: "I", i32: "i", f32: "f"}


def _layout_push(push: Mapping[str, DType]) -> tuple[tuple[str, DType, int], ...]:
    for name, dtype in push.items():
        if dtype not in _PUSH_FORMAT:
            fail(f"push constant {name} is {dtype!r}; expected u32, i32 or f32")
    if 4 * len(push) > MAX_PUSH_BYTES:
        fail(f"{4 * len(push)} bytes of push constants; Vulkan guarantees {MAX_PUSH_BYTES}", "put the rest in a buffer")
    return tuple((name, dtype, 4 * i) for i, (name, dtype) in enumerate(push.items()))


def _spec_type(default: int | float | bool) -> DType:
    if isinstance(default, bool):
        return boolean
    if isinstance(default, float):
        return f32
    return i32 if default < 0 else u32


def _local_size(size: int | tuple[int, ...] | str | None, spec: Mapping[str, Any]) -> tuple[int | str, int, int]:
    if size is None:
        size = "WG" if "WG" in spec else 1
    if isinstance(size, str) and size not in spec:
        fail(f"local_size {size!r} is no specialization constant; there are {sorted(spec)}")
    dims = size if isinstance(size, tuple) else (size,)
    if not 1 <= len(dims) <= 3 or any(isinstance(n, int) and n < 1 for n in dims):
        fail(f"local_size {size!r}; expected 1 to 3 numbers, each 1 or more")
    x, y, z = (*dims, 1, 1)[:3]
    return x, int(y), int(z)


def trace(
    name: str,
    bindings: Mapping[str, Binding],
    push: Mapping[str, DType],
    spec: Mapping[str, int | float | bool],
    local_size: int | tuple[int, ...] | str | None,
    body: Body,
    doc: str = "",
) -> Kernel:
    """Run `body(block, buffers, parameters)` once and return the kernel it describes.

    Bindings are numbered in order, specialization constants too. `parameters` holds push and specialization constants.
    Raises: TraceError: the body broke a rule of the language. VerifyError: the recorded program is not valid.
    """
    named = tuple(replace(b, name=n) for n, b in bindings.items())
    constants = {n: (i, _spec_type(default), default) for i, (n, default) in enumerate(spec.items())}
    program = Program(name, named, _layout_push(push), constants, _local_size(local_size, spec), doc=doc)
    block = Block(program)
    parameters = {n: Value(block, leaf(OpCode.PUSH, t, n)) for n, t in push.items()}
    parameters |= {n: block.spec_value(n) for n in spec}
    buffers = {b.name: Buffer(block, b, i, _dims(block, b, parameters)) for i, b in enumerate(named)}
    if body(block, buffers, parameters) is not None:
        fail(f"the body of {name} returned a value", "store results in buffers")
    return Kernel(program.with_body(block.finish()))


def _dims(block: Block, binding: Binding, parameters: dict[str, Value]) -> list[Value]:
    unknown = [d for d in binding.dims if isinstance(d, str) and d not in parameters]
    # The slowest dimension is never multiplied with: its name is documentation and need not be a parameter.
    if any(d != binding.dims[0] for d in unknown):
        fail(f"dimension {unknown} of buffer {binding.name} is no push or specialization constant")
    return [block.const(u32, 1) if d in unknown else parameters[d] if isinstance(d, str) else block.const(u32, d)
            for d in binding.dims]  # fmt: skip


def kernel(
    *,
    push: Mapping[str, DType] | None = None,
    spec: Mapping[str, int | float | bool] | None = None,
    local_size: int | tuple[int, ...] | str | None = None,
    name: str | None = None,
    **bindings: Binding,
) -> Callable[[Callable[..., object]], Kernel]:
    """Decorate `f(b, <buffers>, *, <push and spec constants>)`: trace it now and replace it by a Kernel.

    local_size: an int, a tuple, or the name of a specialization constant (default: "WG" when there is one).
    """

    def decorate(function: Callable[..., object]) -> Kernel:
        def body(b: Block, buffers: dict[str, Buffer], parameters: dict[str, Value]) -> object:
            return function(b, **buffers, **parameters)

        return trace(name or function.__name__, bindings, push or {}, spec or {}, local_size, body, function.__doc__ or "")

    return decorate
