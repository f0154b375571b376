"""Lines of the log: what they hold, and what they leave out."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from vkllm.serve.logs import TALKATIVE, LogFormat, configure

SECRET = "the hidden badger"
FACTS = {
    "request_id": "req_1",
    "method": "GET",
    "route": "/x",
    "status": 200,
    "total_s": 0.5,
    "client_gone": False,
    "error": None,
}


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root, levels = logging.getLogger(), {name: logging.getLogger(name).level for name in TALKATIVE}
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, was in levels.items():
        logging.getLogger(name).setLevel(was)


def written(form: LogFormat, *, prompts: bool = False) -> list[str]:
    """The lines of a few things that happen."""
    to = io.StringIO()
    configure(form, "debug", prompts=prompts, to=to)
    logging.getLogger("vkllm.serve.requests").info("%s %s", "GET", "/x", extra={"facts": FACTS})
    try:
        raise KeyError(SECRET)
    except KeyError:
        logging.getLogger("vkllm.serve").exception("a bug")
    logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: <Task exception=ValueError(%r)>", SECRET)
    logging.getLogger("websockets.server").debug("< TEXT %s", SECRET)
    logging.getLogger("uvicorn.error").info('"WebSocket /v1/stream?key=%s" [accepted]', SECRET)
    return to.getvalue().splitlines()


def test_one_json_object_a_line() -> None:
    request, bug, task = (json.loads(line) for line in written("json"))
    assert {key: request[key] for key in FACTS} == FACTS and request["level"] == "info" and request["message"] == "GET /x"
    assert request["time"].endswith("+00:00") and request["logger"] == "vkllm.serve.requests"
    assert bug["message"] == "a bug" and "raise KeyError(SECRET)" in bug["traceback"] and bug["traceback"].endswith("KeyError")
    assert task["message"] == "Task exception was never retrieved"


def test_text_leaves_out_what_says_nothing() -> None:
    lines = written("text")
    assert lines[0].endswith('INFO vkllm.serve.requests GET /x request_id="req_1" total_s=0.5')


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_words_of_a_client_unless_asked_for(form: Any) -> None:
    assert SECRET not in "\n".join(written(form)) and SECRET in "\n".join(written(form, prompts=True))
