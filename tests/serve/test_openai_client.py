"""OpenAI's own Python client against our server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vkllm.reference import ReferenceExecutor
from vkllm.weights import vector

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


WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Forecast", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "additionalProperties": False}}},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_required_call_follows_the_schema(client: Any, choice: Any, stream: bool) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": ASK, "tools": TOOLS, "tool_choice": choice, "max_tokens": 80}
    reply = client.chat.completions.create(**fields, temperature=0, stream=stream)
    if stream:
        said = [c for p in reply for c in p.choices]
        call, *more = [t for c in said for t in c.delta.tool_calls or ()]
        assert call.index == 0 and call.id and call.type == "function" and all(m.index == 0 and m.id is None for m in more)
        call.function.arguments += "".join(m.function.arguments for m in more)
        assert said[-1].finish_reason == "tool_calls" and not any(c.delta.content for c in said)
    else:
        [call] = reply.choices[0].message.tool_calls
        assert reply.choices[0].finish_reason == "tool_calls" and reply.choices[0].message.content is None
        history = [*ASK, reply.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        assert client.chat.completions.create(model="tiny", messages=history, tools=TOOLS, max_tokens=4).choices
    arguments = json.loads(call.function.arguments)
    if choice != "required" or call.function.name == "weather":
        assert call.function.name == "weather" and arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 7
    for free in ("auto", "none"):
        reply = client.chat.completions.create(**fields | {"tool_choice": free, "max_tokens": 4})
        assert reply.choices[0].message.content and not reply.choices[0].message.tool_calls


class Script:
    """A constraint that lets nothing pass but these tokens."""

    def __init__(self, ids: list[int], n_vocab: int) -> None:
        self._ids, self._n_vocab = list(ids), n_vocab

    def allowed(self) -> Any:
        return np.arange(self._n_vocab) == self._ids[0]

    def accept(self, token_id: int) -> bool:
        assert token_id == self._ids.pop(0)
        return bool(self._ids)


CALL = '{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}'


@pytest.mark.parametrize(
    ("said", "opening", "close"),
    [
        (f"Let me see. <tool_call>{CALL}</tool_call>", "<tool_call>", "</tool_call>"),
        (f"Let me see. <|im_start|>[{CALL}]", "<|im_start|>", None),  # a control token, as Mistral's [TOOL_CALLS] is one
        (CALL, None, None),
    ],
    ids=["hermes", "mistral", "llama"],
)
def test_a_call_that_the_model_makes_by_itself(
    client: Any, single: Any, monkeypatch: Any, said: str, opening: str | None, close: str | None
) -> None:
    """`tiny` was taught no tools, so its words are put into its mouth: all from its tokens on is real."""
    from vkllm.serve.models import Served
    from vkllm.serve.tools import CallStyle

    ids, jobs = single.tokenizer.encode(said, add_special=False, parse_special=True), Served.jobs
    marks = frozenset(i for i in ids if single.tokenizer.is_control(i))

    def scripted(self: Any, request: Any) -> Any:
        monkeypatch.setattr(self, "style", CallStyle(opening, close, marks))
        return [replace(job, constraint=Script(ids, single.tokenizer.n_vocab)) for job in jobs(self, request)]

    monkeypatch.setattr(Served, "jobs", scripted)
    fields: dict[str, Any] = {"model": "tiny", "messages": ASK, "tools": TOOLS, "tool_choice": "auto"}
    whole = client.chat.completions.create(**fields).choices[0]
    with client.chat.completions.stream(**fields) as events:
        streamed = events.get_final_completion().choices[0]
    for choice in (whole, streamed):
        assert choice.finish_reason == "tool_calls"
        assert (choice.message.content or "") == said[: said.find(opening) if opening else 0]
        [call] = choice.message.tool_calls
        assert call.id and call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Oslo", "days": 2}


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


def test_embeddings(client: Any, single: Any) -> None:
    texts = ["A small dog", "A small dog", "The river " * 60]  # the last one takes several steps
    found = [d.embedding for d in client.embeddings.create(model="tiny", input=texts).data]
    assert found[0] == found[1] and all(abs(np.linalg.norm(e) - 1) < 1e-5 for e in found)
    ids = [single.tokenizer.encode(t) for t in texts]
    again = client.embeddings.create(model="tiny", input=ids, encoding_format="float")
    assert again.usage.prompt_tokens == sum(map(len, ids))
    norm = vector(single.file, "output_norm.weight")
    for values, other, tokens in zip(found, again.data, ids, strict=True):
        outputs: list[tuple[str, Any]] = []
        ReferenceExecutor(single.graph, single.file, n_ctx=512).forward(
            tokens, watch=lambda op, y, to=outputs: to.append((op, y))
        )
        last = dict(outputs)["blk.3.ffn_down"].astype(np.float64)
        normed = last / np.sqrt((last**2).mean(axis=1, keepdims=True) + single.config.rms_norm_eps) * norm
        expected = normed.mean(axis=0) / np.linalg.norm(normed.mean(axis=0))
        assert np.abs(np.array(values) - expected).max() < 1e-3
        assert np.abs(np.array(other.embedding) - np.array(values)).max() < 1e-6
