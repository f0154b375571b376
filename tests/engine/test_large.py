"""Real shapes: the logits of a 64-token prompt against the numpy reference, and against llama.cpp's own error.

Skipped unless VKLLM_LARGE_MODELS names a folder with the files below (random weights will do). With VKLLM_PEER_LOGITS (the
program built from bench/peer_logits.c) the int8 path must also be as near to the reference as llama.cpp, which quantizes too.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from vkllm import LLMEngine, RuntimeConfig
from vkllm.config import Activations
from vkllm.diff import nmse
from vkllm.reference import ReferenceExecutor

FILES = ("qwen2.5-0.5b-Q4_K_M.gguf", "llama-3.2-1b-Q4_K_M.gguf")
N_TOKEN = 64


def model_path(name: str) -> Path:
    folder = os.environ.get("VKLLM_LARGE_MODELS")
    if not folder or not Path(folder, name).is_file():
        pytest.skip(f"VKLLM_LARGE_MODELS names no folder with {name}")
    return Path(folder, name)


def prompt(n_vocab: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(7).integers(0, n_vocab, N_TOKEN)]


def engine_logits(path: Path, activations: Activations, *, step: bool) -> np.ndarray:
    with LLMEngine.init_model(path, RuntimeConfig(n_ctx=128, activations=activations)) as engine:
        return engine.logits(prompt(engine.config.n_vocab), step=step)


def reference_logits(path: Path) -> np.ndarray:
    with LLMEngine.init_model(path, RuntimeConfig(n_ctx=128)) as engine:
        return ReferenceExecutor(engine.graph, engine.file, n_ctx=128).forward(prompt(engine.config.n_vocab))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FILES)
def test_logits_of_a_64_token_prompt(device: object, name: str, tmp_path: Path) -> None:
    path = model_path(name)
    expected = reference_logits(path)
    for step in (False, True):
        error = nmse(engine_logits(path, "f32", step=step), expected)
        print(f"{name} f32 {'steps' if step else 'prefill'}: NMSE {error:.2e}")
        assert error <= 1e-4

    program = os.environ.get("VKLLM_PEER_LOGITS")
    if not program:
        return
    ids = ",".join(map(str, prompt(expected.shape[1])))
    subprocess.run([program, str(path), ids, str(tmp_path / "peer.f32")], check=True)
    peer = nmse(np.fromfile(tmp_path / "peer.f32", np.float32).reshape(expected.shape), expected)
    for step in (False, True):
        error = nmse(engine_logits(path, "int8", step=step), expected)
        print(f"{name} int8 {'steps' if step else 'prefill'}: NMSE {error:.2e}; llama.cpp {peer:.2e}")
        assert error <= peer
