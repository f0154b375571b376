"""What a server is told: plain values, for which nothing of the `serve` extra is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. Port 0: any free one."""

    host: str = "127.0.0.1"
    port: int = 8000


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """`most`: connections that may be open at once; `patience_s`: until one must have asked for something; `stall_s`: how long a
    client may leave unread what it was sent."""

    most: int = 4096
    patience_s: float = 15.0
    stall_s: float = 30.0


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """`model_id`: the name that clients ask for; `max_body`: bytes of a request; `rate`: requests a minute from one
    address; `template_s`: a chat template's deadline; `path`: what the model was loaded from; `idle_s`: how long a WebSocket
    may be open without a request; `log_prompts`: let the log hold what clients ask and are told; `body_s`: how long a request's
    body may take to arrive."""

    model_id: str
    api_key: str | None = None
    max_body: int = 4 << 20
    rate: float | None = None
    template_s: float = 2.0
    path: str = ""
    idle_s: float = 300.0
    log_prompts: bool = False
    body_s: float = 60.0


def model_name(path: str) -> str:
    """The name that clients use for a model: of its file or folder, or the one that it goes by."""
    return Path(path).name.removesuffix(".gguf")
