"""What every request must pass before anything looks into it: who asks, from where, and how much it sends."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .settings import Settings

LOOPBACK = ("127.0.0.1", "::1", "localhost")

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Refuses what a server's settings refuse; hands bodies on whole.

    Args:
        app: what is guarded.
        open_paths: needs no key: health and the page's own files, none of which tells anything.
        answered: told the path's pattern and the status of each response.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        open_paths: frozenset[str],
        answered: Callable[[str, int], None],
    ) -> None:
        self.app, self.settings, self.open_paths, self.answered = app, settings, open_paths, answered
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                self.answered(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        held: list[bytes] = []
        try:
            headers = Headers(scope=scope)
            self._require_known(scope, headers)
            if not await self._receive(receive, headers, held):
                return
            await self.app(scope, _once(b"".join(held), receive), told)
        except ApiError as error:  # ours: the application answers its own
            await error.response({"Connection": "close"})(scope, receive, told)
        finally:
            self._held -= sum(map(len, held))

    async def _receive(self, receive: Receive, headers: Headers, held: list[bytes]) -> bool:
        """Add the body's chunks to `held`; False if the client left instead."""
        try:
            async with asyncio.timeout(self.settings.receiving):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    held.append(message.get("body", b""))
                    self._held += len(held[-1])
                    self._require_room(sum(map(len, held)), headers)
                    if not message.get("more_body"):
                        return True
        except TimeoutError:
            raise ApiError(408, f"the body took more than {self.settings.receiving:.0f} s to arrive") from None

    def _require_known(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if self.settings.loopback and urlsplit(f"//{host}").hostname not in LOOPBACK:
            raise ApiError(421, f"this server listens on loopback and is not called '{host}'", code="host")
        origin = headers.get("origin")
        if origin is not None and origin not in self.settings.origins and urlsplit(origin).netloc != host:
            raise ApiError(403, f"pages of {origin} may not ask this server: see --allow-origin", code="origin")
        if self.settings.key is not None and scope["path"] not in self.open_paths:
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self.settings.key}".encode()):
                raise ApiError(401, "the key is wrong" if given else "a key is wanted", code="invalid_api_key")
        if headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "bodies are not decompressed: send it as it is")
        self._require_room(0, headers)

    def _require_room(self, held: int, headers: Headers) -> None:
        told = headers.get("content-length", "")
        length = max(held, int(told) if told.isdecimal() else 0)
        if length > self.settings.largest:
            raise ApiError(413, f"more than the {self.settings.largest:,} bytes of a request: see --largest")
        if self._held > self.settings.held:
            raise ApiError(429, "too much is being received", code="busy", retry_after=1)


def _once(body: bytes, receive: Receive) -> Receive:
    """The body as one message; what is received afterwards is that the client is gone."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message
