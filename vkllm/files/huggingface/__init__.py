"""Hugging Face folders: safetensors, config.json and tokenizer.json, presented under GGUF's names."""

from __future__ import annotations

from vkllm.files.huggingface.folder import HuggingFaceFolder

__all__ = ["HuggingFaceFolder"]
