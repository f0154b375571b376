"""The Hugging Face architectures that we present as GGUF, and how each differs from the others in its files. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SILU = ("silu", "swish")
GELU_TANH = ("gelu_pytorch_tanh", "gelu_new")


@dataclass(frozen=True, slots=True)
class Architecture:
    """`name`: GGUF's. `activations`: what the graph computes, by config.json's names, under `activation_key`.

    `permuted`: the rows of Q and K are reordered, since GGUF's graph turns neighbours and Hugging Face's halves. `norm_shift`: is
    added to the weights of norms. `fused`: Q, K, V and gate, up are one matrix each. `global_every`: the layers without a window
    where the file does not list them. `tied` and `defaults`: what config.json may leave out.
    """

    name: str
    activations: tuple[str, ...] = SILU
    activation_key: str = "hidden_act"
    permuted: bool = False
    norm_shift: float = 0.0
    fused: bool = False
    experts: bool = False
    sinks: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    global_every: int = 0
    tied: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_GEMMA: dict[str, Any] = {
    "activations": GELU_TANH,
    "activation_key": "hidden_activation",
    "norm_shift": 1.0,
    "post_norms": True,
    "tied": True,
}
_GEMMA2_DEFAULTS = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "head_dim": 256}
_GEMMA3_DEFAULTS = _GEMMA2_DEFAULTS | {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}

_LLAMA = Architecture("llama", permuted=True)
_GEMMA3 = Architecture("gemma3", **_GEMMA, qk_norm=True, global_every=6, defaults=_GEMMA3_DEFAULTS)

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3", qk_norm=True),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe", qk_norm=True, experts=True),
    "Gemma2ForCausalLM": Architecture("gemma2", **_GEMMA, global_every=2, defaults=_GEMMA2_DEFAULTS),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,  # its text part
    "Phi3ForCausalLM": Architecture("phi3", fused=True),
    "GraniteForCausalLM": Architecture("granite", permuted=True),
    "GptOssForCausalLM": Architecture("gpt-oss", experts=True, sinks=True, global_every=2),
}
"""By the name in config.json's `architectures`. A new one: a line here, its keys in config.py, a model in vkllm/models."""
