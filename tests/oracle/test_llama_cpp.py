"""Files made by llama.cpp's quantizer, one of each type, against llama.cpp's logits, and both against the float64 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import Shape, write_model

from vkllm.config import RuntimeConfig
from vkllm.diff import nmse
from vkllm.engine import LLMEngine
from vkllm.reference import ReferenceExecutor
from vkllm.vk import Device

llama_cpp = pytest.importorskip("llama_cpp", reason="pip install vkllm[oracle]")

N_TOKEN = 70
F32_LIMIT = 1e-6  # against the reference: only the f16 cache and the order of sums differ
NOISE = 1.05  # both round to 8 bits a block of 32, at other places: over 70 tokens their errors differ by chance
TYPES = {
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_M": 12,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ4_XS": 30,
    "BF16": 32,
    "TQ1_0": 36,
    "TQ2_0": 37,
}
"""llama.cpp's names and numbers of file types (llama_ftype)."""

EXPANDED = {"IQ3_S": 5e-3}
"""Types that are expanded to Q8_0 while loading: what the second rounding may cost, in NMSE of the logits."""


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose rows are whole blocks of 256."""
    shape = Shape("llama", n_layer=2, n_head=4, n_kv_head=2, head_dim=64, n_ff=512)
    return write_model(tmp_path_factory.mktemp("parent") / "parent.gguf", shape)


def quantized(parent: Path, kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = TYPES[kind], 1
    assert llama_cpp.llama_model_quantize(str(parent).encode(), str(path).encode(), params) == 0
    return path


def peer_logits(path: Path, ids: list[int]) -> np.ndarray:
    model = llama_cpp.Llama(str(path), n_ctx=128, n_batch=128, logits_all=True, n_threads=1, verbose=False)
    model.eval(ids)
    scores = np.array(model.scores[: len(ids)])
    model.close()
    return scores


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_of_each_type(kind: str, parent: Path, device: Device, tmp_path: Path, figure: Any) -> None:
    path = quantized(parent, kind, tmp_path)
    ids = np.random.default_rng(2).integers(3, 260, N_TOKEN).tolist()
    with LLMEngine.init_model(path, RuntimeConfig(n_ctx=128, activations="f32")) as engine:
        truth = ReferenceExecutor(engine.graph, engine.file, n_ctx=128, dtype=np.float64).forward(ids)
        ours = engine.logits(ids)
    with LLMEngine.init_model(path, RuntimeConfig(n_ctx=128, activations="int8")) as engine:
        ours_int8 = engine.logits(ids)
    peer = peer_logits(path, ids)
    name = f"llama.cpp, llama-cpp-python {llama_cpp.__version__}"
    error, error_int8, error_peer = (nmse(found, truth) for found in (ours, ours_int8, peer))
    figure(kind, "gguf's dequantize, float64", "NMSE of logits, f32 activations", error, EXPANDED.get(kind, F32_LIMIT))
    if kind in EXPANDED:
        assert error <= EXPANDED[kind]
        return
    figure(kind, f"{name}, against the same truth", "NMSE of logits, int8 activations", error_int8, NOISE * error_peer)
    figure(kind, name, "NMSE between vkllm (f32) and llama.cpp", nmse(ours, peer), error_peer * 1.5)
    assert error <= F32_LIMIT
    assert error_int8 <= max(NOISE * error_peer, F32_LIMIT)
    assert nmse(ours, peer) <= 1.5 * max(error_peer, F32_LIMIT)
