"""What a server refuses, and that it says why."""

from __future__ import annotations

import http.client
import io
import re
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distilvlm.serve.server import ServeError, Server, is_loopback, require_safe
from distilvlm.serve.settings import Settings

from .fake_engine import FakeEngine
from .running import ask, data_uri, png, saying, serving, showing

CHAT = "/v1/chat/completions"
SMALL = Settings(largest=200_000, held=250_000, pixels=100_000, pictures=2, receiving=0.3, uploads=2_000, kept=0.4)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(FakeEngine(), settings=SMALL) as running:
        yield running


def refused(server: Server, body: Any, path: str = CHAT, **headers: str) -> tuple[int, str]:
    """Status and message of a request that is not answered, told in OpenAI's form."""
    status, _, told = ask(server, "POST", path, body, headers)
    assert set(told) == {"error"} and set(told["error"]) == {"message", "type", "param", "code"}
    return status, told["error"]["message"]


def with_picture(data: bytes, kind: str = "image/png") -> dict[str, Any]:
    return {"model": "parrot", "messages": showing(data_uri(data, kind))}


def with_url(url: str) -> dict[str, Any]:
    return {"model": "parrot", "messages": showing(url)}


def bomb(width: int, height: int) -> bytes:
    """A small file that claims many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(4_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "body"),
        (b"{", 400, "no JSON"),
        (b"\xff\xfe", 400, "no JSON"),
        (b"[" * 90_000, 400, "nested too deeply"),
        (b'{"a":' * 30_000, 400, "nested too deeply"),
        (b'{"model": "parrot", "max_tokens": ' + b"9" * 5000 + b"}", 400, ""),
        ([], 400, "the body"),
        ({"model": "parrot"}, 400, "messages: Field required"),
        ({"model": "cockatoo", "messages": saying("a")}, 404, "no model 'cockatoo': there is parrot"),
        ({"model": "../../etc/passwd", "messages": saying("a")}, 404, "no model"),
        ({"model": "parrot", "messages": []}, 400, "messages"),
        ({"model": "parrot", "messages": saying("a"), "top_k": 3}, 400, "top_k: there is no such field"),
        ({"model": "parrot", "messages": saying("a"), "n": 2}, 400, "n: .*one answer"),
        ({"model": "parrot", "messages": saying("a"), "frequency_penalty": 0.5}, 400, "penalties are not supported"),
        ({"model": "parrot", "messages": saying("a"), "tools": [{}]}, 400, "call no tools"),
        ({"model": "parrot", "messages": saying("a"), "logprobs": "yes"}, 400, "logprobs"),
        ({"model": "parrot", "messages": saying("a"), "top_logprobs": 3}, 400, "only with logprobs"),
        ({"model": "parrot", "messages": saying("a"), "stream_options": {}}, 400, "only with stream"),
        ({"model": "parrot", "messages": saying("a"), "max_tokens": 1, "max_completion_tokens": 2}, 400, "give one"),
        ({"model": "parrot", "messages": saying("a"), "max_tokens": 0}, 400, "max_tokens"),
        ({"model": "parrot", "messages": saying("a"), "temperature": float("nan")}, 400, "temperature"),
        ({"model": "parrot", "messages": saying("a"), "temperature": float("inf")}, 400, "temperature"),
        ({"model": "parrot", "messages": saying("a"), "top_p": float("nan")}, 400, "top_p"),
        ({"model": "parrot", "messages": saying("a"), "stop": ["a"] * 5}, 400, "stop"),
        ({"model": "parrot", "messages": saying("a \ud800 b")}, 400, "messages"),
        ({"model": "parrot \ud800", "messages": saying("a")}, 404, "no model"),
        ({"model": "parrot", "\ud800": 1}, 400, "raw data as a unicode"),
        ({"model": "parrot", "messages": saying("look <image>")}, 400, "stands for a picture"),
        ({"model": "parrot", "messages": saying("nan")}, 400, "not finite"),
        ({"model": "parrot", "messages": saying("nan"), "stream": True}, 400, "not finite"),
        ({"model": "parrot", "messages": saying("a " * 60)}, 400, "more than the model's context"),
    ],
)
def test_what_is_no_request_is_refused_with_the_reason(server: Server, body: Any, status: int, reason: str) -> None:
    got, message = refused(server, body)
    assert got == status and re.search(reason, message), message


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1/a.png", "fetches nothing"),
        ("https://example.org/a.png", "fetches nothing"),
        ("file:///etc/passwd", "fetches nothing"),
        ("/etc/passwd", "fetches nothing"),
        ("data:text/plain;base64,aGFsbG8=", "begins with data:image"),
        ("data:image/png,abc", "begins with data:image"),
        ("data:image/png;base64,@@@@", "non-base64|base64"),
        ("data:image/png;base64,\ud800", "ASCII"),
        ("data:image/png;base64,", "none of PNG, JPEG, WEBP, GIF"),
        (data_uri(b"no picture"), "none of PNG"),
        (data_uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "none of PNG"),
        (data_uri(png()[:45]), "can't be read"),
        (data_uri(png(form="TIFF"), "image/png"), "none of PNG"),
    ],
)
def test_what_is_no_picture_is_refused_with_the_reason(server: Server, url: str, reason: str) -> None:
    status, message = refused(server, with_url(url))
    assert status == 400 and re.search(reason, message), message
    assert "messages.0.content.0.image_url" in message and "0x" not in message


@pytest.mark.parametrize("kind", ["float", "nan"])
def test_a_picture_of_floating_point_numbers_is_none(server: Server, kind: str) -> None:
    stream = io.BytesIO()
    pixels = np.full((4, 4), np.nan if kind == "nan" else 0.5, dtype=np.float32)
    Image.fromarray(pixels).save(stream, "TIFF")
    assert refused(server, with_picture(stream.getvalue()))[0] == 400


def test_a_decompression_bomb_is_refused_before_it_is_decoded(server: Server) -> None:
    began = time.monotonic()
    for size in ((30_000, 30_000), (2**31 - 1, 2**31 - 1), (400, 400)):
        status, message = refused(server, with_picture(bomb(*size)))
        assert status == 400 and ("more than 100000" in message or "can't be read" in message)
    assert time.monotonic() - began < 2


def test_a_jpeg_of_thousands_of_scans_is_refused(server: Server) -> None:
    picture = png(64, 64, "JPEG", progressive=True)
    assert ask(server, "POST", CHAT, with_picture(picture))[0] == 200
    scan = picture[picture.index(b"\xff\xda") :].split(b"\xff\xd9")[0]
    many = picture.replace(b"\xff\xd9", scan[:10] * 200 + b"\xff\xd9")
    status, message = refused(server, with_picture(many))
    assert status == 400 and "scans" in message


def test_only_so_many_pictures_are_taken_and_only_where_a_model_sees(server: Server) -> None:
    three = [{"role": "user", "content": showing(data_uri(png()))[0]["content"] * 3}]
    assert refused(server, {"model": "parrot", "messages": three}) == (
        400,
        "messages: 3 pictures are more than the 2 of a request",
    )
    blind = {"model": "parrot-text", "messages": showing(data_uri(png()))}
    assert refused(server, blind) == (400, "messages: 'parrot-text' does not take pictures")


def test_bodies_have_a_limit(server: Server) -> None:
    status, message = refused(server, b" " * 200_001)
    assert status == 413 and "200,000 bytes" in message
    # without a length it is counted as it comes
    connection = http.client.HTTPConnection(server.address, timeout=5)
    connection.request(
        "POST", CHAT, iter([b" " * 100_000] * 3), {"Content-Type": "application/json"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    packed = refused(server, b"\x1f\x8b", **{"Content-Encoding": "gzip"})
    assert packed == (415, "bodies are not decompressed: send it as it is")
    assert (
        ask(server, "POST", CHAT, {"model": "parrot", "messages": saying("ok")})[0] == 200
    )  # nothing is held any more


def test_all_bodies_together_have_a_limit_and_a_slow_one_ends(server: Server) -> None:
    slow = []
    for _ in range(2):
        one = socket.create_connection(server.address.split(":"), timeout=5)
        one.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: {server.address}\r\nContent-Length: 150000\r\n\r\n".encode())
        one.sendall(b" " * 140_000)
        slow.append(one)
    first = b"".join(one.recv(4096) for one in slow)
    assert b" 429 " in first and b"retry-after: 1" in first.lower()
    assert "too much is being received" in first.decode()
    assert b" 408 " in first and b"more than 0 s" in first
    for one in slow:
        one.close()


def test_uploads_have_a_limit_and_are_forgotten(server: Server) -> None:
    def upload(data: bytes) -> tuple[int, dict[str, str], Any]:
        edge = b"edge"
        body = b'--edge\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n' + (
            b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
            + data
            + b"\r\n--edge--\r\n"
        )
        kind = f"multipart/form-data; boundary={edge.decode()}"
        return ask(server, "POST", "/v1/files", body, {"Content-Type": kind})

    assert upload(b"no picture")[0] == 400
    large = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (22, 22, 3), dtype=np.uint8)
    Image.fromarray(noise).save(large, "PNG")
    status, _, file = upload(large.getvalue())
    assert status == 200
    status, headers, _ = upload(large.getvalue())
    assert status == 429 and headers["retry-after"] == "1"
    time.sleep(0.45)
    assert ask(server, "GET", f"/v1/files/{file['id']}")[0] == 404
    assert upload(large.getvalue())[0] == 200
    assert ask(server, "GET", "/v1/files/..%2f..%2fetc%2fpasswd")[0] == 404
    assert ask(server, "GET", "/v1/files")[0] == 405  # nobody is told of others' uploads


@pytest.mark.parametrize(
    "path",
    ["/../pyproject.toml", "/%2e%2e/app.py", "/page/index.html", "//etc/passwd", "/index.html/../../app.py", "/app.py"],
)
def test_no_path_reaches_the_file_system(server: Server, path: str) -> None:
    assert ask(server, "GET", path)[0] == 404


@pytest.mark.parametrize(
    "host", ["attacker.example", "127.0.0.1.attacker.example", "10.0.0.1:80", "", "[::2]", "a@b:c"]
)
def test_a_name_that_was_pointed_at_loopback_is_refused(server: Server, host: str) -> None:
    status, _, told = ask(server, "GET", "/v1/models", headers={"Host": host})
    assert status == 421
    assert told["error"]["message"] == f"this server listens on loopback and is not called '{host}'"


def test_loopback_by_any_of_its_names_is_answered(server: Server) -> None:
    port = server.address.split(":")[1]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "localhost"):
        assert ask(server, "GET", "/v1/models", headers={"Host": host})[0] == 200


def test_pages_of_other_sites_may_not_ask(server: Server) -> None:
    body = {"model": "parrot", "messages": saying("hello")}
    for origin in ("https://attacker.example", "null", "http://127.0.0.1:1"):
        told = refused(server, body, Origin=origin)
        assert told == (403, f"pages of {origin} may not ask this server: see --allow-origin")
    status, headers, _ = ask(server, "POST", CHAT, body, {"Origin": f"http://{server.address}"})
    assert status == 200 and "access-control-allow-origin" not in headers
    # what a form of any page may send without being asked is no JSON to us
    assert ask(server, "POST", CHAT, body, {"Content-Type": "text/plain"})[0] == 400


def test_an_origin_that_is_allowed_may_ask_with_the_key() -> None:
    settings = Settings(key="sesame", origins=("https://site.example",))
    with serving(FakeEngine(), settings=settings) as server:
        asked = {"Origin": "https://site.example", "Access-Control-Request-Method": "POST"}
        status, headers, _ = ask(server, "OPTIONS", CHAT, headers=asked)
        assert status == 200 and headers["access-control-allow-origin"] == "https://site.example"
        assert ask(server, "OPTIONS", CHAT, headers={**asked, "Origin": "https://other.example"})[0] == 400
        keyed = {"Origin": "https://site.example", "Authorization": "Bearer sesame"}
        status, headers, _ = ask(server, "GET", "/v1/models", headers=keyed)
        assert status == 200 and headers["access-control-allow-origin"] == "https://site.example"


def test_a_key_guards_all_but_health_and_the_page() -> None:
    with serving(FakeEngine(), settings=Settings(key="söße")) as server:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/files/x", "/nothing"):
            status, _, told = ask(server, "GET", path)
            assert (status, told["error"]["message"]) == (401, "a key is wanted")
            assert ask(server, "GET", path, headers={"Authorization": "Bearer söß"})[0] == 401
        assert refused(server, {})[0] == 401
        right = {"Authorization": "Bearer söße".encode().decode("latin-1")}
        assert ask(server, "GET", "/v1/models", headers=right)[0] == 200
        assert ask(server, "GET", "/health")[0] == 200
        document = ask(server, "GET", "/openapi.json", headers=right)[2]
        assert document["paths"]["/health"]["get"]["security"] == []
        assert document["paths"][CHAT]["post"]["security"] == [{"key": []}]


def test_elsewhere_than_on_loopback_a_key_is_wanted() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ServeError, match="--without-key"):
            require_safe(host, Settings(), False)
        require_safe(host, Settings(), True)
        require_safe(host, Settings(key="k"), False)
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert is_loopback(host)
        require_safe(host, Settings(), False)


def test_responses_say_what_they_are(server: Server) -> None:
    _, headers, _ = ask(server, "GET", "/v1/models")
    assert headers["x-content-type-options"] == "nosniff" and "server" not in headers
    status, headers, page = ask(server, "GET", "/")
    assert status == 200 and b"<!doctype html>" in page.lower()
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    linked = re.findall(rb'(?:src|href)="([^"#:]+)"', page)
    assert linked
    for name in linked:
        status, headers, _ = ask(server, "GET", "/" + name.decode())
        assert status == 200 and headers["content-type"].split(";")[0] in ("text/javascript", "text/css")


def test_numbers_are_told_by_path_pattern_and_model(server: Server) -> None:
    ask(server, "POST", CHAT, {"model": "parrot", "messages": saying("one two three")})
    ask(server, "POST", "/somewhere/else")
    text = ask(server, "GET", "/metrics")[2].decode()
    for line in (
        'distilvlm_engine_running{base="parrot"} 0.0',
        'distilvlm_engine_steps_total{base="parrot"} 12.0',
        'path="/v1/chat/completions",status="200"',
        'path="other",status="404"',
        'distilvlm_answers_total{finish="stop",model="parrot"}',
        'distilvlm_time_to_first_token_seconds_bucket{le="0.01",model="parrot"}',
        'distilvlm_inter_token_seconds_count{model="parrot"}',
        'distilvlm_completion_tokens_total{model="parrot"}',
    ):
        assert line in text
    assert "somewhere" not in text  # a client can't make as many series as it likes
