"""One file from the hub: resumed where it stopped, checked against its hash, and under its name only when it is whole.

`huggingface_hub` says where a file lies and with which credentials; it does not keep what it has when it is stopped, so the bytes
are fetched here.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from vkllm.errors import ConfigError, FileFormatError, VkllmError
from vkllm.hub.remote import RemoteFile, RemoteModel, gated, library

BLOCK = 1 << 20
TIMEOUT_S = 30.0
PAUSES_S = (0.5, 1.0, 2.0, 4.0)
"""Waits before trying again when nothing more came."""
Progress = Callable[[int], None]


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but takes no credentials to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            request.remove_header("Authorization")
        return request


def fetch(remote: RemoteModel, file: RemoteFile, target: Path, progress: Progress) -> None:
    """Fetch one file. What an earlier attempt left in `target`.part is kept and continued.

    Raises: FileFormatError: the bytes do not have the hub's hash; ConfigError: the network or the disk failed; RequestError: the
    hub refuses.
    """
    if not file.digest:
        raise FileFormatError(f"the hub tells no hash of {file.name}", hint="choose another file")
    part = target.with_name(f"{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _complete(remote, file, part, progress)
    except OSError as e:
        raise _disk_error(e, target) from e
    digest = _digest(part, file)
    if digest != file.digest:
        part.unlink()
        raise FileFormatError(
            f"{file.name} has the hash {digest[:16]}…; the hub says {file.digest[:16]}…",
            hint="it was deleted: pull again; if that does not help, a proxy or the hub changes the file",
        )
    os.replace(part, target)


def read_small(remote: RemoteModel, name: str, limit: int) -> str:
    """The text of a small file, or "" where it cannot be had: it is only for people to see."""
    try:
        with _open(remote, name, 0) as answer:
            return str(answer.read(limit).decode("utf-8", "replace"))
    except (VkllmError, OSError, http.client.HTTPException):
        return ""


def _complete(remote: RemoteModel, file: RemoteFile, part: Path, progress: Progress) -> None:
    """Append to `part` until it has the file's size. Gives up when nothing came several times in a row."""
    had = part.stat().st_size if part.exists() else 0
    if had > file.nbytes:
        part.unlink()
        had = 0
    progress(had)
    failures = 0
    while had < file.nbytes or not part.exists():
        trouble: Exception | str = "the connection ended early"
        before = had
        try:
            with _open(remote, file.name, had) as answer:
                had = _append(answer, part, had, file.nbytes, progress)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as e:
            trouble = e
            had = part.stat().st_size if part.exists() else 0
        if had >= file.nbytes and part.exists():
            return
        failures = 0 if had > before else failures + 1
        if failures >= len(PAUSES_S):
            raise ConfigError(
                f"{file.name}: {had} of {file.nbytes} bytes came, then {trouble}",
                hint="check the network and pull again: it goes on where it stopped",
            )
        time.sleep(PAUSES_S[failures])


def _append(answer: Any, part: Path, had: int, size: int, progress: Progress) -> int:
    """Write an answer behind what is there, or over it where the server began at the start. Returns the bytes that are there."""
    begin = had if answer.status == 206 else 0
    if begin != had:
        progress(-had)
    with open(part, "r+b" if part.exists() else "wb") as sink:
        sink.truncate(begin)
        sink.seek(begin)
        while begin < size and (block := answer.read(min(BLOCK, size - begin))):
            sink.write(block)
            begin += len(block)
            progress(len(block))
    return begin


def _open(remote: RemoteModel, name: str, offset: int) -> Any:
    """Begin to read a file of the repository at `offset`. Raises: VkllmError: the hub refuses; URLError: it cannot be reached."""
    hub = library()
    url = hub.hf_hub_url(remote.repo, name, revision=remote.revision, endpoint=os.environ.get("HF_ENDPOINT"))
    headers = {**hub.utils.build_hf_headers(library_name="vkllm"), "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    request = urllib.request.Request(url, headers={k.title(): v for k, v in headers.items()})
    try:
        return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as e:
        e.close()
        if e.code in (401, 403):
            raise gated(remote.repo) from e
        if e.code < 500 and e.code not in (408, 416, 429):
            raise ConfigError(f"the hub answered {e.code} for {name}", hint="pull again: the repository may have changed") from e
        raise


def _digest(path: Path, file: RemoteFile) -> str:
    """The file's hash, of the kind that the hub gave: sha256, or git's for blobs."""
    hasher = (
        hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    )
    with open(path, "rb") as source:
        while block := source.read(BLOCK):
            hasher.update(block)
    return hasher.hexdigest()


def _disk_error(error: OSError, target: Path) -> VkllmError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConfigError(
            f"the disk of {target.parent} is full", hint="free some space and pull again: it goes on where it stopped"
        )
    return ConfigError(f"{target}: {error.strerror or error}", hint="check the folder's permissions, or set VKLLM_MODELS_DIR")
