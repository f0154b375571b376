"""The HTTP application: routes, authentication, limits and errors around a BatchEngine.

Work that may take long (tokenizing, templates, schemas) runs in threads; events of the engine's worker come to the event loop by
`call_soon_threadsafe`. A client that goes away takes its requests with it.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from time import monotonic, time
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vkllm.batching import BatchEngine, BatchEvent, Constraint, Handle, TokenLogprob
from vkllm.engine import GenerationResult
from vkllm.errors import ConfigError, ContextTooLongError
from vkllm.sampler import SamplingParams
from vkllm.serve import page, replies
from vkllm.serve.duplex import Duplex
from vkllm.serve.grammar import Grammars
from vkllm.serve.metrics import Metrics
from vkllm.serve.pacing import HomeostasisPacer
from vkllm.serve.render import TemplateWorker
from vkllm.serve.replies import ApiError, Kind, Reply
from vkllm.serve.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from vkllm.serve.tools import CallFinder, call_schema, told
from vkllm_codegen.errors import HintedError

log = logging.getLogger("vkllm.serve")
MAX_ADDRESSES = 10_000  # of clients whose requests are counted
OPEN_PATHS = frozenset({*page.FILES, "/health"})  # no key is needed for these
UNCOUNTED = OPEN_PATHS | {"/metrics", "/v1/homeostasis"}  # who watches has the whole rate for work
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """`model_id`: the name that clients ask for; `max_body`: bytes of a request; `rate`: requests a minute from one
    address; `template_s`: a chat template's deadline."""

    model_id: str
    api_key: str | None = None
    max_body: int = 4 << 20
    rate: float | None = None
    template_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Job:
    """One choice of a reply."""

    ids: list[int]
    params: SamplingParams
    constraint: Constraint | None = None
    embeds: bool = False


class ClientGoneError(Exception):
    """The client has closed its connection."""


class Run:
    """The jobs of one HTTP request in the engine. Ends all of them when it is closed."""

    def __init__(self, batch: BatchEngine, jobs: Sequence[Job], request: Request | None) -> None:
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, BatchEvent | None]]()
        self.results: list[GenerationResult | None] = [None] * len(jobs)
        self._handles: list[Handle] = []
        self._watcher: asyncio.Task[None] | None = None
        try:
            for i, job in enumerate(jobs):
                listener = partial(self._put, i)
                self._handles.append(
                    batch.submit(job.ids, job.params, constraint=job.constraint, embed=job.embeds, listener=listener)
                )
        except BaseException:
            self.close()
            raise
        if request is not None:
            self._watcher = asyncio.create_task(self._watch(request))

    def _put(self, index: int, event: BatchEvent) -> None:
        with suppress(RuntimeError):  # the server has stopped
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait((0, None))

    async def events(self) -> AsyncIterator[tuple[int, BatchEvent]]:
        """All events of all jobs, as they come. Raises: what ended a job; ClientGoneError."""
        n_open = len(self._handles)
        while n_open:
            index, event = await self._queue.get()
            if event is None:
                raise ClientGoneError
            if event.error is not None:
                raise event.error
            if event.result is not None:
                self.results[index] = event.result
                n_open -= 1
            yield index, event

    def finished(self) -> list[GenerationResult]:
        """The results, once all events have come."""
        return [r for r in self.results if r is not None]

    def close(self) -> None:
        """Cancel what still runs."""
        for handle, result in zip(self._handles, self.results, strict=False):
            if result is None:
                handle.cancel()
        if self._watcher is not None:
            self._watcher.cancel()


