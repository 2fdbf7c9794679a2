"""Pictures from other machines: of allowed hosts, at addresses of the internet, within limits."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from distilvlm.serve.fetch import Fetcher, FetchError, is_public

Reply = Callable[[str, socket.socket], None]


class Site:
    """Answers each connection by `reply(path, socket)`, and counts them."""

    def __init__(self) -> None:
        self.reply: Reply = lambda path, sock: sock.sendall(whole(b"picture"))
        self.asked: list[str] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            with sock:
                head = sock.recv(65536).decode()
                if not head:  # connected and gone
                    continue
                self.asked.append(head)
                with contextlib.suppress(OSError):  # whoever asked has left
                    self.reply(head.split(" ")[1], sock)

    def close(self) -> None:
        self._listening.close()


def whole(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


def fetcher(site: Site, *hosts: str, largest: int = 1000, seconds: float = 2.0, **options: object) -> Fetcher:
    """One for which loopback is of the internet, since the tests have nothing else."""
    given = {"may": lambda address: True, "resolve": lambda host, port: ["127.0.0.1"], **options}
    return Fetcher(frozenset(hosts or (f"pictures.example:{site.port}",)), largest, seconds, **given)  # type: ignore[arg-type]


def test_a_picture_of_an_allowed_host_is_fetched(site: Site) -> None:
    assert fetcher(site).fetch(f"http://pictures.example:{site.port}/a/b.png?size=2") == b"picture"
    assert site.asked[0].startswith("GET /a/b.png?size=2 HTTP/1.1\r\n")
    assert f"Host: pictures.example:{site.port}\r\n" in site.asked[0]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://other.example:PORT/", "not among the hosts"),
        ("http://pictures.example/", "not among the hosts"),  # another port
        ("http://pictures.example.other.example:PORT/", "not among the hosts"),
        ("http://pictures.example:PORT@other.example/", "name and password|not among"),
        ("http://me:secret@pictures.example:PORT/", "name and password"),
        ("http://127.0.0.1:PORT/", "not among the hosts"),
        ("file:///etc/passwd", "only http"),
        ("ftp://pictures.example:PORT/", "only http"),
        ("gopher://pictures.example:PORT/", "only http"),
        ("pictures.example", "only http"),
        ("http://[::1", "no address"),
        ("http://pictures.example:99999/", "no address"),
        ("http://pictures.example:PORT/a b", "does not answer: InvalidURL"),
        ("http://pictures.example:PORT/a\r\nHost: x", "does not answer|only http|not among"),
    ],
)
def test_what_is_not_allowed_is_not_connected_to(site: Site, url: str, reason: str) -> None:
    with pytest.raises(FetchError, match=reason):
        fetcher(site).fetch(url.replace("PORT", str(site.port)))
    assert len([one for one in site.asked if one]) == 0 or "\r\nHost: x\r\n" not in site.asked[0]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.5.5", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "224.0.0.1", "255.255.255.255", "198.18.0.1", "240.0.0.1", "::", "::1", "fe80::1", "fc00::1",
        "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::", "2002:c0a8:1::1", "2001:db8::1",
    ],
)  # fmt: skip
def test_addresses_that_only_this_machine_reaches_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:2800:21f::1", "::ffff:8.8.8.8"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


def test_a_name_of_a_private_address_is_not_connected_to(site: Site) -> None:
    with pytest.raises(FetchError, match="no address of the internet"):
        fetcher(site, may=is_public).fetch(f"http://pictures.example:{site.port}/")
    assert not site.asked


def test_the_address_that_was_looked_at_is_the_one_connected_to(site: Site) -> None:
    looked: list[str] = []
    answers = iter([["10.0.0.1", "127.0.0.1"], ["10.0.0.1"]])

    def may(address: str) -> bool:
        looked.append(address)
        return address == "127.0.0.1"

    made = fetcher(site, may=may, resolve=lambda host, port: next(answers))
    assert made.fetch(f"http://pictures.example:{site.port}/") == b"picture"
    assert looked == ["10.0.0.1", "127.0.0.1"] and len(list(answers)) == 1  # resolved once


def test_redirects_stay_among_the_hosts(site: Site) -> None:
    places = {
        "/near": "/there",
        "/far": "http://other.example/",
        "/local": "file:///etc/passwd",
        "/round": "/round",
    }

    def reply(path: str, sock: socket.socket) -> None:
        here = whole(b"picture") if path == "/there" else whole(b"", "302 Found", f"Location: {places[path]}")
        sock.sendall(here)

    site.reply = reply
    base = f"http://pictures.example:{site.port}"
    assert fetcher(site).fetch(f"{base}/near") == b"picture"
    for path, reason in (("/far", "not among the hosts"), ("/local", "only http"), ("/round", "more than 3 redirects")):
        with pytest.raises(FetchError, match=reason):
            fetcher(site).fetch(base + path)


def test_a_large_body_is_left_whether_or_not_it_says_so(site: Site) -> None:
    url = f"http://pictures.example:{site.port}/"
    site.reply = lambda path, sock: sock.sendall(whole(bytes(1001)))
    with pytest.raises(FetchError, match="more than 1,000 bytes"):
        fetcher(site).fetch(url)
    endless = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + bytes(1024) + b"\r\n"
    site.reply = lambda path, sock: sock.sendall(endless)
    with pytest.raises(FetchError, match="more than 1,000 bytes"):
        fetcher(site).fetch(url)


def test_a_slow_host_is_left_when_the_time_is_up(site: Site) -> None:
    def drip(path: str, sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            time.sleep(0.05)
            sock.sendall(b"X-A: b\r\n" if path == "/head" else b"a")  # each is in time, together they are not

    site.reply = drip
    for path in ("/head", "/body"):
        with pytest.raises(FetchError, match="takes too long"):
            fetcher(site, seconds=0.3).fetch(f"http://pictures.example:{site.port}{path}")


def test_what_breaks_off_or_is_not_there_is_told(site: Site) -> None:
    url = f"http://pictures.example:{site.port}/"
    site.reply = lambda path, sock: sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nabc")
    with pytest.raises(FetchError, match="does not answer: IncompleteRead"):
        fetcher(site).fetch(url)
    site.reply = lambda path, sock: sock.sendall(whole(b"", "404 Not Found"))
    with pytest.raises(FetchError, match="HTTP 404"):
        fetcher(site).fetch(url)
    site.reply = lambda path, sock: sock.sendall(b"no http\r\n\r\n")
    with pytest.raises(FetchError, match="does not answer: BadStatusLine"):
        fetcher(site).fetch(url)
