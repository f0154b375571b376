"""Every weight format through the whole engine, on both schedules, with f32 and int8 activations, against the numpy reference.

The formats are shared out over a few models, and one tile does for most, because a kernel takes longer to compile than a model to
run; tests/shaders has every format at every tile.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from random_models import Metadata, Shape, Tensors, write_model

from vkllm import LLMEngine, RuntimeConfig
from vkllm.config import Activations, Schedule
from vkllm.diff import nmse
from vkllm.reference import ReferenceExecutor

N_TOKEN = 19  # chunks of 7, 7 and 5: no power of two
LIMITS: dict[Activations, float] = {"f32": 1e-6, "int8": 2e-3}

K_QUANTS = {"attn_q": "Q4_K", "attn_k": "Q5_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q4_K"}
K_QUANTS |= {"attn_output": "Q5_K", "ffn": "Q4_K", "output.": "Q6_K"}
Q45 = {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q5_0", "attn_output": "Q5_1", "ffn_down": "Q4_1", "token_embd": "Q5_0"}
Q45 |= {"ffn": "Q5_1", "output.": "Q4_0"}
PLAIN = {"attn_q": "F16", "attn_k": "BF16", "attn_v": "Q8_0", "ffn_down": "BF16", "token_embd": "Q8_0", "ffn": "F16", "": "Q8_0"}
FEW = {"attn_q": "Q2_K", "attn_k": "IQ4_NL", "attn_v": "IQ4_XS", "attn_output": "MXFP4", "ffn_down": "IQ4_XS"}
FEW |= {"token_embd": "MXFP4", "ffn": "Q3_K", "output.": "Q2_K"}
EXPANDED = {"attn_q": "IQ1_S", "attn_k": "IQ1_M", "attn_v": "IQ2_XXS", "attn_output": "IQ2_XS", "ffn_gate": "IQ2_S"}
EXPANDED |= {"ffn_up": "IQ3_XXS", "ffn_down": "TQ1_0", "token_embd": "TQ2_0", "output.": "IQ3_S"}

MODELS = {
    "K": Shape("qwen2", n_head=2, n_kv_head=1, head_dim=128, n_ff=256, bias=True, types=K_QUANTS),
    "few bits": Shape("qwen2", n_head=2, n_kv_head=1, head_dim=128, n_ff=256, bias=True, types=FEW),
    "legacy": Shape("llama", n_head=3, n_kv_head=1, head_dim=32, n_ff=160, types=Q45),
    "plain": Shape("qwen2", n_head=2, n_kv_head=2, head_dim=48, n_ff=96, bias=True, types=PLAIN),
}
HEADS = (  # widths and counts at which a kernel's padding could show
    Shape("qwen2", n_head=2, n_kv_head=1, head_dim=256, n_ff=33, bias=True),
    Shape("llama", n_head=9, n_kv_head=9, head_dim=24, n_ff=1, n_embd=4),
)
SCHEDULES: tuple[Schedule, ...] = ("lane_row", "lane_chunk")
USUAL = RuntimeConfig(n_ctx=61, block_size=8, prefill_chunk=7)  # a context that is no multiple of a block


RUNS: tuple[tuple[Activations, Schedule], ...] = (("f32", "lane_row"), ("int8", "lane_row"), ("f32", "lane_chunk"))


def check(
    path: Path, runtime: RuntimeConfig, n_token: int = N_TOKEN, *, step: bool = True, limits: dict[Activations, float] = LIMITS
) -> None:
    """Logits of a prefill, and of single steps, against the reference."""
    with LLMEngine.init_model(path, runtime) as engine:
        ids = [int(i) for i in np.random.default_rng(1).integers(0, engine.config.n_vocab, n_token)]
        expected = ReferenceExecutor(engine.graph, engine.file, n_ctx=engine.n_ctx).forward(ids)
        limit = limits[engine.chain.activations]
        assert nmse(engine.logits(ids), expected) <= limit
        assert not step or nmse(engine.logits(ids[:3], step=True), expected[:3]) <= limit


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("activations, schedule", RUNS)
@pytest.mark.parametrize("model", MODELS)
def test_formats(tmp_path: Path, model: str, activations: Activations, schedule: Schedule) -> None:
    path = write_model(tmp_path / "model.gguf", MODELS[model])
    check(path, replace(USUAL, activations=activations, schedule=schedule), step=False)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "types", [{"attn_v": "Q6_K", "": "Q4_K"}, {"attn_v": "Q8_0", "": "Q5_0"}, {"attn_k": "Q6_K", "": "Q5_K"}]
)
def test_in_int8_prompts_and_steps_give_the_same_bits(tmp_path: Path, types: dict[str, str]) -> None:
    """Q, K and V of two types in one dispatch, or in two where they group x otherwise."""
    shape = Shape("qwen2", n_layer=2, n_head=2, n_kv_head=1, head_dim=128, n_ff=256, bias=True, types=types)
    path = write_model(tmp_path / "model.gguf", shape)
    check(path, replace(USUAL, activations="int8"))
    with LLMEngine.init_model(path, replace(USUAL, activations="int8")) as engine:
        ids = [int(i) for i in np.random.default_rng(2).integers(0, engine.config.n_vocab, N_TOKEN)]
        assert np.array_equal(np.array(engine.logits(ids)), np.array(engine.logits(ids, step=True)))


@pytest.mark.usefixtures("device")
def test_types_without_kernels_are_expanded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The reference has the file's weights, the device their expansion in 8 bits."""
    path = write_model(tmp_path / "model.gguf", Shape("llama", n_head=2, n_kv_head=1, head_dim=128, n_ff=256, types=EXPANDED))
    check(path, USUAL, step=False, limits={"f32": 5e-4})
    assert "9 tensors have no kernels of their own and are expanded while loading" in caplog.text


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_heads(tmp_path: Path, shape: Shape, schedule: Schedule) -> None:
    check(write_model(tmp_path / "model.gguf", shape), replace(USUAL, schedule=schedule))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("chunk, block, n_ctx", [(1, 64, 20), (64, 16, 19), (100, 512, 150), (33, 32, 1000)])
def test_any_chunk_block_and_context(tmp_path: Path, chunk: int, block: int, n_ctx: int) -> None:
    path = write_model(tmp_path / "model.gguf", Shape("qwen2", n_head=4, n_kv_head=2, head_dim=16, n_ff=64, bias=True))
    runtime = RuntimeConfig(prefill_chunk=chunk, block_size=block, n_ctx=n_ctx, submit_ms=1e-6)  # and one dispatch a submit
    check(path, runtime, n_token=min(n_ctx, 130))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_bias_on_every_matrix_and_half_vectors(tmp_path: Path, schedule: Schedule) -> None:
    """No architecture that we have brings them, but the graph takes them where a file does."""

    def damage(metadata: Metadata, tensors: Tensors) -> None:
        rng = np.random.default_rng(5)
        matrices = [n for n, (values, _) in tensors.items() if values.ndim == 2 and n != "token_embd.weight"]
        for name in matrices:
            values = rng.standard_normal(len(tensors[name][0])).astype(np.float32)
            tensors[name.replace(".weight", ".bias")] = (values, "F16")
        for name in [n for n in tensors if "norm" in n]:
            tensors[name] = (tensors[name][0], "F16" if "attn" in name else "BF16")

    path = write_model(tmp_path / "model.gguf", Shape("llama", n_head=4, n_kv_head=2, head_dim=16, n_ff=160), damage)
    check(path, replace(USUAL, schedule=schedule))
