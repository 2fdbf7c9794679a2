"""A server over HTTP that is asked until it answers: one that is away for a while costs time and nothing else.

Asked with the standard library alone. Every question may be put again, since answers depend on nothing else.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from distilvlm.recipe.teachers import RemoteSpec
from distilvlm.teachers.interface import TeacherError

logger = logging.getLogger(__name__)

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP states of a server that may answer the same question later."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds before a question is put again: doubled each time, up to the longest."""

TOLD_EVERY = 60.0
"""Seconds between two words about a server that is still away."""


@dataclass(frozen=True)
class Ask:
    """One question."""

    path: str
    body: bytes | None = None  # None: GET
    kind: str = "application/json"


class RefusedError(TeacherError):
    """The server answered, and will not do what it was asked: the same question has the same answer tomorrow."""

    def __init__(self, url: str, status: int, text: str) -> None:
        self.status = status
        super().__init__(f"{url} refused (HTTP {status}): {text}")


class _AwayError(Exception):
    """No answer this time."""


class Connection:
    """The way to one server.

    Args:
        spec: its address, key, timeout and patience.
        greet: called before anything is asked over a connection that is new, or new again behind an outage: the place
            to see that it is (still) the same model. It may use `once`.

    Raises:
        TeacherError: the address is none, or the variable that should hold the key is not set.
    """

    def __init__(self, spec: RemoteSpec, greet: Callable[[], None]) -> None:
        self.url, self.timeout, self.patience = spec.url.rstrip("/"), spec.timeout, spec.patience
        self._address = _address(self.url)
        self._headers, self._key_variable = _key(spec), spec.key_variable
        self._greet, self._greeted = greet, False
        self._open: list[http.client.HTTPConnection] = []
        self._used = 0  # of those that are open, how many have answered before

    def ask(self, asks: Sequence[Ask]) -> list[bytes]:
        """The bodies of the answers; several questions are put at the same time, each over a connection of its own.

        Raises:
            TeacherError: the server refused one of them, is another one, or was away for longer than `patience`.
        """
        outage: _Outage | None = None
        while True:
            stale = self._used > 0
            try:
                if not self._greeted:
                    self._greet()
                    self._greeted = True
                replies = self.once(asks)
            except _AwayError as away:
                self.close()
                if outage is None and stale:
                    continue  # a connection that lay idle was given up by the server: no outage yet
                outage = outage or _Outage(self)
                outage.wait(str(away))
            else:
                if outage is not None:
                    outage.over()
                return replies

    def once(self, asks: Sequence[Ask]) -> list[bytes]:
        """As `ask`, in one attempt; for `greet`."""
        while len(self._open) < len(asks):
            kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
            host = self._address.hostname
            assert host is not None  # _address has seen to it
            self._open.append(kind(host, self._address.port, timeout=self.timeout))
        replies: list[bytes] = []
        try:
            for connection, one in zip(self._open, asks, strict=False):
                method = "GET" if one.body is None else "POST"
                headers = {**self._headers, "Content-Type": one.kind, "Accept-Encoding": "identity"}
                connection.request(method, self._address.path + one.path, one.body, headers)
            for connection, _ in zip(self._open, asks, strict=False):
                reply = connection.getresponse()
                replies.append(self._body(reply.status, reply.read()))
        except (OSError, http.client.HTTPException) as error:
            # refused or broken connections, time-outs, answers that end too early
            raise _AwayError(f"{type(error).__name__}: {error}") from None
        except BaseException:
            self.close()  # answers that were not read are of no use to the next question
            raise
        self._used = len(self._open)
        return replies

    def close(self) -> None:
        """Give all connections back; the next question greets anew."""
        for connection in self._open:
            connection.close()
        self._open, self._used, self._greeted = [], 0, False

    def _body(self, status: int, body: bytes) -> bytes:
        if status == 200:
            return body
        text = _said(body)
        if status in PASSING:
            raise _AwayError(f"HTTP {status}: {text}")
        if status in (401, 403):
            text += f"; the key is what the variable {self._key_variable or 'teacher.remote.key_variable'} holds"
        raise RefusedError(self.url, status, text)


class _Outage:
    """A server that is away, from the first question without an answer."""

    def __init__(self, connection: Connection) -> None:
        self.url, self.patience = connection.url, connection.patience
        self.began = time.monotonic()
        self.told: float | None = None  # when it was last spoken of, in seconds of the outage
        self.pause = FIRST_PAUSE

    def wait(self, problem: str) -> None:
        """Some time, unless patience is at its end."""
        gone = time.monotonic() - self.began
        left = self.patience - gone
        if left <= 0:
            raise TeacherError(
                f"the teacher at {self.url} did not answer for {gone:.0f} s ({problem}). Nothing is lost: start it "
                "again, and the same command goes on behind the last checkpoint; teacher.remote.patience sets how long "
                "a run waits"
            )
        if self.told is None:
            logger.warning(
                "the teacher at %s does not answer (%s): waiting for it, at most %.0f s", self.url, problem, left
            )
            self.told = gone
        elif gone - self.told >= TOLD_EVERY:
            logger.warning("still waiting for the teacher at %s: %.0f s (%s)", self.url, gone, problem)
            self.told = gone
        time.sleep(min(self.pause, left))
        self.pause = min(2 * self.pause, LONGEST_PAUSE)

    def over(self) -> None:
        logger.warning(
            "the teacher at %s answers again after %.0f s: going on", self.url, time.monotonic() - self.began
        )


def _said(body: bytes) -> str:
    """What an error's body says; as it is, where it is no JSON with a message in it."""
    try:
        given = json.loads(body)
        return str(given.get("error", given)["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return body[:2000].decode(errors="replace").strip()


def _address(url: str) -> SplitResult:
    address = urlsplit(url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise TeacherError(f"teacher.remote.url '{url}' is no address: write http://HOST:PORT")
    return address


def _key(spec: RemoteSpec) -> dict[str, str]:
    """The header that carries the key; it is never part of a recipe, which lies in run directories."""
    if spec.key_variable is None:
        return {}
    key = os.environ.get(spec.key_variable)
    if not key:
        raise TeacherError(
            f"teacher.remote.key_variable names {spec.key_variable}, which is not set: export it with the server's key"
        )
    return {"Authorization": f"Bearer {key}"}
