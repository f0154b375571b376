"""config.json to GGUF's metadata, and the variants that are refused. The values are those of llama.cpp's converter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hf_folders import CONFIG

from vkllm.errors import ConfigError, UnsupportedModelError, VkllmError
from vkllm.files.huggingface.config import HFConfig

QWEN3MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "num_local_experts": 4,
    "experts_per_token": 2,
    "sliding_window": 16,
    "swiglu_limit": 7.0,
    "num_hidden_layers": 4,
}
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "num_hidden_layers": 4,
    "tie_word_embeddings": True,
}
GEMMA3 = GEMMA2 | {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 7, "attn_logit_softcapping": None}
PHI3 = {"architectures": ["Phi3ForCausalLM"], "sliding_window": None, "original_max_position_embeddings": 16}
LONG = {"type": "longrope", "long_factor": [1.0, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.1, 1.2, 1.3]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}


def config(**changes: Any) -> HFConfig:
    return HFConfig(CONFIG | changes)


def metadata(**changes: Any) -> dict[str, Any]:
    """The metadata without its prefix."""
    pairs = config(**changes).metadata()
    prefix = f"{pairs.pop('general.architecture')}."
    return {key.removeprefix(prefix): value for key, value in pairs.items()}


def f32(value: float) -> float:
    return float(np.float32(value))


def test_llama() -> None:
    assert config().metadata() == {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 16,
        "llama.feed_forward_length": 24,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
        "llama.vocab_size": 24,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
    }


EXPECTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "head_dim": ({"head_dim": 32}, {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32}),
    "llama has no window": ({"sliding_window": 8}, {"attention.sliding_window": None}),
    "mistral's window": ({"architectures": ["MistralForCausalLM"], "sliding_window": 8}, {"attention.sliding_window": 8}),
    "rope_parameters": (
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope.freq_base": 5e5},
    ),
    "linear": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0, "rope.freq_base": 10000.0},
    ),
    "yarn": (
        QWEN2 | {"rope_scaling": YARN | {"beta_fast": 30, "beta_slow": 2}},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_beta_fast": 30.0,
            "rope.scaling.yarn_beta_slow": 2.0,
            "rope.scaling.attn_factor": None,
        },
    ),
    "yarn's own attention factor": (
        QWEN2 | {"rope_scaling": YARN | {"attention_factor": 2.0}},
        {"rope.scaling.attn_factor": f32(2.0 / (1 + 0.1 * math.log(4.0)))},
    ),
    "yarn's usual attention factor": (
        QWEN2 | {"rope_scaling": YARN | {"attention_factor": 1 + 0.1 * math.log(4.0)}},
        {"rope.scaling.attn_factor": None},
    ),
    "longrope": (
        PHI3 | {"rope_scaling": LONG},
        {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": 16,
            "rope.scaling.attn_factor": f32(math.sqrt(1 + math.log(4) / math.log(16))),
            "rope.dimension_count": 8,
            "attention.sliding_window": 0,
        },
    ),
    "partial rotation": (PHI3 | {"partial_rotary_factor": 0.5}, {"rope.dimension_count": 4, "attention.key_length": None}),
    "qwen's window is off": (QWEN2 | {"sliding_window": 8, "use_sliding_window": False}, {"attention.sliding_window": None}),
    "qwen's window of late layers": (
        QWEN2 | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 3},
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": [False, True, True]},
    ),
    "qwen3moe": (
        QWEN3MOE,
        {
            "expert_count": 8,
            "expert_used_count": 2,
            "expert_feed_forward_length": 12,
            "feed_forward_length": 24,
            "expert_weights_norm": None,
        },
    ),
    "qwen3moe without norm": (QWEN3MOE | {"norm_topk_prob": False}, {"expert_weights_norm": False}),
    "gpt-oss": (
        GPT_OSS,
        {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 24,
            "attention.sliding_window": 16,
            "attention.sliding_window_pattern": None,
        },
    ),
    "gemma2": (
        GEMMA2,
        {
            "attention.key_length": 8,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "attention.sliding_window": 16,
            "attention.sliding_window_pattern": None,
            "attention.scale": None,
        },
    ),
    "gemma2 27b's scale": (GEMMA2 | {"query_pre_attn_scalar": 16}, {"attention.scale": 0.25}),
    "unusual layers": (
        GEMMA2 | {"layer_types": ["full_attention", "sliding_attention"] * 2},
        {"attention.sliding_window_pattern": [False, True, False, True]},
    ),
    "usual layers": (
        GEMMA2 | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        {"attention.sliding_window_pattern": None},
    ),
    "no local layer": (GEMMA2 | {"layer_types": ["full_attention"] * 4}, {"attention.sliding_window": None}),
    "gemma3 of transformers 4": (
        GEMMA3 | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": 1e4,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
            "attn_logit_softcapping": None,
            "attention.sliding_window": 16,
            "attention.sliding_window_pattern": None,
        },
    ),
    "gemma3 of transformers 5": (
        GEMMA3
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 2e6},
                "sliding_attention": {"rope_theta": 3e4},
            }
        },
        {"rope.freq_base": 2e6, "rope.freq_base_swa": 3e4, "rope.scaling.type": None},
    ),
    "gemma3 with pictures": (
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "num_attention_heads": None,
            "num_key_value_heads": None,
            "vocab_size": None,
            "text_config": {"hidden_size": 32, "num_hidden_layers": 7, "sliding_window": 16},
        },
        {
            "embedding_length": 32,
            "attention.head_count": 8,
            "attention.head_count_kv": 4,
            "attention.key_length": 256,
            "vocab_size": 262208,
            "rope.freq_base_swa": 1e4,
        },
    ),
    "granite": (
        {
            "architectures": ["GraniteForCausalLM"],
            "attention_multiplier": 0.5,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.25,
            "logits_scaling": 8.0,
        },
        {"attention.scale": 0.5, "embedding_scale": 12.0, "residual_scale": 0.25, "logit_scale": 8.0},
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_keys_of_each_architecture(name: str) -> None:
    changes, expected = EXPECTED[name]
    found = metadata(**changes)
    assert {key: found.get(key) for key in expected} == expected


REFUSED: dict[str, tuple[dict[str, Any], type[VkllmError], str]] = {
    "no architecture": ({"architectures": None}, UnsupportedModelError, "architecture none"),
    "unknown": ({"architectures": ["MambaForCausalLM"]}, UnsupportedModelError, "MambaForCausalLM is not supported"),
    "two": ({"architectures": ["LlamaForCausalLM"] * 2}, UnsupportedModelError, "not supported"),
    "no string": ({"architectures": [["x"]]}, UnsupportedModelError, "not supported"),
    "architectures no list": ({"architectures": "LlamaForCausalLM"}, ConfigError, "expected a list"),
    "activation": ({"hidden_act": "relu2"}, UnsupportedModelError, "hidden_act 'relu2'"),
    "gemma's activation": (GEMMA2 | {"hidden_activation": "silu"}, UnsupportedModelError, "hidden_activation 'silu'"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError, "quantized by gptq"),
    "mxfp4 elsewhere": ({"quantization_config": {"quant_method": "mxfp4"}}, UnsupportedModelError, "quantized by mxfp4"),
    "bidirectional": (GEMMA3 | {"use_bidirectional_attention": True}, UnsupportedModelError, "not causal"),
    "dynamic rope": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, UnsupportedModelError, "RoPE scaling 'dynamic'"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, UnsupportedModelError, "partial_rotary_factor 0.5"),
    "yarn mscale": ({"rope_scaling": YARN | {"mscale": 1.0}}, UnsupportedModelError, "mscale"),
    "yarn truncate": ({"rope_scaling": YARN | {"truncate": False}}, UnsupportedModelError, "truncate"),
    "swiglu limit": (GPT_OSS | {"swiglu_limit": 5.0}, UnsupportedModelError, "swiglu_limit 5.0"),
    "sparse layers": (QWEN3MOE | {"decoder_sparse_step": 2}, UnsupportedModelError, "layers without experts"),
    "dense layers": (QWEN3MOE | {"mlp_only_layers": [0]}, UnsupportedModelError, "layers without experts"),
    "missing": ({"hidden_size": None}, ConfigError, "lacks hidden_size"),
    "wrong type": ({"hidden_size": "16"}, ConfigError, "hidden_size is '16'; expected an integer"),
    "boolean": ({"hidden_size": True}, ConfigError, "expected an integer"),
    "zero": ({"num_attention_heads": 0}, ConfigError, "expected 1 to"),
    "layer bomb": ({"num_hidden_layers": 2_000_000_000}, ConfigError, "expected 1 to 4096"),
    "endless": ({"hidden_size": 10**300}, ConfigError, "expected 1 to"),
    "no multiple": ({"num_attention_heads": 3}, ConfigError, "no multiple"),
    "odd head": ({"head_dim": 7}, ConfigError, "even number"),
    "not a number": ({"rms_norm_eps": math.nan}, ConfigError, "rms_norm_eps is nan"),
    "infinite": ({"rope_theta": math.inf}, ConfigError, "rope_theta is inf"),
    "zero epsilon": ({"rms_norm_eps": 0}, ConfigError, "above 0"),
    "huge number": ({"rms_norm_eps": 10**400}, ConfigError, "rms_norm_eps"),
    "small factor": ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ConfigError, "factor is 0.5"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, ConfigError, "lacks factor"),
    "rope no object": ({"rope_scaling": [1]}, ConfigError, "expected an object"),
    "short layer_types": (GEMMA2 | {"layer_types": ["full_attention"]}, ConfigError, "layer_types"),
    "strange layer_types": (GEMMA2 | {"layer_types": [{}] * 4}, ConfigError, "layer_types"),
    "tied no flag": ({"tie_word_embeddings": "yes"}, ConfigError, "true or false"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_is_refused_by_name(name: str) -> None:
    changes, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message) as error:
        config(**changes).metadata()
    assert error.value.hint


def test_llama3_factors() -> None:
    """Of transformers' published formula, in float64: short waves stay, long ones stretch, between them a mixture."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    found = config(head_dim=64, rope_scaling=rope | {"original_max_position_embeddings": 256}).rope_tensors()["rope_freqs.weight"]
    expected = []
    for i in range(32):
        wave = 2 * math.pi * 10000.0 ** (2 * i / 64)
        smooth = (256 / wave - 1) / 3
        expected.append(1.0 if wave < 64 else 8.0 if wave > 256 else 1 / ((1 - smooth) / 8 + smooth))
    assert found.dtype == np.float32 and found == pytest.approx(expected, rel=1e-5)
    assert {1.0, 8.0} < {*found.tolist()} and len({*found.tolist()}) > 3


def test_longrope_factors() -> None:
    tensors = config(**PHI3, rope_scaling=LONG).rope_tensors()
    assert tensors["rope_factors_long.weight"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert tensors["rope_factors_short.weight"] == pytest.approx([1.0, 1.1, 1.2, 1.3])
    for bad in ([1.0], [1.0, 2.0, 3.0, 0.0], [1, 2, 3, "4"], [1, 2, 3, math.nan]):
        with pytest.raises(ConfigError, match="long_factor"):
            config(**PHI3, rope_scaling=LONG | {"long_factor": bad}).rope_tensors()
    with pytest.raises(ConfigError, match="must rise"):
        rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}
        config(rope_scaling=rope | {"original_max_position_embeddings": 256}).rope_tensors()
