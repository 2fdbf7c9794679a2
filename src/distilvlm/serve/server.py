"""An application at an address, until it is told to stop."""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from .desk import Desk
from .settings import Settings

logger = logging.getLogger(__name__)

FLUSHING = 5
"""Seconds that responses which are complete may still take to reach their clients."""


class ServeError(ValueError):
    """A server that can't be started; the message says what to do."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_safe(host: str, settings: Settings, without_key: bool) -> None:
    """Raises `ServeError` where anybody could ask, and nobody said that they may."""
    if settings.key is None and not is_loopback(host) and not without_key:
        raise ServeError(
            f"whoever reaches {host} could use this server: give it a key (--api-key, or DISTILVLM_API_KEY), "
            "or say --without-key"
        )


class Server(uvicorn.Server):
    """Serves `application(...)`; `run` it. The first SIGINT or SIGTERM drains, a second one ends at once.

    While it drains, answers under way are finished, new requests get a 503, and `/health` says so.

    Args:
        host, port: where; port 0 is one that is free.

    Raises:
        ServeError: the address can't be had.
    """

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        self.desk: Desk = app.state.desk
        try:
            self._socket = socket.create_server(
                (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
            )
        except OSError as error:
            raise ServeError(f"can't listen at {host}, port {port} ({error}): choose another --port") from None
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=FLUSHING,
        )
        super().__init__(config)
        self._stopping = False

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal, or until `stop` is called."""
        super().run(sockets=[self._socket])

    def stop(self) -> None:
        """Drain, and end. Returns at once; a second call does not wait for anything."""
        if self._stopping:
            self.should_exit = self.force_exit = True
            return
        self._stopping = True
        logger.info("stopping: answers under way have %.0f s, new requests get 503", self.desk.settings.draining)
        threading.Thread(target=self._drain, daemon=True).start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stop()

    def _drain(self) -> None:
        try:
            self.desk.drain()
        finally:
            self.should_exit = True
