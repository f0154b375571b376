"""Every architecture on the device against the numpy reference, over block, chunk and window edges, in both schedules.

The models are made up in memory from what the graph itself asks for, so that no file and no other library is needed. Whether
graph and reference are right is another question: tests/oracle asks transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from vkllm.chain import ModelChain, Rows, Span
from vkllm.config import ModelConfig, RuntimeConfig
from vkllm.diff import nmse
from vkllm.files import TensorInfo
from vkllm.kv_cache import BlockPool, BlockTable
from vkllm.models import build_graph
from vkllm.plan import Graph
from vkllm.reference import ReferenceExecutor
from vkllm.vk import Device

N_VOCAB = 130
WINDOW = 24
BASE: dict[str, Any] = {
    "block_count": 2,
    "embedding_length": 96,
    "feed_forward_length": 160,
    "context_length": 512,
    "attention.head_count": 6,
    "attention.head_count_kv": 2,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "vocab_size": N_VOCAB,
}
EXPERTS = {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 64}
BIASES = {f"blk.{i}.attn_{x}.bias" for i in range(2) for x in "qkv"}
ALL_BIASES = BIASES | {
    f"blk.{i}.{x}.bias"
    for i in range(2)
    for x in ("attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
}
DENSE = {f"blk.{i}.ffn_gate.weight" for i in range(2)}


@dataclass(frozen=True)
class Case:
    """Metadata beyond BASE, and the optional tensors that the file holds. `kind`: the type of its matrices."""

    arch: str
    keys: dict[str, Any] = field(default_factory=dict)
    tensors: set[str] = field(default_factory=lambda: DENSE | {"output.weight"})
    kind: str = "F32"


CASES = {
    "llama": Case("llama", {"attention.sliding_window": WINDOW}),
    "llama, tied, one head of five": Case("llama", {"attention.head_count": 5, "attention.head_count_kv": 1}, DENSE),
    "llama, yarn": Case("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}),
    "llama, linear, interleaved half": Case("llama", {"rope.scaling.factor": 2.0, "rope.dimension_count": 16}),
    "mixtral": Case("llama", EXPERTS, {"output.weight"}, "Q8_0"),
    "qwen2": Case("qwen2", {}, DENSE | BIASES),
    "qwen3": Case("qwen3", {}, DENSE),
    "qwen3moe": Case("qwen3moe", EXPERTS, {"output.weight"}),
    "qwen3moe, weights as they are": Case("qwen3moe", EXPERTS | {"expert_weights_norm": False}, {"output.weight"}, "Q4_0"),
    "gemma2": Case(
        "gemma2",
        {"attention.sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        DENSE,
    ),
    "gemma3": Case(
        "gemma3", {"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": 2, "rope.freq_base": 1e6}, DENSE
    ),
    "gemma3, heads of 256": Case("gemma3", {"attention.key_length": 256, "attention.value_length": 256}, DENSE),
    "phi3": Case(
        "phi3",
        {"rope.dimension_count": 24, "rope.scaling.original_context_length": 128, "rope.scaling.attn_factor": 1.2},
        {"blk.0.attn_qkv.weight", "blk.1.attn_qkv.weight", "output.weight", "rope_factors_short.weight"},
    ),
    "granite": Case(
        "granite", {"embedding_scale": 12.0, "residual_scale": 0.22, "attention.scale": 0.1, "logit_scale": 8.0}, DENSE
    ),
    "gpt-oss": Case("gpt-oss", EXPERTS | {"attention.sliding_window": WINDOW}, ALL_BIASES | {"output.weight"}),
}


class MadeUpFile:
    """A model file in memory: whatever tensors the graph of a case asks for, with random values."""

    path, format, nbytes = Path("made-up"), "none", 0

    def __init__(self, case: Case) -> None:
        self.metadata: Mapping[str, object] = {"general.architecture": case.arch} | {
            f"{case.arch}.{key}": value for key, value in (BASE | case.keys).items()
        }
        self.graph: Graph = build_graph(ModelConfig.from_gguf(self), case.tensors | {f"unused {i}" for i in range(9)})
        rng, self._data = np.random.default_rng(5), dict[str, np.ndarray]()
        self.tensors: dict[str, TensorInfo] = {}
        for part in self.graph.parts():
            self._add(part.weight, rng.standard_normal(part.shape) / np.sqrt(part.n_col), case.kind)
        for name, shape in self.graph.vectors().items():
            self._add(name, (0.0 if "bias" in name or "sinks" in name else 1.0) + rng.uniform(-0.5, 0.5, shape), "F32")

    def _add(self, name: str, values: np.ndarray, kind: str) -> None:
        data = gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType[kind])
        data = data.reshape(-1, data.shape[-1]).view(np.uint8)
        self.tensors[name], self._data[name] = TensorInfo(name, values.shape, kind, 0, data.nbytes), data

    def data(self, name: str) -> np.ndarray:
        return self._data[name]

    def release(self, name: str) -> None: ...

    def close(self) -> None: ...


def logits(device: Device, file: MadeUpFile, ids: list[int], n_prompt: int, **options: Any) -> np.ndarray:
    """Of `n_prompt` tokens in chunks of 16, then of the rest one by one."""
    runtime = RuntimeConfig(**({"n_ctx": 128, "prefill_chunk": 16, "activations": "f32"} | options))
    chain = ModelChain(device, file.graph, file, runtime)
    table = BlockTable(runtime.block_size)
    BlockPool(chain.n_block, runtime.block_size).extend(table, len(ids))
    starts, out = [*range(0, n_prompt, 16), *range(n_prompt, len(ids))], []
    for start, after in zip(starts, [*starts[1:], len(ids)], strict=True):
        out.append(np.array(chain.forward(Rows.of(Span(ids[start:after], start, table, n_output=after - start))).logits()))
    chain.close()
    return np.concatenate(out)


def f32_limit(device: Device, schedule: str) -> float:
    """NMSE of logits in f32 activations. Cooperative matrices, which the GPU schedule reads prompts with, take f16."""
    coop = "coopmat" in device.limits.features and bool(device.limits.coop_shapes)
    return 5e-6 if coop and schedule == "lane_chunk" else 1e-6


ON_GPUS = ("llama", "mixtral", "gemma2", "gemma3, heads of 256", "phi3", "gpt-oss")  # what has kernels of its own


@pytest.mark.parametrize(("name", "schedule"), [*((n, "lane_row") for n in CASES), *((n, "lane_chunk") for n in ON_GPUS)])
def test_logits_equal_the_reference(name: str, schedule: str, device: Device) -> None:
    file, n_prompt = MadeUpFile(CASES[name]), 48
    ids = np.random.default_rng(1).integers(0, N_VOCAB, n_prompt + 3).tolist()
    expected = ReferenceExecutor(file.graph, file, n_ctx=128, dtype=np.float64).forward(ids)
    assert nmse(logits(device, file, ids, n_prompt, schedule=schedule), expected) <= f32_limit(device, schedule)


@pytest.mark.parametrize("schedule", ["lane_row", "lane_chunk"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_q8_0_cache(name: str, schedule: str, device: Device) -> None:
    """8 bits of k and v cost about 1e-4; the same kernels with an f16 cache are right to 1e-6."""
    file, n_prompt = MadeUpFile(CASES[name]), 48
    ids = np.random.default_rng(1).integers(0, N_VOCAB, n_prompt + 3).tolist()
    expected = ReferenceExecutor(file.graph, file, n_ctx=128, dtype=np.float64).forward(ids)
    error = nmse(logits(device, file, ids, n_prompt, schedule=schedule, cache_type="q8_0"), expected)
    assert 1e-8 < error <= 5e-4


IN_INT8 = ("qwen2", "qwen3", "mixtral", "gemma2", "gemma3", "phi3", "granite", "gpt-oss", "llama, tied, one head of five")


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
@pytest.mark.parametrize("name", IN_INT8)
def test_in_int8_a_row_does_not_depend_on_the_rows_beside_it(name: str, cache_type: str, device: Device) -> None:
    """Prompts in chunks of 16, the last of 5, and steps of one row give the same bits, so batches give the tokens of single runs.

    They are near the reference: whoever writes a record, it is of the rows and the norm that its reader wants.
    """
    case = CASES[name]
    file = MadeUpFile(Case(case.arch, case.keys, case.tensors, "Q8_0"))
    ids = np.random.default_rng(1).integers(0, N_VOCAB, 21).tolist()
    chunks, steps = (logits(device, file, ids, n, activations="int8", cache_type=cache_type) for n in (21, 0))
    assert np.array_equal(chunks.view(np.uint32), steps.view(np.uint32))
    expected = ReferenceExecutor(file.graph, file, n_ctx=128, dtype=np.float64).forward(ids)
    assert nmse(chunks, expected) <= 5e-3


def test_bytes_a_token(device: Device) -> None:
    """Fused matrices count once, and of experts those that work for a token."""
    for name, parts in (("phi3", None), ("mixtral", "exps")):
        file = MadeUpFile(CASES[name])
        chain = ModelChain(device, file.graph, file, RuntimeConfig(n_ctx=64))  # type: ignore[arg-type]
        share = 2 / 5 if parts else 1.0
        matrices = {part.weight for part in file.graph.parts()} - {"token_embd.weight"}
        expected = sum(
            t.nbytes * (share if parts and parts in t.name else 1) for t in file.tensors.values() if t.name in matrices
        )
        assert chain.bytes_per_token == pytest.approx(expected)
        chain.close()


def test_long_factors_are_for_long_contexts(device: Device) -> None:
    case = CASES["phi3"]
    file = MadeUpFile(Case(case.arch, case.keys | {"rope.scaling.original_context_length": 64}, case.tensors))
    table = file.graph.ropes["rope"]
    assert table.long_factors == "rope_factors_long.weight"
    ids = np.random.default_rng(1).integers(0, N_VOCAB, 20).tolist()
    short, long = (logits(device, file, ids, 20, n_ctx=n) for n in (64, 96))
    for n, found in ((64, short), (96, long)):
        expected = ReferenceExecutor(file.graph, file, n_ctx=n, dtype=np.float64).forward(ids)
        assert nmse(found, expected) <= 1e-6
    assert nmse(short, long) > 1e-4


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])
def test_every_op_can_be_watched(name: str, device: Device) -> None:
    """What `vkllm diff` does: each op's output beside the reference's, of the same shape."""
    file, ids, expected = MadeUpFile(CASES[name]), list(range(3, 15)), dict[str, np.ndarray]()
    reference = ReferenceExecutor(file.graph, file, n_ctx=64, dtype=np.float64)
    reference.forward(ids, watch=lambda op, y: expected.update({op: np.array(y)}))
    chain, seen = ModelChain(device, file.graph, file, RuntimeConfig(n_ctx=64, prefill_chunk=16, activations="f32")), set[str]()
    table = BlockTable(32)
    BlockPool(chain.n_block, 32).extend(table, len(ids))

    def compare(op: str, y: np.ndarray) -> None:
        assert y.shape == expected[op].shape
        assert nmse(y, expected[op]) <= 1e-6, op
        seen.add(op)

    chain.forward(Rows.of(Span(ids, 0, table, n_output=len(ids))), watch=compare)
    chain.close()
    assert seen == expected.keys()
