"""What `vkllm serve` logs: one JSON object a line, or text. Neither prompts nor keys, unless that is asked for.

Texts of exceptions may quote a client, so a traceback is logged without them; libraries that would log frames and headers of a
connection at level debug are kept quiet.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, TextIO

LogFormat = Literal["json", "text"]
TALKATIVE = ("uvicorn.error", "uvicorn.access", "websockets", "asyncio", "httpx", "httpcore")
IN_MESSAGE = ("method", "route", "status")
ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class _Formatter(logging.Formatter):
    """What both forms share. `prompts`: texts of exceptions too."""

    def __init__(self, prompts: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")
        self._prompts = prompts

    def formatException(self, ei: ExcInfo) -> str:
        kind, error, trace = ei
        if self._prompts and kind is not None:
            return "".join(traceback.format_exception(kind, error, trace)).rstrip()
        return "".join(traceback.format_tb(trace)) + (kind.__name__ if kind else "")

    def said(self, record: logging.LogRecord) -> str:
        """The message; asyncio puts exceptions into the lines after the first one."""
        message = record.getMessage()
        return message.partition("\n")[0] if record.name == "asyncio" and not self._prompts else message


class JsonFormatter(_Formatter):
    """One JSON object a line: time, level, logger, message, and the record's `facts`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self.said(record),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(_Formatter):
    """For reading: the facts follow the message as key=value, without those that it says already, or that say nothing."""

    def format(self, record: logging.LogRecord) -> str:
        record.msg, record.args = self.said(record), None
        facts = {k: v for k, v in getattr(record, "facts", {}).items() if k not in IN_MESSAGE and v not in (None, False)}
        told = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in facts.items()]
        text = super().format(record)
        return " ".join([text, *told]) if told else text


def configure(form: LogFormat, level: str, *, prompts: bool = False, to: TextIO | None = None) -> None:
    """Set up logging of the whole process, to stderr or `to`."""
    handler = logging.StreamHandler(to or sys.stderr)
    handler.setFormatter(JsonFormatter(prompts) if form == "json" else TextFormatter(prompts))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
