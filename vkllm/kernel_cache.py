"""Compiled kernels on disk: tracing a kernel in Python takes 0.05 s, reading its SPIR-V back takes none.

They are kept in the user's cache: one file a kernel, in a folder named by a hash of the compiler's and the kernels' own sources,
so that a changed line of either compiles everything anew. The kernels of common models come with the package, in an archive that
`make shaders` writes (tools/build_shaders.py) and that counts only for these very sources. A file that is missing, damaged or
cannot be written is no error: the kernel is compiled.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVarTuple

import vkllm_codegen
import vkllm_shaders
from vkllm import debug
from vkllm.vk import Device, Pipeline, cache
from vkllm_codegen import Binding, Kernel
from vkllm_codegen.types import DType

if TYPE_CHECKING:
    from vkllm.kernel_archive import KernelArchive

Args = TypeVarTuple("Args")
ARCHIVE = Path(__file__).with_name("kernels.zip")


@dataclass(frozen=True)
class Recipe:
    """How a kernel is made: a factory and its arguments, which tell kernels apart by their repr."""

    factory: Callable[..., Kernel]
    args: tuple[object, ...]

    def __repr__(self) -> str:
        return f"{self.factory.__module__}.{self.factory.__qualname__}{self.args!r}"

    def make(self) -> Kernel:
        """The kernel, traced."""
        return self.factory(*self.args)


@dataclass(frozen=True)
class CompiledKernel:
    """What recording a kernel needs of it: its interface and its SPIR-V. The fields are those of `vkllm_codegen.Kernel`; `recipe`
    is there where a KernelCache made it."""

    name: str
    bindings: tuple[Binding, ...]
    push: tuple[tuple[str, DType, int], ...]
    features: frozenset[str]
    code: bytes = field(repr=False)
    stage_size: int = 0
    recipe: Recipe | None = field(default=None, repr=False, compare=False)

    @property
    def push_bytes(self) -> int:
        return max((offset + dtype.itemsize for _, dtype, offset in self.push), default=0)

    def pack_push(self, **values: int | float) -> bytes:
        """The push-constant bytes of these values; all must be given, others are refused."""
        return vkllm_codegen.pack_push(self.name, self.push, values)


class KernelCache:
    """Compiles each kernel once: a process, and a version of the sources."""

    def __init__(self, folder: Path | None = None, archive: Path = ARCHIVE) -> None:
        self._folder, self._archive_file = folder or cache.directory(), archive
        self._kernels: dict[str, CompiledKernel] = {}

    @cached_property
    def folder(self) -> Path:
        """Where this version's kernels lie."""
        return self._folder / f"kernels-{_version()[:16]}"

    def get(self, factory: Callable[[*Args], Kernel], *args: *Args) -> CompiledKernel:
        """`factory(*args)`, compiled. Its arguments must tell kernels apart by their repr."""
        recipe = Recipe(factory, args)
        key = repr(recipe)
        if key not in self._kernels:
            file = self.folder / _file_name(key)
            found = _load(file) if debug.LEVEL < debug.IR else None  # from there on every kernel is shown
            found = found or _save(file, self._shipped(file.name) or compiled(recipe.make()))
            self._kernels[key] = replace(found, recipe=recipe)
        return self._kernels[key]

    def _shipped(self, name: str) -> CompiledKernel | None:
        data = self._archive.find(name) if debug.LEVEL < debug.IR else None
        return _decode(data) if data else None

    @cached_property
    def _archive(self) -> KernelArchive:
        from vkllm.kernel_archive import KernelArchive  # only a first start needs it

        return KernelArchive(self._archive_file, _version())


def pipeline_of(device: Device, kernel: CompiledKernel, lanes: int = 0) -> Pipeline:
    """A kernel on a device. Kernels are written for one subgroup size: where the driver may choose, it is told. `lanes`: which
    (0: the device's usual one).

    Raises: as Device.pipeline.
    """
    limits = device.limits
    varies = limits.min_subgroup_size != limits.max_subgroup_size and "subgroup_size_control" in limits.features
    return device.pipeline(
        kernel.name,
        kernel.code,
        tuple(b.kind for b in kernel.bindings),
        kernel.push_bytes,
        required_subgroup_size=(lanes or limits.subgroup_size) if varies else None,
        features=kernel.features,
    )


def write_archive(file: Path, kernels: Mapping[str, CompiledKernel]) -> None:
    """Write kernels, by the repr of their recipes, for later starts of these very sources. Raises: OSError."""
    from vkllm.kernel_archive import write

    by_name = sorted(kernels, key=lambda key: (kernels[key].name, key))
    write(file, _version(), ((_file_name(key), _encode(kernels[key])) for key in by_name))


@functools.cache
def _version() -> str:
    """Of the sources."""
    digest = hashlib.sha256()
    for package in (vkllm_codegen, vkllm_shaders):
        for source in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()


def _file_name(key: str) -> str:
    return f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.kernel"


def compiled(kernel: Kernel) -> CompiledKernel:
    """A kernel's interface and SPIR-V, without any cache."""
    if debug.LEVEL >= debug.IR:
        debug.log(debug.IR, kernel.ir())
    if debug.LEVEL >= debug.SPIRV:
        debug.log(debug.SPIRV, kernel.spvasm())
    return CompiledKernel(kernel.name, kernel.bindings, kernel.push, kernel.features, kernel.spirv(), kernel.stage_size)


def _save(file: Path, kernel: CompiledKernel) -> CompiledKernel:
    cache.replace(file, _encode(kernel))
    return kernel


def _load(file: Path) -> CompiledKernel | None:
    try:
        return _decode(file.read_bytes())
    except OSError:
        return None


def _encode(kernel: CompiledKernel) -> bytes:
    """A checksum, a header of one JSON line, then the SPIR-V."""
    header = {
        "name": kernel.name,
        "bindings": [[b.name, b.kind, repr(b.dtype), b.access] for b in kernel.bindings],
        "push": [[name, repr(dtype), offset] for name, dtype, offset in kernel.push],
        "features": sorted(kernel.features),
        "stage_size": kernel.stage_size,
    }
    body = json.dumps(header).encode() + b"\n" + kernel.code
    return _checksum(body) + b"\n" + body


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


def _decode(data: bytes) -> CompiledKernel | None:
    """The kernel; None where it is damaged."""
    try:
        checksum, _, body = data.partition(b"\n")
        if checksum != _checksum(body):
            return None
        line, _, code = body.partition(b"\n")
        header = json.loads(line)
        bindings = tuple(Binding(name, kind, _dtype(dtype), access, ()) for name, kind, dtype, access in header["bindings"])
        push = tuple((name, _dtype(dtype), offset) for name, dtype, offset in header["push"])
        features, stage_size = frozenset(header["features"]), int(header["stage_size"])
        return CompiledKernel(header["name"], bindings, push, features, code, stage_size)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def _dtype(name: str) -> DType:
    dtype: DType = getattr(vkllm_codegen, name)
    return dtype
