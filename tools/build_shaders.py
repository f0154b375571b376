"""Trace ahead the kernels of common models on common devices: SPIR-V for the package, and a text for reviews.

Usage: python tools/build_shaders.py [--check]
Writes vkllm/kernels.zip, which vkllm.kernel_cache looks into before it traces a kernel (build output, only for these very
sources), and shaders/catalog.txt, which is committed, so that a diff shows which kernels a change touches. With --check nothing
is written: the exit status is 1 where the text would differ.

Any other model works as well: its kernels are traced when they are first used.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.progress import track

from vkllm.config import ModelConfig, RuntimeConfig
from vkllm.files.model_file import ModelFile, TensorInfo
from vkllm.files.types import TYPES
from vkllm.kernel_cache import ARCHIVE, CompiledKernel, KernelCache, Recipe, write_archive
from vkllm.kernels import Lowering
from vkllm.models import build_graph
from vkllm.plan import Graph
from vkllm.quantize.mixes import FILE_TYPES, Model, choose_types
from vkllm.vk.types import MINIMUM_LIMITS, DeviceInfo, DeviceKind
from vkllm_codegen import Kernel

TEXT = Path(__file__).resolve().parents[1] / "shaders" / "catalog.txt"
N_LAYER = 8  # as many as a mix of types needs to show all of its rules; other sizes make only persistent kernels
N_CTX = 4096
THREADS = "2"  # of lavapipe, which share out row groups
MIXES = ("Q4_0", "Q8_0", "Q4_K_M")


@dataclass(frozen=True)
class Shape:
    """A model, as far as it makes kernels. `own_head`: its logits have weights of their own."""

    arch: str
    n_embd: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_ff: int
    n_vocab: int
    own_head: bool = False
    bias: bool = False

    def config(self) -> ModelConfig:
        a = self.arch
        values = {"embedding_length": self.n_embd, "feed_forward_length": self.n_ff, "vocab_size": self.n_vocab}
        values |= {"attention.head_count": self.n_head, "attention.head_count_kv": self.n_kv_head, "block_count": N_LAYER}
        values |= {"attention.key_length": self.head_dim, "attention.value_length": self.head_dim, "context_length": N_CTX}
        metadata = {f"{a}.{key}": value for key, value in values.items()}
        return ModelConfig.from_gguf(
            SimpleNamespace(metadata=metadata | {"general.architecture": a, f"{a}.attention.layer_norm_rms_epsilon": 1e-5})
        )

    def graph(self) -> Graph:
        names = {f"blk.{i}.ffn_gate.weight" for i in range(N_LAYER)} | ({"output.weight"} if self.own_head else set())
        if self.bias:
            names |= {f"blk.{i}.attn_{part}.bias" for i in range(N_LAYER) for part in "qkv"}
        return build_graph(self.config(), names)


MODELS = (
    Shape("qwen2", 896, 14, 2, 64, 4864, 151936, bias=True),  # Qwen2.5 0.5B
    Shape("llama", 2048, 32, 8, 64, 8192, 128256),  # Llama 3.2 1B
    Shape("llama", 4096, 32, 8, 128, 14336, 128256, own_head=True),  # Llama 3.1 8B, Mistral 7B
    Shape("qwen3", 1024, 16, 8, 128, 3072, 151936),  # Qwen3 0.6B, 1.7B
    Shape("qwen3", 2560, 32, 8, 128, 9728, 151936),  # 4B, 8B
)


def device(kind: DeviceKind, subgroup: int, shared: int, coop: bool = False, wide: bool = False) -> DeviceInfo:
    """A device of this kind. Its name is nobody's, so that nothing is tuned for it."""
    limits = replace(
        MINIMUM_LIMITS,
        max_storage_buffer_range=(1 << 32) - 1 if kind != "cpu" else MINIMUM_LIMITS.max_storage_buffer_range,
        max_shared_bytes=shared,
        max_storage_buffers=32,
        max_texel_buffers=64,
        max_workgroup_invocations=1024,
        subgroup_size=subgroup,
        features=MINIMUM_LIMITS.features
        | {"subgroup_ballot", "subgroup_vote", "int64", "dot8"}
        | ({"coopmat", "memory_model"} if coop else set())
        | ({"int64_vectors"} if wide else set()),
        coop_shapes=((16, 16, 16, "f16", "f16", "f32", "f32"),) if coop else (),
    )
    return DeviceInfo(0, "built ahead", kind, 0, 0, "", "", 0, (1, 3, 0), b"", None, 1 << 40, 1 << 40, limits)


DEVICES = (
    device("cpu", 8, 32 << 10, wide=True),  # lavapipe on AMD's CPUs with AVX-512
    device("cpu", 8, 32 << 10),  # on others
    device("discrete", 32, 48 << 10, coop=True),  # NVIDIA
    device("discrete", 64, 64 << 10),  # AMD
)


