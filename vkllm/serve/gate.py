"""In front of everything: the key, where a request comes from, its size and pace; a request id and a line in the log for each."""

from __future__ import annotations

import asyncio
import hmac
import math
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from time import monotonic
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vkllm.serve import page
from vkllm.serve.calls import Call, request_id
from vkllm.serve.metrics import Metrics
from vkllm.serve.options import ServerOptions
from vkllm.serve.replies import ApiError

MAX_ADDRESSES = 10_000  # of clients whose requests are counted
OPEN_PATHS = frozenset({*page.FILES, "/health"})  # no key is needed for these
UNCOUNTED = OPEN_PATHS | {"/metrics", "/v1/homeostasis"}  # who watches has the whole rate for work
Headers = Mapping[bytes, bytes]


class Rates:
    """Counts requests by address: each wears off with time."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = monotonic) -> None:
        self._rate, self._clock = per_minute, clock
        self._debts: dict[str, tuple[float, float]] = {}  # requests not yet worn off, and when that was

    def check(self, address: str) -> None:
        """Count a request. Raises: ApiError: 429, there were too many."""
        rate = self._rate
        if rate is None:
            return
        now = self._clock()
        debt, before = self._debts.get(address, (0.0, now))
        debt = max(0.0, debt - (now - before) * rate / 60.0)
        if debt + 1 > rate:
            error = ApiError(429, f"more than {rate:g} requests a minute", code="rate_limit_exceeded")
            error.headers["Retry-After"] = str(math.ceil((debt + 1 - rate) * 60.0 / rate))
            raise error
        if len(self._debts) >= MAX_ADDRESSES:
            self._debts.clear()
        self._debts[address] = (debt + 1, now)


class Gate:
    """The outermost application. `routes`: paths that metrics and the log call by their name."""

    def __init__(self, app: ASGIApp, options: ServerOptions, rates: Rates, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app, self._options, self._rates, self._metrics, self._routes = app, options, rates, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = dict(scope["headers"]), scope["path"]
        route = path if path in self._routes else "other"
        call = Call(request_id(headers.get(b"x-request-id", b"")), scope["method"], route, prompts=self._options.log_prompts)
        call.enter(scope)
        ended = False

        async def noted(message: Message) -> None:
            nonlocal ended
            if message["type"] == "http.response.start":
                call.status = message["status"]
                self._metrics.replied(call.route, call.status)
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", call.id.encode())]
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body", False))
            await send(message)

        async def watched() -> Message:
            message = await receive()
            call.client_gone |= message["type"] == "http.disconnect" and not ended
            return message

        try:
            try:
                self._check(path, headers, scope)
            except ApiError as error:
                call.error = error.code
                error.headers["Connection"] = "close"
                await JSONResponse(error.body, error.status, error.headers)(scope, watched, noted)
                return
            await self._app(scope, self._bounded(watched), noted)
        except Exception:  # a bug of ours, which has been logged
            if not ended:
                raise
        finally:
            call.close()

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if not self._known(headers) or not _same_origin(headers):
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: 403
            return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers, scope: Scope) -> None:
        """Raises: ApiError: the request is refused before anybody has looked into it."""
        if path not in OPEN_PATHS and not self._known(headers):
            error = ApiError(401, "missing or wrong API key", code="invalid_api_key")
            error.headers["WWW-Authenticate"] = "Bearer"
            raise error
        if path.startswith("/admin/") and self._options.api_key is None and (b"origin" in headers or not _is_local(scope)):
            raise ApiError(403, "without an API key, only programs on this machine may do that", code="forbidden")
        if path not in UNCOUNTED:
            self._rates.check(address_of(scope))
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._options.max_body:
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        """`receive`, with limits on the size of the body and on the time until it is there."""
        n_byte, complete, deadline = 0, False, asyncio.get_running_loop().time() + self._options.body_s

        async def bounded() -> Message:
            nonlocal n_byte, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                text = f"the body did not arrive within {self._options.body_s:g} s"
                raise _closing(ApiError(408, text, code="request_timeout")) from None
            n_byte += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if n_byte > self._options.max_body:
                raise self._too_large()
            return message

        return bounded

    def _known(self, headers: Headers) -> bool:
        key = self._options.api_key
        return key is None or hmac.compare_digest(headers.get(b"authorization", b""), b"Bearer " + key.encode())

    def _too_large(self) -> ApiError:
        return _closing(ApiError(413, f"the body is larger than {self._options.max_body} bytes", code="request_too_large"))


def _closing(error: ApiError) -> ApiError:
    """The rest of the body is not wanted: the connection ends with the reply."""
    error.headers["Connection"] = "close"
    return error


def address_of(scope: Scope) -> str:
    """The client's address; empty where it has none."""
    address: str = (scope.get("client") or ("",))[0]
    return address


def _is_local(scope: Scope) -> bool:
    """Does the request come from this machine?"""
    try:
        return ip_address(address_of(scope)).is_loopback
    except ValueError:
        return False


def _same_origin(headers: Headers) -> bool:
    """Browsers name the page that opens a socket, and let any page do so: only our own may."""
    origin = headers.get(b"origin")
    return origin is None or urlsplit(origin).netloc == headers.get(b"host")
