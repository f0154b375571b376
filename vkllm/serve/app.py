"""The HTTP application: routes around a model host. What is in front of them is in gate.py, how replies are made in generate.py.

Work that may take long (tokenizing, templates, schemas) runs in threads; events of the engine's worker come to the event loop by
`call_soon_threadsafe`. A client that goes away takes its requests with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import TypeVar, cast

from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from vkllm.batching import BatchEngine
from vkllm.serve import page
from vkllm.serve.calls import Call
from vkllm.serve.duplex import Asked, Duplex
from vkllm.serve.gate import Gate, Rates
from vkllm.serve.generate import answer, begin, embed
from vkllm.serve.host import ModelHost, info
from vkllm.serve.metrics import Metrics
from vkllm.serve.models import Served
from vkllm.serve.options import ServerOptions
from vkllm.serve.pacing import HomeostasisPacer
from vkllm.serve.replies import ApiError, parse
from vkllm.serve.runs import Run
from vkllm.serve.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ReloadRequest,
    TokenizeRequest,
)
from vkllm_codegen.errors import HintedError

log = logging.getLogger("vkllm.serve")
M = TypeVar("M", bound=BaseModel)


async def body_of(request: Request, model: type[M]) -> M:
    """The request's body as a `model`. Raises: ApiError: 400, naming the field."""
    return parse(await request.body(), model)


def create_app(first: BatchEngine | ModelHost, options: ServerOptions, metrics: Metrics) -> ASGIApp:
    """The application for an engine, or for a host that can also load others. `metrics` should be what observes the engine; it is
    told to watch it, and so is the pacer."""
    host = first if isinstance(first, ModelHost) else ModelHost(served(first, options))
    totals = cast(BatchEngine, host)  # for those who watch, it looks like one engine that goes on through reloads
    if isinstance(host.pacer, HomeostasisPacer):
        metrics.watch(totals, host.pacer.metrics)
        host.pacer.watch(totals)
    else:
        metrics.watch(totals)
    rates = Rates(options.rate)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await host.start()
        yield
        await host.close()

    app = FastAPI(title="vkllm", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _add_errors(app)
    _add_generation(app, host)
    _add_duplex(app, host, rates, options)
    _add_tokens(app, host)
    _add_information(app, host, metrics)
    _add_administration(app, host)
    page.add_page(app)
    routes = frozenset(str(getattr(route, "path", "")) for route in app.routes)
    return Gate(app, options, rates, metrics, routes)


def served(batch: BatchEngine, options: ServerOptions) -> Served:
    """The engine's model under the name of the options. Slow."""
    return Served(batch, options.model_id, options.path or options.model_id, options.template_s)


def _add_errors(app: FastAPI) -> None:
    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            reply = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        else:
            reply = ApiError.of(error)
        call = Call.of(request.scope)
        call.error = reply.code or type(error).__name__
        if reply.status == 500:
            log.error("%s %s: %s", call.method, call.route, type(error).__name__, exc_info=error, extra=call.id_fact)
        return JSONResponse(reply.body, reply.status, reply.headers)

    handler: Callable[[Request, Exception], Awaitable[Response]] = failed
    for kind in (ApiError, HintedError, HTTPException, Exception):
        app.add_exception_handler(kind, handler)


def _add_generation(app: FastAPI, host: ModelHost) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(host, request, await body_of(request, ChatRequest), "chat")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(host, request, await body_of(request, CompletionRequest), "text")

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return await embed(host, request, await body_of(request, EmbeddingRequest))


def _add_duplex(app: FastAPI, host: ModelHost, rates: Rates, options: ServerOptions) -> None:
    async def run(call: Call, asked: Asked) -> Run:
        return (await begin(host, call, asked, None))[1]

    @app.websocket("/v1/stream")
    async def duplex(ws: WebSocket) -> None:
        await Duplex(ws, run, rates, idle_s=options.idle_s, log_prompts=options.log_prompts).serve()


def _add_tokens(app: FastAPI, host: ModelHost) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        asked = await body_of(request, TokenizeRequest)
        with host.lease() as model:
            t = model.tokenizer
            encode = partial(t.encode, asked.content, add_special=asked.add_special, parse_special=asked.parse_special)
            ids = await asyncio.to_thread(encode)
        if not asked.with_pieces:
            return JSONResponse({"tokens": ids})
        return JSONResponse({"tokens": [{"id": i, "piece": _piece(t.token_bytes(i))} for i in ids]})

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        asked = await body_of(request, DetokenizeRequest)
        with host.lease() as model:
            return JSONResponse({"content": model.tokenizer.decode(asked.tokens, skip_special=False)})


def _piece(raw: bytes) -> str | list[int]:
    """A token's text, or its bytes where they are no text."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def _add_information(app: FastAPI, host: ModelHost, metrics: Metrics) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [info(host.current)] if host.current else []})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        with host.lease() as model:
            model.check_model(name)
            return JSONResponse(info(model))

    @app.get("/health")
    async def health() -> Response:
        status, retry_s = host.health()
        model = host.current
        told = {"model": model.model_id, "n_ctx": model.batch.n_ctx} if model else {}
        headers = {} if retry_s is None else {"Retry-After": str(max(1, round(retry_s)))}
        return JSONResponse({"status": status, **told}, 200 if status in ("ready", "degraded") else 503, headers)

    @app.get("/v1/homeostasis")
    async def homeostasis(request: Request) -> Response:
        if not isinstance(host.pacer, HomeostasisPacer):
            raise ApiError(404, "this server has no pacer")
        try:
            since_s = float(request.query_params.get("since", "-inf"))
        except ValueError:
            raise ApiError(400, "since is a number of seconds, a sample's time_s", param="since") from None
        return JSONResponse(host.pacer.report(since_s))

    @app.get("/metrics")
    async def all_metrics() -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")


def _add_administration(app: FastAPI, host: ModelHost) -> None:
    @app.post("/admin/reload")
    async def reload(request: Request) -> Response:
        raw, drain = await request.body(), request.query_params.get("drain", "false")
        if drain not in ("true", "false"):
            raise ApiError(400, "drain is true or false", param="drain")
        asked = parse(raw, ReloadRequest) if raw else ReloadRequest()
        return JSONResponse(asdict(await host.reload(asked.model, asked.alias, drain=drain == "true")))