class Asked(KernelCache):
    """Makes no kernel, but notes what was asked for, by key. `known`: kernels that are there, which others may be made of."""

    def __init__(self, known: Mapping[str, CompiledKernel]) -> None:
        super().__init__()
        self.known, self.asked = known, dict[str, Recipe]()

    def get(self, factory: Callable[..., Kernel], *args: Any) -> CompiledKernel:  # type: ignore[override]
        recipe = Recipe(factory, args)
        self.asked[repr(recipe)] = recipe
        return self.known.get(repr(recipe), NOTHING)


NOTHING = CompiledKernel("", (), (), frozenset(), b"")


class Planned(Lowering):
    """What a chain asks for."""

    def __init__(self, *args: Any, asked: Asked) -> None:
        super().__init__(*args)
        self._kernels = asked

    def ask(self) -> None:
        """All dispatches of all recordings of a single sequence: a token, and prompts up to a whole chunk."""
        for n_row in (1 << i for i in range(self.capacity.bit_length())):
            for n_out in {0, 1} if n_row > 1 else {1}:
                dispatches = [d for op in self.graph.ops for d in self.dispatches(op, n_row, n_out)]
                if n_row == 1 and all(d.kernel.recipe for d in dispatches):
                    self.merged(dispatches)


def file_of(graph: Graph, shape: Shape, mix: str) -> ModelFile:
    """The tensors of a model: their types are those of llama.cpp's mix."""
    shapes = {part.weight: part.shape for part in graph.parts()}
    plain = {name: TensorInfo(name, size, "F16", 0, 2 * int(np.prod(size))) for name, size in shapes.items()}
    model = Model(shape.arch, N_LAYER, shape.n_head, shape.n_kv_head, 0)
    types = choose_types(plain, model, FILE_TYPES[mix])
    tensors = {}
    for name, size in shapes.items():
        kind = TYPES[types[name]]
        tensors[name] = TensorInfo(name, size, types[name], 0, int(np.prod(size)) // kind.block_size * kind.block_bytes)
    return cast(ModelFile, SimpleNamespace(tensors=tensors))


def wanted(known: Mapping[str, CompiledKernel], models: Iterable[Shape] = MODELS) -> dict[str, Recipe]:
    """How each kernel is made, by its key; with those that are made of others, as far as these are known."""
    asked = Asked(known)
    for shape in models:
        graph = shape.graph()
        for mix in MIXES:
            for info in DEVICES:
                Planned(graph, file_of(graph, shape, mix), info, RuntimeConfig(), N_CTX, asked=asked).ask()
    return asked.asked


def made(recipe: Recipe) -> CompiledKernel:
    """From the user's cache where it is there, else traced."""
    return KernelCache().get(recipe.factory, *recipe.args)


def described(kernel: CompiledKernel) -> str:
    """A kernel's interface, and how long it is."""
    words = np.frombuffer(kernel.code, "<u4")
    n, at = 0, 5  # after the header
    while at < len(words):
        n, at = n + 1, at + int(words[at] >> 16)
    bound = ", ".join(f"{b.name} {b.access} {b.kind} {b.dtype}" for b in kernel.bindings)
    pushed = ", ".join(f"{name} {dtype}" for name, dtype, _ in kernel.push)
    return f"""{kernel.name}
  binds {bound}
  push constants {pushed or "none"}; features {", ".join(sorted(kernel.features)) or "none"}
  {n} instructions, {len(kernel.code)} bytes, sha256 {hashlib.sha256(kernel.code).hexdigest()}
"""


def header(calls: Iterable[str]) -> str:
    """What the text is, and a hash of which kernels are in it (and with them, of which others are made of them)."""
    return f"""\
What `make shaders` builds ahead: kernels of common models on common devices. tools/build_shaders.py writes this file, so that a
diff shows which kernels a change touches. The kernels themselves: `vkllm shaders OUT` writes them as text.

keys {hashlib.sha256("".join(sorted(calls)).encode()).hexdigest()}
"""


def text_of(plain: Iterable[str], kernels: Mapping[str, CompiledKernel]) -> str:
    """The text for reviews. `plain`: the keys of those that are not made of others."""
    return "\n".join([header(plain), *sorted({described(kernel) for kernel in kernels.values()})])


def main(check: bool) -> int:
    os.environ["LP_NUM_THREADS"] = THREADS
    kernels: dict[str, CompiledKernel] = {}
    plain = wanted(kernels)
    for what in ("kernels", "persistent kernels"):
        recipes = {key: recipe for key, recipe in wanted(kernels).items() if key not in kernels}
        with ProcessPoolExecutor() as pool:
            compiled = pool.map(made, recipes.values(), chunksize=4)
            bar = track(zip(recipes, compiled, strict=True), what, len(recipes), console=Console(stderr=True), transient=True)
            kernels |= dict(bar)
    text = text_of(plain, kernels)
    if check:
        same = TEXT.exists() and TEXT.read_text() == text
        print(f"{TEXT} is {'up to date' if same else 'out of date: run `make shaders`'}")
        return 0 if same else 1
    TEXT.write_text(text)
    write_archive(ARCHIVE, kernels)
    print(f"{len(kernels)} kernels, {ARCHIVE.stat().st_size / 1e6:.1f} MB in {ARCHIVE}")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
