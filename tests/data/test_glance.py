"""What is known of rows at a glance is what their drafts say, and files that are listed are those that are there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilvlm.data.glance import glance
from distilvlm.data.problems import RowError
from distilvlm.data.readers import Drafted, Looked
from distilvlm.data.streams import listing, survey
from distilvlm.data.streams.listing import Listing
from distilvlm.data.streams.stored import decoded
from distilvlm.data.turns import Form
from tests.fuzz.inputs import trees
from tests.fuzz.targets import TALK

NAMES = ["a.png", "b.png", "sub/c.png", "./a.png", "sub//c.png"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of which only the names count."""
    root = tmp_path_factory.mktemp("root")
    (root / "sub").mkdir()
    for name in NAMES:
        (root / name).write_bytes(b"")
    return root


texts = st.lists(
    st.sampled_from(
        ["<image>", "<image>\n", "\n<image>", "\n", " ", "a", "two words", "\x1f", "é", "\u2003", "\ue000", "\ud800"]
    ),
    max_size=4,
).map("".join)
speakers = st.sampled_from([["human", "gpt"], ["user", "assistant"]])
pictures = st.none() | st.lists(st.sampled_from(NAMES), max_size=3) | st.sampled_from([*NAMES, "no.png", "", 5])
text_parts = st.builds(lambda text: {"type": "text", "text": text}, texts)
picture_parts = st.sampled_from(
    [{"type": "image"}, {"type": "image", "image": "a.png"}, {"type": "image_url", "image_url": {"url": "b.png"}}]
)
contents = texts | st.lists(text_parts | picture_parts, max_size=3) | st.sampled_from([None, {}, [{}], [{"type": "x"}]])


@st.composite
def rows(draw: st.DrawFn, form: Form) -> dict[str, Any]:
    """Rows that are right for the most part."""
    first, second = draw(speakers) if form == "llava" else ("user", "assistant")
    said = [draw(texts if form == "llava" else contents) for _ in range(draw(st.integers(0, 5)))]
    who = [(first, second)[place % 2] for place in range(len(said))]
    if draw(st.booleans()):
        who, said = ["system", *who], [draw(texts), *said]
    if who and draw(st.integers(0, 9)) == 0:
        who[draw(st.integers(0, len(who) - 1))] = draw(st.sampled_from(["gpt", "assistant", "nobody"]))
    keys = ("from", "value") if form == "llava" else ("role", "content")
    row: dict[str, Any] = {
        "conversations" if form == "llava" else "messages": [
            dict(zip(keys, turn, strict=True)) for turn in zip(who, said, strict=True)
        ]
    }
    for key in draw(st.lists(st.sampled_from(["image", "images"]), max_size=2, unique=True)):
        row[key] = draw(pictures)
    return row


FORMS: tuple[Form, Form] = ("llava", "messages")


def told(look: Any, row: Any) -> tuple[Any, ...]:
    """All that is kept of a row, or what is wrong with it."""
    try:
        seen = look(row)
    except RowError as error:
        return type(error), error.field, error.reason
    return seen.words, list(seen.images), seen.marker_added, seen.neutralised, seen.answers_dropped


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FORMS).flatmap(
        lambda form: st.tuples(st.just(form), rows(form) | st.sampled_from(TALK[:2]).flatmap(trees))
    )
)
def test_a_look_says_what_the_draft_says(root, given):
    form, row = given
    drafted = Drafted(form, None, root)
    assert told(Looked(drafted, Listing(root)), row) == told(drafted, row)


def talk(*said: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)]
    return {"id": 1, "meta": {"x": [None]}, "conversations": turns, **fields}


def messages(*contents: Any, **fields: Any) -> dict[str, Any]:
    roles = ("system", "user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": turns, **fields}


