"""Compiled kernels on disk: tracing a kernel in Python takes 0.1 s, reading its SPIR-V back takes none.

One file a kernel, in a folder named by a hash of the compiler's and the kernels' own sources, so that a changed line of either
compiles everything anew. A file that is damaged or cannot be written is no error: the kernel is compiled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVarTuple

import vkllm_codegen
import vkllm_shaders
from vkllm import debug
from vkllm.vk import cache
from vkllm_codegen import Binding, Kernel
from vkllm_codegen.types import DType

Args = TypeVarTuple("Args")


@dataclass(frozen=True)
class CompiledKernel:
    """What recording a kernel needs of it: its interface and its SPIR-V. The fields are those of `vkllm_codegen.Kernel`."""

    name: str
    bindings: tuple[Binding, ...]
    push: tuple[tuple[str, DType, int], ...]
    features: frozenset[str]
    code: bytes = field(repr=False)

    @property
    def push_bytes(self) -> int:
        return max((offset + dtype.itemsize for _, dtype, offset in self.push), default=0)

    def pack_push(self, **values: int | float) -> bytes:
        """The push-constant bytes of these values; all must be given, others are refused."""
        return vkllm_codegen.pack_push(self.name, self.push, values)


class KernelCache:
    """Compiles each kernel once: a process, and a version of the sources."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or cache.directory()
        self._kernels: dict[Hashable, CompiledKernel] = {}

    @cached_property
    def folder(self) -> Path:
        """Where this version's kernels lie."""
        digest = hashlib.sha256()
        for package in (vkllm_codegen, vkllm_shaders):
            for source in sorted(Path(package.__path__[0]).rglob("*.py")):
                digest.update(source.name.encode() + source.read_bytes())
        return self._folder / f"kernels-{digest.hexdigest()[:16]}"

    def get(self, factory: Callable[[*Args], Kernel], *args: *Args) -> CompiledKernel:
        """`factory(*args)`, compiled. Its arguments must tell kernels apart by their repr."""
        key = f"{factory.__module__}.{factory.__qualname__}{args!r}"
        if key not in self._kernels:
            file = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.kernel"
            cached = _load(file) if debug.LEVEL < debug.IR else None  # from there on every kernel is shown
            self._kernels[key] = cached or _save(file, _compile(factory(*args)))
        return self._kernels[key]


def _compile(kernel: Kernel) -> CompiledKernel:
    if debug.LEVEL >= debug.IR:
        debug.log(debug.IR, kernel.ir())
    if debug.LEVEL >= debug.SPIRV:
        debug.log(debug.SPIRV, kernel.spvasm())
    return CompiledKernel(kernel.name, kernel.bindings, kernel.push, kernel.features, kernel.spirv())


def _save(file: Path, kernel: CompiledKernel) -> CompiledKernel:
    """Write a checksum, a header of one JSON line, then the SPIR-V."""
    header = {
        "name": kernel.name,
        "bindings": [[b.name, b.kind, repr(b.dtype), b.access] for b in kernel.bindings],
        "push": [[name, repr(dtype), offset] for name, dtype, offset in kernel.push],
        "features": sorted(kernel.features),
    }
    body = json.dumps(header).encode() + b"\n" + kernel.code
    cache.replace(file, _checksum(body) + b"\n" + body)
    return kernel


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


def _load(file: Path) -> CompiledKernel | None:
    """The kernel of a file; None where there is none or it is damaged."""
    try:
        checksum, _, body = file.read_bytes().partition(b"\n")
        if checksum != _checksum(body):
            return None
        line, _, code = body.partition(b"\n")
        header = json.loads(line)
        bindings = tuple(Binding(name, kind, _dtype(dtype), access, ()) for name, kind, dtype, access in header["bindings"])
        push = tuple((name, _dtype(dtype), offset) for name, dtype, offset in header["push"])
        return CompiledKernel(header["name"], bindings, push, frozenset(header["features"]), code)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _dtype(name: str) -> DType:
    dtype: DType = getattr(vkllm_codegen, name)
    return dtype
