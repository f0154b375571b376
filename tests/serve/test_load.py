"""Many clients at once: every request gets the tokens that it gets alone, or ends as its client wanted, and nothing is left.

`python tests/serve/soak.py` does the same for longer, in a process whose memory is measured.
"""

from __future__ import annotations

import gc
import importlib.util
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vkllm import LLMEngine, SamplingParams
from vkllm.batching import Handle, _Stream

httpx = pytest.importorskip("httpx", reason="httpx is not installed")


def load(name: str) -> ModuleType:
    """A script beside this file."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alone(single: LLMEngine, bodies: list[dict[str, Any]]) -> dict[str, tuple[int, ...]]:
    """The tokens after each prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=40)
    return {prompt: single.generate_result(prompt, params).token_ids for prompt in {b["prompt"] for b in bodies}}


def expected(single: LLMEngine, ids: tuple[int, ...], body: dict[str, Any]) -> str:
    """What a request must say."""
    text = single.tokenizer.decode(ids[: body["max_tokens"]])
    for stop in body.get("stop", ()):
        text = text.partition(stop)[0]
    return text


def left() -> Counter[str]:
    """What there is of the objects that each request has."""
    from vkllm.serve.calls import Call
    from vkllm.serve.runs import Run

    gc.collect()
    return Counter(type(o).__name__ for o in gc.get_objects() if type(o) in (Handle, _Stream, Run, Call))


def test_thirty_two_clients(server: Any, single: LLMEngine) -> None:
    soak, before, cached = load("soak"), left(), server.batch.stats.cached_tokens
    with (
        httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.key}"}, timeout=120) as client,
        ThreadPoolExecutor(32) as clients,
    ):
        found = list(clients.map(lambda seed: soak.job(client, seed), range(160)))
    server.quiet()
    assert server.batch.stats.cached_tokens > cached
    answered = [(body, text) for body, text in found if text is not None]
    tokens = alone(single, [body for body, _ in answered])
    assert 100 < len(answered) < 160 and len(tokens) > 15, "some have left, the others differ"
    for body, text in answered:
        assert text == expected(single, tokens[body["prompt"]], body), body
    more = left() - before
    assert sum(more.values()) < 20, f"requests that have ended are kept: {more}"