@pytest.mark.parametrize(
    ("form", "row", "words", "images"),
    [
        ("llava", talk("what is it?", "a dog"), 5, []),
        ("llava", talk("<image>\nwhat?", "a dog", "why?", "é", image="a.png"), 6, ["a.png"]),
        ("llava", talk("what?\n<image>", "a dog", image=["a.png"]), 4, ["a.png"]),
        ("llava", talk("what?", "a dog", image="a.png"), 4, ["a.png"]),
        ("llava", talk("<image><image> differ?", "no", images=["a.png", "b.png"]), 3, ["a.png", "b.png"]),
        ("messages", messages("be kind", "what?", "a dog"), 5, []),
        ("messages", messages("be", [{"type": "image"}, {"type": "text", "text": "a?"}], "x", images=["a"]), 4, ["a"]),
    ],
)  # fmt: skip
def test_rows_of_the_usual_shape_need_no_draft(form, row, words, images):
    seen = glance(row, form)
    assert seen is not None and seen.words == words and list(seen.images) == images


SHAPES = [b"{", b"}", b"[", b"]", b",", b":", b'"', b'"a"', b" ", b"\n", b"\x0b", b"\0", b"[" * 300, b"]" * 300]
TEXT = [
    b"\\",
    b"\\u0041",
    b"\\ud83d\\ude00",
    b"\\ud800",
    b"\x7f",
    b"\xc3\xa9",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
]
VALUES = [b"-0", b"-0.0", b"0", b"1e5", b"1E400", b"1.5", b"01", b"NaN", b"-Infinity", b"true", b"9" * 25, b"9" * 4301]
pieces = st.sampled_from([*SHAPES, *TEXT, *VALUES])


@settings(max_examples=200, deadline=None)
@given(st.lists(pieces, max_size=8).map(b"".join), st.sampled_from([b"%s", b"[%s]", b'{"a":%s}', b'"%s"']))
def test_a_text_is_decoded_as_json_decodes_it(text, around):
    text = around % text
    results = []
    for decode in (decoded, lambda text: json.loads(text.decode())):
        try:
            results.append(repr(decode(text)))
        except ValueError as error:
            results.append((type(error), str(error)))
    assert results[0] == results[1]


@pytest.mark.parametrize("largest", [0, 3, 100])
def test_listed_files_are_those_that_are_there(tmp_path, monkeypatch, largest):
    monkeypatch.setattr(listing, "LISTED_FROM", 2)
    monkeypatch.setattr(listing, "LARGEST", largest)
    (tmp_path / "sub").mkdir()
    for name in ("a", "b", "sub/c", "sub/d"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "broken").symlink_to(tmp_path / "none")
    asked = ["a", "b", "sub", "sub/", "sub/c", "sub//c", "./sub/d", "sub/../a", "link", "broken", "none", "no/a"]
    asked += ["", ".", "a/", "a\0", "a\0/b", "\ud800", str(tmp_path / "b"), str(tmp_path / "none"), "/", "/a"]
    files = Listing(tmp_path)
    for _ in range(4):
        for name in asked:
            assert files.has(name) == ("\0" not in name and (tmp_path / name).is_file()), name
    (tmp_path / "later").write_bytes(b"")
    assert files.has("later")


def test_pictures_of_a_directory_are_not_asked_for_one_by_one(tmp_path, monkeypatch):
    for number in range(100):
        (tmp_path / f"{number}").write_bytes(b"")
    asked: list[Any] = []
    there = os.path.isfile
    monkeypatch.setattr("os.path.isfile", lambda path: asked.append(path) or there(path))
    files = Listing(tmp_path)
    assert all(files.has(f"{number}") for number in range(100))
    assert len(asked) == listing.LISTED_FROM


def test_a_picture_is_known_by_its_path(tmp_path):
    files = ["a", "b/c", "./a", "b//c", "b/./c", "b/../a", "/a/b", "b/c/", ".a", "b/.c", "a."]
    names = [*files, "inside:0+9:x.tar#a", "a"]
    hashes, directories = survey._shown(names, tmp_path)
    paths = [name if name.startswith("inside:") else str(tmp_path / name) for name in names]
    expected = [hashlib.blake2b(path.encode(), digest_size=16).digest() for path in paths]
    assert hashes.tobytes() == b"".join(expected) and hashes.dtype == np.uint64
    assert directories == {str((tmp_path / name).parent) for name in files}
