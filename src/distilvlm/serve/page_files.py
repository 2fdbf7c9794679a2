"""The chat page's files, read once: a request's path is looked up among their names and never opened."""

from __future__ import annotations

import mimetypes
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

PAGE = Path(__file__).parent / "page"

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "font-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""What the page may load: its own files and pictures that it has at hand. Nothing of it is inline."""


@dataclass(frozen=True)
class PageFile:
    path: str  # as it is asked for
    kind: str
    content: bytes


def page_files(directory: Path = PAGE) -> list[PageFile]:
    """All files of the page; `index.html` is at `/`, too."""
    found: list[PageFile] = []
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        if file.suffix == ".js":
            kind = "text/javascript"  # some systems say otherwise, and browsers run nothing else
        name = file.relative_to(directory).as_posix()
        found.append(PageFile("/" if name == "index.html" else f"/{name}", kind, file.read_bytes()))
    return found


def routes(files: list[PageFile]) -> APIRouter:
    """A route per file; none of them is part of the API's document."""
    router = APIRouter(include_in_schema=False)
    for file in files:
        router.add_api_route(file.path, _given(file), methods=["GET", "HEAD"])
    return router


def _given(file: PageFile) -> Callable[[], Awaitable[Response]]:
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache", "X-Frame-Options": "DENY"}

    async def given() -> Response:
        return Response(file.content, media_type=file.kind, headers=headers)

    return given
