"""Boxes against true boxes: overlap, the figures, what is read and what is not; the sheet of drawn boxes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distilvlm import cli
from distilvlm.data import DataError
from distilvlm.data.boxes import written
from distilvlm.evaluate import Evaluation, Question, difference, rescored, score
from distilvlm.evaluate.grounding import GROUNDING, blind_answers, draw, iou
from distilvlm.evaluate.grounding.drawing import COLOURS, TRUE
from distilvlm.models.save import save
from distilvlm.models.vlm import VLM
from tests.evaluate.asking import question

SIZE = (200, 100)
Command = Callable[..., tuple[int, str, str]]


def asked(count: int = 4, **meta: Any) -> list[Question]:
    """Questions about a picture of 200 x 100 pixels whose thing lies at 20, 0, 60, 50."""
    true = {"boxes": [[20, 0, 60, 50]], "size": list(SIZE)} | meta
    return [question(row, "[0.10, 0.25, 0.30, 0.50]", "Where: the dog", **true) for row in range(count)]


def scored(*predictions: str, **meta: Any) -> Evaluation:
    return score(asked(len(predictions), **meta), predictions, measure=GROUNDING)


def means(evaluation: Evaluation) -> dict[str, float | None]:
    return {name: None if one is None else one.mean for name, one in evaluation.figures.items()}


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),
        ((0, 0, 10, 10), (2, 2, 7, 7), 0.25),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0),  # they touch
        ((0, 0, 10, 10), (20, 20, 30, 30), 0),
        ((0, 0, 10, 10), (10, 10, 0, 0), 0),  # inverted
        ((5, 5, 5, 5), (5, 5, 5, 5), 0),  # empty
    ],
)
def test_overlap(a: tuple[float, ...], b: tuple[float, ...], value: float) -> None:
    assert iou(a, b) == iou(b, a) == pytest.approx(value)


def test_first_box_and_any_box() -> None:
    good, poor = "[0.10, 0.25, 0.30, 0.50]", "[0.50, 0.25, 0.90, 0.50]"
    found = scored(good, f"{poor}; {good}", poor, f"{good}; {poor}")
    figures = means(found)
    assert figures["acc"] == 0.5 and figures["acc_any"] == 0.75
    assert figures["boxes"] == 1.5 and figures["unreadable"] == 0
    assert figures["overlap"] == pytest.approx(0.5)
    assert [sample.details["verdict"] for sample in found.samples[:2]] == ["right (IoU 1.00)", "wrong (IoU 0.00)"]
    assert found.samples[1].details["boxes"] == [[100, 0, 180, 50], [20, 0, 60, 50]]


def test_half_an_overlap_is_enough_and_less_is_not() -> None:
    enough, less = written((20, 0, 60, 25), SIZE, 4), written((20, 0, 60, 24.9), SIZE, 4)
    assert means(scored(enough, less))["acc"] == 0.5


def test_what_cannot_be_read_is_wrong_and_kept() -> None:
    found = scored("[0.10, 0.25, 0.30, 0.50]", "the dog is left", "[20, 0, 60, 50]", "")
    assert means(found) | {"boxes": 0} == {
        "acc": 0.25, "acc_any": 0.25, "overlap": 0.25, "unreadable": 0.75, "inverted": 0, "boxes": 0,
    }  # fmt: skip
    assert found.samples[1].prediction == "the dog is left"
    assert found.samples[1].details | {"true": 0} == {
        "true": 0, "size": [200, 100], "boxes": [], "overlaps": [], "inverted": 0, "readable": False,
        "right": False, "verdict": "not a box",
    }  # fmt: skip


def test_inverted_boxes_are_counted_and_wrong() -> None:
    found = scored("[0.30, 0.50, 0.10, 0.25]; [0.10, 0.25, 0.30, 0.50]", "[0.10, 0.50, 0.30, 0.25]")
    assert means(found)["inverted"] == pytest.approx(2 / 3) and means(found)["acc"] == 0
    assert found.samples[0].details["verdict"] == "wrong (IoU 0.00), inverted"
    assert scored("no box").figures["inverted"] is None


def test_of_several_true_boxes_any_will_do() -> None:
    found = scored("[0.50, 0.25, 0.90, 0.50]", boxes=[[20, 0, 60, 50], [100, 0, 180, 50]])
    assert means(found)["acc"] == 1


@pytest.mark.parametrize("meta", [{"boxes": []}, {"boxes": [[1, 2, 3]]}, {"size": None}, {"boxes": "[0, 0, 1, 1]"}])
def test_a_question_without_a_true_box_is_refused(meta: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"test.jsonl, row 0: no true box to compare with"):
        scored("[0.10, 0.25, 0.30, 0.50]", **meta)


def test_intervals_differences_and_files_are_those_of_every_measure(tmp_path: Path) -> None:
    first = scored(*["[0.10, 0.25, 0.30, 0.50]"] * 6, *["nothing"] * 2)
    second = scored(*["nothing"] * 8)
    assert first.main is not None and first.main.low < 0.75 < first.main.high
    gap = difference(first, second)
    assert gap is not None and gap.mean == 0.75 and difference(first, first) is not None
    first.write(tmp_path / "a.jsonl")
    assert rescored(tmp_path / "a.jsonl", measure=GROUNDING).figures == first.figures


def test_blind_answers_fill_the_picture_or_are_right_for_most_of_the_training() -> None:
    alike = ["[0.20, 0.20, 0.60, 0.60]", "[0.22, 0.20, 0.62, 0.60]", "[0.20, 0.24, 0.60, 0.64]"]
    training = [("Where: a cat", box) for box in ("[0.80, 0.80, 0.90, 0.90]", *alike)]
    found = blind_answers(asked(2), training)
    assert found["whole picture"] == ["[0.00, 0.25, 1.00, 0.75]"] * 2
    assert found["majority"] == found["question-only"] == [alike[0]] * 2  # nobody asked for the dog before
    own = blind_answers(asked(2), [*training, ("Where: the dog", "[0.00, 0.00, 0.10, 0.10]"), ("What?", "a dog")])
    assert own["question-only"] == ["[0.00, 0.00, 0.10, 0.10]"] * 2 and own["majority"] == [alike[0]] * 2
    with pytest.raises(DataError, match="the training questions are not answered by boxes"):
        blind_answers(asked(2), [("What?", "a dog")])


def drawn_at(sheet: Image.Image, colour: str) -> np.ndarray:
    """[pixels, 2] x and y of a colour."""
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    ys, xs = np.nonzero((np.asarray(sheet.convert("RGB")) == wanted).all(axis=2))
    return np.stack([xs, ys], axis=1)


def test_boxes_are_drawn_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    Image.new("RGB", SIZE, "black").save(path)
    questions = [question(0, "", "Where: the dog", str(path), boxes=[[20, 0, 60, 50]], size=list(SIZE))]
    rows = {
        name: score(questions, [text], measure=GROUNDING)
        for name, text in {"base": "[0.50, 0.25, 1.00, 0.75]", "ours": "[0.90, 0.50, 0.60, 0.30]", "mute": ""}.items()
    }
    assert draw(rows, tmp_path / "sheet.png", limit=5) == 1
    sheet = Image.open(tmp_path / "sheet.png")
    black = drawn_at(sheet, "#000000")  # the picture: 320 x 160 in the middle of a square of 320
    left, top = black[:, 0].min(), black[:, 1].min()
    inside = lambda at: at[(at[:, 1] > top - 80) & (at[:, 1] < top + 240)]  # noqa: E731 (not the legend or captions)
    true = inside(drawn_at(sheet, TRUE))
    assert (true.min(axis=0) - [left, top]).tolist() == [32, 0]
    assert (true.max(axis=0) - [left, top]).tolist() == [96, 80]
    base = inside(drawn_at(sheet, COLOURS[0]))
    assert (base.min(axis=0) - [left, top]).tolist() == [160, 0]
    ours = inside(drawn_at(sheet, COLOURS[1]))  # inverted: drawn as its mirror image
    assert (ours.min(axis=0) - [left, top]).tolist() == [192, 16]
    assert not len(inside(drawn_at(sheet, COLOURS[2])))
    assert len(drawn_at(sheet, COLOURS[2]))  # but its name and verdict stand there


def test_a_sheet_spreads_over_all_questions_and_survives_a_missing_picture(tmp_path: Path) -> None:
    rows = {"a": score(asked(50), ["[0.10, 0.25, 0.30, 0.50]"] * 50, measure=GROUNDING)}
    assert draw(rows, tmp_path / "sheet.png", limit=10) == 10
    with pytest.raises(ValueError, match="7 models can't be told apart"):
        draw({str(number): rows["a"] for number in range(7)}, tmp_path / "sheet.png")


@pytest.fixture
def grounding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(cli, "_configure_logging", lambda: None)
        monkeypatch.setattr(sys, "argv", ["distilvlm", "grounding", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


def data(tmp_path: Path, meta: dict[str, Any]) -> Path:
    rows = []
    for number in range(3):
        Image.new("RGB", SIZE, (40 * number, 90, 90)).save(tmp_path / f"{number}.png")
        talk = [
            {"from": "human", "value": "<image>\nWhere: the dog"},
            {"from": "gpt", "value": "[0.10, 0.25, 0.30, 0.50]"},
        ]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": talk, "meta": meta})
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "asked.jsonl"


TRUE_META = {"boxes": [[20, 0, 60, 50]], "size": list(SIZE)}


def test_a_model_is_asked_where_things_are(grounding: Command, vlm: VLM, tmp_path: Path) -> None:
    save(vlm, tmp_path / "model", "pad")
    file, out, sheet = data(tmp_path, TRUE_META), tmp_path / "out.jsonl", tmp_path / "sheet.png"
    words = ["--data", file, "--training", file, "--max-new-tokens", 4, "--out", out, "--draw", sheet]
    code, said, _ = grounding(tmp_path / "model", *words, "--json")
    told = json.loads(said)
    assert code == 0 and told["n"] == 3 and told["pictures"] == 3 and told["unreadable"]["mean"] == 1
    assert set(told["others"]) == {"whole picture", "majority", "question-only"}
    assert told["others"]["majority"]["acc"]["mean"] == 1 and told["others"]["whole picture"]["acc"]["mean"] == 0
    assert told["against"] == "question-only" and told["differences"]["acc"]["mean"] == -1
    assert Image.open(sheet).format == "PNG"

    code, said, _ = grounding("--data", file, "--answers", out, "--against", out)
    assert code == 0 and "minus out (against)" in said and "not a box" in said


def test_rows_without_boxes_are_refused_before_a_model_is_loaded(grounding: Command, tmp_path: Path) -> None:
    code, _, said = grounding("nowhere", "--data", data(tmp_path, {}), "--draw", tmp_path / "x.png")
    assert code == 1 and "row 0: no true box to compare with" in said
    code, _, said = grounding("nowhere", "--data", tmp_path / "asked.jsonl", "--draw", tmp_path / "x.jpg")
    assert code == 2 and "--draw" in said
