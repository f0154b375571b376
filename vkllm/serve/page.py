"""The web page: a chat and a live view, as plain files that ask nobody but this server for anything.

The policy allows scripts and styles of these files only, nothing within the page or from elsewhere: text of a model stays text.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

FOLDER = Path(__file__).with_name("static")
FILES = {  # path → (file, media type)
    "/": ("index.html", "text/html"),
    "/static/style.css": ("style.css", "text/css"),
    "/static/chat.js": ("chat.js", "text/javascript"),
    "/static/live.js": ("live.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page's files. They are read once."""
    for path, (file, media_type) in FILES.items():
        _add(app, path, (FOLDER / file).read_bytes(), media_type)


def _add(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @app.get(path)
    async def page_file() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)
