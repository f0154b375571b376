"""What a model is (ModelConfig, from its file) and how to run it (RuntimeConfig, from the user). Both frozen and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from vkllm.errors import ConfigError, UnsupportedModelError

RopePairing = Literal["interleaved", "half"]
Activations = Literal["auto", "f32", "int8"]
Schedule = Literal["auto", "lane_row", "lane_chunk"]

BLOCK_SIZES = (8, 16, 32, 64, 128, 256, 512)
"""What the attention kernels can divide: they take positions 8 at a time, and split a long context every 512."""

ROPE_PAIRING: dict[str, RopePairing] = {"llama": "interleaved", "qwen2": "half"}
"""Supported architectures, and how each pairs the dimensions that RoPE rotates: (2i, 2i+1) or (i, i + rope_dim/2)."""


NEUTRAL: dict[str, tuple[float, ...]] = {
    "attention.causal": (1,),
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", "attention.scale"), (0,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (0,)),
    **dict.fromkeys(("logit_scale", "embedding_scale", "residual_scale"), (0, 1)),
}
"""Keys that other models use to change the arithmetic, and the values with which they change nothing."""


class GGUFLike(Protocol):
    """What `ModelConfig.from_gguf` needs of a file."""

    @property
    def metadata(self) -> Mapping[str, object]: ...


class _Metadata:
    """Typed look-ups in GGUF metadata; every refusal names the key."""

    def __init__(self, pairs: Mapping[str, object]) -> None:
        self.pairs = pairs

    def text(self, key: str, default: str | None = None) -> str:
        value = self.pairs.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.pairs.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, value, "an integer")
        if not least <= value < 1 << 31:
            raise ConfigError(
                f"{key} is {value}; expected {least} to 2147483647", hint="the file is damaged: convert the model again"
            )
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.pairs.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(key, value, "a number")
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(
                f"{key} is {value}; expected a positive number", hint="the file is damaged: convert the model again"
            )
        return float(value)

    def _wrong(self, key: str, value: object, expected: str) -> ConfigError:
        if key not in self.pairs:
            return ConfigError(f"the metadata lacks {key}", hint="the file is incomplete: convert the model again")
        return ConfigError(f"{key} is of type {type(value).__name__}; expected {expected}", hint="convert the model again")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The hyper-parameters of a model, in the names of STYLE section 4. `file_type` is GGUF's general.file_type (or None)."""

    arch: str
    name: str
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_ctx: int
    rope_theta: float
    rope_dim: int
    rope_pairing: RopePairing
    rms_norm_eps: float
    file_type: int | None = None

    def __post_init__(self) -> None:
        if self.n_head % self.n_kv_head:
            raise self._contradiction(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")
        if self.rope_dim > self.head_dim or self.rope_dim % 2:
            raise self._contradiction(f"rope_dim {self.rope_dim} must be even and at most head_dim {self.head_dim}")

    def _contradiction(self, what: str) -> ConfigError:
        return ConfigError(f"{self.arch} model: {what}", hint="the metadata contradicts itself: convert the model again")

    @classmethod
    def from_gguf(cls, file: GGUFLike) -> ModelConfig:
        """Read and check a file's metadata.

        Raises: UnsupportedModelError: unknown architecture or RoPE scaling; ConfigError: a key is missing, of the wrong
        type, or contradicts another.
        """
        meta = _Metadata(file.metadata)
        arch = meta.text("general.architecture")
        if arch not in ROPE_PAIRING:
            raise UnsupportedModelError(f"architecture {arch!r} is not supported", hint=f"supported: {', '.join(ROPE_PAIRING)}")
        _refuse_unsupported(meta, arch)
        n_embd, n_head = meta.integer(f"{arch}.embedding_length"), meta.integer(f"{arch}.attention.head_count")
        head_dim = _head_dim(meta, arch, n_embd, n_head)
        return cls(
            arch=arch,
            name=meta.text("general.name", ""),
            n_layer=meta.integer(f"{arch}.block_count"),
            n_embd=n_embd,
            n_head=n_head,
            n_kv_head=meta.integer(f"{arch}.attention.head_count_kv", n_head),
            head_dim=head_dim,
            n_ff=meta.integer(f"{arch}.feed_forward_length"),
            n_vocab=_n_vocab(meta, arch),
            n_ctx=meta.integer(f"{arch}.context_length"),
            rope_theta=meta.positive(f"{arch}.rope.freq_base", 10000.0),
            rope_dim=meta.integer(f"{arch}.rope.dimension_count", head_dim),
            rope_pairing=ROPE_PAIRING[arch],
            rms_norm_eps=meta.positive(f"{arch}.attention.layer_norm_rms_epsilon"),
            file_type=meta.integer("general.file_type", least=0) if "general.file_type" in meta.pairs else None,
        )


def _refuse_unsupported(meta: _Metadata, arch: str) -> None:
    """Metadata that changes the arithmetic in a way that we do not implement is refused, never ignored."""
    scaling, factor = meta.text(f"{arch}.rope.scaling.type", "none"), f"{arch}.rope.scaling.factor"
    if scaling != "none" and (factor not in meta.pairs or meta.positive(factor) != 1.0):
        raise UnsupportedModelError(f"{arch}.rope.scaling.type is {scaling!r}", hint="use a model without RoPE scaling")
    if meta.positive(f"{arch}.rope.scale_linear", 1.0) != 1.0:
        raise UnsupportedModelError(f"{arch}.rope.scale_linear is not 1", hint="use a model without RoPE scaling")
    for suffix, values in NEUTRAL.items():
        value = meta.pairs.get(f"{arch}.{suffix}")
        if value is not None and value not in values:
            raise UnsupportedModelError(f"{arch}.{suffix} is {value}", hint="this variant of the architecture cannot be run")
    window = meta.integer(f"{arch}.attention.sliding_window", 0, least=0)
    if 0 < window < meta.integer(f"{arch}.context_length"):
        raise UnsupportedModelError(f"{arch}.attention.sliding_window is {window}", hint="use a model with full attention")
    n_expert = meta.integer(f"{arch}.expert_count", 0, least=0)
    if n_expert:
        raise UnsupportedModelError(f"{arch}.expert_count is {n_expert}: a mixture of experts", hint="use a dense model")


def _head_dim(meta: _Metadata, arch: str, n_embd: int, n_head: int) -> int:
    """The length of a head: its own key, or n_embd / n_head. Kernels read the cache in chunks of 8."""
    key = f"{arch}.attention.key_length"
    if key not in meta.pairs and n_embd % n_head:
        raise ConfigError(
            f"{arch}.embedding_length {n_embd} is no multiple of {arch}.attention.head_count {n_head}",
            hint="convert the model again",
        )
    head_dim = meta.integer(key, n_embd // n_head)
    if head_dim % 8:
        raise UnsupportedModelError(f"heads of {head_dim} dimensions", hint="the kernels need a multiple of 8")
    value_length = meta.integer(f"{arch}.attention.value_length", head_dim)
    if value_length != head_dim:
        raise UnsupportedModelError(
            f"{key} {head_dim} differs from {arch}.attention.value_length {value_length}", hint="they must be equal"
        )
    return head_dim


def _n_vocab(meta: _Metadata, arch: str) -> int:
    """The vocabulary's size: of the token list, which {arch}.vocab_size must not contradict."""
    tokens = meta.pairs.get("tokenizer.ggml.tokens")
    n_token = len(tokens) if isinstance(tokens, list) else None
    n_vocab = meta.integer(f"{arch}.vocab_size", n_token)
    if n_token is not None and n_token != n_vocab:
        raise ConfigError(
            f"{arch}.vocab_size is {n_vocab}, but tokenizer.ggml.tokens holds {n_token}", hint="convert the model again"
        )
    return n_vocab


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """How to run a model. `n_ctx` None: what the model was trained for, as far as memory allows.

    `cache_tokens`: positions of the KV cache, of all sequences together; None: `n_ctx` for each of the `n_seq`.
    `prefill_chunk`: prompt tokens in one replayed recording. `block_size`: KV-cache positions in a block.
    `activations`: "int8" quantizes them before matrix products, "auto" where that is faster. `submit_ms`: about how long one
    submit may run: drivers kill work that takes seconds, and pacing acts between submits. `schedule`: how kernels share work
    over lanes, by default what suits the kind of device (KERNELS: "lane_row" CPUs, "lane_chunk" GPUs).
    """

    device: str | int | None = None
    n_ctx: int | None = None
    activations: Activations = "auto"
    schedule: Schedule = "auto"
    prefill_chunk: int = 64
    n_seq: int = 1
    cache_tokens: int | None = None
    block_size: int = 32
    submit_ms: float = 100.0
    progress: bool = False

    def __post_init__(self) -> None:
        if self.activations not in get_args(Activations):
            raise ConfigError(f"activations is {self.activations!r}", hint="choose auto, f32 or int8")
        if self.schedule not in get_args(Schedule):
            raise ConfigError(f"schedule is {self.schedule!r}", hint="choose auto, lane_row or lane_chunk")
        for name in ("n_ctx", "prefill_chunk", "n_seq", "block_size", "cache_tokens"):
            value = getattr(self, name)
            if value is None and name in ("n_ctx", "cache_tokens"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; expected a positive integer", hint=f"leave {name} out for the default")
        if not (isinstance(self.submit_ms, int | float) and self.submit_ms > 0):
            raise ConfigError(f"submit_ms is {self.submit_ms!r}; expected a number above 0", hint="leave it out for 100")
        if self.block_size not in BLOCK_SIZES:
            known = ", ".join(map(str, BLOCK_SIZES))
            raise ConfigError(f"block_size is {self.block_size}; expected one of {known}", hint="leave it out for 32")
