"""OpenAI's own Python client against our server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="openai is not installed")

ASK = [{"role": "user", "content": "Who is a cat?"}]


@pytest.fixture
def client(server: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, timeout=60) as client:
        yield client


def test_chat_and_streaming(client: Any) -> None:
    whole = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, max_completion_tokens=16)
    assert whole.choices[0].message.role == "assistant" and whole.usage.completion_tokens <= 16
    parts = list(
        client.chat.completions.create(
            model="tiny", messages=ASK, temperature=0, max_tokens=16, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.delta.content or "" for p in parts for c in p.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert parts[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens_details.cached_tokens


def test_four_streamed_choices_with_logprobs(client: Any) -> None:
    texts, values = [""] * 4, [0.0] * 4
    reasons = {}
    for part in client.chat.completions.create(
        model="tiny", messages=ASK, n=4, seed=3, temperature=1.2, max_tokens=10, logprobs=True, top_logprobs=2, stream=True
    ):
        for choice in part.choices:
            texts[choice.index] += choice.delta.content or ""
            values[choice.index] += sum(e.logprob for e in (choice.logprobs.content if choice.logprobs else []))
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert set(reasons.values()) <= {"stop", "length"} and len(reasons) == 4
    assert all(texts) and all(v < 0 for v in values)
    whole = client.chat.completions.create(model="tiny", messages=ASK, n=4, seed=3, temperature=1.2, max_tokens=10)
    assert [c.message.content for c in whole.choices] == texts


def test_a_json_schema(client: Any) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(model="tiny", messages=ASK, response_format=form, max_tokens=40)
    assert isinstance(json.loads(reply.choices[0].message.content)["ok"], bool)


def test_completions_models_and_errors(client: Any, server: Any) -> None:
    reply = client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=5, temperature=0, logprobs=1)
    assert "".join(reply.choices[0].logprobs.tokens) == reply.choices[0].text
    assert [m.id for m in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="davinci", prompt="Hi")
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="tiny", prompt="Hi", best_of=3)
    stranger = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
