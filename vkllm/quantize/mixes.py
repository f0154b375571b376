"""Which type each tensor gets: the mixes that llama.cpp calls Q4_K_M and so on, tensor by tensor as it lays them out.

Pure: names, shapes and the metadata go in, names of types come out.
Source: llama.cpp, src/llama-quant.cpp (its choices are facts about its files; a test compares them file by file).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from vkllm.errors import ConfigError, UnsupportedQuantError
from vkllm.files.model_file import TensorInfo
from vkllm.files.types import TYPES


@dataclass(frozen=True, slots=True)
class FileType:
    """A mix: its number in `general.file_type`, and the type that most of its matrices have."""

    id: int
    name: str
    base: str


FILE_TYPES: dict[str, FileType] = {
    t.name: t
    for t in (
        FileType(0, "F32", "F32"),
        FileType(1, "F16", "F16"),
        FileType(32, "BF16", "BF16"),
        FileType(2, "Q4_0", "Q4_0"),
        FileType(3, "Q4_1", "Q4_1"),
        FileType(8, "Q5_0", "Q5_0"),
        FileType(9, "Q5_1", "Q5_1"),
        FileType(7, "Q8_0", "Q8_0"),
        FileType(10, "Q2_K", "Q2_K"),
        FileType(11, "Q3_K_S", "Q3_K"),
        FileType(12, "Q3_K_M", "Q3_K"),
        FileType(13, "Q3_K_L", "Q3_K"),
        FileType(14, "Q4_K_S", "Q4_K"),
        FileType(15, "Q4_K_M", "Q4_K"),
        FileType(16, "Q5_K_S", "Q5_K"),
        FileType(17, "Q5_K_M", "Q5_K"),
        FileType(18, "Q6_K", "Q6_K"),
        FileType(38, "MXFP4_MOE", "MXFP4"),
    )
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

FLOATS = ("F32", "F16", "BF16")
NUMBERS = ("I8", "I16", "I32", "I64", "F64")
"""Types of what are no weights."""
NARROW = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What replaces a type with blocks of 256 where a row is no multiple of that."""

KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight"),  # norms, routers of experts
    *("position_embd", "token_types.weight", "attn_rel_b.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "time_mix_first.weight", "time_mix_lerp_fused.weight"),
    *("indexer.k_proj.weight", "indexer.q_proj.weight", ".patch_embd", ".patch_merger", ".rel_pos"),
)
"""Parts of the names of matrices that are too small or too sensitive to quantize."""
_KEPT_LOW_RANK = re.compile(r"time_mix_(w[0-2]|v[0-2]|a[0-2]|g[12]|decay_w[12])\.weight")

EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
ATTN_V = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")


def file_type(name: str) -> FileType:
    """The mix of that name, in any case. Raises: UnsupportedQuantError: there is none."""
    wanted = name.upper()
    found = FILE_TYPES.get(ALIASES.get(wanted, wanted))
    if found is None:
        raise UnsupportedQuantError(f"there is no file type {name!r}", hint=f"choose one of {', '.join(FILE_TYPES)}")
    return found


@dataclass(frozen=True, slots=True)
class Model:
    """What the choice of types depends on, beside names and shapes."""

    arch: str
    n_layer: int
    n_head: int
    n_kv_head: int
    n_expert: int

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Model:
        """Raises: ConfigError: no architecture or no count of layers."""
        arch = metadata.get("general.architecture")
        if not isinstance(arch, str):
            raise ConfigError("general.architecture is missing", hint="give the file of a language model")

        n_layer = _count(metadata, f"{arch}.block_count", 0)
        if n_layer < 1:
            raise ConfigError(f"{arch}.block_count is missing", hint="give the file of a language model")
        n_head = _count(metadata, f"{arch}.attention.head_count", 0)
        n_kv_head = _count(metadata, f"{arch}.attention.head_count_kv", n_head)
        return cls(arch, n_layer, n_head, n_kv_head, _count(metadata, f"{arch}.expert_count", 0))

    @property
    def shares_heads(self) -> bool:
        """Do at least four query heads share one of the values?"""
        return self.n_kv_head > 0 and self.n_head // self.n_kv_head >= 4

    @property
    def is_70b(self) -> bool:
        """The shape whose attn_v is small enough to afford more bits."""
        named = self.arch in ("qwen2", "deci", "olmo") or (self.arch == "llama" and self.n_head != self.n_kv_head)
        return named and self.n_layer == 80


def _count(metadata: Mapping[str, object], key: str, default: int) -> int:
    """A whole number; the first where there is one a layer."""
    value = metadata.get(key, default)
    if isinstance(value, np.ndarray | list) and len(value):
        value = value[0]
    if not isinstance(value, int | np.integer):
        raise ConfigError(f"{key} is {value!r}; expected a whole number", hint="convert the model again")
    return int(value)


