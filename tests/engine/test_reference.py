"""The numpy reference against another program's output: it must be right before it can judge the device."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vkllm.config import ModelConfig
from vkllm.files.gguf import GGUFFile
from vkllm.models import build_graph
from vkllm.reference import ReferenceExecutor
from vkllm.tokenizer import Tokenizer


def greedy(file: GGUFFile, prompt: str, n_token: int) -> str:
    """Prompt and continuation, `n_token` ids in all with BOS (128 steps of the other program)."""
    reference = ReferenceExecutor(build_graph(ModelConfig.from_gguf(file), file.tensors), file, n_ctx=256)
    tokenizer = Tokenizer.from_gguf(file.metadata)
    ids = tokenizer.encode(prompt)
    logits = reference.forward(ids)
    while len(ids) < n_token:
        ids.append(int(np.argmax(logits[-1])))
        logits = reference.forward(ids[-1:])
    return tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_greedy_continuations_of_another_program(shared_data: Path, kind: str) -> None:
    folder = shared_data / "stories260K"
    expected = json.loads((folder / "expected.json").read_text())["continuations"]
    with GGUFFile.open(folder / f"stories260K-{kind}.gguf") as file:
        for prompt, text in expected.items():
            assert greedy(file, prompt, 129).strip() == text.strip()


def test_chunks_do_not_matter(shared_data: Path) -> None:
    with GGUFFile.open(shared_data / "stories260K" / "stories260K-f32.gguf") as file:
        graph = build_graph(ModelConfig.from_gguf(file), file.tensors)
        ids = list(range(3, 40))
        whole = ReferenceExecutor(graph, file, n_ctx=64, dtype=np.float64).forward(ids)
        pieces = ReferenceExecutor(graph, file, n_ctx=64, dtype=np.float64)
        parts = np.concatenate([pieces.forward(ids[:1]), pieces.forward(ids[1:20]), pieces.forward(ids[20:])])
        np.testing.assert_allclose(parts, whole, rtol=1e-9, atol=1e-9)
