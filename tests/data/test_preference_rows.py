"""Rows of preferences become pairs or rated records in every form that people have them in; defects are named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from distilvlm.data import DataError, Record, Source, Turn, read
from distilvlm.data.records import PICTURE
from distilvlm.recipe.schema import SourceSpec

from .small_data import llava_row, make_pictures, write_json


@pytest.fixture(autouse=True)
def pictures(tmp_path: Path) -> list[str]:
    return make_pictures(tmp_path / "images", 3)


def source_of(tmp_path: Path, given: list[Any], **spec: Any) -> Source:
    path = write_json(tmp_path / "data.json", given)
    return read(SourceSpec(path=str(path), images=str(tmp_path / "images"), **spec), "talk")


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


ASKED = "<image>\nWhat is it?"
PARTS = [{"type": "image"}, {"type": "text", "text": "What is it?"}]

# Each says: about 0.png, "What is it?", "A dog." is better than "A cat.".
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "LLaVA-MoD's": (
        "llava",
        {
            "id": "x",
            "image": "0.png",
            "chosen": [human(ASKED), gpt("A dog.")],
            "rejected": [human(ASKED), gpt("A cat.")],
        },
    ),
    "LLaVA's with a list of pictures": (
        "llava",
        {
            "id": "x",
            "images": ["0.png"],
            "chosen": [human(ASKED), gpt("A dog.")],
            "rejected": [human(ASKED), gpt("A cat.")],
        },
    ),
    "ShareGPT's": (
        "llava",
        {
            "id": "x",
            "image": "0.png",
            "conversations": [human(ASKED)],
            "chosen": gpt("A dog."),
            "rejected": gpt("A cat."),
        },
    ),
    "LLaVA's with texts": (
        "llava",
        {"id": "x", "image": "0.png", "conversations": [human(ASKED)], "chosen": "A dog.", "rejected": "A cat."},
    ),
    "OpenAI's": (
        "messages",
        {
            "id": "x",
            "images": ["0.png"],
            "messages": [user(ASKED)],
            "chosen": assistant("A dog."),
            "rejected": "A cat.",
        },
    ),
    "TRL's": (
        "messages",
        {
            "id": "x",
            "images": ["0.png"],
            "prompt": [user(PARTS)],
            "chosen": [assistant([{"type": "text", "text": "A dog."}])],
            "rejected": [assistant([{"type": "text", "text": "A cat."}])],
        },
    ),
    "TRL's with an implicit prompt": (
        "messages",
        {
            "id": "x",
            "images": ["0.png"],
            "chosen": [user(PARTS), assistant("A dog.")],
            "rejected": [user(PARTS), assistant("A cat.")],
        },
    ),
    "a prompt of text": (
        "messages",
        {"id": "x", "image": "0.png", "prompt": ASKED, "chosen": "A dog.", "rejected": "A cat."},
    ),
    "a prompt of text that the conversations repeat": (
        "messages",
        {
            "id": "x",
            "image": "0.png",
            "prompt": ASKED,
            "chosen": [user(ASKED), assistant("A dog.")],
            "rejected": [user(ASKED), assistant("A cat.")],
        },
    ),
}


def asked(record: Record) -> str:
    """The question without white space around the picture, where the forms differ."""
    (question,) = [turn.text for turn in record.turns if turn.role == "user"]
    return " ".join(question.replace(PICTURE, f"{PICTURE} ").split())


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_the_same_record_in_every_form(tmp_path, name):
    form, row = PAIRS[name]
    source = source_of(tmp_path, [row])
    assert (source.bad, source.format, source.preferences) == ([], form, "pairs")
    (record,) = source.records
    assert (record.id, record.preferences, record.desirable) == ("x", "pairs", None)
    assert record.images == (str(tmp_path / "images" / "0.png"),)
    assert asked(record) == f"{PICTURE} What is it?"
    assert record.turns[:-1] == record.other[:-1] and len(record.turns) == 2
    assert (record.turns[-1], record.other[-1]) == (Turn("assistant", "A dog."), Turn("assistant", "A cat."))
    assert record.rejected().answers == ("A cat.",)


RATED: dict[str, tuple[str, dict[str, Any]]] = {
    "TRL's": (
        "messages",
        {"images": ["0.png"], "prompt": [user(PARTS)], "completion": [assistant("A dog.")], "label": False},
    ),
    "texts": ("messages", {"image": "0.png", "prompt": ASKED, "completion": "A dog.", "label": False}),
    "messages": ("messages", {"images": ["0.png"], "messages": [user(PARTS), assistant("A dog.")], "label": False}),
    "LLaVA's": ("llava", {"image": "0.png", "conversations": [human(ASKED), gpt("A dog.")], "label": False}),
    "an implicit prompt": (
        "messages",
        {"images": ["0.png"], "completion": [user(PARTS), assistant("A dog.")], "label": False},
    ),
}


@pytest.mark.parametrize("name", RATED)
def test_a_rated_answer_is_the_same_record_in_every_form(tmp_path, name):
    form, row = RATED[name]
    source = source_of(tmp_path, [row, {**row, "label": True}])
    assert (source.bad, source.format, source.preferences) == ([], form, "rated")
    bad, good = source.records
    assert (bad.desirable, good.desirable, bad.preferences, bad.other) == (False, True, "rated", ())
    assert asked(bad) == f"{PICTURE} What is it?" and bad.turns[-1] == Turn("assistant", "A dog.")
    assert good.turns == bad.turns and bad.answered("A cow.").answers == ("A cow.",)


def test_earlier_rounds_and_the_system_belong_to_the_prompt(tmp_path):
    before = [{"from": "system", "value": "Be brief."}, human(ASKED), gpt("A dog."), human("Sure?")]
    row = {"image": "0.png", "chosen": [*before, gpt("Yes.")], "rejected": [*before, gpt("No.")]}
    (record,) = source_of(tmp_path, [row]).records
    assert [turn.role for turn in record.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert (record.answers, record.rejected().answers) == (("A dog.", "Yes."), ("A dog.", "No."))


def test_both_sides_get_the_care_of_a_plain_conversation(tmp_path):
    greeted = [gpt("hello"), human("What does <image> mean?")]
    row = {"image": "0.png", "chosen": [*greeted, gpt("a tag")], "rejected": [*greeted, gpt(f"an <image> {PICTURE}")]}
    marked = [gpt("hello"), human("<image>\nWhat does <image> mean?")]
    source = source_of(
        tmp_path,
        [
            row,
            {"image": "0.png", "chosen": [*marked, gpt("a tag")], "rejected": [*marked, gpt(f"an <image> {PICTURE}")]},
        ],
    )
    first, second = source.records
    assert first.turns[0].text == f"{PICTURE}\nWhat does  mean?"  # one marker, one picture: it is the picture's
    assert second.turns[0].text == f"{PICTURE}\nWhat does < image > mean?"
    assert first.other[-1].text == second.other[-1].text == "an < image > \ufffd"
    assert (source.answers_dropped, source.markers_added) == (2, 0)
    assert source.neutralised == 2 + (1 + 1 + 2)
    unmarked = {"image": "0.png", "conversations": [human("What?")], "chosen": "a", "rejected": "b"}
    assert source_of(tmp_path, [unmarked]).markers_added == 1


def pair(**changes: Any) -> dict[str, Any]:
    row = {"image": "0.png", "conversations": [human(ASKED)], "chosen": "A dog.", "rejected": "A cat.", **changes}
    return {key: value for key, value in row.items() if value is not None}


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        (pair(rejected=None), "rejected", "missing"),
        (pair(chosen=3), "chosen", "is a number, not text, a turn or a list of turns"),
        (pair(chosen=[]), "chosen", "is empty"),
        (pair(chosen=""), "chosen", "no answer with text"),
        (pair(rejected=gpt(" ")), "rejected", "no answer with text"),
        (pair(rejected=" A dog.\n"), "rejected", "is the same answer as chosen"),
        (
            pair(rejected=human("A cat.")),
            "rejected",
            "holds a whole conversation, but its prompt is not 'conversations'",
        ),
        (pair(conversations=None), "chosen", "there is no prompt (prompt, conversations, messages)"),
        (pair(chosen=[gpt("A dog."), human("Sure?")]), "chosen[1]", "is the user's: a conversation that is"),
        (pair(rejected={"from": "robot", "value": "A cat."}), "rejected.from", "'robot'"),
        (pair(rejected=[gpt("A cat."), gpt("A cow.")]), "rejected[1]", "must alternate"),
        (pair(chosen="half \ud83d"), "chosen", "surrogate"),
        (pair(image="gone.png"), "image", "no file"),
        (pair(image=["0.png", "1.png"]), "chosen", "1 <image> markers for 2 pictures"),
        (
            pair(conversations=None, chosen=[human(ASKED), gpt("a")], rejected=[human("<image>\nWho?"), gpt("b")]),
            "rejected",
            "has another prompt than chosen",
        ),
        (
            pair(conversations=None, chosen=[human(ASKED), gpt("a")], rejected=[gpt("b")]),
            "rejected",
            "there is no prompt",
        ),
        (pair(chosen=[human("<image>\nWho?"), gpt("a")]), "chosen", "its prompt is not 'conversations'"),
        (llava_row(1, "0.png", ASKED, "A dog."), "chosen", "the row is a plain conversation, the first one a pair"),
        (
            {**llava_row(1, "0.png", ASKED, "A dog."), "label": True},
            "chosen",
            "the row is a rated answer (label: true or false), the first one a pair",
        ),
    ],
)
def test_a_pairs_defect_names_its_field(tmp_path, row, field, reason):
    source = source_of(tmp_path, [pair(), row, pair(image="1.png")])
    assert [record.key.row for record in source.records] == [0, 2]
    (bad,) = source.bad
    assert (bad.key.row, bad.field) == (1, field)
    assert reason in bad.reason


def test_both_sides_must_show_the_same_pictures(tmp_path):
    def side(*names: str, answer: str) -> list[dict[str, Any]]:
        return [
            user([*({"type": "image", "path": name} for name in names), {"type": "text", "text": "?"}]),
            assistant(answer),
        ]

    rows = [
        {"chosen": side("0.png", "1.png", answer="a"), "rejected": side("0.png", "1.png", answer="b")},
        {"chosen": side("0.png", "1.png", answer="a"), "rejected": side("1.png", "0.png", answer="b")},
        {"chosen": side("0.png", answer="a"), "rejected": side(answer="b")},
    ]
    source = source_of(tmp_path, rows)
    assert [record.key.row for record in source.records] == [0]
    assert [(bad.key.row, bad.field) for bad in source.bad] == [(1, "rejected"), (2, "rejected")]
    assert "['1.png', '0.png'], chosen ['0.png', '1.png']: both must show the same, in order" in source.bad[0].reason


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"prompt": "q", "completion": "a", "label": 1}, "label", "is a number, not true (a good answer) or false"),
        ({"prompt": "q", "completion": "a", "label": None}, "label", "is missing, not true"),
        ({"prompt": "q", "completion": "a"}, "label", "the row is a plain conversation"),
        ({"prompt": "q", "label": True}, "completion", "is missing"),
        ({"completion": "a", "label": True}, "completion", "there is no prompt"),
        ({"prompt": "q", "completion": " ", "label": True}, "completion", "no answer with text"),
        ({"messages": [user("q"), assistant("a"), user("q")], "label": True}, "messages[2]", "ends with its answer"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "chosen", "the row is a pair"),
    ],
)
def test_a_rated_answers_defect_names_its_field(tmp_path, row, field, reason):
    good = {"prompt": "q", "completion": "a", "label": False}
    source = source_of(tmp_path, [good, row, good])
    (bad,) = source.bad
    assert (bad.key.row, bad.field, len(source.records)) == (1, field, 2)
    assert reason in bad.reason


def test_a_plain_file_refuses_rows_of_preferences_and_keeps_other_labels(tmp_path):
    plain = llava_row(0, "0.png", ASKED, "A dog.")
    rows = [plain, pair(), {**plain, "label": False}, {**plain, "label": "dog"}, {**plain, "label": 3}]
    source = source_of(tmp_path, rows)
    assert source.preferences is None
    assert [record.preferences for record in source.records] == [None] * 3
    assert [(bad.key.row, bad.field) for bad in source.bad] == [(1, "chosen"), (2, "label")]


def test_the_form_may_be_given_and_must_then_fit(tmp_path):
    assert source_of(tmp_path, [pair()], format="llava").bad == []
    source = source_of(tmp_path, [{"prompt": [user("q")], "chosen": "a", "rejected": "b"}], format="llava")
    assert [(bad.field, len(source.records)) for bad in source.bad] == [("prompt[0].from", 0)]


def test_a_row_without_a_prompt_that_is_known_sends_to_the_converters(tmp_path):
    with pytest.raises(DataError, match=r"nor a 'prompt' with answers.*'question'.*distilvlm data convert"):
        source_of(tmp_path, [{"image": "0.png", "question": "q", "chosen": "a", "rejected": "b"}])


def test_packed_preferences_survive_and_count_their_longer_side(tmp_path):
    rows = [pair(chosen="a", rejected="b c d"), pair(chosen="a b", rejected="c")]
    records = source_of(tmp_path, rows).records
    assert list(pickle.loads(pickle.dumps(records))) == list(records)
    assert records.words.tolist() == [4 + 3, 4 + 2]  # the picture, "What is it?" and the longer answer
    rated = source_of(tmp_path, [{"prompt": "q", "completion": "a", "label": False}]).records
    assert pickle.loads(pickle.dumps(rated))[0] == rated[0] and rated[0].desirable is False


def test_take_and_rows_count_as_for_plain_files(tmp_path):
    source = source_of(tmp_path, [pair(), pair(chosen=""), pair()], take=1, rows=3)
    assert (len(source.records), source.bad, source.preferences) == (1, [], "pairs")
    assert json.loads(json.dumps(source.spec.model_dump()))["format"] == "auto"


def test_what_the_documentation_shows_is_read(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    shown = page.partition("## Preferences")[2].partition("```json\n")[2].partition("```")[0]
    make_pictures(tmp_path / "images", 1)
    (tmp_path / "images" / "0.png").rename(tmp_path / "images" / "7.jpg")
    found = []
    while shown.strip():
        row, end = json.JSONDecoder().raw_decode(shown.lstrip())
        shown = shown.lstrip()[end:]
        source = source_of(tmp_path, [row])
        assert source.bad == [] and asked(source.records[0]) == f"{PICTURE} What is it?"
        found.append(source.preferences)
    assert found == ["pairs", "pairs", "pairs", "rated"]