def choose_types(tensors: Mapping[str, TensorInfo], model: Model, target: FileType) -> dict[str, str]:
    """The type of every tensor of the file, in llama.cpp's order: by layer, then by name."""
    chooser = _Chooser(model, target, tied="output.weight" not in tensors, n_v=sum(_is_v(name) for name in tensors))
    return {name: chooser.choose(tensors[name]) for name in sorted(tensors, key=_place)}


def _place(name: str) -> tuple[int, str]:
    layer = re.match(r"blk\.(\d+)\.", name)
    return int(layer[1]) if layer else -1, name


def _is_v(name: str) -> bool:
    return any(part in name for part in ATTN_V)


def may_quantize(tensor: TensorInfo) -> bool:
    """Is it a matrix of weights, no norm, router or table of positions?"""
    name = tensor.name
    n_dim = max((len(tensor.shape) - i for i, n in enumerate(tensor.shape) if n > 1), default=1)  # leading ones do not count
    return (
        n_dim > 1
        and name.endswith("weight")
        and tensor.type not in NUMBERS
        and not any(part in name for part in KEPT)
        and not _KEPT_LOW_RANK.search(name)
    )


class _Chooser:
    """Goes through the tensors in order, counting layers as llama.cpp counts them."""

    def __init__(self, model: Model, target: FileType, *, tied: bool, n_v: int) -> None:
        self.model, self.target, self.tied, self.n_v = model, target, tied, n_v
        self.seen_v = self.seen_down = 0

    def choose(self, tensor: TensorInfo) -> str:
        if not may_quantize(tensor):
            return _plain(tensor)
        if self.target.base in FLOATS:
            return self.target.base
        return _fitting(self._wanted(tensor), tensor.shape[-1])

    def _wanted(self, tensor: TensorInfo) -> str:
        name, base = tensor.name, self.target.base
        if base == "MXFP4":  # experts only
            return "MXFP4" if len(tensor.shape) > 2 and tensor.shape[-3] > 1 else "Q8_0"
        if name == "output.weight" or (self.tied and name in EMBEDDINGS):
            if tensor.shape[-1] % TYPES[base].block_size:
                return "Q8_0"
            return base if base == "Q8_0" else "Q6_K"
        if name in EMBEDDINGS:
            return base
        rules: dict[str, Callable[[str], str | None]] = {
            **dict.fromkeys(ATTN_V, self._value),
            "attn_k.weight": lambda _: "Q8_0" if self.model.n_expert == 8 else None,
            "attn_output.weight": self._attn_output,
            "ffn_down": self._ffn_down,
        }
        return next((rule(name) for part, rule in rules.items() if part in name), None) or base

    def _value(self, name: str) -> str | None:
        """attn_v, or what holds it: few weights that matter much."""
        layer, self.seen_v = self.seen_v, self.seen_v + 1
        chosen = {
            "Q2_K": "Q4_K" if self.model.shares_heads else "Q3_K",
            "Q3_K_M": "Q5_K" if layer < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if layer < 4 else None,
            "Q4_K_M": "Q6_K" if _more_bits(layer, self.n_v) else None,
            "Q5_K_M": "Q6_K" if _more_bits(layer, self.n_v) else None,
        }.get(self.target.name)
        if self.model.is_70b and (chosen or self.target.base) in ("Q3_K", "Q4_K"):
            chosen = "Q5_K"
        return "Q8_0" if self.model.n_expert == 8 else chosen

    def _attn_output(self, name: str) -> str | None:
        if self.model.n_expert == 8:
            return "Q5_K" if self.target.name in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M") else None
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.target.name)

    def _ffn_down(self, name: str) -> str | None:
        layer, n_layer, self.seen_down = self.seen_down, self.model.n_layer, self.seen_down + 1
        if self.model.n_expert > 1:  # several such tensors a layer: the name tells
            layer = _place(name)[0]
        return {
            "Q2_K": "Q3_K",
            "Q3_K_M": "Q5_K" if layer < n_layer // 16 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if layer < n_layer // 8 else None,
            "Q4_K_M": "Q6_K" if _more_bits(layer, n_layer) else None,
            "Q5_K_M": "Q6_K" if _more_bits(layer, n_layer) else None,
        }.get(self.target.name)


def _more_bits(layer: int, n_layer: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = n_layer // 8
    return layer < eighth or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2


def _fitting(kind: str, n_col: int) -> str:
    """The type, or the one that replaces it where rows are no whole blocks."""
    if n_col % TYPES[kind].block_size == 0:
        return kind
    narrow = NARROW.get(kind, kind)
    return narrow if n_col % TYPES[narrow].block_size == 0 else "F16"


def _plain(tensor: TensorInfo) -> str:
    """Of what is not quantized: floats with one dimension, norms and routers are F32, which llama.cpp wants; others stay."""
    small = len(tensor.shape) == 1 or any(part in tensor.name for part in KEPT[:2])
    return "F32" if small and tensor.type in FLOATS else tensor.type