@dataclass
class Service:
    """What the routes share."""

    batch: BatchEngine
    options: ServerOptions
    metrics: Metrics
    started: int = field(default_factory=lambda: int(time()))

    def __post_init__(self) -> None:
        t = self.batch.tokenizer
        self.tokenizer, self.grammars = t, Grammars(t)
        self.template = (
            TemplateWorker(t.chat_template, t.bos_token, t.eos_token, self.options.template_s) if t.chat_template else None
        )
        self._longest_token = max(len(t.token_bytes(i)) for i in range(t.n_vocab))

    def check_model(self, name: str) -> None:
        """Raises: ApiError: another model than ours is asked for."""
        if name != self.options.model_id:
            message = f"the model {name!r} does not exist; this server has {self.options.model_id!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_length(self, text: str) -> str:
        """Refuse, before tokenizing, a text that cannot fit: a token has only so many bytes.

        Raises: ContextTooLongError.
        """
        if len(text) > self.batch.n_ctx * self._longest_token:
            raise ContextTooLongError(
                f"the prompt has {len(text)} characters; the context holds {self.batch.n_ctx} tokens", hint="shorten it"
            )
        return text

    def chat_ids(self, request: ChatRequest) -> list[int]:
        """Token ids of a conversation. Slow: not for the event loop."""
        if self.template is None:
            raise ConfigError("the model has no chat template", hint="use /v1/completions, or an instruction-tuned model")
        messages, tools = [m.plain() for m in request.messages], request.offered
        if not self.template.knows_tools:
            messages, tools = told(messages, tools), []
        text = self.check_length(self.template.render(messages, tools or None))
        ids, bos = self.tokenizer.encode(text, add_special=False, parse_special=True), self.tokenizer.bos_id
        return [bos, *ids] if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos] else ids

    def encoded(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Token ids of each prompt. Slow: not for the event loop."""
        return [self.tokenizer.encode(self.check_length(p)) if isinstance(p, str) else p for p in prompts]

    def jobs(self, request: ChatRequest | CompletionRequest) -> list[Job]:
        """All choices of all prompts, prompt by prompt. Slow: not for the event loop."""
        prompts = [self.chat_ids(request)] if isinstance(request, ChatRequest) else self.encoded(request.prompts())
        form = request.response_format
        schema = form.schema_of_text() if form else None
        if isinstance(request, ChatRequest) and request.must_call:
            schema = call_schema(request.offered, request.called_name)
        return [
            Job(ids, request.params(i), None if schema is None else self.grammars.json(schema))
            for ids in prompts
            for i in range(request.n_choice)
        ]


async def body_of(request: Request, model: type[M]) -> M:
    """The request's body as a `model`. Raises: ApiError: 400, naming the field."""
    return parse(await request.body(), model)


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


async def answer(service: Service, request: Request, asked: ChatRequest | CompletionRequest, kind: Kind) -> Response:
    """Run a request, and reply at once or as a stream. The status waits for the first event, so that errors have one."""
    service.check_model(asked.model)
    jobs = await asyncio.to_thread(service.jobs, asked)
    run = Run(service.batch, jobs, request)
    events = run.events()
    reply = Reply(kind, service.options.model_id)
    try:
        first = await anext(events)
        if asked.stream:
            return StreamingResponse(
                stream(service, run, first, events, reply, asked),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
            )
        body = await collect(service, run, first, events, reply, asked)
    except ClientGoneError:
        run.close()
        return Response(status_code=499)
    except BaseException:
        run.close()
        raise
    run.close()
    return JSONResponse(body)


async def embed(service: Service, request: Request, asked: EmbeddingRequest) -> Response:
    """The mean of the normed hidden states of each input, at unit length."""
    service.check_model(asked.model)
    ids = await asyncio.to_thread(service.encoded, asked.prompts())
    run = Run(service.batch, [Job(i, SamplingParams(), embeds=True) for i in ids], request)
    found: dict[int, list[float] | str] = {}
    try:
        async for index, event in run.events():
            assert event.embedding is not None
            unit = event.embedding / max(float(np.linalg.norm(event.embedding)), 1e-12)
            as_text = asked.encoding_format == "base64"
            found[index] = b64encode(unit.astype("<f4").tobytes()).decode() if as_text else unit.tolist()
    except ClientGoneError:
        return Response(status_code=499)
    finally:
        run.close()
    data = [{"object": "embedding", "index": i, "embedding": found[i]} for i in range(len(ids))]
    n = sum(map(len, ids))
    counts = {"prompt_tokens": n, "total_tokens": n}
    return JSONResponse({"object": "list", "data": data, "model": service.options.model_id, "usage": counts})


def finder_of(asked: ChatRequest | CompletionRequest) -> CallFinder | None:
    """What looks for calls in the text of one choice, where there are tools."""
    if not isinstance(asked, ChatRequest) or not asked.offered:
        return None
    return CallFinder(frozenset(t["function"]["name"] for t in asked.offered), required=asked.must_call)


async def collect(
    service: Service,
    run: Run,
    first: tuple[int, BatchEvent],
    events: AsyncIterator[tuple[int, BatchEvent]],
    reply: Reply,
    asked: ChatRequest | CompletionRequest,
) -> dict[str, Any]:
    """The whole reply."""
    values: list[list[TokenLogprob]] = [[] for _ in run.results]
    values[first[0]] += first[1].logprobs
    async for index, event in events:
        values[index] += event.logprobs
    choices = []
    for i, result in enumerate(run.finished()):
        found = replies.logprobs(reply.kind, service.tokenizer, values[i]) if asked.params(0).logprobs is not None else None
        finder = finder_of(asked)
        content, calls = (finder.push(result.text), finder.finish()) if finder else (result.text, ("", []))
        choices.append(reply.choice(i, content + calls[0], found, result.finish_reason, calls[1]))
    return reply.message(choices, replies.usage([r.usage for r in run.finished()], asked.n_choice), chunk=False)


async def stream(
    service: Service,
    run: Run,
    first: tuple[int, BatchEvent],
    events: AsyncIterator[tuple[int, BatchEvent]],
    reply: Reply,
    asked: ChatRequest | CompletionRequest,
) -> AsyncIterator[str]:
    """The reply as server-sent events. An error after the first chunk becomes a last event."""
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage
    lengths = [0] * len(run.results)
    finders = [finder_of(asked) for _ in run.results]

    def chunk(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        body = reply.message(choices, usage, chunk=True)
        if with_usage and usage is None:
            body["usage"] = None
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def piece(index: int, event: BatchEvent) -> str:
        out, reason = "", event.result.finish_reason if event.result else None
        finder, text = finders[index], event.text
        calls: list[dict[str, Any]] = []
        if finder is not None:
            text = finder.push(text)
            if reason:
                rest, calls = finder.finish()
                text += rest
        if text or event.logprobs:
            found = replies.logprobs(reply.kind, service.tokenizer, event.logprobs, lengths[index]) if event.logprobs else None
            lengths[index] += len(text)
            out = chunk([reply.delta(index, {"content": text}, found, None)])
        if calls:
            numbered = [{"index": i, **call} for i, call in enumerate(calls)]
            out, reason = out + chunk([reply.delta(index, {"tool_calls": numbered}, None, None)]), "tool_calls"
        return out + (chunk([reply.delta(index, {}, None, reason)]) if reason else "")

    try:
        if reply.kind == "chat":
            roles = [reply.delta(i, {"role": "assistant", "content": ""}, None, None) for i in range(len(run.results))]
            yield "".join(chunk([role]) for role in roles)
        if text := piece(*first):
            yield text
        async for index, event in events:
            if text := piece(index, event):
                yield text
        if with_usage:
            yield chunk([], replies.usage([r.usage for r in run.finished()], asked.n_choice))
        yield "data: [DONE]\n\n"
    except ClientGoneError:
        return
    except Exception as error:
        log.warning("a stream failed: %s", type(error).__name__)
        yield f"data: {json.dumps(ApiError.of(error).body, ensure_ascii=False)}\n\n"
    finally:
        run.close()


class Gate:
    """In front of everything: the key, the size of the body, and a count of replies."""

    def __init__(self, app: ASGIApp, options: ServerOptions, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._options, self._metrics, self._paths = app, options, metrics, paths
        self._debts: dict[str, tuple[float, float]] = {}  # of an address: requests not yet worked off, and when that was

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and not self._known(dict(scope["headers"]).get(b"authorization", b"")):
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: 403
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = dict(scope["headers"]), scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.replied(path if path in self._paths else "other", message["status"])
            await send(message)

        declared = headers.get(b"content-length", b"0")
        error: ApiError | None = None
        if path not in OPEN_PATHS and not self._known(headers.get(b"authorization", b"")):
            error = ApiError(401, "missing or wrong API key", code="invalid_api_key")
            error.headers["WWW-Authenticate"] = "Bearer"
        elif path not in UNCOUNTED and (wait_s := self._wait_s((scope.get("client") or ("",))[0])) > 0:
            error = ApiError(429, f"more than {self._options.rate:g} requests a minute", code="rate_limit_exceeded")
            error.headers["Retry-After"] = str(math.ceil(wait_s))
        elif not declared.isdigit() or int(declared) > self._options.max_body:
            error = self._too_large()
        if error is not None:
            error.headers["Connection"] = "close"
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, counted)
            return
        n_byte = 0

        async def bounded() -> Message:
            nonlocal n_byte
            message = await receive()
            n_byte += len(message.get("body", b""))
            if n_byte > self._options.max_body:
                raise self._too_large()
            return message

        await self._app(scope, bounded, counted)

    def _known(self, authorization: bytes) -> bool:
        key = self._options.api_key
        return key is None or hmac.compare_digest(authorization, b"Bearer " + key.encode())

    def _wait_s(self, address: str) -> float:
        """How long a client must wait before its next request; 0: it may come, and is counted."""
        rate = self._options.rate
        if rate is None:
            return 0.0
        now = monotonic()
        debt, before = self._debts.get(address, (0.0, now))
        debt = max(0.0, debt - (now - before) * rate / 60.0)
        if debt + 1 > rate:
            return (debt + 1 - rate) * 60.0 / rate
        if len(self._debts) >= MAX_ADDRESSES:
            self._debts.clear()
        self._debts[address] = (debt + 1, now)
        return 0.0

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._options.max_body} bytes", code="request_too_large")


def create_app(batch: BatchEngine, options: ServerOptions, metrics: Metrics) -> ASGIApp:
    """The application. `metrics` should be what observes `batch`; it is told to watch it."""
    service = Service(batch, options, metrics)
    homeostasis = batch.pacer if isinstance(batch.pacer, HomeostasisPacer) else None
    metrics.watch(batch, homeostasis.metrics if homeostasis else None)
    if homeostasis:
        homeostasis.watch(batch)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if service.template is not None:
            await asyncio.to_thread(service.template.start)
        yield
        if service.template is not None:
            service.template.close()

    app = FastAPI(title="vkllm", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _add_errors(app)
    _add_generation(app, service)
    _add_information(app, service)
    paths = frozenset(str(getattr(route, "path", "")) for route in app.routes)
    return Gate(app, options, metrics, paths)


def _add_errors(app: FastAPI) -> None:
    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            reply = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        else:
            reply = ApiError.of(error)
        if reply.status >= 500:
            log.error("%s %s: %s", request.method, request.url.path, type(error).__name__, exc_info=reply.status == 500)
        return JSONResponse(reply.body, reply.status, reply.headers)

    handler: Callable[[Request, Exception], Awaitable[Response]] = failed
    for kind in (ApiError, HintedError, HTTPException, Exception):
        app.add_exception_handler(kind, handler)


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(service, request, await body_of(request, ChatRequest), "chat")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(service, request, await body_of(request, CompletionRequest), "text")

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return await embed(service, request, await body_of(request, EmbeddingRequest))

    async def start(asked: ChatRequest | CompletionRequest) -> Run:
        service.check_model(asked.model)
        return Run(service.batch, await asyncio.to_thread(service.jobs, asked), None)

    @app.websocket("/v1/stream")
    async def duplex(ws: WebSocket) -> None:
        await Duplex(ws, start, parse).serve()

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        asked, t = await body_of(request, TokenizeRequest), service.tokenizer
        encode = partial(t.encode, asked.content, add_special=asked.add_special, parse_special=asked.parse_special)
        ids = await asyncio.to_thread(encode)
        if not asked.with_pieces:
            return JSONResponse({"tokens": ids})
        return JSONResponse({"tokens": [{"id": i, "piece": _piece(t.token_bytes(i))} for i in ids]})

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        asked = await body_of(request, DetokenizeRequest)
        return JSONResponse({"content": service.tokenizer.decode(asked.tokens, skip_special=False)})


def _piece(raw: bytes) -> str | list[int]:
    """A token's text, or its bytes where they are no text."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def _add_information(app: FastAPI, service: Service) -> None:
    batch, model_id = service.batch, service.options.model_id
    model = {"id": model_id, "object": "model", "created": service.started, "owned_by": "vkllm"}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(model)

    @app.get("/health")
    async def health() -> Response:
        status, code = _health(batch)
        headers = {"Retry-After": str(max(1, round(batch.pacer.retry_after_s)))} if batch.pacer and status == "tripped" else {}
        return JSONResponse({"status": status, "model": model_id, "n_ctx": batch.n_ctx}, code, headers)

    @app.get("/v1/homeostasis")
    async def homeostasis(request: Request) -> Response:
        if not isinstance(batch.pacer, HomeostasisPacer):
            raise ApiError(404, "this server has no pacer")
        try:
            since_s = float(request.query_params.get("since", "-inf"))
        except ValueError:
            raise ApiError(400, "since is a number of seconds, a sample's time_s", param="since") from None
        return JSONResponse(batch.pacer.report(since_s))

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    page.add_page(app)


def _health(batch: BatchEngine) -> tuple[str, int]:
    """ready: full speed; degraded: paced; tripped: too hot for work; failed: the device is lost."""
    if batch.failure is not None:
        return "failed", 503
    limit = batch.pacer.batch_limit if batch.pacer else None
    if limit == 0:
        return "tripped", 503
    return ("ready" if limit is None or limit >= batch.scheduler.n_row else "degraded"), 200
