"""`distilvlm teach`: one model behind HTTP, which gives hidden rows for a batch, and its head.

Whoever may reach it may use it: it listens on loopback unless told otherwise, and asks for a key if it was given one.
Bodies are safetensors and JSON, never pickles, of a limited size. Requests are received side by side and computed one
after another, by one thread: each further thread would bring a pool of its own for matrix products.

    GET  /v1/models      what the model is (`Description`)
    GET  /v1/vocabulary  id -> token, JSON
    GET  /v1/head        {head}
    POST /v1/hidden      `Question` -> {hidden}; ?model=FINGERPRINT&products=fp32|bf16
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from safetensors.torch import save
from torch import Tensor

from distilvlm.models import forward
from distilvlm.models.packing import require_packable
from distilvlm.models.vlm import VLM
from distilvlm.teachers.local import hidden_rows, meanings

from .description import Description
from .message import KIND, MessageError, Question

logger = logging.getLogger(__name__)

IDLE = 300.0
"""Seconds that a connection may say nothing, or not take what it asked for, before it is given up."""


class TeachingServer(ThreadingHTTPServer):
    """A model at an address; `serve` it until a signal, or `serve_forever` in a thread.

    Args:
        vlm: the model, on its device; it is frozen.
        name: how it is called.
        address: host and port; port 0 is one that is free.
        key: what a request must carry as a bearer token.
        largest: bytes of a request's body, at most.

    Raises:
        TeacherError: the model can't teach.
        OSError: the address is taken.
    """

    daemon_threads = False  # what is under way ends before the process does
    request_queue_size = 128

    def __init__(self, vlm: VLM, name: str, address: tuple[str, int], key: str | None, largest: int) -> None:
        self.vlm, self.name, self.key = vlm, name, key
        for tree in vlm.trees:
            tree.requires_grad_(False).eval()
        self.device = forward.head_weight(vlm.model).device
        self.description = Description.of(vlm, largest)
        self.closing, self._packable = False, False
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher")
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)  # closes itself where the address is taken

    @property
    def url(self) -> str:
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    def compute(self, work: Callable[[], bytes]) -> bytes:
        """What `work` gives, when all that was asked for before is done."""
        return self._worker.submit(work).result()

    def head(self) -> bytes:
        return save({"head": forward.head_weight(self.vlm.model).cpu().contiguous()})

    def hidden(self, body: bytes, products: str) -> bytes:
        """The rows that a question wants, in the dtype that they are computed in. Raises `MessageError`."""
        question = Question.unpack(body)
        question.require_fits(self.vlm)
        asked = question.to(self.device)
        if asked.sizes is not None and not self._packable:
            try:
                require_packable(self.vlm, "teacher")
            except ValueError as error:
                raise MessageError(str(error)) from None
            self._packable = True
        with torch.autocast(self.device.type, torch.bfloat16, enabled=products == "bf16"):
            rows: Tensor = hidden_rows(self.vlm, asked, asked.pictures, asked.rows)
        return save({"hidden": rows.cpu().contiguous()})

    def serve(self) -> None:
        """Answer until SIGINT or SIGTERM; what is under way then is answered still. A second signal ends at once."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: Any) -> None:
            for number, handler in before.items():
                signal.signal(number, handler)
            threading.Thread(target=self.shutdown).start()  # it waits for the loop that this handler interrupts

        for number in before:
            signal.signal(number, stop)
        try:
            self.serve_forever(poll_interval=0.2)
        finally:
            self.server_close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def server_close(self) -> None:
        """Take no more requests, answer those that are under way, and give everything back."""
        self.closing = True
        with self._lock:
            for connection in self._connections:
                _silence(connection)
        super().server_close()  # waits for the threads of all connections
        self._worker.shutdown()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.info("a connection of %s ended early", client_address[0], exc_info=True)


def _silence(connection: socket.socket) -> None:
    """Read nothing more from a connection: one that is idle ends, one that waits for its answer still gets it."""
    with contextlib.suppress(OSError):  # the other side was faster
        connection.shutdown(socket.SHUT_RD)


class _Handler(BaseHTTPRequestHandler):
    server: TeachingServer
    protocol_version = "HTTP/1.1"  # connections stay open
    server_version, sys_version = "distilvlm", ""
    disable_nagle_algorithm = True  # a header on its own would wait 40 ms for the other side's acknowledgement
    timeout = IDLE

    def do_GET(self) -> None:
        if not self._may():
            return
        path = urlsplit(self.path).path
        if path == "/v1/models":
            self._json(200, self.server.description.as_models(self.server.name))
        elif path == "/v1/vocabulary":
            self._json(200, meanings(self.server.vlm))
        elif path == "/v1/head":
            self._computed(self.server.head)
        else:
            self._fail(404, f"there is no {path}: /v1/models, /v1/vocabulary, /v1/head, /v1/hidden")

    def do_POST(self) -> None:
        if not self._may():
            return
        address = urlsplit(self.path)
        if address.path != "/v1/hidden":
            self._fail(404, f"nothing is posted to {address.path}: /v1/hidden")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._fail(411, "a request says how long it is (Content-Length)")
            return
        largest = self.server.description.largest
        if int(length) > largest:
            self._fail(413, f"{int(length):,} bytes are more than the {largest:,} of a request: see --largest")
            return
        asked = {name: values[-1] for name, values in parse_qs(address.query).items()}
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True  # whoever asked is gone
            return
        ours = self.server.description.fingerprint
        if asked.get("model") != ours:
            self._fail(412, f"this is the model {ours}, and {asked.get('model', 'none')} was asked")
        elif (products := asked.get("products", "fp32")) not in ("fp32", "bf16"):
            self._fail(400, f"products are fp32 or bf16, not {products}")
        else:
            self._computed(lambda: self.server.hidden(body, products))

    def _may(self) -> bool:
        key = self.server.key
        given = self.headers.get("Authorization", "")
        if key is None or hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            return True
        self._fail(401, "the key is wrong" if given else "a key is wanted")
        return False

    def _computed(self, work: Callable[[], bytes]) -> None:
        try:
            body = self.server.compute(work)
        except MessageError as error:
            self._fail(400, str(error))
        except Exception as error:  # told to whoever asked, who waits and asks again: the server lives on
            logger.exception("a request could not be answered")
            self._fail(500, f"{type(error).__name__}: {error}")
        else:
            self._send(200, KIND, body)

    def _json(self, status: int, content: Any) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _fail(self, status: int, message: str) -> None:
        """Say why not; the connection ends, since what else was sent has not been read."""
        self.close_connection = True
        self._json(status, {"error": {"message": message, "code": status}})

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.close_connection |= self.server.closing
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("%s %s", self.address_string(), format % args)
