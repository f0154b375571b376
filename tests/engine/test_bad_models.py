"""Sound GGUF files that hold no model we can run: each is refused with a typed error, quickly, and nothing stays open.

(Files that are damaged as files are tests/files' business.)
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from random_models import Damage, Metadata, Shape, Tensors, vocabulary, write_model

from vkllm import LLMEngine, RuntimeConfig, SamplingParams
from vkllm import engine as engine_module
from vkllm.chain import ModelChain
from vkllm.errors import (
    ConfigError,
    FileFormatError,
    NonFiniteError,
    OutOfDeviceMemoryError,
    UnsupportedModelError,
    UnsupportedQuantError,
    VkllmError,
)
from vkllm.files import resolve_model
from vkllm.vk import Device, open_device

SMALL = Shape("llama", n_layer=2, n_head=4, n_kv_head=2, head_dim=8, n_ff=96)


def without(*names: str) -> Damage:
    """Tensors or metadata left out."""

    def damage(metadata: Metadata, tensors: Tensors) -> None:
        for name in names:
            (tensors if name in tensors else metadata).pop(name)  # type: ignore[union-attr]

    return damage


def reshaped(name: str, *shape: int) -> Damage:
    """A tensor of another shape."""

    def damage(metadata: Metadata, tensors: Tensors) -> None:
        tensors[name] = (np.ones(shape, np.float32), tensors[name][1])

    return damage


def of_type(kind: str, *names: str) -> Damage:
    """Tensors of another type."""

    def damage(metadata: Metadata, tensors: Tensors) -> None:
        for name in names:
            tensors[name] = (tensors[name][0], kind)

    return damage


def says(**pairs: object) -> Damage:
    """Metadata changed; `__` in a key stands for a dot."""

    def damage(metadata: Metadata, tensors: Tensors) -> None:
        metadata.update({key.replace("__", "."): value for key, value in pairs.items()})

    return damage


WIDE = Shape("llama", n_layer=1, n_head=4, n_kv_head=2, head_dim=64, n_ff=256)  # rows of 256: whole blocks of every type

CASES: dict[str, tuple[Shape, Damage, type[VkllmError], str]] = {
    "no embedding": (SMALL, without("token_embd.weight"), FileFormatError, "token_embd.weight is missing"),
    "no q": (SMALL, without("blk.1.attn_q.weight"), FileFormatError, "blk.1.attn_q.weight is missing"),
    "no norm": (SMALL, without("blk.0.ffn_norm.weight"), FileFormatError, "blk.0.ffn_norm.weight is missing"),
    "no last norm": (SMALL, without("output_norm.weight"), FileFormatError, "output_norm.weight is missing"),
    "no tensors": (SMALL, lambda m, t: t.clear(), FileFormatError, "holds 0 tensors"),
    "a layer too few": (SMALL, says(llama__block_count=3), FileFormatError, r"blk\.2\."),
    "transposed k": (SMALL, reshaped("blk.0.attn_k.weight", 32, 16), FileFormatError, r"attn_k.weight has shape \[32, 16\]"),
    "one column more": (SMALL, reshaped("blk.1.ffn_up.weight", 96, 33), FileFormatError, r"\[96, 33\]; expected \[96, 32\]"),
    "short norm": (SMALL, reshaped("blk.1.attn_norm.weight", 31), FileFormatError, r"attn_norm.weight has shape \[31\]"),
    "norm as matrix": (SMALL, reshaped("blk.1.attn_norm.weight", 1, 32), FileFormatError, r"\[1, 32\]; expected \[32\]"),
    "vector as matrix": (SMALL, reshaped("blk.0.attn_q.weight", 1024), FileFormatError, r"\[1024\]; expected \[32, 32\]"),
    "three dimensions": (SMALL, reshaped("output.weight", 263, 32, 2), FileFormatError, "output.weight has shape"),
    "long rope factors": (
        Shape("llama", head_dim=8, rope_factors=True),
        reshaped("rope_freqs.weight", 5),
        FileFormatError,
        r"rope_freqs.weight has shape \[5\]",
    ),
    "short bias": (Shape("qwen2", bias=True), reshaped("blk.0.attn_v.bias", 15), FileFormatError, "attn_v.bias has shape"),
    "a norm of the heads": (
        SMALL,
        lambda m, t: t.update({"blk.0.attn_q_norm.weight": (np.ones(8, np.float32), "F32")}),
        UnsupportedModelError,
        "blk.0.attn_q_norm.weight has no place in the llama architecture",
    ),
    "a bias of the norm": (
        SMALL,
        lambda m, t: t.update({"output_norm.bias": (np.ones(32, np.float32), "F32")}),
        UnsupportedModelError,
        "output_norm.bias",
    ),
    "F64": (WIDE, of_type("F64", "blk.0.ffn_down.weight"), UnsupportedQuantError, "blk.0.ffn_down.weight is F64"),
    "I32": (WIDE, of_type("I32", "blk.0.attn_k.weight"), UnsupportedQuantError, "blk.0.attn_k.weight is I32"),
    "quantized norm": (SMALL, of_type("Q8_0", "output_norm.weight"), UnsupportedQuantError, "output_norm.weight is Q8_0"),
    "gate unlike up": (SMALL, of_type("F16", "blk.0.ffn_up.weight"), UnsupportedQuantError, "blk.0.ffn_up.weight is F16"),
    "architecture": (SMALL, says(general__architecture="mamba"), UnsupportedModelError, "'mamba'"),
    "experts": (Shape("qwen2"), says(qwen2__expert_count=8), UnsupportedModelError, "expert_count is 8"),
    "rope scaling": (
        SMALL,
        says(llama__rope__scaling__type="dynamic", llama__rope__scaling__factor=4.0),
        UnsupportedModelError,
        "dynamic",
    ),
    "unequal heads": (SMALL, says(llama__attention__value_length=16), UnsupportedModelError, "value_length 16"),
    "head_dim 12": (Shape("llama", head_dim=12), lambda m, t: None, UnsupportedModelError, "heads of 12"),
    "groups": (SMALL, says(llama__attention__head_count_kv=3), ConfigError, "n_kv_head 3"),
    "rope_dim": (SMALL, says(llama__rope__dimension_count=10), ConfigError, "rope_dim 10"),
    "no eps": (SMALL, without("llama.attention.layer_norm_rms_epsilon"), ConfigError, "layer_norm_rms_epsilon"),
    "no layers": (SMALL, says(llama__block_count=0), ConfigError, "block_count is 0"),
    "absurd layers": (SMALL, says(llama__block_count=(1 << 31) - 1), FileFormatError, "block_count is 2147483647"),
    "text for a number": (SMALL, says(llama__embedding_length="32"), ConfigError, "embedding_length is of type str"),
    "vocabulary": (SMALL, says(llama__vocab_size=300), ConfigError, "vocab_size is 300"),
    "wider than its tensors": (SMALL, says(llama__embedding_length=64), FileFormatError, r"expected \[263, 64\]"),
    "no tokenizer": (SMALL, without(*vocabulary("llama")), ConfigError, "vocab_size"),
    "no tokenizer, but its size": (
        SMALL,
        lambda m, t: (without(*vocabulary("llama"))(m, t), says(llama__vocab_size=263)(m, t))[0],
        ConfigError,
        "tokenizer.ggml.model",
    ),
    "no tokenizer model": (SMALL, without("tokenizer.ggml.model"), ConfigError, "tokenizer.ggml.model"),
    "unknown tokenizer": (SMALL, says(tokenizer__ggml__model="rwkv"), UnsupportedModelError, "'rwkv'"),
    "unknown pre-tokenizer": (Shape("qwen2"), says(tokenizer__ggml__pre="of the future"), UnsupportedModelError, "of the future"),
    "types of some tokens": (SMALL, says(tokenizer__ggml__token_type=[1, 2, 3]), ConfigError, "token_type"),
    "EOS outside": (SMALL, says(tokenizer__ggml__eos_token_id=263), ConfigError, "eos_token_id"),
}


@pytest.fixture
def opened(device: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Device]]:
    """The devices that engines open; all must be closed in the end."""
    devices: list[Device] = []

    def remember(selector: str | int | None) -> Device:
        devices.append(open_device(selector))
        return devices[-1]

    monkeypatch.setattr(engine_module, "open_device", remember)
    yield devices
    assert not any(d._closer.alive for d in devices)


def assert_released(path: Path) -> None:
    """The file is neither mapped nor open any more."""
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert str(path) not in {str(p.resolve()) for p in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_model_is_refused(case: str, tmp_path: Path, opened: list[Device]) -> None:
    shape, damage, error, words = CASES[case]
    path = write_model(tmp_path / "bad.gguf", shape, damage)
    with pytest.raises(error, match=words) as caught:
        LLMEngine.init_model(path, RuntimeConfig(n_ctx=64))
    assert type(caught.value) is error
    assert caught.value.hint
    del caught
    assert_released(path)


def test_the_undamaged_model_runs_and_is_released(tmp_path: Path, opened: list[Device]) -> None:
    path = write_model(tmp_path / "good.gguf", SMALL)
    with LLMEngine.init_model(path, RuntimeConfig(n_ctx=64)) as engine:
        greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        assert len(engine.generate_result("an", greedy).token_ids) == 4
    assert len(opened) == 1
    del engine
    assert_released(path)


def test_a_model_that_does_not_fit_is_refused_before_loading(
    tmp_path: Path, opened: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "big.gguf", SMALL)
    monkeypatch.setattr(Device, "memory_budget", lambda self: (10_000, 1 << 30))
    monkeypatch.setattr(ModelChain, "_load", lambda *_: pytest.fail("it began to load"))
    with pytest.raises(OutOfDeviceMemoryError) as caught:
        LLMEngine.init_model(path, RuntimeConfig(n_ctx=64))
    assert caught.value.available == 10_000
    assert caught.value.needed > 10_000
    del caught
    assert_released(path)


def test_a_failure_while_loading_releases_everything(
    tmp_path: Path, opened: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "late.gguf", SMALL)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vkllm.chain.rope_table", fail)
    with pytest.raises(KeyboardInterrupt) as caught:
        LLMEngine.init_model(path, RuntimeConfig(n_ctx=64))
    del caught
    assert_released(path)


def test_an_unknown_device_leaves_no_file_open(tmp_path: Path, device: Device) -> None:
    path = write_model(tmp_path / "good.gguf", SMALL)
    with pytest.raises(VkllmError, match="no such device"):
        LLMEngine.init_model(path, RuntimeConfig(device="no such device"))
    assert_released(path)


def test_weights_that_are_not_finite_name_their_layer(tmp_path: Path, opened: list[Device]) -> None:
    def damage(metadata: Metadata, tensors: Tensors) -> None:
        tensors["blk.1.attn_output.weight"][0][3, 5] = np.nan

    path = write_model(tmp_path / "nan.gguf", SMALL, damage)
    with LLMEngine.init_model(path, RuntimeConfig(n_ctx=64)) as engine:
        with pytest.raises(NonFiniteError, match=r"blk\.1\.attn_output"):
            engine.generate("an")
        with pytest.raises(NonFiniteError):  # and again: the engine is not left in an odd state
            engine.generate("an")


def test_no_file_and_no_model_by_that_name(tmp_path: Path) -> None:
    for model in (tmp_path / "nowhere.gguf", "big"):
        with pytest.raises(FileFormatError, match="no model file") as caught:
            LLMEngine.init_model(model)
        assert "tiny" in caught.value.hint
    assert resolve_model("tiny").is_file()
