"""A server over a real engine: many clients at once, some of which leave, and nobody notices the others."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from distilvlm.serve import loading
from distilvlm.serve.interface import Request
from distilvlm.serve.local import LocalEngine
from distilvlm.serve.server import Server

from . import small_models as tiny
from .running import data_uri, saying, serving, until

CLIENTS, REQUESTS = 16, 200
NAMES = ("text", "seeing", "grounding")


def request(number: int) -> Request:
    """Greedy or drawn, with pictures or without, of three workflows."""
    drawn = {"temperature": 1.0, "top_p": 0.9} if number % 2 else {}
    return tiny.asked(number % 20, NAMES[number % 3], seed=number % 4, max_tokens=4 + number % 5, **drawn)


def body(request: Request) -> dict[str, Any]:
    """The same as OpenAI's client sends it."""
    parts: list[dict[str, Any]] = []
    for picture in request.pictures:
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        parts.append({"type": "image_url", "image_url": {"url": data_uri(stream.getvalue())}})
    parts.append({"type": "text", "text": request.messages[0].text.replace("<image>\n", "")})
    return {
        "model": request.model,
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
    }


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    yield loading.around(tiny.vlm(adaptors=True), "tiny", "pad", "chat", places=8, queue=CLIENTS)


@pytest.fixture(scope="module")
def server(engine: LocalEngine) -> Iterator[Server]:
    with serving(engine) as running:
        yield running


def test_every_answer_is_the_one_computed_alone_and_none_is_lost(engine: LocalEngine, server: Server) -> None:
    single = loading.around(tiny.vlm(adaptors=True), "tiny", "pad", "chat", places=1, queue=1)
    alone: dict[Any, str] = {}

    def key(asked: Request) -> Any:
        return asked.model, asked.messages, asked.seed, asked.temperature, asked.max_tokens

    for number in range(REQUESTS):
        if (asked := key(request(number))) not in alone:
            alone[asked] = "".join(piece.text for piece in single.submit(request(number)))
    single.drain(1)

    leaves = {number: random.Random(number).randrange(4) for number in random.Random(0).sample(range(REQUESTS), 40)}
    lock, numbers, answers = threading.Lock(), iter(range(REQUESTS)), dict[int, str]()

    def ask() -> None:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            asked = body(request(number))
            if number not in leaves and number % 2:
                answers[number] = client.chat.completions.create(**asked).choices[0].message.content or ""
                continue
            with client.chat.completions.create(**asked, stream=True) as stream:
                text = ""
                for count, event in enumerate(stream):
                    if count == leaves.get(number):
                        break
                    text += event.choices[0].delta.content or ""
            answers[number] = text

    with ThreadPoolExecutor(CLIENTS) as clients:
        for done in [clients.submit(ask) for _ in range(CLIENTS)]:
            done.result()

    assert sorted(answers) == list(range(REQUESTS))
    for number, text in answers.items():
        expected = alone[key(request(number))]
        assert text == expected if number not in leaves else expected.startswith(text), number
    assert len({alone[key(request(number))] for number in range(60)}) > 30  # they do differ
    until(lambda: engine.numbers()["running"] == engine.numbers()["queue"] == 0)
    told = engine.numbers()
    assert told["requests_total"] == REQUESTS == told["finished_total"] + told["cancelled_total"]
    assert told["cancelled_total"] > 10 and told["failed_total"] == told["busy_total"] == 0
    assert told["steps_total"] < told["tokens_total"] / 2  # steps were shared


def test_what_the_engine_refuses_is_told(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    for messages, reason in (
        (saying("long " * 200), "more than the context of 256"),
        (saying("a", "b"), "the user's must be the last"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "system|last"),
    ):
        with pytest.raises(openai.BadRequestError, match=reason):
            client.chat.completions.create(model="text", messages=messages)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="prompt: is empty"):
        client.completions.create(model="text", prompt="")


def test_a_text_is_continued_with_the_probabilities_of_its_tokens(engine: LocalEngine, server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    asked: dict[str, Any] = {"model": "text", "prompt": "once upon", "max_tokens": 5, "temperature": 0}
    answer = client.completions.create(**asked, logprobs=2)
    (choice,) = answer.choices
    pieces = list(engine.submit(Request("text", prompt="once upon", max_tokens=5, temperature=0.0, logprobs=2)))
    told = [one for piece in pieces for one in piece.logprobs or ()]
    assert choice.logprobs is not None and choice.text == "".join(piece.text for piece in pieces)
    assert choice.logprobs.tokens == [one.token for one in told] and len(told) == 5
    assert choice.logprobs.token_logprobs == [one.logprob for one in told]
    seen = "".join(event.choices[0].text for event in client.completions.create(**asked, stream=True))
    assert seen == choice.text


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_are_scored_as_lm_eval_asks_for_it(server: Server, stream: bool) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    ids = [5, 6, 7, 8]
    asked: dict[str, Any] = {"model": "text", "prompt": [ids], "max_tokens": 1, "temperature": 0, "logprobs": 1}
    answer = client.completions.create(**asked, echo=True, stream=stream)
    known = [one.choices[0].logprobs for one in (answer if stream else [answer]) if one.choices[0].logprobs]
    given = [value for one in known for value in one.token_logprobs or ()]
    likeliest = [value for one in known for value in one.top_logprobs or ()]
    assert len(given) == len(likeliest) == len(ids) + 1  # and one that is answered
    assert given[0] is None and likeliest[0] is None
    assert all(value < 0 for value in given[1:] if value is not None)
    assert given[-1] == max(likeliest[-1].values())  # greedy


def test_a_literal_marker_is_no_picture(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert client.completions.create(model="text", prompt="an <image> tag", max_tokens=2).usage is not None
