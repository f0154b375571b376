"""Small random models of every architecture, made and saved by transformers, which is also the oracle for their logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

N_VOCAB = 300
WINDOW = 24  # shorter than a block of the cache and a chunk of the prefill

BASE: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LONG = [1.0 + 0.25 * i for i in range(12)]  # for rope_dim 24
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

KEPT = ("sliding_window", "pad_token_id")
"""Settings whose None is not the default."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, 3 heads": ("Llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": True}),
    "llama, llama3 rope": ("Llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}),
    "llama, linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral, window": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {}),
    "qwen2, yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "num_hidden_layers": 7, "tie_word_embeddings": True},
    ),
    "phi3, window": ("Phi3", {"sliding_window": WINDOW, "head_dim": None, "hidden_size": 192, "initializer_range": 0.1}),
    "phi3, longrope": (
        "Phi3",
        {
            "head_dim": None,
            "hidden_size": 192,
            "initializer_range": 0.1,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 256,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0 + 0.05 * i for i in range(12)],
                "long_factor": LONG,
                "original_max_position_embeddings": 256,
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "granite": (
        "Granite",
        {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 8.0},
    ),
    "qwen3moe": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True}),
    "qwen3moe, weights as they are": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": False}),
    "gpt-oss": (
        "GptOss",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "initializer_range": 0.08,
            "rope_parameters": YARN | {"rope_theta": 15e4, "factor": 32.0, "truncate": False},
        },
    ),
}


def build(case: str, folder: Path, dtype: str = "float32") -> Callable[[list[int]], np.ndarray]:
    """Save a model of this case into `folder`. Returns: the oracle, which gives f64-summed f32 logits [n_token, n_vocab]."""
    import torch
    import transformers

    family, changes = CASES[case]
    config_class = getattr(transformers, f"{family}{'Text' if family == 'Gemma3' else ''}Config")
    settings = {key: value for key, value in (BASE | changes).items() if value is not None or key in KEPT}
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**settings, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:  # norms, biases and sinks that do something
                p.uniform_(-0.5, 0.5)
                if name.endswith("norm.weight") and "Gemma" not in family:
                    p.add_(1.0)
            elif "experts" in name or "router" in name:
                p.normal_(0.0, settings["initializer_range"])
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    save_tokenizer(folder)
    model = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    def logits(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(model(torch.tensor([ids])).logits[0].numpy())

    return logits


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of N_VOCAB tokens without merges."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [*map(chr, printable), *(chr(0x100 + i) for i in range(256 - len(printable)))]
    special = ["<|begin|>", "<|end|>"]
    vocabulary = {token: i for i, token in enumerate(special + letters)}
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [
        {"id": i, "content": s, "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for i, s in enumerate(special)
    ]
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": False, "unk_token": None}
    whole = {"version": "1.0", "added_tokens": added, "pre_tokenizer": split, "decoder": split, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|begin|>", "eos_token": "<|end|>"}))
