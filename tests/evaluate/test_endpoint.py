"""A judge behind HTTP: asked as OpenAI's protocol has it, again when it is busy, and never twice for the same."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from distilvlm.evaluate.hallucination import Case, Endpoint, JudgeError, judged, namer, rater
from distilvlm.evaluate.hallucination.prompted import default_prompt

Reply = tuple[int, Any, dict[str, str]]


class Server(ThreadingHTTPServer):
    """Answers with what `reply` makes of the number of the request and the question."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.reply: Callable[[int, str], Reply] = lambda number, prompt: said("Rating: 4")
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            number = len(self.server.requests)
        status, content, headers = self.server.reply(number, body["messages"][0]["content"])
        payload = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(payload)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        pass


def said(text: str) -> Reply:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, {}


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def endpoint(server: Server) -> Endpoint:
    return Endpoint(server.url, "judge-1", key="secret", timeout=5, attempts=3, wait=0.01)


def cases(count: int = 3) -> list[Case]:
    return [
        Case(("test.json", row, 0), str(row), f"Question {row}?", ("Dog", "Tree"), "A dog.", f"answer {row}")
        for row in range(count)
    ]


def test_a_question_is_put_as_the_protocol_has_it(server: Server, endpoint: Endpoint) -> None:
    (found,) = judged(cases(1), rater(endpoint))
    assert (found.rating, found.hallucinated, found.text) == (4, False, "Rating: 4")
    (request,) = server.requests
    assert (request["path"], request["key"]) == ("/v1/chat/completions", "Bearer secret")
    assert (request["model"], request["temperature"]) == ("judge-1", 0)
    (message,) = request["messages"]
    assert message["role"] == "user"
    for part in ("Dog, Tree", "Question 0?", "A dog.", "answer 0"):
        assert part in message["content"]
    assert "{" not in message["content"]


def test_without_a_key_none_is_sent(server: Server, endpoint: Endpoint) -> None:
    replace(endpoint, key=None).ask("hello")
    assert server.requests[0]["key"] is None


def test_the_key_does_not_show(endpoint: Endpoint) -> None:
    assert "secret" not in repr(endpoint)


def test_a_prompt_of_ones_own_is_filled_once_and_its_other_braces_stay(server: Server, endpoint: Endpoint) -> None:
    tricky = replace(cases(1)[0], answer="{question} {reference}")
    judged([tricky], rater(endpoint, 'Q {question} A {answer} {"rating": 1}'))
    assert server.requests[0]["messages"][0]["content"] == 'Q Question 0? A {question} {reference} {"rating": 1}'


@pytest.mark.parametrize(
    "busy",
    [
        (503, "busy", {}),
        (429, "slow down", {"Retry-After": "0"}),
        (200, "no json", {}),
        (200, {"error": "no choices"}, {}),
    ],
)
def test_a_busy_or_broken_reply_is_asked_for_again(server: Server, endpoint: Endpoint, busy: Reply) -> None:
    server.reply = lambda number, prompt: busy if number < 3 else said("Rating: 2")
    assert rater(endpoint)(cases(1)[0]).rating == 2
    assert len(server.requests) == 3


def test_after_all_attempts_it_is_given_up_with_the_reason(server: Server, endpoint: Endpoint) -> None:
    server.reply = lambda number, prompt: (500, "out of order", {})
    with pytest.raises(JudgeError, match=r"did not answer in 3 attempts \(HTTP 500: out of order\)"):
        endpoint.ask("hello")
    server.reply = lambda number, prompt: (200, {"error": "no choices"}, {})
    with pytest.raises(JudgeError, match=r'3 attempts \(ValueError: .*no completion: \{"error": "no choices"\}\)'):
        endpoint.ask("hello")
    with pytest.raises(JudgeError, match="did not answer in 1 attempts"):
        Endpoint("http://127.0.0.1:9/v1", "m", attempts=1, timeout=1).ask("hello")


