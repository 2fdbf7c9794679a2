"""`distilvlm serve` as a process: it drains when it is told to stop, and refuses what is unsafe before it loads."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from distilvlm import cli
from distilvlm.serve.app import application
from distilvlm.serve.server import ServeError, Server

from .fake_engine import FakeEngine
from .running import ask, saying, serving, until

SERVE = """
import sys
from distilvlm.serve.app import application
from distilvlm.serve.server import Server
from distilvlm.serve.settings import Settings
from tests.serve.fake_engine import FakeEngine
engine = FakeEngine()
engine.stand_still_after = float(sys.argv[2])
server = Server(application([engine], Settings(draining=float(sys.argv[1]))), "127.0.0.1", 0)
print(server.url, flush=True)
server.run()
print("stopped", flush=True)
"""


def start(draining: float, pieces: float) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(draining), str(pieces)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_answers_under_way_are_finished_and_new_ones_refused() -> None:
    engine = FakeEngine(stand_still_after=1)
    with serving(engine) as server:
        body = {"model": "parrot", "messages": saying("one two three")}
        got: list[object] = []
        asker = threading.Thread(target=lambda: got.append(ask(server, "POST", "/v1/chat/completions", body)))
        asker.start()
        until(lambda: engine.running)
        server.stop()
        until(lambda: engine.draining)
        status, headers, told = ask(server, "POST", "/v1/chat/completions", body)
        assert (status, headers["retry-after"], told["error"]["code"]) == (503, "30", "draining")
        assert told["error"]["message"] == "this server is about to stop"
        assert ask(server, "GET", "/health")[::2] == (503, {"status": "draining"})
        engine.stand_still_after = 99
        asker.join(5)
        (answer,) = got
        assert answer[0] == 200 and answer[2]["choices"][0]["message"]["content"] == "one two three"  # type: ignore[index]
        until(lambda: server.should_exit)


def test_a_signal_ends_the_process_when_its_limit_is_over() -> None:
    process, url = start(draining=0.3, pieces=1)
    server = type("There", (), {"address": url.removeprefix("http://")})()
    body = {"model": "parrot", "prompt": "a b", "stream": True}
    got: list[bytes] = []
    asker = threading.Thread(target=lambda: got.append(ask(server, "POST", "/v1/completions", body)[2]))
    asker.start()
    until(lambda: 'running{base="parrot"} 1.0' in ask(server, "GET", "/metrics")[2].decode())
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out.strip()) == (0, "stopped")
    asker.join(5)
    assert b'"text":"a"' in got[0] and b"[DONE]" not in got[0]
    assert "the answer was cancelled by the server" in got[0].decode()  # the client knows


def test_a_taken_port_is_told() -> None:
    with serving(FakeEngine()) as server, pytest.raises(ServeError, match="choose another --port"):
        Server(application([FakeEngine()]), "127.0.0.1", int(server.address.split(":")[1]))


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two models are called 'parrot'"):
        application([FakeEngine(), FakeEngine()])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere", "--host", "0.0.0.0"], "--without-key"),
        (["nowhere", "--host", "0.0.0.0", "--api-key", ""], "key is empty"),
        (["=nowhere"], "is not NAME=MODEL"),
        (["nowhere", "--adaptor", "seeing"], "NAME=PATH"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    monkeypatch.setattr(cli, "_configure_logging", lambda: None)
    monkeypatch.setattr(sys, "argv", ["distilvlm", "serve", *arguments])
    monkeypatch.delenv("DISTILVLM_API_KEY", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert end.value.code and reason in said
