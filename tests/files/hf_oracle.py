"""Random small models as Hugging Face folders, and what llama.cpp's converter makes of them.

Not a test: `test_hf_oracle.py` runs it with a Python that has torch, transformers and sentencepiece.
Usage: python hf_oracle.py LLAMA_CPP_SOURCE OUT. Writes OUT/NAME/ and OUT/NAME.gguf for every model of MODELS, OUT/NAME/ and
OUT/NAME.npy for every one of VARIANTS.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [1.0 + i / 4 for i in range(8)],
    "short_factor": [1.0 + i / 16 for i in range(8)],
    "original_max_position_embeddings": 64,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "float32", {"attention_bias": True}),
    "llama3": ("Llama", "bfloat16", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_linear": ("Llama", "float16", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "mistral": ("Mistral", "bfloat16", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("Qwen2", "bfloat16", {"tie_word_embeddings": True}),
    "qwen2_yarn": ("Qwen2", "float32", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", "bfloat16", {"head_dim": 32}),
    "gemma2": ("Gemma2", "bfloat16", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 4}),
    "gemma3": (
        "Gemma3",
        "float32",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "num_hidden_layers": 7,
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
    "phi3": ("Phi3", "bfloat16", {"rope_parameters": LONG, "original_max_position_embeddings": 64, "sliding_window": 32}),
    "granite": (
        "Granite",
        "bfloat16",
        {"attention_multiplier": 0.1, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
    ),
    "qwen3moe": (
        "Qwen3Moe",
        "bfloat16",
        {"head_dim": 32, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
    "gptoss": (
        "GptOss",
        "bfloat16",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "intermediate_size": 64},
    ),
}
"""NAME: the prefix of transformers' classes, the type of the weights, and what its configuration has beside SMALL."""

_GEMMA2 = MODELS["gemma2"][2]
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral_window": ("Mistral", "float32", {"sliding_window": 8}),
    "gemma2_scale": ("Gemma2", "float32", _GEMMA2 | {"query_pre_attn_scalar": 64}),
    "gemma2_layers": ("Gemma2", "float32", _GEMMA2 | {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}),
    "qwen3moe_unnormed": ("Qwen3Moe", "float32", MODELS["qwen3moe"][2] | {"norm_topk_prob": False}),
    "qwen2_yarn_factor": ("Qwen2", "float32", {"rope_parameters": YARN | {"attention_factor": 1.5}}),
}
"""Models of which the converter drops something that changes the result: transformers' logits are the oracle instead."""
TOKENS = [(i * 37 + 11) % 300 for i in range(48)]


def save_model(name: str, out: Path) -> None:
    """A random model, its norms and biases away from 1 and 0, in a folder (two shards for qwen2)."""
    import torch
    import transformers

    prefix, dtype, extra = (MODELS | VARIANTS)[name]
    config_class = getattr(transformers, f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config_class(**SMALL | extra)).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out, max_shard_size="40KB" if name == "qwen2" else "1GB")
    if name in BYTE_LEVEL:
        byte_level_files(out, BYTE_LEVEL[name])
    else:
        sentencepiece_files(out)


def save_mxfp4(source: Path, out: Path) -> None:
    """gpt-oss as its checkpoint is: the experts of `source` in MXFP4 blocks and scales (of random bits)."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        n_expert, n_col, n_row = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (n_expert, n_row, n_col // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(110, 130, (n_expert, n_row, n_col // 32), dtype=torch.uint8)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (out / "config.json").write_text(json.dumps(config))


def byte_level_files(out: Path, expression: str) -> None:
    """A byte-level BPE of 300 tokens that cuts words as `expression` says, begins with <s>, and has two ends."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([f"the {w} of a {w} is not the {w}er" for w in WORDS] * 5, trainer)
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), frame()])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.add_tokens(["<turn>"])
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(out)


def frame() -> Any:
    """The post-processor that puts <s> first."""
    from tokenizers import processors

    return processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])


def sentencepiece_files(out: Path) -> None:
    """A SentencePiece BPE of 320 tokens, as tokenizer.model and as the tokenizer.json that transformers makes of it."""
    import sentencepiece
    import transformers

    text = out.parent / "text.txt"
    model = out.parent / "spm"
    if not text.exists():
        text.write_text("\n".join(f"the {w} of a {w} is not the {w}er of {w}s, or {i}" for i in range(400) for w in WORDS))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(model), vocab_size=310, model_type="bpe", byte_fallback=True,
            num_threads=1, minloglevel=2, pad_id=-1, add_dummy_prefix=True, normalization_rule_name="identity",
        )  # fmt: skip
    shutil.copy(model.with_suffix(".model"), out / "tokenizer.model")
    tokenizer = transformers.LlamaTokenizerFast.from_pretrained(out)
    tokenizer.add_tokens(["<turn>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.backend_tokenizer.post_processor = frame()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(out)


MODERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTE_LEVEL = {"llama3": MODERN % "{1,3}", "qwen3": MODERN % "", "qwen3moe": MODERN % "", "gptoss": MODERN % "{1,3}"}
PRE = {"llama3": "llama-bpe", "qwen3": "qwen2", "qwen3moe": "qwen2", "gptoss": "llama-bpe", "gptoss_mxfp4": "llama-bpe"}


def save_logits(folder: Path) -> None:
    """transformers' logits of TOKENS, f32 [48, n_vocab], in FOLDER.npy."""
    import numpy as np
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().float()
    with torch.no_grad():
        np.save(folder.with_suffix(".npy"), model(torch.tensor([TOKENS])).logits[0].numpy())


WORDS = ("cat", "house", "river", "stone", "bird", "winter", "light", "garden", "boat", "mountain", "cloud", "song")


def convert(source: Path, folder: Path) -> None:
    """Run llama.cpp's converter in this process."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import gguf
    import torch
    from conversion import ModelBase, get_model_class

    raw = json.loads((folder / "config.json").read_text())
    kinds = {
        "float32": gguf.LlamaFileType.ALL_F32,
        "float16": gguf.LlamaFileType.MOSTLY_F16,
        "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    }
    with torch.inference_mode():
        hparams = ModelBase.load_hparams(folder, False)
        cls = get_model_class(raw["architectures"][0])
        cls.get_vocab_base_pre = lambda *_: PRE[folder.name]  # it knows vocabularies by their hash
        ftype = kinds[raw.get("dtype", raw.get("torch_dtype"))]
        cls(folder, ftype, folder.with_suffix(".gguf"), eager=True, hparams=hparams).write()


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    for name in (*MODELS, *VARIANTS):
        (out / name).mkdir(parents=True)
        save_model(name, out / name)
    save_mxfp4(out / "gptoss", out / "gptoss_mxfp4")
    for name in VARIANTS:
        save_logits(out / name)
    for name in (*MODELS, "gptoss_mxfp4"):
        convert(source, out / name)


if __name__ == "__main__":
    main()
