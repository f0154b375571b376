"""A checkpoint's tensors under GGUF's names, shapes and types, made from the mapped files when they are asked for.

Most are the mapped bytes themselves. What conversion to GGUF changes is done here, tensor by tensor: rows of Q and K reordered,
1 added to Gemma's norms, experts stacked, gpt-oss's MXFP4 blocks repacked, small tensors widened to F32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from vkllm.errors import ConfigError, FileFormatError, UnsupportedModelError, UnsupportedQuantError
from vkllm.files.huggingface import mxfp4
from vkllm.files.huggingface.checkpoint import Checkpoint
from vkllm.files.huggingface.config import HFConfig
from vkllm.files.huggingface.safetensors import Stored
from vkllm.files.model_file import TensorInfo
from vkllm.files.types import TYPES

Array = NDArray[Any]
Make = Callable[[Sequence[Array]], Array]
"""From the stored tensors (f32, f16, bf16 as uint16, or bytes) to the rows of the presented one."""

DTYPES: dict[str, np.dtype[np.generic]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
}
FLOATS = ("F32", "F16", "BF16")
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq|.*\.attention\.(masked_)?bias")
_OTHER_MODALITIES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
_EXPERTS = r"(?P<experts>model\.layers\.\d+\.mlp\.experts)\."
_EXPERT = re.compile(_EXPERTS + r"(?P<index>0|[1-9][0-9]{0,5})\.(?P<part>(gate|up|down)_proj)\.weight")
_FUSED_EXPERTS = re.compile(_EXPERTS + r"(?P<part>gate_up_proj|down_proj)(?P<kind>_bias|_blocks|_scales)?")
_WRONG_CONFIG = "config.json belongs to another model: download the folder again"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make a tensor: of which stored ones (none: `make` knows it), and how."""

    info: TensorInfo
    sources: tuple[str, ...]
    make: Make


def recipes(config: HFConfig, checkpoint: Checkpoint) -> dict[str, Recipe]:
    """A recipe for every tensor of the model.

    Raises: FileFormatError: a tensor is missing; ConfigError: one has another shape than config.json gives;
    UnsupportedModelError: one has no place in this architecture; UnsupportedQuantError: a type that we cannot read.
    """
    planner = _Planner(config, checkpoint)
    planner.plan()
    expected = dict(_shapes(config))
    for name, recipe in planner.found.items():
        if name not in expected:
            raise UnsupportedModelError(
                f"tensor {recipe.sources[0]} ({name}) has no place in {config.hf_name}",
                hint="the model is a variant of it that cannot be run",
            )
        if recipe.info.shape != expected[name]:
            raise ConfigError(
                f"{recipe.sources[0]} ({name}) has shape {list(recipe.info.shape)}; config.json makes it {list(expected[name])}",
                hint=_WRONG_CONFIG,
            )
    for name in expected:
        if name not in planner.found and not _optional(name):
            raise FileFormatError(f"the weights lack {name}, which config.json asks for", hint=_WRONG_CONFIG)
    for name, factors in config.rope_tensors().items():
        info = TensorInfo(name, factors.shape, "F32", -1, factors.nbytes)
        planner.found[name] = Recipe(info, (), partial(_known, factors))
    return planner.found


def make(recipe: Recipe, checkpoint: Checkpoint) -> NDArray[np.uint8]:
    """The bytes of a tensor, uint8 [n_row, row_bytes], read-only; the mapped ones where nothing changes."""
    rows = recipe.make([_array(checkpoint, name) for name in recipe.sources])
    n_row = math.prod(recipe.info.shape[:-1])
    data = np.ascontiguousarray(rows).reshape(n_row, -1).view(np.uint8)
    data.flags.writeable = False
    return data


def _array(checkpoint: Checkpoint, name: str) -> Array:
    stored = checkpoint.tensors[name]
    return checkpoint.data(name).view(DTYPES[stored.dtype]).reshape(stored.shape)


