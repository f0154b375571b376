"""What a model is (ModelConfig, from its file) and how to run it (RuntimeConfig, from the user). Both frozen and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np

from vkllm.errors import ConfigError, UnsupportedModelError

RopePairing = Literal["interleaved", "half"]
RopeScalingKind = Literal["none", "linear", "yarn", "longrope"]
Activations = Literal["auto", "f32", "int8"]
Schedule = Literal["auto", "lane_row", "lane_chunk"]
CacheType = Literal["f16", "q8_0"]
Speculate = Literal["auto", "off"] | int

MAX_DRAFT = 15
MAX_STEPS = 64
"""Most tokens that speculation drafts for a step."""

BLOCK_SIZES = (8, 16, 32, 64, 128, 256, 512)
"""What the attention kernels can divide: they take positions 8 at a time, and split a long context every 512."""

SCALES = frozenset({"embedding_scale", "residual_scale", "logit_scale", "attention.scale"})
SOFTCAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping", "attention.scale"})
WINDOW = frozenset({"attention.sliding_window"})
EXPERTS = frozenset({"expert_count"})


@dataclass(frozen=True, slots=True)
class Traits:
    """What an architecture's metadata means.

    `rope_pairing`: which dimensions RoPE turns together, (2i, 2i+1) or (i, i + rope_dim/2). `honours`: the keys of NEUTRAL,
    WINDOW and EXPERTS that its graph implements. `global_every`: of layers with windows, each of that number sees everything (2:
    every other one; 0: none). `rope_theta_local`: RoPE's base in layers with a window, where it differs. `default_window`: the
    window where the file does not tell. `n_layer_wide`: the model with so many layers scales scores by 1 / sqrt(n_embd / n_head),
    and its GGUF files do not say so.
    """

    rope_pairing: RopePairing
    honours: frozenset[str] = frozenset()
    global_every: int = 0
    rope_theta_local: float | None = None
    default_window: int = 0
    n_layer_wide: int = 0


TRAITS: dict[str, Traits] = {
    "llama": Traits("interleaved", WINDOW | EXPERTS),
    "qwen2": Traits("half"),
    "qwen3": Traits("half"),
    "qwen3moe": Traits("half", EXPERTS),
    "gemma2": Traits("half", SOFTCAPS | WINDOW, global_every=2, default_window=4096, n_layer_wide=46),
    "gemma3": Traits("half", SOFTCAPS | WINDOW, global_every=6, rope_theta_local=10000.0, n_layer_wide=62),
    "phi3": Traits("half", WINDOW),
    "granite": Traits("interleaved", SCALES),
    "gpt-oss": Traits("half", WINDOW | EXPERTS, global_every=2),
}
"""Supported architectures, in GGUF's names. A new one: a line here, and a file in vkllm/models."""

