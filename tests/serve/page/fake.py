"""A server of the chat page that speaks the API by heart: every answer is a function of the model and the question."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from distilvlm.serve.page_files import POLICY, page_files

FILES = {file.path: file for file in page_files()}

MODELS = [
    {"id": "teacher", "sees": True, "boxes": False, "context": 4096, "parameters": 3_086_000_000, "geometry": "pad"},
    {"id": "student", "sees": True, "boxes": False, "context": 2048, "parameters": 228_500_000, "geometry": "pad"},
    {"id": "grounding", "sees": True, "boxes": True, "context": 2048, "parameters": 246_100_000, "geometry": "pad"},
    {"id": "text", "sees": False, "boxes": False, "context": 2048, "parameters": 134_500_000, "geometry": "pad"},
]

ENDLESS = "go on for ever"
BREAK = "break off"


@dataclass
class Fake:
    """What the server does and has seen.

    Attributes:
        answers: question → answer, or model and question → answer; any other question is answered by its own words.
        key: wanted as a bearer token.
        busy: so many questions are refused with 429 first.
        pause: seconds between pieces.
        asked: bodies of questions.
        left: how many clients went away before their answer had ended.
    """

    address: str = ""
    answers: dict[Any, str] = field(default_factory=dict)
    key: str | None = None
    busy: int = 0
    pause: float = 0.0
    models: list[dict[str, Any]] = field(default_factory=lambda: MODELS)
    asked: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0


def pictures_in(message: dict[str, Any]) -> list[str]:
    content = message["content"]
    return [] if isinstance(content, str) else [part["image_url"]["url"] for part in content[:-1]]


def text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else content[-1]["text"]


@contextmanager
def served(**settings: Any) -> Iterator[Fake]:
    fake = Fake(**settings)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                if self._known():
                    self._send(200, {"object": "list", "data": fake.models})
                return
            file = FILES.get(self.path)
            if file is None:
                self._send(404, {"error": {"message": "no such file"}})
                return
            self.send_response(200)
            self.send_header("Content-Type", file.kind)
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(file.content)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._known():
                return
            if fake.busy:
                fake.busy -= 1
                self._send(429, {"error": {"message": "the queue is full"}}, {"Retry-After": "1"})
                return
            fake.asked.append(body)
            try:
                self._answer(body)
            except (BrokenPipeError, ConnectionResetError):
                fake.left += 1

        def _answer(self, body: dict[str, Any]) -> None:
            question = text_of(body["messages"][-1])
            answer = fake.answers.get(
                (body["model"], question), fake.answers.get(question, f"{body['model']}: {question}")
            )
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            self._event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
            words = answer.split(" ")
            pieces = [word if word is words[-1] else f"{word} " for word in words]
            while True:
                for piece in pieces:
                    self._event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
                    time.sleep(fake.pause)
                if question != ENDLESS:
                    break
                time.sleep(0.01)
            if question == BREAK:
                return
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self._event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(pieces)}})
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, data: dict[str, Any]) -> None:
            self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())

        def _known(self) -> bool:
            known = fake.key is None or self.headers["Authorization"] == f"Bearer {fake.key}"
            if not known:
                self._send(401, {"error": {"message": "a key is wanted"}})
            return known

        def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.address = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