class _Planner:
    """Goes through a checkpoint's names and collects recipes by GGUF's names."""

    def __init__(self, config: HFConfig, checkpoint: Checkpoint) -> None:
        self.config, self.checkpoint = config, checkpoint
        self.found: dict[str, Recipe] = {}
        arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == config.arch.name)
        self._names = gguf.get_tensor_name_map(arch, config.n_layer)
        self._experts: dict[tuple[str, str], dict[int, str]] = {}

    def plan(self) -> None:
        for stored in self.checkpoint.tensors:
            name = stored.replace("language_model.", "", 1) if "language_model." in stored else stored
            if _IGNORED.fullmatch(name) or self._is_elsewhere(name):
                continue
            if match := _EXPERT.fullmatch(name):
                self._experts.setdefault((match["experts"], match["part"]), {})[int(match["index"])] = stored
            elif match := _FUSED_EXPERTS.fullmatch(name.removesuffix(".weight")):
                self._fused_experts(stored, match["experts"], match["part"], match["kind"] or "")
            else:
                self._single(stored, name)
        for (experts, part), by_index in self._experts.items():
            self._stacked(f"{experts}.{part}.weight", by_index)

    def _is_elsewhere(self, name: str) -> bool:
        """Does the tensor belong to another modality, or repeat the embedding, where the two are tied?"""
        if self.config.hf_name == "Gemma3ForConditionalGeneration" and _OTHER_MODALITIES.fullmatch(name):
            return True
        return self.config.tied and name in ("lm_head.weight", "model.lm_head.weight")

    def _single(self, stored: str, name: str) -> None:
        """A tensor that is one in both worlds."""
        ours = self._named(name + ".weight" if name.endswith(".sinks") else name, stored)
        config = self.config
        if config.arch.permuted and name.endswith((".q_proj.weight", ".q_proj.bias")):
            change: Make = partial(_permuted, config.n_head)
        elif config.arch.permuted and name.endswith((".k_proj.weight", ".k_proj.bias")):
            change = partial(_permuted, config.n_kv_head)
        elif config.arch.norm_shift and name.endswith("norm.weight"):
            change = partial(_shifted, np.float32(config.arch.norm_shift))
        else:
            change = _same
        self._add(ours, (stored,), self._stored(stored).shape, change)

    def _stacked(self, name: str, by_index: Mapping[int, str]) -> None:
        """One expert a tensor: stacked in their order."""
        n_expert = self.config.n_expert
        if len(by_index) != n_expert or max(by_index) != n_expert - 1:
            raise ConfigError(
                f"{name}: {len(by_index)} experts up to number {max(by_index)}; config.json says {n_expert}", hint=_WRONG_CONFIG
            )
        sources = tuple(by_index[i] for i in sorted(by_index))
        shapes, dtypes = {self._stored(s).shape for s in sources}, {self._stored(s).dtype for s in sources}
        if len(shapes) > 1 or len(dtypes) > 1:
            raise FileFormatError(f"{name}: the experts differ in shape or type", hint="download the folder again")
        self._add(self._named(name, sources[0]), sources, (len(sources), *shapes.pop()), _stack)

    def _fused_experts(self, stored: str, experts: str, part: str, kind: str) -> None:
        """All experts in one tensor, gate and up interleaved (gpt-oss) or one after the other."""
        if kind == "_scales":
            return  # comes with its blocks
        suffix = ".bias" if kind == "_bias" else ".weight"
        sources = (stored, stored.replace("_blocks", "_scales")) if kind == "_blocks" else (stored,)
        transposed = self.config.arch.name == "gpt-oss" and not kind
        for piece, rows in self._pieces(part):
            name = self._named(f"{experts}.{piece}{suffix}", stored)
            if kind == "_blocks":
                shape = mxfp4.shape(*(self._stored(s) for s in sources))
                self._add(name, sources, _sliced(shape, rows, 1), partial(_repacked, rows), "MXFP4")
                continue
            shape = self._stored(stored).shape
            if len(shape) != (2 if kind else 3):
                raise ConfigError(f"{stored} has shape {list(shape)}; expected that of experts", hint=_WRONG_CONFIG)
            if transposed:
                shape = (shape[0], shape[2], shape[1])
            self._add(name, sources, _sliced(shape, rows, 1), partial(_piece, transposed, rows))

    def _pieces(self, part: str) -> Iterator[tuple[str, slice]]:
        """The matrices in a stored one, and which of its rows they are."""
        if part == "down_proj":
            yield "down_proj", slice(None)
        elif self.config.arch.name == "gpt-oss":
            yield "gate_proj", slice(0, None, 2)
            yield "up_proj", slice(1, None, 2)
        else:
            yield "gate_proj", slice(0, self.config.n_ff_expert)
            yield "up_proj", slice(self.config.n_ff_expert, None)

    def _named(self, name: str, stored: str) -> str:
        ours = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if ours is None:
            raise UnsupportedModelError(
                f"tensor {stored} has no place in {self.config.hf_name} with {self.config.n_layer} layers",
                hint="the model is a variant of it that cannot be run, or config.json belongs to another model",
            )
        return str(ours)

    def _stored(self, name: str) -> Stored:
        stored = self.checkpoint.tensors.get(name)
        if stored is None:
            raise FileFormatError(f"the weights lack {name}", hint="download the folder again")
        return stored

    def _add(self, name: str, sources: tuple[str, ...], shape: tuple[int, ...], change: Make, kind: str | None = None) -> None:
        """`kind`: the presented type; None: as stored, or F32 for what is always F32 in GGUF."""
        if name in self.found:
            raise FileFormatError(
                f"{self.found[name].sources[0]} and {sources[0]} are both {name}", hint="the folder mixes two models"
            )
        dtype = self._stored(sources[0]).dtype
        if kind is None and dtype not in FLOATS:
            raise UnsupportedQuantError(
                f"{sources[0]} is {dtype}; expected F32, F16 or BF16", hint="download the original weights"
            )
        if kind is None and dtype != "F32" and _always_f32(name, shape):
            kind, change = "F32", partial(_widened, dtype, change)
        kind = kind or dtype
        info, offset = TYPES[kind], self._stored(sources[0]).offset if change is _same else -1
        nbytes = math.prod(shape) // info.block_size * info.block_bytes
        self.found[name] = Recipe(TensorInfo(name, shape, kind, offset, nbytes), sources, change)


