"""Requests that share decoding steps: each is answered as if it were alone, and none is lost."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from PIL import Image

from distilvlm.data.geometry import canvas
from distilvlm.data.template import Template
from distilvlm.evaluate.generate import left_padded
from distilvlm.models.decode import greedy
from distilvlm.models.forward import embeddings, vision_features
from distilvlm.models.vlm import VLM
from distilvlm.serve import loading
from distilvlm.serve.interface import Busy, Draining, Failed, Message, Piece, Refused, Request, Usage
from distilvlm.serve.local import LocalEngine
from distilvlm.serve.ticket import Answer

from . import small_models as tiny

NAMES = ("text", "seeing", "grounding")


@pytest.fixture
def make() -> Iterator[Callable[..., LocalEngine]]:
    """make(vlm, ...) → an engine that is stopped at the end."""
    made: list[LocalEngine] = []

    def one(vlm: VLM | None = None, **settings: int) -> LocalEngine:
        made.append(loading.around(vlm or tiny.vlm(), "tiny", "pad", "chat", **settings))
        return made[-1]

    yield one
    for engine in made:
        engine.drain(0)


@pytest.fixture
def engine(make: Callable[..., LocalEngine]) -> LocalEngine:
    return make()


def ids(ticket: Answer) -> list[int]:
    return [id for piece in ticket for id in piece.ids]


def text(ticket: Answer) -> str:
    return "".join(piece.text for piece in ticket)


def alone(vlm: VLM, request: Request) -> list[int]:
    """What evaluation's own decoding answers."""
    from distilvlm.data.batch import SampleKey
    from distilvlm.data.records import PICTURE, Record, Turn

    turns = tuple(Turn(m.role, m.text.replace("<image>", PICTURE)) for m in request.messages)
    if len(request.pictures) == 1:
        turns = (Turn("user", f"{PICTURE}\n{turns[0].text.replace(PICTURE, '').strip()}"),)
    record = Record(SampleKey("", "", 0), "", ("",) * len(request.pictures), turns)
    rows = left_padded([Template.of("chat", vlm.tokenizer).prompt(record, 4)], torch.device("cpu"))
    shown = [canvas(picture, "pad", 28) for picture in request.pictures]
    features = vision_features(vlm.model, vlm.layout, torch.stack(shown)) if shown else None
    with torch.no_grad(), vlm.host.use(request.model):
        embedded = embeddings(vlm.model, vlm.layout, rows, features)
        ends = {tiny.EOS, tiny.TURN_END}
        return greedy(
            vlm.model, embedded, rows.attention_mask, ends=ends, forbidden=[tiny.IMAGE], limit=request.max_tokens or 1
        )[0]


def test_200_requests_of_16_threads_are_answered_as_alone(make: Callable[..., LocalEngine]) -> None:
    vlm = tiny.vlm(adaptors=True, ends=True)
    requests = [tiny.asked(n % 60, NAMES[n % 3], max_tokens=4 + n % 13) for n in range(200)]
    longest = [alone(vlm, replace(request, max_tokens=16)) for request in requests[:60]]
    assert any(len(ids) < 16 for ids in longest)  # some end by themselves
    wanted = [longest[n % 60][: 4 + n % 13] for n in range(200)]
    engine = make(vlm, places=8, queue=200)

    def client(number: int) -> tuple[list[int], bool]:
        chance = random.Random(number)
        time.sleep(chance.random() * 0.02)
        ticket = engine.submit(requests[number])
        cut, got, finished = chance.randrange(8) if chance.random() < 0.3 else None, [], False
        for piece in ticket:
            got += piece.ids
            finished = piece.finish is not None
            if cut is not None and len(got) >= cut:
                ticket.cancel()
        return got, finished

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(client, range(200)))
    complete = 0
    for number, (got, finished) in enumerate(answers):
        assert got == (wanted[number] if finished else wanted[number][: len(got)]), number
        complete += finished
    assert 120 < complete < 200
    numbers = engine.numbers()
    assert numbers["requests_total"] == 200 == numbers["finished_total"] + numbers["cancelled_total"]
    assert numbers["steps_total"] < numbers["tokens_total"] / 3  # steps were shared
    engine.drain(5)
    assert engine.numbers()["running"] == engine.numbers()["key_value_bytes"] == 0


def test_answers_differ_between_workflows_questions_and_pictures() -> None:
    vlm = tiny.vlm(adaptors=True)
    answers = {tuple(alone(vlm, tiny.asked(n, name, max_tokens=8))) for n in range(6) for name in NAMES}
    assert len(answers) > 12


