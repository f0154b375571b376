"""Which line of the user's Python is running: every operation remembers it, so that errors can name it."""

from __future__ import annotations

import contextlib
import os
import sys

from ..ir import Where

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
SKIPPED: dict[str, bool] = {contextlib.__file__: True}


def _is_internal(filename: str) -> bool:
    known = SKIPPED.get(filename)
    if known is None:
        known = SKIPPED[filename] = os.path.abspath(filename).startswith(PACKAGE)
    return known


def caller() -> Where:
    """File and line of the innermost frame outside this package."""
    frame = sys._getframe(1)
    while _is_internal(frame.f_code.co_filename) and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def at(where: Where | None) -> str:
    """`where` as it appears at the start of an error message."""
    return f"{where[0]}:{where[1]}: " if where else ""
