"""Prefill in the GPU schedule, whose long chunks go through the tiled GEMM, against the numpy reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_architectures import CASES, N_VOCAB, MadeUpFile, f32_limit

from vkllm.chain import ModelChain, Rows, Span
from vkllm.config import RuntimeConfig
from vkllm.diff import nmse
from vkllm.kv_cache import BlockPool, BlockTable
from vkllm.reference import ReferenceExecutor
from vkllm.vk import Device

CHUNK, N_TOKEN = 64, 97  # a whole chunk, and one of 33


def prefill(device: Device, file: MadeUpFile, ids: list[int]) -> tuple[np.ndarray, set[str]]:
    """The logits of all tokens, and the names of the kernels that made them."""
    runtime = RuntimeConfig(n_ctx=128, prefill_chunk=CHUNK, activations="f32", schedule="lane_chunk")
    chain, table, out = ModelChain(device, file.graph, file, runtime), BlockTable(runtime.block_size), []
    BlockPool(chain.n_block, runtime.block_size).extend(table, len(ids))
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        out.append(np.array(chain.forward(Rows.of(Span(part, start, table, n_output=len(part)))).logits()))
    recorded = chain._recorded.values()
    names = {d.kernel.name for r in recorded for run in range(len(r.runs)) for d in r.dispatches(run)}
    chain.close()
    return np.concatenate(out), names


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "Q8_0"), ("qwen2", "Q4_0"), ("gemma2", "F16"), ("phi3", "F32"), ("mixtral", "Q8_0")]
)
def test_chunks_go_through_the_gemm(name: str, kind: str, device: Device) -> None:
    file = MadeUpFile(replace(CASES[name], kind=kind))
    ids = np.random.default_rng(1).integers(0, N_VOCAB, N_TOKEN).tolist()
    expected = ReferenceExecutor(file.graph, file, n_ctx=128, dtype=np.float64).forward(ids)
    found, names = prefill(device, file, ids)
    assert any(n.startswith("gemm_") for n in names)
    assert nmse(found, expected) <= f32_limit(device, "lane_chunk")
