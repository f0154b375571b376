"""The DEBUG ladder shows what it promises, level by level."""

from __future__ import annotations

import pytest

from vkllm import LLMEngine, RuntimeConfig, SamplingParams, debug


@pytest.mark.parametrize(
    ("level", "shown", "hidden"),
    [
        (1, ["MiB needed"], ["µs", "barrier"]),
        (2, ["GB/s  blk.0.qkv: matmul_", "argmax"], ["barrier"]),
        (3, ["barrier", "on token_embd.weight, params, x"], ["OpEntryPoint"]),
        (5, ["OpEntryPoint", "OpFunctionEnd"], []),
    ],
)
def test_each_level_shows_more(
    device: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    level: int,
    shown: list[str],
    hidden: list[str],
) -> None:
    monkeypatch.setattr(debug, "LEVEL", level)
    with LLMEngine.init_model("tiny", RuntimeConfig(n_ctx=64)) as engine:
        engine.generate([1], SamplingParams(temperature=0.0, max_tokens=1))
    text = capsys.readouterr().err
    for word in shown:
        assert word in text
    for word in hidden:
        assert word not in text
