"""vkllm bench: what it counts, whatever the machine's speed."""

from __future__ import annotations

import pytest

from vkllm.benchmark import SHALLOW, TURN, benchmark
from vkllm.chain import ModelChain, Output, Rows
from vkllm.config import RuntimeConfig
from vkllm.errors import RequestError


def test_both_depths_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int]] = []  # rows, first position
    forward = ModelChain.forward

    def note(self: ModelChain, rows: Rows) -> Output:
        steps.append((len(rows.token_ids), int(rows.positions[0])))
        return forward(self, rows)

    monkeypatch.setattr(ModelChain, "forward", note)
    report = benchmark("tiny", RuntimeConfig(), 0, 0, 1, depth=100)
    deep = [step for step in steps if step != (1, 0)]  # without the first token's
    turn = [*((1, SHALLOW + i) for i in range(TURN)), *((1, 100 + i) for i in range(TURN))]
    assert deep == [(64, 0), (36, 64), *turn * 4]
    assert report.depth == 100
    assert min(report.fill_tok_s, report.shallow_tok_s, report.deep_tok_s) > 0
    assert report.pp_tok_s == report.tg_tok_s == 0


@pytest.mark.parametrize("depth", [1, SHALLOW])
def test_a_small_depth_fits(depth: int) -> None:
    assert benchmark("tiny", RuntimeConfig(), 0, 0, 1, depth=depth).deep_tok_s > 0


def test_no_depth_no_figures() -> None:
    report = benchmark("tiny", RuntimeConfig(), 2, 1, 1)
    assert (report.depth, report.fill_tok_s, report.shallow_tok_s, report.deep_tok_s) == (0, 0, 0, 0)


def test_a_depth_beyond_the_context_is_refused() -> None:
    with pytest.raises(RequestError, match="68 positions"):
        benchmark("tiny", RuntimeConfig(n_ctx=64), 0, 0, 1, depth=64)
