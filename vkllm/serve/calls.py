"""One request, or one prompt over a socket: its id, what must end with it, and what its line in the log says."""

from __future__ import annotations

import logging
import re
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

if TYPE_CHECKING:
    from vkllm.serve.runs import Run

log = logging.getLogger("vkllm.serve.requests")
QUIET = frozenset({"/", "/health", "/metrics", "/v1/homeostasis"})  # asked again and again: logged at level debug
_KEY = "vkllm.call"
_GOOD_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}")


def request_id(given: bytes = b"") -> str:
    """The client's own id where it is short and plain; otherwise a new one."""
    return given.decode() if _GOOD_ID.fullmatch(given) else f"req_{uuid.uuid4().hex[:24]}"


@dataclass(eq=False)
class Call:
    """`stack` is closed when the request ends, however it does. `prompts`: may what is asked and said be logged?"""

    id: str
    method: str = "GET"
    route: str = "other"
    status: int = 0
    prompts: bool = False
    stack: ExitStack = field(default_factory=ExitStack)
    run: Run | None = None
    client_gone: bool = False
    error: str | None = None  # the type or code of what went wrong, never its text
    _facts: dict[str, Any] = field(default_factory=dict)
    _started: float = field(default_factory=perf_counter)

    @classmethod
    def of(cls, scope: Scope) -> Call:
        """The call that the gate has put into a request's scope."""
        call: Call = scope[_KEY]
        return call

    def enter(self, scope: Scope) -> None:
        """Let `of` find it."""
        scope[_KEY] = self

    @property
    def id_fact(self) -> dict[str, Any]:
        """For `extra` of other lines in the log that belong to it."""
        return {"facts": {"request_id": self.id}}

    def note(self, **facts: Any) -> None:
        """Facts for the log: no text of a client."""
        self._facts |= facts

    def note_text(self, **texts: Any) -> None:
        """What a client sent, or was told: logged only where that was asked for."""
        if self.prompts:
            self._facts |= texts

    def close(self) -> None:
        """End what belongs to it, and write its line."""
        self.stack.close()
        level = logging.DEBUG if self.route in QUIET and self.status < 500 else logging.INFO
        log.log(level, "%s %s %s", self.method, self.route, self.status, extra={"facts": self._line()})

    def _line(self) -> dict[str, Any]:
        known = {"request_id": self.id, "method": self.method, "route": self.route, "status": self.status, **self._facts}
        if self.run is not None:
            known |= self.run.facts()
        known |= {"total_s": round(perf_counter() - self._started, 6), "client_gone": self.client_gone, "error": self.error}
        return known