@pytest.mark.parametrize("language", ["sparse", "sliding"])
def test_other_decoders_share_steps_too(make: Callable[..., LocalEngine], language: str) -> None:
    engine = make(tiny.vlm(language))
    one_by_one = [ids(engine.submit(tiny.asked(n))) for n in range(12)]
    together = [ids(ticket) for ticket in [engine.submit(tiny.asked(n)) for n in range(12)]]
    assert together == one_by_one and len({*map(tuple, together)}) > 6


def test_a_seed_decides_whatever_shares_the_batch(engine: LocalEngine) -> None:
    request = tiny.asked(5, temperature=1.0, top_p=0.9, seed=7, max_tokens=30)
    first = ids(engine.submit(request))
    others = [engine.submit(tiny.asked(n, temperature=1.5, max_tokens=25)) for n in range(5)]
    again = [
        engine.submit(request),
        engine.submit(replace(request, seed=8)),
        engine.submit(replace(request, seed=None)),
    ]
    same, other, any_seed = (ids(ticket) for ticket in again)
    assert same == first != other and any_seed != first
    assert all(len(ids(ticket)) > 0 for ticket in others)


def test_log_probabilities_are_those_of_the_answer(engine: LocalEngine) -> None:
    pieces = list(engine.submit(tiny.asked(2, temperature=1.3, seed=1, logprobs=20, max_tokens=12)))
    known = [one for piece in pieces for one in piece.logprobs or ()]
    chosen = [id for piece in pieces for id in piece.ids]
    assert [one.id for one in known] == chosen and len(chosen) > 3
    again = [one for p in engine.submit(tiny.asked(2, logprobs=0, max_tokens=1)) for one in p.logprobs or ()]
    assert again[0].likeliest == () and again[0].logprob == pytest.approx(known[0].likeliest[0][2], abs=1e-5)
    for one in known:
        values = [value for _, _, value in one.likeliest]
        assert values == sorted(values, reverse=True) and len(values) == 20
        assert 0.2 < sum(torch.tensor(values).exp().tolist()) <= 1 + 1e-5
        held = {id: value for _, id, value in one.likeliest}
        assert held.get(one.id, one.logprob) == one.logprob


