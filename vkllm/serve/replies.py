"""OpenAI's replies and errors, as plain dictionaries."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from vkllm.batching import TokenLogprob
from vkllm.engine import Usage
from vkllm.errors import CapacityError, ConfigError, ContextTooLongError, RequestError
from vkllm.tokenizer import Tokenizer
from vkllm_codegen.errors import HintedError

Kind = Literal["chat", "text"]
M = TypeVar("M", bound=BaseModel)
OBJECTS = {
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
    ("text", False): "text_completion",
    ("text", True): "text_completion",
}


class ApiError(Exception):
    """An HTTP error in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}

    @property
    def body(self) -> dict[str, Any]:
        """The reply."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @classmethod
    def of(cls, error: Exception) -> ApiError:
        """The reply to any of our errors; one that is not ours stays vague."""
        if isinstance(error, ApiError):
            return error
        if not isinstance(error, HintedError):
            return cls(500, "internal error", code="internal_error")
        message = f"{error.message}; {error.hint}" if error.hint else error.message
        if isinstance(error, ContextTooLongError):
            return cls(400, message, code="context_length_exceeded")
        if isinstance(error, RequestError | ConfigError):
            return cls(400, message)
        if isinstance(error, CapacityError):
            reply = cls(503, message, code="overloaded")
            reply.headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
            return reply
        return cls(500, message, code=type(error).__name__)


def parse(text: str | bytes, model: type[M]) -> M:
    """JSON as a `model`. Raises: ApiError: 400, naming the field."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or None
        if first["type"] == "extra_forbidden":
            message, code = f"the field {where} is not supported", "unsupported_field"
        elif first["type"] == "json_invalid":
            message, code = f"the body is no JSON: {first['msg']}", "invalid_json"
        else:
            message, code = f"{where}: {first['msg']}" if where else first["msg"], "invalid_value"
        raise ApiError(400, message, param=where, code=code) from None


class Reply:
    """What all messages of one reply share: its id, time and model."""

    def __init__(self, kind: Kind, model: str) -> None:
        self.kind = kind
        self._head = {"id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
        self._tail = {"model": model, "system_fingerprint": None}

    def message(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None, *, chunk: bool) -> dict[str, Any]:
        """A whole reply, or one chunk of a stream."""
        body = {**self._head, "object": OBJECTS[self.kind, chunk], **self._tail, "choices": list(choices)}
        return body | ({"usage": usage} if usage is not None else {})

    def choice(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        reason: str | None,
        calls: Sequence[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        """One complete choice: text, or calls of tools."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message, reason = message | {"content": text or None, "tool_calls": list(calls)}, "tool_calls"
        said = {"message": message} if self.kind == "chat" else {"text": text}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def delta(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        """A piece of a choice."""
        said = {"delta": delta} if self.kind == "chat" else {"text": delta.get("content", "")}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}


def usage(parts: Iterable[Usage], n_choice: int) -> dict[str, Any]:
    """The tokens of a reply. The prompt of several choices counts once; cached are those of its first choice."""
    total = list(parts)
    first = total[::n_choice]
    n_prompt, n_completion = sum(u.prompt_tokens for u in first), sum(u.completion_tokens for u in total)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": n_prompt + n_completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in first)},
    }


def logprobs(kind: Kind, tokenizer: Tokenizer, values: Sequence[TokenLogprob], offset: int = 0) -> dict[str, Any]:
    """Log probabilities in the shape of chat, or of plain completions (there `offset` is the length of the text before)."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    if kind == "chat":
        return {
            "content": [entry(v.token_id, v.logprob) | {"top_logprobs": [entry(*pair) for pair in v.top]} for v in values],
            "refusal": None,
        }
    tokens = [entry(v.token_id, v.logprob)["token"] for v in values]
    offsets = list(accumulate(map(len, tokens), initial=offset))[:-1]
    tops = [{entry(i, p)["token"]: p for i, p in reversed(v.top)} for v in values]
    return {"tokens": tokens, "token_logprobs": [v.logprob for v in values], "top_logprobs": tops, "text_offset": offsets}
