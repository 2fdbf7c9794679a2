"""A server at a free port of loopback, in a thread."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image

from distilvlm.serve.app import application
from distilvlm.serve.interface import Engine
from distilvlm.serve.server import Server
from distilvlm.serve.settings import Settings


@contextmanager
def serving(*engines: Engine, settings: Settings | None = None) -> Iterator[Server]:
    server = Server(application(engines, settings), "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    url = server.url
    thread.start()
    until(lambda: server.started)
    server.address = url.removeprefix("http://")
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive()


def until(true: Any, seconds: float = 5.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never was"
        time.sleep(0.002)


def ask(
    server: Server,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, str], Any]:
    """Status, headers (small letters) and the body (JSON if it is) of one request; `body`: bytes, or made JSON."""
    connection = http.client.HTTPConnection(server.address, timeout=10)
    given = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, given, {"Content-Type": "application/json", **(headers or {})})
    reply = connection.getresponse()
    content = reply.read()
    told = {name.lower(): value for name, value in reply.getheaders()}
    connection.close()
    return reply.status, told, json.loads(content) if "json" in told.get("content-type", "") else content


def png(width: int = 8, height: int = 6, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(stream, form, **options)
    return stream.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def showing(url: str, text: str = "what is it") -> list[dict[str, Any]]:
    """Messages with a picture."""
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def saying(*texts: str) -> Sequence[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