def test_log_probabilities_of_the_whole_vocabulary_sum_to_one(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distilvlm.serve import served

    monkeypatch.setattr(served, "MOST_LIKELIEST", 262)
    pieces = list(engine.submit(tiny.asked(2, logprobs=262, max_tokens=5)))
    for one in [one for piece in pieces for one in piece.logprobs or ()]:
        assert sum(torch.tensor([value for *_, value in one.likeliest]).exp().tolist()) == pytest.approx(1, abs=1e-5)


def test_a_stop_string_across_tokens_ends_the_answer(engine: LocalEngine) -> None:
    whole = text(engine.submit(tiny.asked(4, max_tokens=40)))
    assert len(whole) == 40 and whole.isascii()
    stop = whole[10:14]  # of four tokens: every byte is one
    ticket = engine.submit(tiny.asked(4, max_tokens=40, stop=("never there", stop)))
    pieces = list(ticket)
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish == "stop"
    assert ticket.usage.completion_tokens == whole.index(stop) + 4


def test_what_may_begin_a_stop_string_is_held_back_and_given_at_the_end(engine: LocalEngine) -> None:
    whole = text(engine.submit(tiny.asked(4, max_tokens=20)))
    pieces = list(engine.submit(tiny.asked(4, max_tokens=20, stop=(whole[-3:] + "\x00",))))
    assert "".join(piece.text for piece in pieces) == whole
    assert pieces[-1].finish == "length" and len(pieces[-1].text) == 3


def test_usage_counts_positions_of_pictures(engine: LocalEngine) -> None:
    ticket = engine.submit(Request("tiny", prompt="ab<image>c", pictures=(tiny.picture(0),), max_tokens=3))
    assert len(ids(ticket)) == 3
    assert ticket.usage == Usage(3 + 4, 3)
    assert ticket.seconds_to_first_token is not None and ticket.seconds_to_first_token > 0


def test_a_prompt_is_continued_as_it_stands(engine: LocalEngine) -> None:
    chat = tiny.asked(0, max_tokens=10)
    written = f"<|im_start|>user\n{chat.messages[0].text}<|im_end|>\n<|im_start|>assistant\n"
    assert ids(engine.submit(Request("tiny", prompt=written, temperature=0, max_tokens=10))) == ids(engine.submit(chat))


def test_a_repeated_prompt_tells_of_its_tokens_what_the_model_thought_when_it_chose_them(engine: LocalEngine) -> None:
    given = tuple(tiny.vlm().tokenizer.encode("hello world", add_special_tokens=False))
    asked = Request("tiny", prompt=given, temperature=0.0, max_tokens=4, logprobs=2)
    answer = list(engine.submit(asked))
    chosen = [one for piece in answer for one in piece.logprobs or ()]
    assert len(chosen) >= 3
    longer = (*given, *(one.id for one in chosen))
    first, *after = list(engine.submit(replace(asked, prompt=longer, echo=True)))
    assert first.text.startswith("hello world") and first.ids == () and first.logprobs is not None
    assert [one.id for one in first.logprobs] == list(longer)
    assert first.logprobs[0].logprob is None and first.logprobs[0].likeliest == ()
    again = first.logprobs[len(given) :]
    assert [one.logprob for one in again] == pytest.approx([one.logprob for one in chosen], abs=1e-4)
    assert [one.likeliest[0][:2] for one in again] == [one.likeliest[0][:2] for one in chosen]
    assert after and all(piece.logprobs is not None for piece in after)
    # The text is the same prompt, and nothing is told of its tokens where nobody asks.
    said = list(engine.submit(replace(asked, prompt="hello world", echo=True, logprobs=None)))
    assert said[0].text == "hello world" and said[0].logprobs is None
    assert [one.ids for one in said[1:]] == [one.ids for one in answer]


def test_a_full_queue_is_busy_and_cancelling_makes_room_at_once(make: Callable[..., LocalEngine]) -> None:
    engine = make(places=1, queue=2)
    running = engine.submit(tiny.asked(1, max_tokens=200))
    next(iter(running))
    waiting = [engine.submit(tiny.asked(n, max_tokens=200)) for n in (2, 3)]
    with pytest.raises(Busy) as refused:
        engine.submit(tiny.asked(4))
    assert refused.value.retry_after >= 1
    waiting[0].cancel()
    last = engine.submit(tiny.asked(4))
    assert list(waiting[0]) == []
    running.cancel()
    waiting[1].cancel()
    assert len(ids(last)) == 8
    assert engine.numbers()["busy_total"] == 1


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (tiny.asked(1, "other"), "model"),
        (Request("tiny", (Message("assistant", "a"),)), "messages"),
        (Request("tiny", (Message("user", "x" * 300),)), "messages"),
        (Request("tiny", prompt="x" * 256), "prompt"),
        (Request("tiny", prompt=""), "prompt"),
        (Request("tiny", prompt=(3, 10**6)), "prompt"),
        (Request("tiny", prompt=(3,), pictures=(tiny.picture(0),)), "prompt"),
        (Request("tiny", (Message("user", "<image>"),), pictures=(tiny.picture(0),) * 2), "messages"),
        (Request("tiny", (Message("user", "a\ud800"),)), "messages"),
        (Request("tiny", (Message("user", "<image>"),), pictures=(Image.new("1", (99999, 1)),)), "pictures"),
        (tiny.asked(1, max_tokens=0), "max_tokens"),
        (tiny.asked(1, max_tokens=250), "max_tokens"),
        (tiny.asked(1, temperature=float("nan")), "temperature"),
        (tiny.asked(1, temperature=-0.1), "temperature"),
        (tiny.asked(1, top_p=0.0), "top_p"),
        (tiny.asked(1, logprobs=21), "logprobs"),
        (tiny.asked(1, stop=("",)), "stop"),
    ],
)
def test_what_can_not_be_answered_is_refused(engine: LocalEngine, request_: Request, field: str) -> None:
    with pytest.raises(Refused) as refused:
        engine.submit(request_)
    assert refused.value.field == field and refused.value.reason
    assert engine.numbers()["requests_total"] == 0


@pytest.mark.parametrize(
    ("request_", "field", "reason"),
    [
        (Request("tiny"), "messages", "give a conversation, or a prompt to go on with, one of both"),
        (Request("tiny", (Message("user", "a"),), prompt="a"), "messages", "a prompt to go on with, one of both"),
        (
            Request("tiny", prompt="a", pictures=(tiny.picture(0),)),
            "prompt",
            "0 <image> for 1 picture: write one for each",
        ),
        (
            Request("tiny", prompt="<image>a", pictures=(tiny.picture(0),) * 2),
            "prompt",
            "1 <image> for 2 pictures: write one for each",
        ),
    ],
)
def test_a_request_of_neither_form_or_of_too_few_pictures_is_told(
    engine: LocalEngine, request_: Request, field: str, reason: str
) -> None:
    with pytest.raises(Refused) as refused:
        engine.submit(request_)
    assert refused.value.field == field and refused.value.reason.endswith(reason)


def test_two_workflows_of_one_name_are_refused(engine: LocalEngine) -> None:
    served = list(engine._served.values())
    with pytest.raises(ValueError, match="two models are called alike: tiny, tiny"):
        LocalEngine(engine._vlm, served * 2)


