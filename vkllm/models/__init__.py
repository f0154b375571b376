"""Architectures: what a file's hyper-parameters mean as a graph. One file an architecture."""

from __future__ import annotations

from collections.abc import Callable, Collection

from vkllm.config import ModelConfig
from vkllm.errors import FileFormatError, UnsupportedModelError
from vkllm.models import gemma, gpt_oss, granite, llama, phi3, qwen2, qwen3
from vkllm.plan import Graph

ARCHITECTURES: dict[str, Callable[[ModelConfig, Collection[str]], Graph]] = {
    "llama": llama.graph,
    "qwen2": qwen2.graph,
    "qwen3": qwen3.graph,
    "qwen3moe": qwen3.graph,
    "gemma2": gemma.graph,
    "gemma3": gemma.graph,
    "phi3": phi3.graph,
    "granite": granite.graph,
    "gpt-oss": gpt_oss.graph,
}


def build_graph(config: ModelConfig, tensors: Collection[str]) -> Graph:
    """The graph of a model.

    Args: tensors: the names that the file holds; they decide what is optional (tied head, biases, rope factors).
    Raises: UnsupportedModelError: an architecture that we do not have; FileFormatError: more layers than tensors.
    """
    if config.n_layer > len(tensors):  # before a graph of a billion layers is built
        raise FileFormatError(
            f"{config.arch}.block_count is {config.n_layer}; the file holds {len(tensors)} tensors",
            hint="the file is damaged: convert the model again",
        )
    try:
        graph = ARCHITECTURES[config.arch]
    except KeyError:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(f"architecture {config.arch!r} is not supported", hint=f"supported: {known}") from None
    return graph(config, tensors)
