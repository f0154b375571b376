"""A second opinion: the same models exported to ONNX and run by onnxruntime, differences also in units in the last place."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
from test_transformers import CHUNK, N_PROMPT, logits

from vkllm.diff import nmse
from vkllm.vk import Device

pytest.importorskip("transformers", reason="pip install vkllm[oracle]")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install vkllm[oracle]")
pytest.importorskip("onnxscript", reason="pip install vkllm[oracle]")

LIMIT = 1e-5
LIMIT_ULP = 1 << 14  # of f32's 24 bits: the f16 cache keeps 11


def export(folder: Path, n_token: int) -> Path:
    """The folder's model as ONNX, for prompts of `n_token` tokens; returns the file."""
    import torch
    import transformers

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()

        def forward(self, ids: Any) -> Any:
            return self.model(input_ids=ids, use_cache=False).logits

    path = folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Logits(), (torch.zeros(1, n_token, dtype=torch.int64),), path, dynamo=True, verbose=False)
    return path


def ulp_distance(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """By how many units in the last place of the row's largest f32 logit two numbers differ."""
    unit = np.spacing(np.abs(expected).max(axis=-1, keepdims=True).astype(np.float32))
    return np.asarray(np.abs(actual.astype(np.float64) - expected) / unit)


@pytest.mark.parametrize("case", ["llama", "qwen2"])
def test_onnxruntime_agrees(case: str, device: Device, tmp_path: Path, figure: Any) -> None:
    hf_models.build(case, tmp_path)
    ids = np.random.default_rng(4).integers(2, 256, N_PROMPT).tolist()
    session = onnxruntime.InferenceSession(export(tmp_path, len(ids)), providers=["CPUExecutionProvider"])
    expected = session.run(None, {session.get_inputs()[0].name: np.asarray([ids], np.int64)})[0][0]
    actual = logits(device, tmp_path, ids, 2 * CHUNK)
    error, ulp = nmse(actual, expected), ulp_distance(actual, expected)
    name = f"onnxruntime {onnxruntime.__version__}"
    figure(case, name, "NMSE of logits", error, LIMIT)
    figure(case, name, "median difference, ULP of the row's largest logit", float(np.median(ulp)), LIMIT_ULP)
    assert error <= LIMIT
    assert np.median(ulp) <= LIMIT_ULP
