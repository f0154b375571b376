"""A hub on 127.0.0.1 that holds small repositories and misbehaves on request."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """Files by name. `lies`: bytes that are sent in place of a file's. `info`: more of what the hub tells about the model."""

    files: dict[str, bytes]
    info: dict[str, Any] = field(default_factory=dict)
    lies: dict[str, bytes] = field(default_factory=dict)
    sha: str = SHA

    def described(self, name: str) -> dict[str, Any]:
        siblings = []
        for file, data in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            sibling: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": blob}
            if file.endswith((".gguf", ".safetensors", ".bin")):
                sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(sibling)
        known = {"tags": [], "cardData": {"license": "apache-2.0"}, "gated": False, "private": False, "downloads": 1, "likes": 0}
        return {"id": name, "modelId": name, "sha": self.sha, "siblings": siblings, **known, **self.info}


class Hub:
    """What the fake holds, how it misbehaves, and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.cut_after: list[int] = []  # bytes that the next answers send before the connection breaks
        self.refuse: int | None = None  # status of every file
        self.asked: list[tuple[str, str | None]] = []  # (file, Range)
        self.elsewhere: str | None = None  # another host, to which files are redirected
        self.authorizations: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(404, b"")

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.model("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else None)
        repository = self.hub.repositories.get("/".join(parts[:2]))
        if repository is None:  # the library asks for more than models
            return self.answer(404, b"")
        assert parts[2:4] == ["resolve", repository.sha], "files are asked for at the revision that was shown"
        self.file("/".join(parts[4:]), repository)

    def model(self, name: str, revision: str | None) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", repository.sha):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        self.answer(200, json.dumps(repository.described(name)).encode(), {"Content-Type": "application/json"})

    def file(self, name: str, repository: Repository) -> None:
        wanted = self.headers.get("Range")
        self.hub.asked.append((name, wanted))
        self.hub.authorizations.append(self.headers.get("Authorization"))
        if self.hub.refuse:
            return self.answer(self.hub.refuse, b"no")
        if self.hub.elsewhere and self.headers.get("Host") not in self.hub.elsewhere:
            return self.answer(302, b"", {"Location": self.hub.elsewhere + self.path})
        data = repository.lies.get(name, repository.files[name])
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        span = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if wanted else {}
        self.answer(206 if wanted else 200, data[start:], span)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Connection": "close", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        is_file = status in (200, 206) and "Content-Type" not in (headers or {})
        self.wfile.write(body[: self.hub.cut_after.pop(0)] if self.hub.cut_after and is_file else body)
        self.close_connection = True

    def log_message(self, *_: object) -> None: ...


@contextmanager
def served() -> Iterator[tuple[Hub, str]]:
    """An empty hub and its address, until the end of the context."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
