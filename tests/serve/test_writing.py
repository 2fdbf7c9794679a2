"""Text that grows with its tokens: whole characters, the whole of it, and nothing of a stop string."""

from __future__ import annotations

import random

import pytest

from distilvlm.serve.writing import Writer

from . import small_models as tiny

TEXT = "Grüße, 世界! 🙂👍🏽 end"


def test_only_whole_characters_are_told() -> None:
    words = tiny.tokenizer()
    writer = Writer(words)
    pieces = [writer.add(id) for id in words(TEXT, add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) == TEXT and writer.rest() == ""
    assert all("\ufffd" not in piece for piece in pieces) and "🙂" in pieces


def test_bytes_that_are_no_character_hold_nothing_back_for_ever() -> None:
    words = tiny.tokenizer()
    broken = words.convert_tokens_to_ids(["ÿ"] * 50)  # 0xFF, which no character has
    writer = Writer(words)
    told = "".join(writer.add(id) for id in [*broken, *words("ok")["input_ids"]])
    assert told == words.decode([*broken, *words("ok")["input_ids"]])
    assert told.endswith("ok")


def test_half_a_character_at_the_end_is_left_out() -> None:
    words = tiny.tokenizer()
    writer = Writer(words)
    ids = words("a🙂", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(writer.add(id) for id in ids) + writer.rest() == "a"


def test_special_tokens_have_no_text() -> None:
    writer = Writer(tiny.tokenizer())
    assert [writer.add(id) for id in (tiny.EOS, 257, 64)][:2] == ["", ""]


@pytest.mark.parametrize("seed", range(30))
def test_stop_strings_cut_where_the_first_of_them_begins(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choice("ab") for _ in range(40)) + "ü"
    stops = tuple("".join(chance.choice("ab") for _ in range(chance.randint(1, 6))) for _ in range(2))
    words = tiny.tokenizer()
    writer = Writer(words, stops)
    told = ""
    for id in words(text)["input_ids"]:
        told += writer.add(id)
        assert not any(stop in told for stop in stops)
        if writer.stopped:
            break
    else:
        told += writer.rest()
    # The first that is complete counts, and among those that end together the one that began first.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert writer.stopped == bool(ends)
    assert told == (text[: min(place for end, place in ends if end == min(ends)[0])] if ends else text)
