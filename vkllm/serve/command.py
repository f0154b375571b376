"""`vkllm serve`: load a model, then serve it until a signal comes."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from vkllm.config import RuntimeConfig
from vkllm.errors import ConfigError
from vkllm.homeostasis import HomeostasisConfig, Mode
from vkllm.serve.pacing import paced

if TYPE_CHECKING:
    from vkllm.batching import BatchEngine

log = logging.getLogger("vkllm.serve")


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. Port 0: any free one."""

    host: str = "127.0.0.1"
    port: int = 8000


class Server:
    """uvicorn with our application on a socket of ours: `run` serves until `stop`, or a signal where it has the main thread.

    `stop_s`: how long running replies may go on then; `patience_s`: how long a connection may be open without a request.
    """

    def __init__(
        self, app: Any, address: Address, *, stop_s: float = 30.0, max_connections: int = 512, patience_s: float = 15.0
    ) -> None:
        import uvicorn

        from vkllm.serve.connections import protocol

        self._socket = socket.create_server((address.host, address.port), backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=protocol(max_connections, patience_s),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=round(stop_s),
            h11_max_incomplete_event_size=64 << 10,
            ws="websockets-sansio",
            ws_max_size=4 << 20,
        )
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serve in this thread. In the main thread SIGINT and SIGTERM stop it, and `run` returns."""
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        before = [signal.signal(s, lambda *_: None) for s in signals]  # uvicorn raises them again when it has stopped
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)

    def start(self) -> None:
        """Serve in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="vkllm-http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No new connections; what runs may finish, up to the deadline."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()


def key_from(given: str | None, file: Path | None) -> str | None:
    """The API key: of the option, its file, or VKLLM_API_KEY. Raises: ConfigError: an empty one."""
    key = file.read_text().strip() if file is not None else given if given is not None else os.environ.get("VKLLM_API_KEY")
    if key is not None and not key:
        raise ConfigError("the API key is empty", hint="give a key, or none at all")
    return key


def serve(
    model: Annotated[str, typer.Argument(help="A GGUF file, or `tiny`, the model that comes with vkllm.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8000,
    api_key: Annotated[str | None, typer.Option(help="Clients must send it; also VKLLM_API_KEY.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Read the key from a file.")] = None,
    alias: Annotated[str | None, typer.Option(help="The model's name for clients; default: of the file.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Requests that run at once; the others wait.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = 256,
    max_body: Annotated[int, typer.Option(min=1024, help="Largest request in bytes.")] = 4 << 20,
    rate: Annotated[float | None, typer.Option(min=1, help="Requests a minute from one address; default: no limit.")] = None,
    stop_after: Annotated[float, typer.Option(min=0, help="Seconds that streams have when the server stops.")] = 30.0,
    device: Annotated[str | None, typer.Option("--device", help="Index or part of the name (see `vkllm devices`).")] = None,
    n_ctx: Annotated[int | None, typer.Option("--n-ctx", "-c", min=1, help="Positions of each request.")] = None,
    homeostasis: Annotated[str, typer.Option(help="How to hold the device's temperature: pi, ramp or off.")] = "pi",
    target: Annotated[float, typer.Option(help="The temperature to hold, °C.")] = 75.0,
    power_limit: Annotated[
        float | None, typer.Option(help="Hold the device's own power limit at so many watts, where that is allowed.")
    ] = None,
    cache_tokens: Annotated[int | None, typer.Option(min=1, help="Positions of the KV cache; default: for all at once.")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a model with OpenAI's API. Ctrl-C or SIGTERM stops it: running streams may finish."""
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    key = key_from(api_key, api_key_file)
    if key is None and host not in ("127.0.0.1", "localhost", "::1"):
        log.warning("listening on %s without an API key: everybody who reaches it may use it", host)
    runtime = RuntimeConfig(device=device, n_ctx=n_ctx, n_seq=parallel, cache_tokens=cache_tokens)
    serve_model(
        model,
        runtime,
        Address(host, port),
        key=key,
        alias=alias,
        n_queue=queue,
        max_body=max_body,
        rate=rate,
        stop_s=stop_after,
        pacing=HomeostasisConfig(mode=cast(Mode, homeostasis), target_c=target),
        watts=power_limit,
    )


def serve_model(
    model: str,
    runtime: RuntimeConfig,
    address: Address,
    *,
    key: str | None,
    alias: str | None,
    n_queue: int,
    max_body: int,
    rate: float | None,
    stop_s: float,
    pacing: HomeostasisConfig,
    watts: float | None,
) -> None:
    """Load and serve until a signal. Raises: ConfigError: the `serve` extra is not installed."""
    try:
        from vkllm.serve.app import ServerOptions, create_app
        from vkllm.serve.metrics import Metrics
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed", hint="pip install 'vkllm[serve]'") from error
    from vkllm.batching import BatchEngine
    from vkllm.engine import LLMEngine

    metrics = Metrics()
    with (
        LLMEngine.init_model(model, runtime) as engine,
        paced(engine, pacing, watts) as pacer,
        BatchEngine(engine, pacer=pacer, n_queue=n_queue, observe=metrics.observe, revive=True) as batch,
    ):
        options = ServerOptions(alias or Path(model).stem, key, max_body, rate)
        server = Server(create_app(batch, options, metrics), address, stop_s=stop_s)
        _say(batch, options.model_id, address.host, server.port)
        server.run()
    log.info("stopped")


def _say(batch: BatchEngine, model_id: str, host: str, port: int) -> None:
    tokens = batch.pool.n_block * batch.pool.block_size
    log.info("%s on %s; the cache holds %d tokens", model_id, batch.engine.device.info.name, tokens)
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