def test_numbers_that_are_not_finite_end_their_request_alone(make: Callable[..., LocalEngine]) -> None:
    vlm = tiny.vlm()
    vlm.model.get_input_embeddings().weight.data[ord("z") - 33] = torch.nan
    engine = make(vlm)
    wanted = [ids(engine.submit(tiny.asked(n))) for n in range(6)]
    tickets = [engine.submit(tiny.asked(n)) for n in range(3)]
    broken = engine.submit(Request("tiny", prompt="a z", max_tokens=5))
    tickets += [engine.submit(tiny.asked(n)) for n in range(3, 6)]
    with pytest.raises(Failed, match="NaN"):
        list(broken)
    assert [ids(ticket) for ticket in tickets] == wanted
    assert engine.numbers()["failed_total"] == 1


def test_a_prompt_that_breaks_the_model_fails_alone(
    make: Callable[..., LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distilvlm.serve import batch

    engine = make(places=8)
    blocker = engine.submit(tiny.asked(1, max_tokens=50))
    real = batch.vision_features

    def breaking(model, layout, pictures):
        if len(pictures) and int(pictures[..., 0, 0].sum()) and (pictures == 255).all(dim=(1, 2, 3)).any():
            raise RuntimeError("a tower that does not like white")
        return real(model, layout, pictures)

    monkeypatch.setattr(batch, "vision_features", breaking)
    white = Image.new("RGB", (8, 8), "white")
    bad = Request("tiny", (Message("user", "<image>a"),), pictures=(white,), max_tokens=3)
    tickets = [engine.submit(one) for one in (tiny.asked(2), bad, tiny.asked(4))]
    assert len(ids(tickets[0])) == 6 and len(ids(tickets[2])) == 8
    with pytest.raises(Failed, match="does not like white"):
        list(tickets[1])
    assert len(ids(blocker)) == 50


def test_a_step_that_breaks_fails_what_runs_and_the_engine_goes_on(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ids(engine.submit(tiny.asked(3)))
    real, broken = engine._batch.step, threading.Event()

    def step(tokens: list[int]) -> torch.Tensor:
        if not broken.is_set():
            broken.set()
            raise MemoryError("no room for keys")
        return real(tokens)

    monkeypatch.setattr(engine._batch, "step", step)
    with pytest.raises(Failed, match="no room for keys"):
        list(engine.submit(tiny.asked(3)))
    assert ids(engine.submit(tiny.asked(3))) == wanted


def test_draining_finishes_what_runs_and_takes_nothing_new(make: Callable[..., LocalEngine]) -> None:
    engine = make(places=2)
    tickets = [engine.submit(tiny.asked(n, max_tokens=30)) for n in range(5)]
    drained = threading.Thread(target=engine.drain, args=(20,))
    drained.start()
    while not engine._draining:
        time.sleep(0.001)
    with pytest.raises(Draining):
        engine.submit(tiny.asked(0))
    drained.join()
    assert [len(ids(ticket)) for ticket in tickets] == [30] * 5


def test_what_a_drain_has_no_time_for_fails(make: Callable[..., LocalEngine]) -> None:
    engine = make(places=1)
    tickets = [engine.submit(tiny.asked(n, max_tokens=200)) for n in range(4)]
    engine.drain(0)
    with pytest.raises(Failed, match="stopped"):
        list(tickets[-1])


def test_an_event_loop_waits_without_threads(engine: LocalEngine) -> None:
    wanted = [ids(engine.submit(tiny.asked(n))) for n in range(8)]

    async def read(number: int) -> list[int]:
        return [id async for piece in engine.submit(tiny.asked(number)) for id in piece.ids]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(read(number) for number in range(8)))

    before = threading.active_count()
    assert asyncio.run(all_of_them()) == wanted
    assert threading.active_count() == before


def test_a_loop_that_is_gone_does_not_stop_the_engine(engine: LocalEngine) -> None:
    ticket = engine.submit(tiny.asked(1, max_tokens=200))

    async def first() -> Piece:
        pieces = ticket.__aiter__()
        return await pieces.__anext__()

    assert asyncio.run(first()).ids
    assert len(ids(engine.submit(tiny.asked(2)))) == 6
    ticket.cancel()


def test_models_are_told(make: Callable[..., LocalEngine]) -> None:
    told = {one.name: one for one in make(tiny.vlm(adaptors=True), context=100).models}
    assert set(told) == set(NAMES)
    assert [one.boxes for one in told.values()] == [False, False, True]
    assert all(one.context == 100 and one.sees for one in told.values())
    assert told["seeing"].parameters > told["text"].parameters > 0
    with pytest.raises(ValueError, match="256 at most"):
        make(context=1000)
