"""vkllm: run large language models on any Vulkan device from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vkllm.config import ModelConfig, RuntimeConfig
    from vkllm.engine import GenerationResult, LLMEngine, StreamEvent
    from vkllm.sampler import SamplingParams

__version__ = "0.1.0"
__all__ = ["GenerationResult", "LLMEngine", "ModelConfig", "RuntimeConfig", "SamplingParams", "StreamEvent"]

_HOMES = {
    "GenerationResult": "engine",
    "LLMEngine": "engine",
    "StreamEvent": "engine",
    "ModelConfig": "config",
    "RuntimeConfig": "config",
    "SamplingParams": "sampler",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: `import vkllm` costs nothing and needs no Vulkan loader."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"vkllm.{_HOMES[name]}"), name)
