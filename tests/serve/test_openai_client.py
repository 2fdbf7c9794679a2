"""OpenAI's own client against a running server: every feature that it offers and we serve."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from distilvlm.serve.server import Server
from distilvlm.serve.settings import Settings

from .fake_engine import FakeEngine
from .running import data_uri, png, saying, serving, showing, until


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[FakeEngine, Server]]:
    engine = FakeEngine()
    with serving(engine, settings=Settings(key="sesame")) as server:
        yield engine, server


@pytest.fixture(autouse=True)
def engine(shared: tuple[FakeEngine, Server]) -> FakeEngine:
    shared[0].requests.clear()
    shared[0].cancelled.clear()
    shared[0].stand_still_after = math.inf
    return shared[0]


@pytest.fixture
def client(shared: tuple[FakeEngine, Server]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{shared[1].url}/v1", api_key="sesame", max_retries=0)


def test_models_are_listed_with_what_they_can(client: openai.OpenAI) -> None:
    listed = list(client.models.list())
    assert [(model.id, model.owned_by) for model in listed] == [("parrot", "distilvlm"), ("parrot-text", "distilvlm")]
    assert listed[0].to_dict()["sees"] is True and listed[1].to_dict()["sees"] is False
    assert client.models.retrieve("parrot").to_dict() == listed[0].to_dict()
    with pytest.raises(openai.NotFoundError, match="there is parrot, parrot-text"):
        client.models.retrieve("cockatoo")


def test_a_conversation_is_answered(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(
        model="parrot",
        messages=[{"role": "developer", "content": "be brief"}, *saying("hello", "hi", "good morning")],
        max_completion_tokens=5,
        temperature=0.5,
        top_p=0.9,
        seed=-3,
        stop=["\n", "END"],
        user="somebody",
        n=1,
        frequency_penalty=0,
    )
    assert answer.choices[0].message.content == "good morning"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 2, 7)
    (asked,) = engine.requests
    assert [(m.role, m.text) for m in asked.messages] == [
        ("system", "be brief"),
        ("user", "hello"),
        ("assistant", "hi"),
        ("user", "good morning"),
    ]
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.seed) == (5, 0.5, 0.9, -3)
    assert (asked.stop, asked.logprobs) == (("\n", "END"), None)


def test_an_answer_can_be_sent_back(client: openai.OpenAI, engine: FakeEngine) -> None:
    first = client.chat.completions.create(model="parrot", messages=saying("one"))
    turns: list[Any] = [*saying("one"), first.choices[0].message, *saying("two")]
    assert client.chat.completions.create(model="parrot", messages=turns).choices[0].message.content == "two"
    assert [m.text for m in engine.requests[-1].messages] == ["one", "one", "two"]


def test_what_is_not_said_is_the_protocols_default(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.chat.completions.create(model="parrot", messages=saying("hello"))
    client.completions.create(model="parrot", prompt="hello")
    chat, text = engine.requests
    assert (chat.max_tokens, chat.temperature, chat.top_p, chat.seed, chat.stop) == (None, 1.0, 1.0, None, ())
    assert (text.max_tokens, text.messages, text.prompt) == (16, (), "hello")


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    words = "a parrot says what it hears"
    stream = client.chat.completions.create(
        model="parrot", messages=saying(words), stream=True, stream_options={"include_usage": True}
    )
    events = list(stream)
    assert events[0].choices[0].delta.role == "assistant"
    texts = [event.choices[0].delta.content for event in events if event.choices]
    assert "".join(text or "" for text in texts) == words and len([text for text in texts if text]) == 6
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "stop"
    assert events[-1].choices == [] and events[-1].usage is not None and events[-1].usage.completion_tokens == 6
    assert all(event.usage is None for event in events[:-1])
    assert len({event.id for event in events}) == 1


def test_pieces_come_as_they_are_made(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.stand_still_after = 1
    got = iter(client.completions.create(model="parrot", prompt="one two three", stream=True))
    assert next(got).choices[0].text == "one"
    rest: list[str] = []
    reader = threading.Thread(target=lambda: rest.extend(event.choices[0].text for event in got))
    reader.start()
    reader.join(0.1)
    assert not rest and reader.is_alive()  # the engine stands still, and so does the stream
    engine.stand_still_after = math.inf
    reader.join(5)
    assert "".join(rest) == " two three"


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_come_with_their_log_probabilities(client: openai.OpenAI, stream: bool) -> None:
    answer: Any = client.chat.completions.create(
        model="parrot", messages=saying("red fish"), logprobs=True, top_logprobs=2, stream=stream
    )
    choices = [event.choices[0] for event in answer] if stream else answer.choices
    told = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
    assert [(one.token, one.logprob, one.bytes) for one in told] == [
        ("red", -0.25, [114, 101, 100]),
        (" fish", -0.25, [32, 102, 105, 115, 104]),
    ]
    # what is no character has no bytes, and what is impossible has a number that JSON knows
    assert [(top.token, top.logprob, top.bytes) for top in told[0].top_logprobs] == [
        ("red", -0.25, [114, 101, 100]),
        ("\ufffd", -9999.0, None),
    ]


def test_log_probabilities_alone_have_no_others_beside_them(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="parrot", messages=saying("red"), logprobs=True)
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].top_logprobs == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_is_continued(client: openai.OpenAI, stream: bool) -> None:
    answer: Any = client.completions.create(
        model="parrot", prompt=["one two three"], max_tokens=2, logprobs=1, stream=stream
    )
    choices = [event.choices[0] for event in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == "one two"
    assert choices[-1].finish_reason == "length"
    told = [choice.logprobs for choice in choices if choice.logprobs]
    assert [token for one in told for token in one.tokens] == ["one", " two"]
    assert [at for one in told for at in one.text_offset] == [0, 3]
    assert [top for one in told for top in one.top_logprobs] == [{"one": -0.25}, {" two": -0.25}]


def test_pictures_come_as_data(client: openai.OpenAI, engine: FakeEngine) -> None:
    turns: Any = showing(data_uri(png(8, 6)))
    turns[0]["content"] += showing(data_uri(png(5, 7, "JPEG"), "image/jpeg"), "and this")[0]["content"]
    answer = client.chat.completions.create(model="parrot", messages=turns)
    assert answer.choices[0].message.content == "8x6 5x7 what is it and this"
    assert engine.requests[0].messages[0].text == "<image>\nwhat is it\n<image>\nand this"
    assert engine.requests[0].pictures[0].getpixel((0, 0)) == (200, 30, 30)


def test_pictures_are_uploaded_once_and_named_afterwards(client: openai.OpenAI, engine: FakeEngine) -> None:
    file = client.files.create(file=("../../etc/passwd", png(9, 4)), purpose="vision")
    assert (file.bytes, file.filename, file.purpose) == (len(png(9, 4)), "../../etc/passwd", "vision")
    assert client.files.retrieve(file.id).id == file.id
    turns: Any = [{"role": "user", "content": [{"type": "file", "file": {"file_id": file.id}}]}]
    for _ in range(2):
        assert client.chat.completions.create(model="parrot", messages=turns).choices[0].message.content == "9x4"
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError, match="upload it again"):
        client.chat.completions.create(model="parrot", messages=turns)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_wrong_key_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError, match="the key is wrong"):
        client.with_options(api_key="sesam").models.list()


def test_a_full_queue_is_told_and_asked_again_by_the_client(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.stand_still_after = 0
    streams: list[Any] = []
    askers = [
        threading.Thread(target=lambda: streams.append(client.completions.create(model="parrot", prompt="a b")))
        for _ in range(engine.places)
    ]
    for asker in askers:
        asker.start()
    until(lambda: len(engine.running) == engine.places)
    with pytest.raises(openai.RateLimitError, match="the queue is full: try again in 2 s") as busy:
        client.completions.create(model="parrot", prompt="a b")
    assert busy.value.response.headers["retry-after"] == "3"
    engine.stand_still_after = math.inf
    for asker in askers:
        asker.join(5)
    assert [one.choices[0].text for one in streams] == ["a b"] * engine.places


def test_a_stream_that_is_closed_frees_its_place(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.stand_still_after = 1
    stream = client.completions.create(model="parrot", prompt="one two three", stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: not engine.running)
    assert len(engine.cancelled) == 1


def test_a_client_that_leaves_before_its_answer_frees_its_place(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.stand_still_after = 0
    for stream in (False, True):
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.1).chat.completions.create(
                model="parrot", messages=saying("a b"), stream=stream
            )
    until(lambda: not engine.running)
    assert len(engine.cancelled) == 2


def test_an_answer_that_fails_has_a_status_and_a_stream_says_so(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="the model gave no number"):
            client.chat.completions.create(model="parrot", messages=saying("fail"), stream=stream)
    begun = client.chat.completions.create(model="parrot", messages=saying("well fail"), stream=True)
    with pytest.raises(openai.APIError, match="the model gave no number"):
        list(begun)
