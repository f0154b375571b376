"""`vkllm serve`: load a model, then serve it until a signal comes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args
from weakref import ref

import typer

from vkllm.config import CacheType, RuntimeConfig, speculate_of
from vkllm.errors import ConfigError
from vkllm.homeostasis import HomeostasisConfig, Mode
from vkllm.hub_cli import pulled_model
from vkllm.serve import logs
from vkllm.serve.options import Address, ConnectionLimits, ServerOptions, model_name
from vkllm.serve.pacing import paced
from vkllm.serve.server import Server

if TYPE_CHECKING:
    from vkllm.batching import BatchEngine, Pacer
    from vkllm.engine import LLMEngine

log = logging.getLogger("vkllm.serve")


def key_from(given: str | None, file: Path | None) -> str | None:
    """The API key: of the option, its file, or VKLLM_API_KEY. Raises: ConfigError: an empty one."""
    key = file.read_text().strip() if file is not None else given if given is not None else os.environ.get("VKLLM_API_KEY")
    if key is not None and not key:
        raise ConfigError("the API key is empty", hint="give a key, or none at all")
    return key


def serve(
    model: Annotated[
        str, typer.Argument(help="A GGUF file, a Hugging Face folder, a pulled model's name, or `tiny`.", callback=pulled_model)
    ],
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
    cache_tokens: Annotated[
        int | None, typer.Option(min=1, help="Positions of the KV cache; default: for all at once, as memory allows.")
    ] = None,
    cache_type: Annotated[str, typer.Option(help="f16, or q8_0: holds nearly twice the tokens, a little less exact.")] = "f16",
    speculate: Annotated[str, typer.Option(help="Try several tokens a step where words repeat: auto, off or how many.")] = "auto",
    max_connections: Annotated[int, typer.Option(min=1, help="Connections that may be open at once.")] = 4096,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_format: Annotated[str, typer.Option(help="text, or json: one object a line.")] = "text",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what clients ask and are told.")] = False,
) -> None:
    """Serve a model with OpenAI's API. Ctrl-C or SIGTERM stops it: running streams may finish. SIGHUP loads the model again."""
    configure_logs(log_format, log_level, log_prompts)
    key = key_from(api_key, api_key_file)
    if key is None and host not in ("127.0.0.1", "localhost", "::1"):
        log.warning("listening on %s without an API key: everybody who reaches it may use it", host)
    runtime = RuntimeConfig(
        device=device,
        n_ctx=n_ctx,
        n_seq=parallel,
        cache_tokens=cache_tokens,
        cache_type=cast(CacheType, cache_type),
        speculate=speculate_of(speculate),
    )
    serve_model(
        runtime,
        Address(host, port),
        ServerOptions(alias or model_name(model), key, max_body, rate, path=model, log_prompts=log_prompts),
        n_queue=queue,
        max_connections=max_connections,
        stop_s=stop_after,
        pacing=HomeostasisConfig(mode=cast(Mode, homeostasis), target_c=target),
        watts=power_limit,
    )


def configure_logs(form: str, level: str, prompts: bool) -> None:
    """Raises: ConfigError: an unknown form or level."""
    levels = ("debug", "info", "warning", "error")
    for name, given, known in (("format", form, get_args(logs.LogFormat)), ("level", level.lower(), levels)):
        if given not in known:
            raise ConfigError(f"--log-{name} is {given!r}", hint=f"choose {', '.join(known)}")
    logs.configure(cast(logs.LogFormat, form), level, prompts=prompts)


def serve_model(
    runtime: RuntimeConfig,
    address: Address,
    options: ServerOptions,
    *,
    n_queue: int,
    max_connections: int,
    stop_s: float,
    pacing: HomeostasisConfig,
    watts: float | None,
) -> None:
    """Load the model of `options.path` and serve until a signal. Raises: ConfigError: the `serve` extra is not installed."""
    try:
        from vkllm.serve.app import create_app, served
        from vkllm.serve.connections import allowed_connections
        from vkllm.serve.host import ModelHost
        from vkllm.serve.metrics import Metrics
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed", hint="pip install 'vkllm[serve]'") from error
    from vkllm.engine import LLMEngine

    metrics, limits = Metrics(), ConnectionLimits(allowed_connections(max_connections))
    if limits.most < max_connections:
        log.warning("the limit on open files allows %d connections, not %d", limits.most, max_connections)
    engine = LLMEngine.init_model(options.path, runtime)
    with ExitStack() as stack:
        stack.callback(close_if_there, ref(engine))  # by a weak reference: a reload may end it, and then its memory is to go
        pacer = stack.enter_context(paced(engine, pacing, watts))

        def load(path: str) -> BatchEngine:
            return batched(LLMEngine.init_model(pulled_model(path), runtime), pacer, n_queue, metrics.observe)

        host = ModelHost(served(batched(engine, pacer, n_queue, metrics.observe), options), load)
        app = create_app(host, options, metrics)
        server = Server(app, address, stop_s=stop_s, limits=limits, max_message=options.max_body, hang_up=host.reload_soon)
        _say(engine, options.model_id, address.host, server.port)
        del engine
        server.run()
    log.info("stopped")


def close_if_there(engine: ref[LLMEngine]) -> None:
    """Close an engine, unless nothing is left of it."""
    if (found := engine()) is not None:
        found.close()


def batched(engine: LLMEngine, pacer: Pacer | None, n_queue: int, observe: Callable[[str, float], None]) -> BatchEngine:
    """An engine for many requests, which mends a lost device. Where that fails, the engine is closed."""
    from vkllm.batching import BatchEngine

    try:
        return BatchEngine(engine, pacer=pacer, n_queue=n_queue, observe=observe, revive=True)
    except BaseException:
        engine.close()
        raise


def _say(engine: LLMEngine, model_id: str, host: str, port: int) -> None:
    tokens = engine.chain.n_block * engine.runtime.block_size
    log.info("%s on %s; the cache holds %d tokens", model_id, engine.device.info.name, tokens)
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
