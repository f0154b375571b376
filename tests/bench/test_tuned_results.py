"""Choices that were tuned change no token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vkllm.config import RuntimeConfig
from vkllm.engine import LLMEngine
from vkllm.files import open_model
from vkllm.sampler import SamplingParams
from vkllm.tune import axes, model_shapes
from vkllm.tuned import Choices, default_choices, save

PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PROMPT = "Once upon a time there was a small machine that wanted to know how fast it could be, and"


def tokens(runtime: RuntimeConfig) -> tuple[tuple[int, ...], Choices]:
    with LLMEngine.init_model("tiny", runtime) as engine:
        return engine.generate_result(PROMPT, PARAMS).token_ids, engine.chain._lower._choices


@pytest.mark.parametrize("schedule", ["lane_row", "lane_chunk"])
def test_tokens_are_those_without(schedule: str, device: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VKLLM_CACHE_DIR", str(tmp_path))
    runtime = RuntimeConfig(schedule=schedule, n_ctx=256)  # type: ignore[arg-type]
    expected, defaults = tokens(runtime)
    with open_model("tiny") as file:
        shapes = model_shapes(file)
    info = device.info  # type: ignore[attr-defined]
    lane_row = schedule == "lane_row"
    for rows in (2, 8):
        tried = {axis: values[-1] for axis, values in axes(lane_row, info.limits).items() if axis not in ("rows", "tile")}
        tile = 2 if lane_row else 8
        choices = Choices(**({"activations": "f32"} | tried | {"rows": rows, "tile": tile}))
        save(choices, info, shapes)
        found, used = tokens(runtime)
        assert used == choices != defaults
        assert found == expected


def test_integer_products_give_the_same_bits_whatever_is_chosen(
    device: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VKLLM_CACHE_DIR", str(tmp_path))
    info, runtime = device.info, RuntimeConfig(activations="int8", n_ctx=256)  # type: ignore[attr-defined]
    if "side_by_side" not in axes(info.kind == "cpu", info.limits):
        pytest.skip("this device has no such products")
    with open_model("tiny") as file:
        shapes = model_shapes(file)
    found = []
    for tile, side_by_side in ((8, 4), (4, 1), (16, 2)):
        choices = replace(default_choices(lane_row=True), tile=tile, side_by_side=side_by_side)
        save(choices, info, shapes)
        with LLMEngine.init_model("tiny", runtime) as engine:
            assert engine.chain._lower._choices == choices
            ids = engine.tokenizer.encode(PROMPT)
            found += [np.array(engine.logits(ids)), np.array(engine.logits(ids, step=True))]
    assert all(np.array_equal(logits, found[0]) for logits in found)