NEUTRAL: dict[str, tuple[float, ...]] = {
    "attention.causal": (1,),
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", "attention.scale"), (0,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (0,)),
    **dict.fromkeys(("logit_scale", "embedding_scale", "residual_scale"), (0, 1)),
}
"""Keys that some models use to change the arithmetic, and the values with which they change nothing."""


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

    def number(self, key: str, default: float) -> float:
        """A positive number; 0 and a missing key are the default."""
        return default if self.pairs.get(key, 0) == 0 else self.positive(key)

    def flag(self, key: str, default: bool) -> bool:
        value = self.pairs.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def _wrong(self, key: str, value: object, expected: str) -> ConfigError:
        if key not in self.pairs:
            return ConfigError(f"the metadata lacks {key}", hint="the file is incomplete: convert the model again")
        return ConfigError(f"{key} is of type {type(value).__name__}; expected {expected}", hint="convert the model again")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How RoPE's frequencies were stretched beyond the context of the first training, `n_ctx_original`.

    `linear`: all by 1 / factor. `yarn`: slow ones by 1 / factor, fast ones not (arXiv 2309.00071); `truncate`: the limits between
    them are whole pairs. `longrope`: by two tensors in the file, one for contexts up to `n_ctx_original`, one for longer ones
    (arXiv 2402.13753); some files hold them and name no kind. `attn_factor` multiplies what is rotated.
    """

    kind: RopeScalingKind = "none"
    factor: float = 1.0
    n_ctx_original: int = 0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The hyper-parameters of a model, in the names of STYLE section 4. `file_type` is GGUF's general.file_type (or None).

    `sliding_window`: how many positions a token sees in layers with a window, which `window_pattern` tells: all but each layer of
    that number (0: all), or one by one; `rope_theta_local`: RoPE's base there, where it differs. Softcaps are 0 where there is
    none. Embeddings are multiplied by `embedding_scale`, what a layer adds by `residual_scale`, scores by `attention_scale`
    (None: 1 / sqrt(head_dim)); logits are divided by `logit_scale`.
    Experts: `n_expert` (0: dense), of which `n_expert_used` work for a token, each with `n_ff_expert` columns.
    """

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
    rope_scaling: RopeScaling = RopeScaling()
    rope_theta_local: float | None = None
    sliding_window: int = 0
    window_pattern: int | tuple[bool, ...] = 0
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_expert: int = 0
    expert_weights_norm: bool = True

    def __post_init__(self) -> None:
        if self.n_head % self.n_kv_head:
            raise self._contradiction(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")
        if self.rope_dim > self.head_dim or self.rope_dim % 2:
            raise self._contradiction(f"rope_dim {self.rope_dim} must be even and at most head_dim {self.head_dim}")
        if self.n_expert_used > self.n_expert:
            raise self._contradiction(f"n_expert_used {self.n_expert_used} of n_expert {self.n_expert}")

    def window(self, layer: int) -> int:
        """Positions that a token sees in this layer, itself included; 0: all."""
        every = self.window_pattern
        local = every[layer] if isinstance(every, tuple) else not every or layer % every != every - 1
        return self.sliding_window if local else 0

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
        if arch not in TRAITS:
            raise UnsupportedModelError(f"architecture {arch!r} is not supported", hint=f"supported: {', '.join(TRAITS)}")
        traits = TRAITS[arch]
        _refuse_unsupported(meta, arch, traits)
        n_embd, n_head = meta.integer(f"{arch}.embedding_length"), meta.integer(f"{arch}.attention.head_count")
        head_dim, n_layer = _head_dim(meta, arch, n_embd, n_head), meta.integer(f"{arch}.block_count")
        n_expert = meta.integer(f"{arch}.expert_count", 0, least=0)
        n_ff = meta.integer(f"{arch}.feed_forward_length", None if not n_expert else 0, least=0 if n_expert else 1)
        window, wide = _window(meta, arch, traits), n_layer == traits.n_layer_wide
        return cls(
            arch=arch,
            name=meta.text("general.name", ""),
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_kv_head=meta.integer(f"{arch}.attention.head_count_kv", n_head),
            head_dim=head_dim,
            n_ff=n_ff,
            n_vocab=_n_vocab(meta, arch),
            n_ctx=meta.integer(f"{arch}.context_length"),
            rope_theta=meta.positive(f"{arch}.rope.freq_base", 10000.0),
            rope_dim=meta.integer(f"{arch}.rope.dimension_count", head_dim),
            rope_pairing=traits.rope_pairing,
            rms_norm_eps=meta.positive(f"{arch}.attention.layer_norm_rms_epsilon"),
            file_type=meta.integer("general.file_type", least=0) if "general.file_type" in meta.pairs else None,
            rope_scaling=_rope_scaling(meta, arch),
            rope_theta_local=_rope_theta_local(meta, arch, traits) if window else None,
            sliding_window=window,
            window_pattern=_window_pattern(meta, arch, traits, n_layer) if window else 0,
            attn_softcap=meta.number(f"{arch}.attn_logit_softcapping", 0.0),
            final_softcap=meta.number(f"{arch}.final_logit_softcapping", 0.0),
            attention_scale=meta.number(f"{arch}.attention.scale", (n_embd / n_head) ** -0.5 if wide else 0.0) or None,
            embedding_scale=meta.number(f"{arch}.embedding_scale", 1.0),
            residual_scale=meta.number(f"{arch}.residual_scale", 1.0),
            logit_scale=meta.number(f"{arch}.logit_scale", 1.0),
            n_expert=n_expert,
            n_expert_used=meta.integer(f"{arch}.expert_used_count") if n_expert else 0,
            n_ff_expert=meta.integer(f"{arch}.expert_feed_forward_length", n_ff or None) if n_expert else 0,
            expert_weights_norm=meta.flag(f"{arch}.expert_weights_norm", True),
        )


def _refuse_unsupported(meta: _Metadata, arch: str, traits: Traits) -> None:
    """Metadata that changes the arithmetic in a way that we do not implement is refused, never ignored."""
    for suffix, values in NEUTRAL.items():
        value = meta.pairs.get(f"{arch}.{suffix}")
        if value is not None and value not in values and suffix not in traits.honours:
            raise UnsupportedModelError(f"{arch}.{suffix} is {value}", hint="this variant of the architecture cannot be run")
    window = meta.integer(f"{arch}.attention.sliding_window", 0, least=0)
    if 0 < window < meta.integer(f"{arch}.context_length") and not traits.honours >= WINDOW:
        raise UnsupportedModelError(f"{arch}.attention.sliding_window is {window}", hint="use a model with full attention")
    n_expert = meta.integer(f"{arch}.expert_count", 0, least=0)
    if n_expert and not traits.honours >= EXPERTS:
        raise UnsupportedModelError(f"{arch}.expert_count is {n_expert}: a mixture of experts", hint="use a dense model")


def _rope_scaling(meta: _Metadata, arch: str) -> RopeScaling:
    """RoPE scaling from `{arch}.rope.scaling.*`, or the `scale_linear` of old files. A factor of 1 is none, but for longrope,
    whose factors are tensors."""
    kind, prefix = meta.text(f"{arch}.rope.scaling.type", "none"), f"{arch}.rope.scaling"
    factor = meta.number(f"{prefix}.factor", meta.number(f"{arch}.rope.scale_linear", 1.0))
    if kind == "none" and factor != 1.0:
        kind = "linear"
    if kind not in get_args(RopeScalingKind):
        known = ", ".join(get_args(RopeScalingKind))
        raise UnsupportedModelError(f"{prefix}.type is {kind!r}", hint=f"supported: {known}")
    if factor == 1.0 and kind != "longrope":
        kind = "none"
    return RopeScaling(
        kind=kind,  # type: ignore[arg-type]
        factor=factor,
        n_ctx_original=meta.integer(f"{prefix}.original_context_length", meta.integer(f"{arch}.context_length")),
        attn_factor=meta.number(f"{prefix}.attn_factor", 1.0) * (1.0 + 0.1 * math.log(factor) if kind == "yarn" else 1.0),
        beta_fast=meta.number(f"{prefix}.yarn_beta_fast", 32.0),
        beta_slow=meta.number(f"{prefix}.yarn_beta_slow", 1.0),
        truncate=arch != "gpt-oss",  # its authors interpolate between pairs
    )


def _window(meta: _Metadata, arch: str, traits: Traits) -> int:
    """The window of the layers that have one; 0: none, or no shorter than the context."""
    window = meta.integer(f"{arch}.attention.sliding_window", traits.default_window, least=0)
    return window if window < meta.integer(f"{arch}.context_length") else 0


def _window_pattern(meta: _Metadata, arch: str, traits: Traits, n_layer: int) -> int | tuple[bool, ...]:
    key = f"{arch}.attention.sliding_window_pattern"
    pattern = meta.pairs.get(key)
    if not isinstance(pattern, list | np.ndarray):
        return meta.integer(key, traits.global_every, least=0)
    if len(pattern) < n_layer:
        raise ConfigError(f"{key} has {len(pattern)} entries for {n_layer} layers", hint="convert the model again")
    return tuple(bool(local) for local in pattern[:n_layer])


def _rope_theta_local(meta: _Metadata, arch: str, traits: Traits) -> float | None:
    """RoPE's base in layers with a window; None: as in the others."""
    local = meta.number(f"{arch}.rope.freq_base_swa", traits.rope_theta_local or 0.0)
    return local or None


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
    n_token = len(tokens) if isinstance(tokens, Sequence) and not isinstance(tokens, str) else None
    n_vocab = meta.integer(f"{arch}.vocab_size", n_token)
    if n_token is not None and n_token != n_vocab:
        raise ConfigError(
            f"{arch}.vocab_size is {n_vocab}, but tokenizer.ggml.tokens holds {n_token}", hint="convert the model again"
        )
    return n_vocab


def speculate_of(text: str) -> Speculate:
    """An option's text: "auto", "off" or a number. RuntimeConfig refuses anything else."""
    return int(text) if text.isdecimal() else text  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """How to run a model. `n_ctx` None: what the model was trained for, as far as memory allows.

    `cache_tokens`: positions of the KV cache, of all sequences together; None: `n_ctx` for each of the `n_seq`, or as many as fit
    into `memory_share` of the device's free memory. `cache_type`: how keys and values are kept; "q8_0" takes 9/16 of "f16".
    `prefill_chunk`: prompt tokens in one replayed recording; None: 64 on CPUs, 512 on GPUs. `block_size`: KV-cache positions in
    a block. `activations`: "int8" quantizes them before matrix products, "auto" where that is faster. `submit_ms`: about how long
    one submit may run: drivers kill work that takes seconds, and pacing acts between submits. `schedule`: how kernels share work
    over lanes, by default what suits the kind of device (KERNELS: "lane_row" CPUs, "lane_chunk" GPUs).
    `multi_step`: decode steps in one submit when nobody waits for a token; "auto": 8 on GPUs, 1 on CPUs.
    `persistent`: "auto" does the layers of a single decode step in one dispatch each, on CPUs; "off": an op in one.
    `weight_cache`: keep packed weights on disk, beside the pipelines, so that the next load maps them.
    """

    device: str | int | None = None
    n_ctx: int | None = None
    activations: Activations = "auto"
    cache_type: CacheType = "f16"
    memory_share: float = 0.9
    schedule: Schedule = "auto"
    prefill_chunk: int | None = None
    n_seq: int = 1
    cache_tokens: int | None = None
    block_size: int = 32
    submit_ms: float = 100.0
    speculate: Speculate = "auto"
    multi_step: int | Literal["auto"] = "auto"
    persistent: Literal["auto", "off"] = "auto"
    progress: bool = False
    weight_cache: bool = True

    def __post_init__(self) -> None:
        if self.activations not in get_args(Activations):
            raise ConfigError(f"activations is {self.activations!r}", hint="choose auto, f32 or int8")
        if self.cache_type not in get_args(CacheType):
            raise ConfigError(f"cache_type is {self.cache_type!r}", hint="choose f16 or q8_0")
        if self.speculate not in ("auto", "off", *range(1, MAX_DRAFT + 1)) or isinstance(self.speculate, bool):
            raise ConfigError(f"speculate is {self.speculate!r}", hint=f"choose auto, off or 1 to {MAX_DRAFT} tokens")
        if self.multi_step != "auto" and (self.multi_step not in range(1, MAX_STEPS + 1) or isinstance(self.multi_step, bool)):
            raise ConfigError(f"multi_step is {self.multi_step!r}", hint=f"choose auto, or 1 to {MAX_STEPS} steps")
        if self.persistent not in ("auto", "off"):
            raise ConfigError(f"persistent is {self.persistent!r}", hint="choose auto or off")
        if not 0 < self.memory_share <= 1:
            raise ConfigError(f"memory_share is {self.memory_share!r}; expected a number up to 1", hint="leave it out for 0.9")
        if self.schedule not in get_args(Schedule):
            raise ConfigError(f"schedule is {self.schedule!r}", hint="choose auto, lane_row or lane_chunk")
        for name in ("n_ctx", "prefill_chunk", "n_seq", "block_size", "cache_tokens"):
            value = getattr(self, name)
            if value is None and name in ("n_ctx", "prefill_chunk", "cache_tokens"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; expected a positive integer", hint=f"leave {name} out for the default")
        if not (isinstance(self.submit_ms, int | float) and self.submit_ms > 0):
            raise ConfigError(f"submit_ms is {self.submit_ms!r}; expected a number above 0", hint="leave it out for 100")
        if self.block_size not in BLOCK_SIZES:
            known = ", ".join(map(str, BLOCK_SIZES))
            raise ConfigError(f"block_size is {self.block_size}; expected one of {known}", hint="leave it out for 32")
