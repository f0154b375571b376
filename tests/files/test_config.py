"""ModelConfig from metadata: what is read, what is refused, and by which name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vkllm.config import ModelConfig, RopeScaling, RuntimeConfig
from vkllm.errors import ConfigError, UnsupportedModelError
from vkllm.files import GGUFFile

REQUIRED = ("block_count", "embedding_length", "feed_forward_length", "context_length", "attention.head_count")


@dataclass
class Fake:
    metadata: dict[str, object]


def metadata(arch: str = "llama", **changes: Any) -> Fake:
    values: dict[str, object] = {
        "block_count": 2,
        "embedding_length": 64,
        "feed_forward_length": 172,
        "context_length": 512,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": 100,
    }
    pairs = {f"{arch}.{k}": v for k, v in values.items()} | {"general.architecture": arch}
    pairs |= {(k if "." in k and k.split(".")[0] in ("general", "tokenizer") else f"{arch}.{k}"): v for k, v in changes.items()}
    return Fake({k: v for k, v in pairs.items() if v is not None})


def test_defaults() -> None:
    c = ModelConfig.from_gguf(metadata())
    assert (c.head_dim, c.rope_dim, c.rope_theta, c.rope_pairing, c.name, c.file_type) == (8, 8, 10000.0, "interleaved", "", None)
    unscaled = {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}
    neutral = {"attention.causal": True, "attention.sliding_window": 512, "logit_scale": 1.0, "attention.clamp_kqv": 0.0}
    assert ModelConfig.from_gguf(metadata(**unscaled, **neutral)) == c
    assert ModelConfig.from_gguf(metadata("qwen2")).rope_pairing == "half"
    assert ModelConfig.from_gguf(metadata(**{"attention.head_count_kv": None})).n_kv_head == 8
    assert ModelConfig.from_gguf(metadata(**{"attention.key_length": 16, "attention.value_length": 16})).head_dim == 16


@pytest.mark.parametrize("key", [*REQUIRED, "attention.layer_norm_rms_epsilon", "vocab_size"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"lacks llama.{key}"):
        ModelConfig.from_gguf(metadata(**{key: None}))


@pytest.mark.parametrize("value", [0, -1, 1 << 40, "8", 2.5, True, [1]])
@pytest.mark.parametrize("key", REQUIRED)
def test_a_bad_value_is_named(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"llama.{key}"):
        ModelConfig.from_gguf(metadata(**{key: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.head_count": 7}, "no multiple"),
        ({"attention.head_count_kv": 3}, "n_kv_head 3"),
        ({"rope.dimension_count": 10}, "rope_dim 10"),
        ({"rope.dimension_count": 5}, "rope_dim 5"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "holds 2"),
        ({"rope.freq_base": float("nan")}, "freq_base"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "epsilon"),
    ],
)
def test_contradictions(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_gguf(metadata(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "mamba"),
        ({"rope.scaling.type": "dynamic", "rope.scaling.factor": 4.0}, "dynamic"),
        ({"attention.key_length": 16, "attention.value_length": 8}, "value_length"),
        ({"attention.causal": False}, "causal is False"),
        ({"attention.scale": 0.5}, "attention.scale is 0.5"),
        ({"final_logit_softcapping": 30.0}, "softcapping is 30"),
        ({"residual_scale": 0.22}, "residual_scale is 0.22"),
    ],
)
def test_unsupported_models_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        ModelConfig.from_gguf(metadata(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"expert_count": 8}, "mixture"), ({"attention.sliding_window": 511}, "sliding_window is 511")],
)
def test_what_an_architecture_does_not_have_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        ModelConfig.from_gguf(metadata("qwen2", **changes))


def test_rope_scaling() -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert ModelConfig.from_gguf(metadata(**linear)).rope_scaling == RopeScaling(kind="linear", factor=4.0, n_ctx_original=512)
    assert ModelConfig.from_gguf(metadata(**{"rope.scale_linear": 4.0})).rope_scaling.kind == "linear"
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
    scaling = ModelConfig.from_gguf(metadata(**yarn)).rope_scaling
    assert (scaling.kind, scaling.n_ctx_original) == ("yarn", 128)
    assert scaling.attn_factor == pytest.approx(1.0 + 0.1 * np.log(4.0))
    assert ModelConfig.from_gguf(metadata(**{"rope.scaling.type": "longrope"})).rope_scaling.kind == "longrope"


@pytest.mark.parametrize(
    ("arch", "changes", "windows"),
    [
        ("llama", {}, (0, 0)),
        ("llama", {"attention.sliding_window": 8}, (8, 8)),
        ("llama", {"attention.sliding_window": 512}, (0, 0)),
        ("gemma2", {"attention.sliding_window": 8}, (8, 0)),
        ("gemma2", {}, (0, 0)),
        ("gemma2", {"context_length": 8192}, (4096, 0)),
        ("gemma3", {"attention.sliding_window": 8, "attention.sliding_window_pattern": [False, True]}, (0, 8)),
        ("gemma3", {"attention.sliding_window": 8, "attention.sliding_window_pattern": np.array([False, True])}, (0, 8)),
        ("gpt-oss", {"attention.sliding_window": 8}, (8, 0)),
    ],
)
def test_windows(arch: str, changes: dict[str, object], windows: tuple[int, ...]) -> None:
    c = ModelConfig.from_gguf(metadata(arch, **changes))
    assert (c.window(0), c.window(1)) == windows


def test_a_pattern_of_windows_that_is_too_short() -> None:
    with pytest.raises(ConfigError, match="1 entries for 2 layers"):
        ModelConfig.from_gguf(metadata(**{"attention.sliding_window": 8, "attention.sliding_window_pattern": [True]}))


def test_the_scale_of_the_largest_gemma() -> None:
    """Gemma 2 27B: 46 layers, 32 heads of 128, 4608 wide. Its files have no key for the scale."""
    large = {"block_count": 46, "embedding_length": 4608, "attention.head_count": 32, "attention.key_length": 128}
    large |= {"attention.value_length": 128}
    assert ModelConfig.from_gguf(metadata("gemma2", **large)).attention_scale == pytest.approx(1 / 12)
    assert ModelConfig.from_gguf(metadata("gemma2", **(large | {"attention.scale": 0.5}))).attention_scale == 0.5
    assert ModelConfig.from_gguf(metadata("gemma2", **(large | {"block_count": 42}))).attention_scale is None


def test_experts() -> None:
    keys = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 96}
    c = ModelConfig.from_gguf(metadata("qwen3moe", feed_forward_length=None, **keys))
    assert (c.n_expert, c.n_expert_used, c.n_ff_expert, c.expert_weights_norm) == (8, 2, 96, True)
    with pytest.raises(ConfigError, match="n_expert_used 9 of n_expert 8"):
        ModelConfig.from_gguf(metadata("qwen3moe", **(keys | {"expert_used_count": 9})))


def test_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(UnsupportedModelError) as e:
        ModelConfig.from_gguf(metadata("mamba"))
    assert "llama" in e.value.hint and "qwen2" in e.value.hint


def test_vocabulary_from_the_tokens() -> None:
    assert ModelConfig.from_gguf(metadata(vocab_size=None, **{"tokenizer.ggml.tokens": ["a", "b"]})).n_vocab == 2


def test_real_files(shared_data: Path) -> None:
    with GGUFFile.open(shared_data / "stories260K" / "stories260K-q4_0.gguf") as file:
        c = ModelConfig.from_gguf(file)
    assert (c.n_layer, c.n_embd, c.n_head, c.n_kv_head, c.n_ff, c.n_vocab, c.n_ctx) == (5, 64, 8, 4, 172, 512, 512)


@pytest.mark.parametrize(
    "change",
    [
        *({"n_ctx": n} for n in (0, 2.0)),
        *({"block_size": n} for n in (12, 24, 1024)),
        *({"prefill_chunk": n} for n in (-1, True, 0)),
        *({"submit_ms": ms} for ms in (0.0, float("nan"), "1")),
        {"activations": "f64"},
        {"schedule": "fast"},
        {"cache_type": "q4_0"},
        {"memory_share": 0.0},
        {"n_seq": 0},
    ],
)
def test_runtime_config_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(RuntimeConfig(), **change)
