"""Many clients at once: every request gets the tokens that it gets alone, or ends as its client wanted, and nothing is left."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from vkllm import SamplingParams

httpx = pytest.importorskip("httpx", reason="httpx is not installed")

SYSTEM = "There was a small dog who lived in a house near the river with a cat, a bird and an old fish. "


def job(server: Any, seed: int) -> tuple[str, int, str | None]:
    """One request of a random kind: (prompt, tokens, text or None where the client left)."""
    dice = random.Random(seed)
    prompt = (
        SYSTEM * dice.randint(0, 3) + dice.choice(("Once upon", "The cat", "One day the bird", "A")) + " saw" * dice.randint(0, 9)
    )
    n, stream, leaves = dice.randint(1, 40), dice.random() < 0.5, dice.random() < 0.15
    body = {"model": "tiny", "prompt": prompt, "max_tokens": n, "temperature": 0, "stream": stream or leaves}
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.key}"}, timeout=120) as client:
        if not body["stream"]:
            reply = client.post("/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
            return prompt, n, reply.json()["choices"][0]["text"]
        text = ""
        with client.stream("POST", "/v1/completions", json=body) as reply:
            assert reply.status_code == 200
            for i, line in enumerate(reply.iter_lines()):
                if leaves and i > 4:
                    return prompt, n, None
                if line.startswith("data: {"):
                    data = httpx.Response(200, content=line[6:]).json()
                    text += "".join(c["text"] for c in data["choices"])
        return prompt, n, text


def test_eight_clients_sixty_requests(server: Any, single: Any) -> None:
    before = server.batch.stats.cached_tokens
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(lambda seed: job(server, seed), range(60)))
    server.quiet()
    assert server.batch.stats.cached_tokens > before
    expected = {
        (prompt, n): single.generate(prompt, SamplingParams(temperature=0.0, max_tokens=n)) for prompt, n, text in found if text
    }
    assert len(expected) > 30
    for prompt, n, text in found:
        assert text is None or text == "" or text == expected[prompt, n]
