"""Servers for tests: `distilvlm teach` in a thread that can be killed, and one that answers as vLLM or SGLang does."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distilvlm.models import forward
from distilvlm.models.vlm import VLM
from distilvlm.teachers.local import hidden_rows
from distilvlm.teachers.remote import TeachingServer
from distilvlm.teachers.remote.message import Question
from tests.runs.tiny import CHATML

LARGEST = 1 << 20


class Teaching:
    """`distilvlm teach` in a thread, at one port for all its lives."""

    def __init__(self, vlm: VLM, key: str | None = None) -> None:
        self.vlm, self.key, self.port = vlm, key, 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.server = TeachingServer(self.vlm, "tiny", ("127.0.0.1", self.port), self.key, LARGEST)
        self.port = self.server.server_port
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def kill(self) -> None:
        """As a process that dies: nothing is answered any more, connections break."""
        self.server.shutdown()
        with self.server._lock:
            for connection in self.server._connections:
                connection.shutdown(socket.SHUT_RDWR)
        self.server.server_close()


class Completions(ThreadingHTTPServer):
    """A VLM that answers as vLLM (`/v1/completions`, `/v1/chat/completions`) or SGLang (`/generate`) does.

    `variant` is what is wrong with it: log-probabilities "shifted" by one position, or "bare" of the tokens that stand
    there, a token in "front", a template of its "own", "no_ids".
    """

    daemon_threads = True

    def __init__(self, vlm: VLM, kind: str = "vllm", port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.vlm, self.kind, self.variant = vlm, kind, ""
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def read(self, text: str) -> list[int]:
        return self.vlm.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids  # pyright: ignore

    def log_probabilities(self, ids: list[int], pictures: list[Tensor]) -> tuple[list[int], Tensor]:
        """The prompt with its image tokens expanded, and [positions, vocabulary] of what stands behind each."""
        layout, image = self.vlm.layout, self.vlm.image_id
        ids = [one for id in ids for one in ([id] * layout.placeholders if id == image else [id])]
        row = torch.tensor(ids)
        question = Question(
            input_ids=torch.where(row == image, 0, row)[None],
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            placeholder_rows=(row == image).nonzero().flatten(),
            rows=torch.arange(len(ids)),
            pictures=torch.stack(pictures) if pictures else None,
        )
        hidden = hidden_rows(self.vlm, question, question.pictures, question.rows)
        return ids, (hidden @ forward.head_weight(self.vlm.model).T).log_softmax(-1).detach()


class _Handler(BaseHTTPRequestHandler):
    server: Completions
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        model = {"id": "tiny", "object": "model", "owned_by": self.server.kind, "root": "somewhere/tiny"}
        self._reply({"object": "list", "data": [model]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append((self.path, body))
            self._reply(_sglang(self.server, body) if self.path == "/generate" else _vllm(self.server, self.path, body))

    def _reply(self, content: Any) -> None:
        payload = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        pass


def _vllm(server: Completions, path: str, body: dict[str, Any]) -> dict[str, Any]:
    assert body["max_tokens"] == 1 and body["return_token_ids"] and body["model"] == "tiny"
    pictures: list[Tensor] = []
    if path == "/v1/chat/completions":
        messages = body["messages"]
        pictures = [_picture(p["image_url"]["url"]) for m in messages for p in m["content"] if "image_url" in p]
        template = body["chat_template"]
        if server.variant == "own":
            flat = "".join("<image>" if "image_url" in p else p["text"] for m in messages for p in m["content"])
            template, messages = CHATML, [{"role": "user", "content": flat}]
        ids = server.read(jinja2.Template(template).render(messages=messages))
    else:
        given = body["prompt"]
        ids = server.read(given) if isinstance(given, str) else given
    if server.variant == "front":
        ids = [1, *ids]
    ids, values = server.log_probabilities(ids, pictures)
    told: list[Any] = [None]
    for position in range(1, len(ids)):
        stands = ids[position] if ids[position] != server.vlm.image_id else 0
        row = values[position - 1] if server.variant != "shifted" else values[position]
        chosen = row.topk(body["prompt_logprobs"]).indices.tolist()
        if server.variant != "bare":
            chosen = list(dict.fromkeys([stands, *chosen]))  # as vLLM: the token that stands there comes first
        told.append({str(id): {"logprob": float(row[id]), "rank": 1, "decoded_token": "?"} for id in chosen})
    facts = {"prompt_logprobs": told, "prompt_token_ids": None if server.variant == "no_ids" else ids}
    choice = {"index": 0, "text": "?"}
    return {"choices": [choice], **facts} if "chat" in path else {"choices": [{**choice, **facts}]}


def _sglang(server: Completions, body: dict[str, Any]) -> dict[str, Any]:
    assert body["return_logprob"] and body["logprob_start_len"] == 0
    ids = body["input_ids"] if "input_ids" in body else server.read(body["text"])
    ids, values = server.log_probabilities(ids, [_picture(one) for one in body.get("image_data", [])])
    # Under pictures stand numbers that are no ids: hashes of what is seen.
    shown = [10_000_000 + position if id == server.vlm.image_id else id for position, id in enumerate(ids)]
    standing: list[Any] = [[None, shown[0], None]]
    likeliest: list[Any] = [None]
    for position in range(1, len(ids)):
        row = values[position - 1]
        standing.append([float(row[min(ids[position], len(row) - 1)]), shown[position], None])
        top = (values[position] if server.variant == "shifted" else row).topk(body["top_logprobs_num"])
        likeliest.append([[float(value), int(id), None] for value, id in zip(*top, strict=True)])
    return {"text": "?", "meta_info": {"input_token_logprobs": standing, "input_top_logprobs": likeliest}}


def _picture(uri: str) -> Tensor:
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).permute(2, 0, 1)


@contextmanager
def serving(server: Completions) -> Iterator[Completions]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
