"""The API as plain HTTP clients see it: shapes, refusals, limits and what happens when a client leaves."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed")

HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "Who is a cat?"}], "temperature": 0, "max_tokens": 12}
TEXT = {"model": "tiny", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 12}


@pytest.fixture
def client(server: Any) -> Iterator[Any]:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.key}"}, timeout=60) as client:
        yield client


def chat(client: Any, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json=HELLO | fields)


def refused(response: Any, status: int = 400) -> dict[str, Any]:
    """The error of a reply, in OpenAI's shape."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def chunks(response: Any) -> list[dict[str, Any]]:
    """The JSON of all server-sent events; the last one is [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_completion_is_what_the_engine_says(client: Any, single: Any) -> None:
    from vkllm import SamplingParams

    expected = single.generate_result("Once upon a time", SamplingParams(temperature=0.0, max_tokens=12))
    body = client.post("/v1/completions", json=TEXT).json()
    assert body["choices"] == [{"index": 0, "text": expected.text, "logprobs": None, "finish_reason": expected.finish_reason}]
    n_prompt = len(single.tokenizer.encode("Once upon a time"))
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (n_prompt, 12)
    ids = client.post("/v1/completions", json=TEXT | {"prompt": single.tokenizer.encode("Once upon a time")}).json()
    assert ids["choices"][0]["text"] == expected.text
    several = client.post("/v1/completions", json=TEXT | {"prompt": ["Once upon a time", "The dog"], "n": 2}).json()
    assert [c["index"] for c in several["choices"]] == [0, 1, 2, 3]
    assert several["choices"][1]["text"] == expected.text


def test_a_stream_says_the_same_as_a_reply(client: Any) -> None:
    whole = chat(client).json()
    parts = chunks(chat(client, stream=True, stream_options={"include_usage": True}))
    assert whole["object"] == "chat.completion" and parts[0]["object"] == "chat.completion.chunk"
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["delta"].get("content", "") for p in parts for c in p["choices"])
    assert text == whole["choices"][0]["message"]["content"] != ""
    assert parts[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert parts[-1]["choices"] == [] and [parts[-1]["usage"][c] for c in counts] == [whole["usage"][c] for c in counts]
    assert all(p["usage"] is None for p in parts[:-1])
    plain = chunks(client.post("/v1/completions", json=TEXT | {"stream": True}))
    whole = client.post("/v1/completions", json=TEXT).json()
    assert "".join(c["text"] for p in plain for c in p["choices"]) == whole["choices"][0]["text"]


def test_usage_reports_cached_tokens(client: Any) -> None:
    prompt = "There was a dog and a cat and a bird and a fish and a mouse who lived in a house near the hill. " * 3
    first, second = (client.post("/v1/completions", json=TEXT | {"prompt": prompt}).json() for _ in range(2))
    n = second["usage"]["prompt_tokens"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == (n - 1) // 32 * 32 > 0
    assert first["choices"] == second["choices"]


def test_choices_seeds_stops_and_biases(client: Any, single: Any) -> None:
    one, two = (chat(client, n=4, seed=5, temperature=1.5).json()["choices"] for _ in range(2))
    assert one == two and [c["index"] for c in one] == [0, 1, 2, 3]
    assert len({c["message"]["content"] for c in one}) > 1
    text = client.post("/v1/completions", json=TEXT).json()["choices"][0]["text"]
    cut = client.post("/v1/completions", json=TEXT | {"stop": [text[8:11], "@@"]}).json()["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (text[: text.find(text[8:11])], "stop")
    token = single.tokenizer.encode(" dog", add_special=False)[0]
    forced = client.post("/v1/completions", json=TEXT | {"logit_bias": {str(token): 100}, "max_tokens": 3}).json()
    assert forced["choices"][0]["text"] == " dog dog dog"
    for name in ("presence_penalty", "frequency_penalty"):
        assert chat(client, **{name: 2.0, "repetition_penalty": 1.5, "top_k": 5, "min_p": 0.1}).status_code == 200


def test_logprobs(client: Any) -> None:
    body = chat(client, logprobs=True, top_logprobs=3).json()["choices"][0]
    entries = body["logprobs"]["content"]
    assert "".join(e["token"] for e in entries) == body["message"]["content"] and len(entries) <= 12
    for e in entries:
        assert len(e["top_logprobs"]) == 3 and e["top_logprobs"][0]["logprob"] == e["logprob"] <= 0  # greedy
        assert bytes(e["bytes"]).decode() == e["token"]
    parts = chunks(chat(client, logprobs=True, stream=True))
    streamed = [e for p in parts for c in p["choices"] for e in (c["logprobs"] or {"content": []})["content"]]
    assert [e["token"] for e in streamed] == [e["token"] for e in entries]
    plain = client.post("/v1/completions", json=TEXT | {"logprobs": 2}).json()["choices"][0]
    found = plain["logprobs"]
    assert "".join(found["tokens"]) == plain["text"] and found["text_offset"][:2] == [0, len(found["tokens"][0])]
    assert all(len(top) == 2 for top in found["top_logprobs"])


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog", "bird"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 1, "maxItems": 2},
    },
    "required": ["kind", "age", "names"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_schema_output_parses_and_validates(client: Any, temperature: float) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
    reply = chat(client, response_format=form, temperature=temperature, max_tokens=200, n=4, seed=1).json()
    for choice in reply["choices"]:
        found = json.loads(choice["message"]["content"])
        assert choice["finish_reason"] == "stop"
        assert set(found) == {"kind", "age", "names"} and found["kind"] in ("cat", "dog", "bird")
        assert isinstance(found["age"], int) and 0 <= found["age"] <= 30
        assert 1 <= len(found["names"]) <= 2 and all(isinstance(n, str) and len(n) <= 6 for n in found["names"])


def test_json_object_and_bad_schemas(client: Any) -> None:
    begun = chat(client, response_format={"type": "json_object"}, max_tokens=3).json()["choices"][0]["message"]["content"]
    assert begun.startswith("{")
    assert chat(client, response_format={"type": "text"}).json()["choices"] == chat(client).json()["choices"]
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    assert "response_format" in refused(chat(client, response_format=bad))["message"]
    refused(chat(client, response_format={"type": "json_schema"}))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        ({"tool_choice": "required"}, None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, None),
        ({"logit_bias": {"x": 1}}, None),
        ({"logit_bias": {"99999": 1}}, None),
        ({"top_logprobs": 2}, None),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"max_completion_tokens": 3}, None),
        ({"stream_options": {"include_usage": True}}, None),
    ],
)
def test_what_is_not_honoured_is_refused(client: Any, fields: dict[str, Any], param: str | None) -> None:
    error = refused(chat(client, **fields))
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param


def test_other_errors(client: Any, server: Any) -> None:
    assert refused(chat(client, model="gpt-4"), 404)["code"] == "model_not_found"
    url = "/v1/chat/completions"
    assert refused(client.post(url, content=b"{nonsense"))["code"] == "invalid_json"
    assert refused(client.post(url, content=b"\xff\xfe"))["code"] == "invalid_json"
    refused(client.get("/v1/nowhere"), 404)
    refused(client.get(url), 405)
    refused(client.post("/v1/embeddings", json={"model": "tiny"}))
    refused(client.post("/v1/embeddings", json={"model": "tiny", "input": []}))
    long = {"role": "user", "content": "word " * 2000}
    assert refused(chat(client, messages=[long]))["code"] == "context_length_exceeded"
    assert refused(client.post("/v1/completions", json=TEXT | {"prompt": "dog " * 600}))["code"] == "context_length_exceeded"
    refused(client.post("/v1/completions", json=TEXT | {"prompt": [5000]}))
    assert refused(client.post(url, content=b"x" * (65 << 10)), 413)["code"] == "request_too_large"
    stream = (b"x" * 1024 for _ in range(100))
    assert refused(client.post(url, content=stream), 413)["code"] == "request_too_large"
    assert client.get("/health").json()["status"] == "ready"


def test_the_key(server: Any) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": server.key}, {"Authorization": "Bearer é".encode()}):
        error = refused(httpx.get(f"{server.url}/v1/models", headers=headers), 401)
        assert error["code"] == "invalid_api_key"
    assert httpx.get(f"{server.url}/health").status_code == 200
    page = httpx.get(server.url)
    assert page.status_code == 200 and "<title>vkllm</title>" in page.text


def test_information(client: Any, single: Any) -> None:
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    tokens = client.post("/tokenize", json={"content": "A small dog"}).json()["tokens"]
    assert tokens == single.tokenizer.encode("A small dog", add_special=False)
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"content": "A small dog"}
    pieces = client.post("/tokenize", json={"content": "A dog", "with_pieces": True}).json()["tokens"]
    assert "".join(p["piece"] for p in pieces) == "A dog"
    chat(client)
    text = client.get("/metrics").text
    for name in ("requests_running 0", "kv_blocks_used 0", "completion_tokens_total ", "time_to_first_token_seconds_bucket"):
        assert f"vkllm_{name}" in text
    assert 'vkllm_requests_total{reason="length"}' in text or 'vkllm_requests_total{reason="stop"}' in text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(server: Any, stream: bool) -> None:
    body = json.dumps(TEXT | {"max_tokens": 450, "stream": stream, "logit_bias": {"2047": -100, "2045": -100}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    before = server.batch.stats.requests.get("cancelled", 0)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + body)
        while not server.batch.stats.n_running:
            time.sleep(0.005)
    server.quiet()
    assert server.batch.stats.requests.get("cancelled", 0) == before + 1
