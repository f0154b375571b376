"""OpenAI's requests as strict types: a field that we do not honour is an error that names it, never dropped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vkllm.sampler import SamplingParams

Probability = Annotated[float, Field(gt=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
StopTexts = Annotated[list[StopText], Field(max_length=16)]
Positive = Annotated[int, Field(ge=1)]
Ids = Annotated[list[int], Field(min_length=1)]
MAX_CHOICES = 64
T = TypeVar("T")


class Strict(BaseModel):
    """Unknown fields and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    """A piece of a message. Images, audio and files are refused by their type."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """A function's name, and its arguments as JSON text."""

    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_json(cls, value: str) -> str:
        if not isinstance(json.loads(value), dict):  # a ValueError where it is no JSON
            raise ValueError("arguments must be a JSON object, as text")
        return value


class Call(Strict):
    """A call that the model made earlier in the conversation."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None  # replies of ours have it, and clients send them back
    tool_calls: Annotated[list[Call], Field(min_length=1)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.content is None and self.tool_calls is None:
            raise ValueError("a message needs content, or tool_calls")
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("tool_calls belong to role assistant")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id belongs to role tool, which needs it")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates know it: text content, "system" for "developer", arguments of calls as objects."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls is not None:
            calls = [{"name": c.function.name, "arguments": json.loads(c.function.arguments)} for c in self.tool_calls]
            message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        return message | {k: v for k, v in (("name", self.name), ("tool_call_id", self.tool_call_id)) if v}


class StreamOptions(Strict):
    include_usage: bool = False


class JsonSchema(Strict):
    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # the output always follows the schema


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type json_schema, which needs it")
        return self

    def schema_of_text(self) -> dict[str, Any] | None:
        """The JSON schema that the text must follow; None where it is free."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # required calls always follow the schema


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class Generation(Strict):
    """What chat and plain completions have in common."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    stop: StopText | StopTexts | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = 1.0
    top_p: Probability | None = 1.0
    top_k: Annotated[int, Field(ge=0)] | None = 0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] | None = 1.0
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = None
    max_tokens: Positive | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None  # whose request it is; nothing depends on it

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        if any(not key.isdecimal() for key in self.logit_bias or {}):
            raise ValueError("logit_bias maps token ids, written as strings, to numbers")
        return self

    @property
    def n_choice(self) -> int:
        return self.n or 1

    def sampling(self, choice: int, *, logprobs: int | None, max_tokens: int | None) -> SamplingParams:
        """The engine's parameters for one choice: with a seed, each choice has its own."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            temperature=_given(self.temperature, 1.0),
            top_k=_given(self.top_k, 0),
            top_p=_given(self.top_p, 1.0),
            min_p=_given(self.min_p, 0.0),
            repetition_penalty=_given(self.repetition_penalty, 1.0),
            presence_penalty=_given(self.presence_penalty, 0.0),
            frequency_penalty=_given(self.frequency_penalty, 0.0),
            penalty_last_n=-1,
            logit_bias={int(i): b for i, b in (self.logit_bias or {}).items()},
            seed=None if self.seed is None else (self.seed + choice) % (1 << 64),
            max_tokens=max_tokens,
            stop=stop,
            logprobs=logprobs,
        )


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _prompts(given: str | Sequence[int] | Sequence[str] | Sequence[list[int]]) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    ids = [i for i in given if isinstance(i, int)]
    return [ids] if ids else [p for p in given if not isinstance(p, int)]


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: Positive | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else [t.model_dump(exclude_none=True) for t in self.tools or ()]

    @property
    def must_call(self) -> bool:
        """Is the reply to be a call?"""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def called_name(self) -> str | None:
        """The tool that must be called, if it is named."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @model_validator(mode="after")
    def _chat_agrees(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [t.function.name for t in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if self.must_call and (not names or self.called_name not in (None, *names)):
            raise ValueError("tool_choice asks for a tool that is not in tools")
        if self.must_call and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("tool_choice and response_format contradict each other")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        return self

    def said(self) -> Any:
        """What the client wrote, for a log that may hold it."""
        return [m.model_dump(exclude_none=True) for m in self.messages]

    def params(self, choice: int) -> SamplingParams:
        """Without a limit: up to the context's end."""
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(choice, logprobs=logprobs, max_tokens=self.max_completion_tokens or self.max_tokens)


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """One prompt each: text or ids."""
        return _prompts(self.prompt)

    def said(self) -> Any:
        """What the client wrote, for a log that may hold it."""
        return self.prompt

    def params(self, choice: int) -> SamplingParams:
        """Without a limit: OpenAI's 16 tokens."""
        return self.sampling(choice, logprobs=self.logprobs, max_tokens=self.max_tokens or 16)


class EmbeddingRequest(Strict):
    """POST /v1/embeddings."""

    model: str
    input: str | Ids | Annotated[list[str], Field(min_length=1, max_length=256)] | Annotated[list[Ids], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = "float"
    user: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """One input each: text or ids."""
        return _prompts(self.input)


class TokenizeRequest(Strict):
    """POST /tokenize, as llama-server has it."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    tokens: list[int]


class ReloadRequest(Strict):
    """POST /admin/reload. `model`: a file, or a packaged model; without one the same file is loaded again."""

    model: Annotated[str, Field(min_length=1)] | None = None
    alias: Annotated[str, Field(min_length=1, max_length=256)] | None = None  # its name for clients