def test_a_server_that_says_nothing_is_left_after_the_timeout(server: Server, endpoint: Endpoint) -> None:
    stop = threading.Event()
    server.reply = lambda number, prompt: (stop.wait(5) and said("")) or said("")
    with pytest.raises(JudgeError, match="TimeoutError"):
        replace(endpoint, timeout=0.1, attempts=1).ask("hello")
    stop.set()


def test_a_refusal_is_told_at_once(server: Server, endpoint: Endpoint) -> None:
    server.reply = lambda number, prompt: (401, "no such key", {})
    with pytest.raises(JudgeError, match=r"refused the question \(HTTP 401: no such key\)"):
        endpoint.ask("hello")
    assert len(server.requests) == 1


def test_what_was_said_is_kept_and_not_asked_for_again(server: Server, endpoint: Endpoint, tmp_path: Path) -> None:
    kept = tmp_path / "judged.jsonl"

    def breaks(number: int, prompt: str) -> Reply:
        return said("Rating: 5") if "answer 2" not in prompt else (400, "broken", {})

    server.reply = breaks
    with pytest.raises(JudgeError):
        judged(cases(), rater(endpoint), kept, workers=1)
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(row["row"], row["rating"], row["judge"]) for row in rows] == [(0, 5, "judge-1"), (1, 5, "judge-1")]

    server.requests.clear()
    server.reply = lambda number, prompt: said("Rating: 1")
    told: list[tuple[int, int]] = []
    found = judged(cases(), rater(endpoint), kept, progress=lambda *n: told.append(n))
    assert [one.rating for one in found] == [5, 5, 1] and len(server.requests) == 1 and told == [(3, 3)]
    assert judged(cases(), rater(endpoint), kept) == found and len(server.requests) == 1

    # another answer, another prompt or another model is another question
    judged([replace(one, answer="new") for one in cases()], rater(endpoint), kept)
    judged(cases(), rater(endpoint, "{question} {answer}"), kept)
    judged(cases(), rater(replace(endpoint, model="judge-2")), kept)
    assert len(server.requests) == 1 + 9


def test_a_damaged_file_of_judgements_is_named(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "judged.jsonl").write_text('{"row": 0}\n')
    with pytest.raises(JudgeError, match=r"judged\.jsonl, line 1 is no kept judgement"):
        judged(cases(), rater(endpoint), tmp_path / "judged.jsonl")


def test_a_judge_names_objects(server: Server, endpoint: Endpoint) -> None:
    server.reply = lambda number, prompt: said('["dog", "tree"]')
    assert namer(endpoint)(cases(1)[0]).objects == ("dog", "tree")
    assert "Dog, Tree" not in server.requests[0]["messages"][0]["content"]  # it must not know what is there


def test_cases_are_asked_at_the_same_time_and_stay_in_order(server: Server, endpoint: Endpoint) -> None:
    together = threading.Barrier(4)

    def reply(number: int, prompt: str) -> Reply:
        together.wait(5)  # breaks unless four are here
        return said(f"Rating: {prompt.split('answer ')[1][0]}")

    server.reply = reply
    found = judged(cases(4), rater(endpoint, "{answer}"), workers=4)
    assert [one.rating for one in found] == [0, 1, 2, 3]


def test_address_model_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_MODEL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(JudgeError, match="set OPENAI_BASE_URL and OPENAI_MODEL"):
        Endpoint.from_environment()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    monkeypatch.setenv("OPENAI_MODEL", "m")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert Endpoint.from_environment() == Endpoint("http://127.0.0.1:1/v1", "m", "k")
    assert Endpoint.from_environment(model="other").model == "other"
    with pytest.raises(JudgeError, match="must begin with http"):
        Endpoint.from_environment("file:///etc")


@pytest.mark.parametrize(("name", "places"), [("rate", 4), ("name", 2)])
def test_our_prompts_have_their_places(name: str, places: int) -> None:
    text = default_prompt(name)
    assert sum(text.count(f"{{{place}}}") for place in ("question", "answer", "contents", "reference")) == places
