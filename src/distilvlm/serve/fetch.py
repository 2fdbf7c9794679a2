"""Pictures from other machines, of hosts that the server was told: off unless there are any.

A request must not reach what only this machine can (services of its network, metadata of a cloud). So a name is
resolved once, the address is looked at, and that very address is connected to: a name that means another address a
moment later (DNS rebinding) changes nothing. Every redirect is a new address of the same rules.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urljoin, urlsplit

REDIRECTS = 3
PORTS = {"http": 80, "https": 443}

Resolve = Callable[[str, int], list[str]]


class FetchError(ValueError):
    """A picture that is not fetched; the message says why."""


def is_public(address: str) -> bool:
    """Whether an IP address is of the internet: not private, loopback, link-local, or one of these in disguise."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return is_public(str(found.ipv4_mapped))
        if any(one is not None and not is_public(str(one)) for one in (found.sixtofour, *(found.teredo or ()))):
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


@dataclass(frozen=True)
class Fetcher:
    """Fetches from `hosts` only.

    Attributes:
        hosts: `HOST` (at the usual ports) or `HOST:PORT`.
        largest: bytes of a body, at most.
        seconds: for all of it, redirects included; finding a name's address is given as long as the system gives it.
        may: whether an address may be connected to.
    """

    hosts: Collection[str]
    largest: int
    seconds: float
    may: Callable[[str], bool] = is_public
    resolve: Resolve = resolve
    context: ssl.SSLContext = field(default_factory=ssl.create_default_context, repr=False)

    def fetch(self, url: str) -> bytes:
        """The body behind an address.

        Raises:
            FetchError: not allowed, too large, too slow, or not there.
        """
        end = time.monotonic() + self.seconds
        for _ in range(REDIRECTS + 1):
            status, location, body = self._once(self._allowed(url), end)
            if status == 200:
                return body
            if status not in (301, 302, 303, 307, 308) or location is None:
                raise FetchError(f"{urlsplit(url).hostname} answers with HTTP {status}")
            url = urljoin(url, location)
        raise FetchError(f"more than {REDIRECTS} redirects")

    def _allowed(self, url: str) -> SplitResult:
        if not self.hosts:
            raise FetchError("this server fetches nothing: send the picture as a data URI, or upload it")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise FetchError(f"no address: {error}") from None
        if parts.scheme not in PORTS:
            raise FetchError("only http, https and data: are read")
        if parts.username is not None or parts.password is not None:
            raise FetchError("an address with a name and password is not fetched")
        usual = port in (None, PORTS[parts.scheme])
        if f"{host}:{port or PORTS[parts.scheme]}" not in self.hosts and not (usual and host in self.hosts):
            raise FetchError(f"{parts.netloc} is not among the hosts that this server fetches from")
        return parts

    def _once(self, parts: SplitResult, end: float) -> tuple[int, str | None, bytes]:
        host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
        try:
            addresses = self.resolve(host, port)
            public = next((address for address in addresses if self.may(address)), None)
            if public is None:
                raise FetchError(f"{host} is no address of the internet")
            sock = socket.create_connection((public, port), timeout=_left(end))
            if parts.scheme == "https":
                sock = self.context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
            # A timeout is of one read, and a server may give a byte at a time: the whole is cut when its time is up.
            cut = threading.Timer(_left(end), _cut, (sock,))
            cut.start()
            try:
                with sock:
                    answer = self._answer(sock, parts, port)
                _left(end)  # one that was cut may look like one that ended
                return answer
            finally:
                cut.cancel()
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            _left(end)
            raise FetchError(f"{host} does not answer: {type(error).__name__}") from None

    def _answer(self, sock: socket.socket, parts: SplitResult, port: int) -> tuple[int, str | None, bytes]:
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        connection = http.client.HTTPConnection(parts.hostname or "", port)
        connection.sock, connection.auto_open = sock, 0  # never anywhere by name
        connection.default_port = PORTS[parts.scheme]
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        reply = connection.getresponse()
        if reply.status != 200:
            return reply.status, reply.getheader("Location"), b""
        body = reply.read(self.largest + 1)
        if len(body) > self.largest:
            raise FetchError(f"more than {self.largest:,} bytes")
        if reply.length:
            raise http.client.IncompleteRead(body, reply.length)
        return 200, None, body


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # over already
        socket.socket.shutdown(
            sock, socket.SHUT_RDWR
        )  # the system's own: TLS would take its state away from the reader


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise FetchError("it takes too long")
    return left
