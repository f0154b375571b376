"""Small Hugging Face folders for tests: a sound one, whose every part a test may replace."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPACE = "\u2581"
SPM_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
_PIECES = ("<unk>", "<s>", "</s>", "<0x0A>", SPACE + "a", "ab", SPACE + "ab", SPACE, "a", "b", "c", "cc", "ccc")


def special(i: int, text: str, is_special: bool = True) -> dict[str, Any]:
    return {"id": i, "content": text, "special": is_special, "normalized": False}


def spm_tokenizer() -> dict[str, Any]:
    """A tokenizer.json made from a SentencePiece model of 13 tokens, as transformers writes it."""
    return {
        "added_tokens": [special(i, text) for i, text in enumerate(_PIECES[:3])],
        "normalizer": SPM_NORMALIZER,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": True,
            "vocab": {text: i for i, text in enumerate(_PIECES)},
            "merges": [[SPACE, "a"], ["a", "b"], [SPACE + "a", "b"], [SPACE, "ab"], ["c", "c"], ["cc", "c"], ["c", "cc"]],
        },
    }


def random(shape: tuple[int, ...], seed: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def llama_tensors(config: dict[str, Any] = CONFIG, dtype: str = "float32") -> Tensors:
    """Random weights of the shapes that a Llama configuration gives."""
    n_embd, n_ff, n_vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n_kv = config.get("head_dim", n_embd // config["num_attention_heads"]) * config["num_key_value_heads"]
    n_q = config.get("head_dim", n_embd // config["num_attention_heads"]) * config["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (n_vocab, n_embd), "model.norm.weight": (n_embd,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (n_vocab, n_embd)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}_layernorm.weight": (n_embd,) for norm in ("input", "post_attention")}
        shapes |= {f"{layer}self_attn.{m}_proj.weight": (n, n_embd) for m, n in (("q", n_q), ("k", n_kv), ("v", n_kv))}
        shapes |= {f"{layer}self_attn.o_proj.weight": (n_embd, n_q), f"{layer}mlp.down_proj.weight": (n_embd, n_ff)}
        shapes |= {f"{layer}mlp.{m}_proj.weight": (n_ff, n_embd) for m in ("gate", "up")}
    return {name: random(shape, i, dtype) for i, (name, shape) in enumerate(shapes.items())}


def write_folder(
    folder: Path,
    config: dict[str, Any] | None = None,
    tensors: Tensors | None = None,
    tokenizer: dict[str, Any] | None = None,
    **files: dict[str, Any],
) -> Path:
    """Write a folder; what is None is sound. `files`: further JSON files, by their names without .json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG if config is None else config)
    write_json(folder / "tokenizer.json", spm_tokenizer() if tokenizer is None else tokenizer)
    save_file(llama_tensors() if tensors is None else tensors, folder / "model.safetensors")
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return folder


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def raw_safetensors(header: object, nbytes: int = 0, length: int | None = None) -> bytes:
    """A safetensors file of any header (JSON, or bytes as they are), and `nbytes` bytes of data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(i & 0xFF for i in range(nbytes))


def bf16(values: np.ndarray) -> np.ndarray:
    """f32 cut to bf16, as uint16."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
