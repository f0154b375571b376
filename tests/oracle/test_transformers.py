"""Logits of every architecture against transformers: prefill in chunks and token by token, over block, chunk and window edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest

from vkllm.chain import ModelChain, Rows, Span
from vkllm.config import ModelConfig, RuntimeConfig
from vkllm.diff import nmse
from vkllm.files import open_model
from vkllm.kv_cache import BlockPool, BlockTable
from vkllm.models import build_graph
from vkllm.vk import Device

transformers = pytest.importorskip("transformers", reason="pip install vkllm[oracle]")

N_PROMPT, N_STEP, CHUNK = 150, 8, 64
LIMITS = {"float32": 1e-5, "float16": 1e-4}


def logits(device: Device, folder: Path, ids: list[int], n_prompt: int, **options: Any) -> np.ndarray:
    """Of `n_prompt` tokens in chunks, then of the rest one by one."""
    runtime = RuntimeConfig(n_ctx=256, prefill_chunk=CHUNK, activations="f32", **options)
    with open_model(folder) as file:
        chain = ModelChain(device, build_graph(ModelConfig.from_gguf(file), file.tensors), file, runtime)
    table = BlockTable(runtime.block_size)
    BlockPool(chain.n_block, runtime.block_size).extend(table, len(ids))
    starts = [*range(0, n_prompt, CHUNK), *range(n_prompt, len(ids))]
    out = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        span = Span(ids[start : min(end, n_prompt) if start < n_prompt else end], start, table, n_output=end - start)
        out.append(np.array(chain.forward(Rows.of(span)).logits()))
    chain.close()
    return np.concatenate(out)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", hf_models.CASES)
def test_logits(case: str, dtype: str, device: Device, tmp_path: Path, figure: Any) -> None:
    oracle = hf_models.build(case, tmp_path, dtype)
    ids = np.random.default_rng(3).integers(2, 256, N_PROMPT + N_STEP).tolist()
    expected, actual = oracle(ids), logits(device, tmp_path, ids, N_PROMPT)
    prompt, steps = nmse(actual[:N_PROMPT], expected[:N_PROMPT]), nmse(actual[N_PROMPT:], expected[N_PROMPT:])
    oracle_name = f"transformers {transformers.__version__}, {dtype}"
    figure(case, oracle_name, "NMSE of logits, prefill", prompt, LIMITS[dtype])
    figure(case, oracle_name, "NMSE of logits, decode", steps, LIMITS[dtype])
    assert np.isfinite(actual).all()
    assert max(prompt, steps) <= LIMITS[dtype]