def _always_f32(name: str, shape: tuple[int, ...]) -> bool:
    """Vectors, norms, biases and routers are F32 in GGUF, whatever the rest is."""
    return len(shape) == 1 or name.endswith(("_norm.weight", ".ffn_gate_inp.weight")) or not name.endswith(".weight")


def _sliced(shape: tuple[int, ...], rows: slice, axis: int) -> tuple[int, ...]:
    return (*shape[:axis], len(range(*rows.indices(shape[axis]))), *shape[axis + 1 :])


def _same(parts: Sequence[Array]) -> Array:
    return parts[0]


def _known(values: Array, _: Sequence[Array]) -> Array:
    return values.copy()


def _permuted(n_head: int, parts: Sequence[Array]) -> Array:
    """Rows of each head, first half and second half, to neighbours: [n_head * head_dim, ...]."""
    rows = parts[0]
    return rows.reshape(n_head, 2, rows.shape[0] // n_head // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _stack(parts: Sequence[Array]) -> Array:
    return np.stack(parts)


def _piece(transposed: bool, rows: slice, parts: Sequence[Array]) -> Array:
    return (parts[0].swapaxes(1, 2) if transposed else parts[0])[:, rows]


def _repacked(rows: slice, parts: Sequence[Array]) -> Array:
    return mxfp4.repacked(parts[0][:, rows], parts[1][:, rows])


def _shifted(shift: np.float32, parts: Sequence[Array]) -> Array:
    return np.add(parts[0], shift)


def _widened(dtype: str, change: Make, parts: Sequence[Array]) -> Array:
    """f16 or bf16 to f32, exactly, before the change."""
    if dtype == "BF16":
        return change([(part.astype(np.uint32) << 16).view(np.float32) for part in parts])
    return change([part.astype(np.float32) for part in parts])


_OPTIONAL = re.compile(r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))\.bias")


def _optional(name: str) -> bool:
    """Biases of matrices: some models of an architecture have them, others not."""
    return _OPTIONAL.fullmatch(name) is not None


def _shapes(config: HFConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape of every tensor that a model of this configuration can have."""
    n_embd, arch = config.n_embd, config.arch
    yield "token_embd.weight", (config.n_vocab, n_embd)
    if not config.tied:
        yield "output.weight", (config.n_vocab, n_embd)
    yield "output_norm.weight", (n_embd,)
    layer = dict(_layer_shapes(config))
    vectors = ["attn_norm", "post_attention_norm" if arch.name == "gpt-oss" else "ffn_norm"]
    vectors += ["post_attention_norm", "post_ffw_norm"] if arch.post_norms else []
    for i in range(config.n_layer):
        for name in vectors:
            yield f"blk.{i}.{name}.weight", (n_embd,)
        for name, shape in layer.items():
            yield f"blk.{i}.{name}", shape


def _layer_shapes(config: HFConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What one layer has beside norms over the whole row."""
    n_embd, arch = config.n_embd, config.arch
    n_q, n_kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    rows = {"attn_qkv": n_q + 2 * n_kv} if arch.fused else {"attn_q": n_q, "attn_k": n_kv, "attn_v": n_kv}
    matrices = {name: (n_row, n_embd) for name, n_row in rows.items()} | {"attn_output": (n_embd, n_q)}
    if not arch.experts:
        matrices |= {"ffn_up": (2 * config.n_ff if arch.fused else config.n_ff, n_embd), "ffn_down": (n_embd, config.n_ff)}
        matrices |= {} if arch.fused else {"ffn_gate": (config.n_ff, n_embd)}
    for name, shape in matrices.items():
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]
    if arch.qk_norm:
        yield "attn_q_norm.weight", (config.head_dim,)
        yield "attn_k_norm.weight", (config.head_dim,)
    if arch.sinks:
        yield "attn_sinks.weight", (config.n_head,)
    if arch.experts:
        yield from _expert_shapes(config)


def _expert_shapes(config: HFConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    n_expert, n_embd, n_ff = config.n_expert, config.n_embd, config.n_ff_expert
    matrices = {"ffn_gate_inp": (n_expert, n_embd), "ffn_gate_exps": (n_expert, n_ff, n_embd)}
    matrices |= {"ffn_up_exps": (n_expert, n_ff, n_embd), "ffn_down_exps": (n_expert, n_embd, n_ff)}
    for name, shape in matrices.items():
        yield f"{name}.weight", shape
        if config.arch.name == "gpt-oss":
            yield f"{name}.bias", shape[:-1]
