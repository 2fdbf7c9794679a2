"""Which samples are shown, what their intervals say, and what a mask looks like."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer

from distilvlm.data import IGNORED, Encoded
from distilvlm.report.formats import Answer, ComparisonFile, Interval
from distilvlm.report.intervals import gaps, measured, verdict
from distilvlm.report.masks import Span, spans
from distilvlm.report.pictures import Album
from distilvlm.report.samples import choose, shared_out
from tests.runs.tiny import write_tokenizer

SERIES = {"control": 0, "distilled": 1}


def answers(rights: dict[str, str], pictures: list[str]) -> dict[str, list[Answer]]:
    """A letter per question: r right, w wrong."""
    return {
        name: [
            Answer(
                file="f",
                row=row,
                turn=0,
                pictures=(pictures[row],),
                question=f"q{row}",
                answer="yes",
                prediction="yes" if letter == "r" else "no",
                exact=letter == "r",
                accurate=letter == "r",
            )
            for row, letter in enumerate(letters)
        ]
        for name, letters in rights.items()
    }


def test_quotas_follow_the_shares_and_go_on_where_a_kind_has_no_more() -> None:
    assert shared_out([100, 100, 100, 100, 100, 100], 11) == [3, 2, 2, 2, 1, 1]
    assert shared_out([1, 0, 0, 0, 0, 100], 10) == [1, 0, 0, 0, 0, 9]
    assert shared_out([2, 2], 10) == [2, 2]
    assert shared_out([5, 5], 0) == [0, 0]


def test_kinds_come_in_order_with_their_counts() -> None:
    given = answers({"control": "rwrw" * 3, "distilled": "wrrw" * 3}, [f"{n}" for n in range(12)])
    kinds = choose(given, ["control", "distilled"], ("distilled", "control"), SERIES, "accuracy", 6)
    assert [(kind.title, kind.count) for kind in kinds] == [
        ("distilled right, control wrong", 3),
        ("control right, distilled wrong", 3),
        ("all models wrong, in the same words", 3),
        ("all models right", 3),
    ]
    assert sum(kind.shown for kind in kinds) == 6
    assert kinds[0].cards[0].asked[0].question == "q1"


def test_questions_about_one_picture_share_a_card_and_cards_spread_over_pictures() -> None:
    given = answers({"control": "w" * 40, "distilled": "r" * 40}, [f"{n // 4}" for n in range(40)])
    (kind,) = choose(given, ["control", "distilled"], ("distilled", "control"), SERIES, "accuracy", 8)
    assert [card.pictures for card in kind.cards] == [("0",), ("2",), ("5",), ("7",)]
    assert [[asked.question for asked in card.asked] for card in kind.cards][1] == ["q8", "q9"]


def interval(mean: float, low: float, high: float) -> Interval:
    return Interval(mean=mean, low=low, high=high)


def test_whether_an_interval_excludes_zero_is_said_in_words() -> None:
    up, down, none = interval(0.1, 0.05, 0.2), interval(-0.1, -0.2, -0.01), interval(0.0, -0.1, 0.1)
    assert verdict([up]) == "above 0: the interval excludes 0"
    assert verdict([down]) == "below 0: the interval excludes 0"
    assert verdict([none]) == "includes 0"
    assert verdict([interval(0.1, 0.0, 0.2)]) == "includes 0"
    assert verdict([up, up, None]) == "above 0 on all 2 seeds: every interval excludes 0"
    assert verdict([up, none, up]) == "above 0 on 2 of 3 seeds; the other intervals include 0"
    assert verdict([up, down]) == "above 0 on 1, below 0 on 1 of 2 seeds: every interval excludes 0"


def comparison(told: str | None) -> ComparisonFile:
    same = {"mean": 0.5, "low": 0.4, "high": 0.6}
    more = {"mean": 0.75, "low": 0.7, "high": 0.8}
    rows = {
        "a": {"n": 4, "pictures": 4, "exact_match": same, "accuracy": more},
        "b": {"n": 4, "pictures": 4, "exact_match": same, "accuracy": same},
    }
    gap = {"a - b": {"mean": 0.25, "low": 0.1, "high": 0.4}}
    return ComparisonFile.model_validate(
        {
            "name": "x",
            "models": {"a": {}, "b": {}},
            "questions": {"set": {"n": 4, "measure": told}},
            "differences": [("a", "b")],
            "seeds": [{"seed": 0, "rows": {"set": rows}, "differences": {"set": gap}}],
        }
    )


def test_differences_say_which_measure_they_are_of() -> None:
    assert measured(comparison(None), "set") == "accuracy"  # the only one that they are the differences of
    assert measured(comparison("exact"), "set") == "exact_match"
    table = gaps(comparison(None), "set", {"a": 0, "b": 1})
    assert table is not None and table.caption == "paired differences of accuracy in percentage points"
    assert [(row.name, row.series) for row in table.rows] == [("a \u2212 b", 0)]


def test_spans_tell_registers_from_visual_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    asked, learned = tokenizer.encode("what colour"), tokenizer.encode(" red<|im_end|>")
    ids = torch.tensor([*asked, 0, 0, 0, 0, 0, 0, *learned])
    labels = torch.full_like(ids, IGNORED)
    labels[-len(learned) :] = ids[-len(learned) :]
    encoded = Encoded(ids, labels, torch.arange(6) + len(asked))
    assert spans(encoded, tokenizer, (True, True, False)) == (  # two pictures side by side
        Span("prompt", len(asked), ("what", " ", "colour")),
        Span("picture", 3, registers=1),
        Span("picture", 3, registers=1),
        Span("learned", len(learned), (" ", "red", "<|im_end|>")),
    )


def test_tokens_of_one_character_stay_together(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.tensor(tokenizer.encode("a\u00e4\u20acz"))
    (span,) = spans(Encoded(ids, torch.full_like(ids, IGNORED), torch.tensor([], dtype=torch.int64)), tokenizer, ())
    assert span.tokens == ("a", "\u00e4", "\u20ac", "z")


def test_tiny_pictures_are_kept_and_large_ones_scaled(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), "red").save(tmp_path / "tiny.png")
    noise = np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.jpg")
    album = Album()
    tiny, large = (album.picture(str(tmp_path / name)) for name in ("tiny.png", "large.jpg"))
    assert (tiny.width, tiny.height, tiny.tiny) == (64, 48, True) and tiny.uri.startswith("data:image/png")
    content = base64.b64decode(large.uri.partition(",")[2])
    assert content[:2] == b"\xff\xd8"
    (tmp_path / "out.jpg").write_bytes(content)
    assert Image.open(tmp_path / "out.jpg").size == (256, 171)
    assert album.used == len(tiny.uri) + len(large.uri) and album.shown == 2


def test_pictures_beyond_the_budget_are_left_out_and_counted(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    album = Album(budget=20_000)
    first, second, third = (album.picture(str(tmp_path / f"{number}.png")) for number in range(3))
    assert first.uri and not second.uri and not third.uri
    assert "budget" in second.problem and album.left_out == 2 and album.used <= 20_000
    assert album.picture(str(tmp_path / "0.png")) is first


def test_a_picture_that_is_no_picture_says_so(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_text("hello")
    problem = Album().picture(str(tmp_path / "0.png")).problem
    assert problem.startswith("not shown: ") and str(tmp_path) not in problem
