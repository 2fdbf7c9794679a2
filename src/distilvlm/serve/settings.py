"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Limits of a server, and whom it answers.

    Attributes:
        key: what requests must carry as a bearer token; None: none.
        loopback: whether it listens on loopback alone, where a request must also name a loopback host: a page of
            another site whose name was pointed here (DNS rebinding) does not.
        origins: other sites whose pages may ask.
        largest: bytes of a request's body, of an upload and of a picture that is fetched, each.
        held: bytes of all bodies that are being received or answered; more are told to come later.
        receiving: seconds that a body may take to arrive.
        pixels: of a picture.
        pictures: in a request.
        uploads: bytes of all uploads that are kept.
        kept: seconds that an upload is kept.
        hosts: `HOST` or `HOST:PORT` that pictures may be fetched from.
        fetching: seconds that fetching a picture may take.
        draining: seconds that answers which are under way may still take when the server is told to stop.
    """

    key: str | None = None
    loopback: bool = True
    origins: tuple[str, ...] = ()
    largest: int = 32 * MIB
    held: int = 256 * MIB
    receiving: float = 60.0
    pixels: int = 25_000_000
    pictures: int = 8
    uploads: int = 256 * MIB
    kept: float = 3600.0
    hosts: frozenset[str] = frozenset()
    fetching: float = 10.0
    draining: float = 30.0
