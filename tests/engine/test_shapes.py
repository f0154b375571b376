"""Random models of odd shapes: the device's logits are the reference's, in prefill across chunks and in single steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from random_models import Shape, write_model
from test_architectures import f32_limit

from vkllm import LLMEngine, RuntimeConfig
from vkllm.config import Activations, Schedule
from vkllm.diff import nmse
from vkllm.reference import ReferenceExecutor

N_TOKEN = 37  # whole chunks and a part, and more than one block of the cache

MIXED = {"attn_q": "Q5_0", "attn_k": "Q8_0", "attn_v": "Q8_0", "attn_output": "Q4_1", "ffn_gate": "Q4_0", "ffn_up": "Q4_0"}
MIXED |= {"ffn_down": "Q5_1", "token_embd": "Q8_0", "output.": "F16"}

SHAPES = (
    Shape("llama", n_layer=1, n_head=3, n_kv_head=3, head_dim=8, n_ff=96),
    Shape("llama", n_layer=2, n_head=6, n_kv_head=2, head_dim=16, n_ff=172, tied=True, rope_factors=True),
    Shape("llama", n_layer=3, n_head=8, n_kv_head=4, head_dim=8, n_ff=172, n_embd=40, bias=True),
    Shape("llama", n_layer=1, n_head=5, n_kv_head=1, head_dim=64, n_ff=96, rope_dim=32, types={"": "BF16"}),
    Shape("qwen2", n_layer=1, n_head=7, n_kv_head=1, head_dim=64, n_ff=192, bias=True),
    Shape("qwen2", n_layer=2, n_head=2, n_kv_head=1, head_dim=96, n_ff=172, tied=True, bias=True),
    Shape("qwen2", n_layer=2, n_head=6, n_kv_head=1, head_dim=16, n_ff=96, bias=True, types=MIXED),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def check(path: Path, activations: Activations, limit: float, chunk: int, schedule: Schedule = "auto") -> None:
    """Logits of a prefill and of single steps against the reference."""
    runtime = RuntimeConfig(n_ctx=64, prefill_chunk=chunk, activations=activations, schedule=schedule)
    with LLMEngine.init_model(path, runtime) as engine:
        ids = [int(i) for i in np.random.default_rng(1).integers(0, engine.config.n_vocab, N_TOKEN)]
        expected = ReferenceExecutor(engine.graph, engine.file, n_ctx=64).forward(ids)
        assert nmse(engine.logits(ids), expected) <= limit
        assert nmse(engine.logits(ids, step=True), expected) <= limit


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_of_any_shape(folder: Path, shape: Shape) -> None:
    check(write_model(folder / "model.gguf", shape), "f32", 1e-6, chunk=4 if shape.types else 8)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 7])
def test_int8_activations(folder: Path, chunk: int) -> None:
    shape = Shape("qwen2", n_layer=2, n_head=6, n_kv_head=1, head_dim=16, n_ff=160, bias=True, types={"ffn": "Q4_0", "": "Q8_0"})
    check(write_model(folder / "model.gguf", shape), "int8", 1e-3, chunk=chunk)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]], ids=str)
def test_logits_of_the_gpu_schedule(folder: Path, shape: Shape) -> None:
    check(write_model(folder / "model.gguf", shape), "f32", 1e-6, chunk=4, schedule="lane_chunk")


@pytest.mark.usefixtures("device")
def test_the_gpu_schedule_splits_a_long_context(folder: Path) -> None:
    path = write_model(folder / "model.gguf", SHAPES[1])
    with LLMEngine.init_model(path, RuntimeConfig(n_ctx=1024, prefill_chunk=32, schedule="lane_chunk")) as engine:
        ids = [int(i) for i in np.random.default_rng(2).integers(0, engine.config.n_vocab, 600)]
        expected = ReferenceExecutor(engine.graph, engine.file, n_ctx=1024).forward(ids)
        assert nmse(engine.logits(ids)[-90:], expected[-90:]) <= f32_limit(
            engine.device, "lane_chunk"
        )  # beyond position 512: more than one split
