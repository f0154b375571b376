"""config.json to GGUF's metadata: the keys and values that llama.cpp's convert_hf_to_gguf.py writes.

What changes the arithmetic and has no key there is written under the key that GGUF has for it (Mistral's and Qwen's sliding
windows, Gemma's query scale, unusual layer patterns), or refused.

Source: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py and transformers' configuration classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vkllm.errors import ConfigError, UnsupportedModelError
from vkllm.files.huggingface.architectures import ARCHITECTURES, Architecture
from vkllm.files.huggingface.json_file import Fields

MAX_LAYERS = 4096
SWIGLU_LIMIT = 7.0  # the clamp of gpt-oss's experts: GGUF has no key for it, so it is always this one


class HFConfig:
    """A checked config.json. `fields`: its entries, of the text part where there are others, with the architecture's defaults."""

    def __init__(self, pairs: Mapping[str, Any]) -> None:
        """Raises: UnsupportedModelError: an unknown architecture or variant; ConfigError: a key is missing or of a wrong type."""
        names = [str(name) for name in Fields(pairs, "config.json").items("architectures")]
        if len(names) != 1 or names[0] not in ARCHITECTURES:
            found = ", ".join(names)[:120] or "none"
            raise UnsupportedModelError(
                f"config.json: architecture {found} is not supported", hint=f"supported: {', '.join(ARCHITECTURES)}"
            )
        self.hf_name: str = names[0]
        self.arch: Architecture = ARCHITECTURES[self.hf_name]
        own = {k: v for k, v in pairs.items() if v is not None}
        text = {k: v for k, v in Fields(pairs, "config.json").fields("text_config").pairs.items() if v is not None}
        self.fields = f = Fields({**self.arch.defaults, **own, **text}, "config.json")
        self.n_layer, self.n_embd = f.integer("num_hidden_layers", most=MAX_LAYERS), f.integer("hidden_size")
        self.n_head = f.integer("num_attention_heads")
        self.n_kv_head = f.integer("num_key_value_heads", self.n_head)
        if not f.has("head_dim") and self.n_embd % self.n_head:
            raise ConfigError(
                f"config.json: hidden_size {self.n_embd} is no multiple of num_attention_heads {self.n_head}",
                hint="correct config.json, or give it a head_dim",
            )
        self.head_dim = f.integer("head_dim", self.n_embd // self.n_head)
        if self.head_dim % 2:
            raise ConfigError(f"config.json: head_dim is {self.head_dim}; expected an even number", hint="correct config.json")
        self.n_ff, self.n_vocab = f.integer("intermediate_size"), f.integer("vocab_size")
        self.n_ctx = f.integer("max_position_embeddings")
        self.n_expert = _first(f, ("num_local_experts", "num_experts")) if self.arch.experts else 0
        self.n_ff_expert = f.integer("moe_intermediate_size", self.n_ff) if self.arch.experts else 0
        self.tied = f.flag("tie_word_embeddings", self.arch.tied)
        _refuse_variants(self)

    def metadata(self) -> dict[str, object]:
        """The model's part of the metadata: everything but `general.*` and the tokenizer."""
        pairs = {f"{self.arch.name}.{k}": float(np.float32(v)) if isinstance(v, float) else v for k, v in _pairs(self)}
        return {"general.architecture": self.arch.name} | pairs

    def rope_tensors(self) -> dict[str, NDArray[np.float32]]:
        """The tensors that RoPE scaling needs: factors by which each pair's wavelength is stretched, f32 [rope_dim / 2]."""
        rope = self.rope()
        if rope.text("rope_type", "default") == "llama3":
            return {"rope_freqs.weight": _llama3_factors(self, rope)}
        if rope.text("rope_type", "default") in ("longrope", "su"):
            return {f"rope_factors_{kind}.weight": _longrope_factors(self, rope, kind) for kind in ("long", "short")}
        return {}

    @property
    def rope_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        partial = self.rope().number("partial_rotary_factor", 1.0)
        return int(partial * self.head_dim)

    def rope(self, layers: str = "full_attention") -> Fields:
        """RoPE's parameters for a kind of layer: `rope_parameters` (transformers 5), or `rope_scaling` and single entries."""
        f = self.fields
        given = dict(f.fields("rope_parameters").pairs or f.fields("rope_scaling").pairs)
        if isinstance(given.get(layers), dict):
            return Fields({"rope_theta": 1e4, **_named(given[layers])}, f"config.json: rope_parameters: {layers}")
        if layers == "sliding_attention":
            return Fields(
                {"rope_theta": f.number("rope_local_base_freq")} if f.has("rope_local_base_freq") else {}, "config.json"
            )
        single = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
        return Fields({k: f.pairs[k] for k in single if f.has(k)} | _named(given), "config.json: rope_parameters")


def _named(rope: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE parameters without nulls, the type under its newer name."""
    given = {k: v for k, v in rope.items() if v is not None}
    return given | {"rope_type": given.get("rope_type", given.get("type", "default"))}


def _first(fields: Fields, keys: tuple[str, ...]) -> int:
    """The integer under the first key that is there."""
    return fields.integer(next((k for k in keys if fields.has(k)), keys[0]))


def _refuse_variants(config: HFConfig) -> None:
    """What the graph of this architecture does not compute is refused by name."""
    f, arch = config.fields, config.arch
    act = f.text(arch.activation_key, arch.activations[0])
    if act not in arch.activations:
        raise _unsupported(config, f"{arch.activation_key} {act!r}", f"it computes {arch.activations[0]}")
    quantization = f.fields("quantization_config").pairs
    method = quantization.get("quant_method", "unknown") if quantization else None
    if method is not None and not (method == "mxfp4" and arch.name == "gpt-oss"):
        raise _unsupported(config, f"weights quantized by {method}", "download the original weights, or a GGUF file")
    if f.flag("use_bidirectional_attention", False) or not f.flag("is_causal", True):
        raise _unsupported(config, "attention that is not causal", "use a text generation model")
    if arch.name == "gpt-oss" and f.number("swiglu_limit", SWIGLU_LIMIT) != SWIGLU_LIMIT:
        raise _unsupported(config, f"swiglu_limit {f.number('swiglu_limit')}", f"expected {SWIGLU_LIMIT}")
    if arch.name == "qwen3moe" and (f.integer("decoder_sparse_step", 1) != 1 or f.items("mlp_only_layers")):
        raise _unsupported(config, "layers without experts (decoder_sparse_step, mlp_only_layers)", "use a model without them")
    if arch.name != "phi3" and config.rope_dim != config.head_dim:
        raise _unsupported(config, f"partial_rotary_factor {config.rope().number('partial_rotary_factor')}", "expected 1")


def _unsupported(config: HFConfig, what: str, hint: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"config.json: {config.hf_name} with {what} is not supported", hint=hint)


def _pairs(config: HFConfig) -> Iterator[tuple[str, object]]:
    """The metadata without the architecture's prefix."""
    f, arch = config.fields, config.arch
    yield "block_count", config.n_layer
    yield "context_length", config.n_ctx
    yield "embedding_length", config.n_embd
    yield "feed_forward_length", config.n_ff
    yield "attention.head_count", config.n_head
    yield "attention.head_count_kv", config.n_kv_head
    yield "attention.layer_norm_rms_epsilon", f.positive("rms_norm_eps")
    yield "vocab_size", config.n_vocab
    if f.has("head_dim"):
        yield "attention.key_length", config.head_dim
        yield "attention.value_length", config.head_dim
    if arch.name in ("llama", "granite", "phi3"):
        yield "rope.dimension_count", config.rope_dim
    yield from _rope_pairs(config)
    yield from _window_pairs(config)
    yield from _scale_pairs(config)
    if arch.experts:
        yield "expert_count", config.n_expert
        yield "expert_used_count", _first(f, ("num_experts_per_tok", "experts_per_token"))
        yield "expert_feed_forward_length", config.n_ff_expert
        if arch.name == "qwen3moe" and not f.flag("norm_topk_prob", False):
            yield "expert_weights_norm", False


def _scale_pairs(config: HFConfig) -> Iterator[tuple[str, object]]:
    """Factors and caps of embeddings, attention, residuals and logits."""
    f, arch = config.fields, config.arch
    if arch.name == "granite":
        for theirs, ours in GRANITE_SCALES.items():
            if f.has(theirs):
                yield ours, f.number(theirs)
    if arch.name.startswith("gemma"):
        query = f.positive("query_pre_attn_scalar")
        if query != config.head_dim:
            yield "attention.scale", query**-0.5
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if f.has(key):
                yield key, f.number(key)


GRANITE_SCALES = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def _window_pairs(config: HFConfig) -> Iterator[tuple[str, object]]:
    """The sliding window, and which layers have it where that is not the architecture's custom."""
    f, arch = config.fields, config.arch
    if arch.name == "phi3":
        yield "attention.sliding_window", f.integer("sliding_window", 0, least=0)
        return
    asked = f.flag("use_sliding_window", False) if arch.name.startswith("qwen") else config.hf_name != "LlamaForCausalLM"
    if arch.name == "granite" or not asked or not f.has("sliding_window"):
        return
    local = _local_layers(config)
    if any(local):
        yield "attention.sliding_window", f.integer("sliding_window")
        every = arch.global_every
        if local != [not every or (i + 1) % every != 0 for i in range(config.n_layer)]:
            yield "attention.sliding_window_pattern", local


def _local_layers(config: HFConfig) -> list[bool]:
    """Of each layer: has it a window?"""
    f, n_layer = config.fields, config.n_layer
    if f.has("layer_types"):
        kinds = [str(kind) for kind in f.items("layer_types")]
        if len(kinds) != n_layer or not {*kinds} <= {"full_attention", "sliding_attention"}:
            raise ConfigError(
                f"config.json: layer_types does not say full_attention or sliding_attention for each of {n_layer} layers",
                hint="correct config.json",
            )
        return [kind == "sliding_attention" for kind in kinds]
    if config.arch.name in ("qwen2", "qwen3"):
        return [i >= f.integer("max_window_layers", 28, least=0) for i in range(n_layer)]
    every = f.integer("sliding_window_pattern", config.arch.global_every, least=0) if config.arch.global_every else 0
    return [not every or (i + 1) % every != 0 for i in range(n_layer)]


def _rope_pairs(config: HFConfig) -> Iterator[tuple[str, object]]:
    """Base and scaling of RoPE."""
    rope, local = config.rope(), config.rope("sliding_attention")
    yield "rope.freq_base", rope.positive("rope_theta", 1e4)
    if local.has("rope_theta"):
        if local.text("rope_type", "default") != "default":
            raise _unsupported(config, "scaled RoPE in layers with a window", "use a model without")
        yield "rope.freq_base_swa", local.positive("rope_theta")
    kind = rope.text("rope_type", "default")
    if kind in ("default", "llama3"):  # llama3: a tensor
        return
    if kind == "linear":
        yield "rope.scaling.type", "linear"
        yield "rope.scaling.factor", _factor(rope)
    elif kind == "yarn":
        yield from _yarn_pairs(config, rope)
    elif kind in ("longrope", "su"):
        yield from _longrope_pairs(config, rope)
    else:
        raise _unsupported(config, f"RoPE scaling {kind!r}", "supported: linear, llama3, yarn, longrope")


def _factor(rope: Fields) -> float:
    factor = rope.number("factor")
    if factor < 1:
        raise ConfigError(f"{rope.where}: factor is {factor}; expected 1 or more", hint="correct config.json")
    return factor


def _yarn_pairs(config: HFConfig, rope: Fields) -> Iterator[tuple[str, object]]:
    """YaRN. GGUF's attn_factor multiplies the usual 1 + ln(factor) / 10, Hugging Face's attention_factor takes its place."""
    factor = _factor(rope)
    if rope.has("mscale") or rope.has("mscale_all_dim"):
        raise _unsupported(config, "YaRN with mscale", "use a model without")
    if not rope.flag("truncate", True) and config.arch.name != "gpt-oss":
        raise _unsupported(config, "YaRN with truncate false", "use a model without")
    yield "rope.scaling.type", "yarn"
    yield "rope.scaling.factor", factor
    yield "rope.scaling.original_context_length", rope.integer("original_max_position_embeddings", config.n_ctx)
    for key in ("beta_fast", "beta_slow"):
        if rope.has(key):
            yield f"rope.scaling.yarn_{key}", rope.number(key)
    if rope.has("attention_factor"):
        extra = rope.positive("attention_factor") / (1.0 + 0.1 * math.log(factor))
        if not math.isclose(extra, 1.0, rel_tol=1e-6):
            yield "rope.scaling.attn_factor", extra


def _longrope_pairs(config: HFConfig, rope: Fields) -> Iterator[tuple[str, object]]:
    """LongRoPE: two tables of factors, and one for what attention sees."""
    original = _original_ctx(rope)
    scale = rope.positive("factor", config.n_ctx / original)
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    yield "rope.scaling.type", "longrope"
    yield "rope.scaling.original_context_length", original
    yield "rope.scaling.attn_factor", rope.positive("attention_factor", usual)


def _original_ctx(rope: Fields) -> int:
    return rope.integer("original_max_position_embeddings", least=2)


def _longrope_factors(config: HFConfig, rope: Fields, kind: str) -> NDArray[np.float32]:
    factors = rope.numbers(f"{kind}_factor")
    if len(factors) != config.rope_dim // 2 or min(factors) <= 0:
        raise ConfigError(
            f"{rope.where}: {kind}_factor holds {len(factors)} numbers; expected {config.rope_dim // 2}, all positive",
            hint="correct config.json",
        )
    return np.array(factors, np.float32)


def _llama3_factors(config: HFConfig, rope: Fields) -> NDArray[np.float32]:
    """Long waves are stretched by `factor`, short ones not, those between in proportion.

    In f32, as torch computes them. Source: transformers, modeling_rope_utils.py.
    """
    dim = config.rope_dim
    base, factor = rope.positive("rope_theta", 1e4), _factor(rope)
    low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
    original = _original_ctx(rope)
    if not 0 < low < high:
        raise ConfigError(
            f"{rope.where}: low_freq_factor {low} and high_freq_factor {high} must rise from above 0", hint="correct config.json"
        )
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    wavelengths = np.float32(2 * math.pi) * np.float32(base) ** exponents
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    between = 1 / ((1 - smooth) / np.float32(factor) + smooth)
    stretched = np.where(wavelengths > original / low, np.float32(factor), between)
    return np.where(wavelengths < original / high, np.float32(1), stretched).astype(np.float32)
