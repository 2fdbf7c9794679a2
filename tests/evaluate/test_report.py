"""An evaluation from file to table."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from distilvlm.data.problems import DataError
from distilvlm.data.readers import Source, read
from distilvlm.data.records import Record
from distilvlm.evaluate.questions import Question, questions_of
from distilvlm.evaluate.report import Evaluation, difference, evaluate, score
from distilvlm.evaluate.table import as_table
from distilvlm.models.vlm import VLM
from distilvlm.recipe.schema import SourceSpec


@pytest.fixture
def asked(records: list[Record]) -> list[Question]:
    return list(questions_of(records))


@pytest.fixture
def source(records: list[Record], tmp_path: Path) -> Source:
    """Two conversations, three questions, on pictures of `records`."""
    first, second = records[0].images[0], records[4].images[0]
    rows = [
        {"image": first, "conversations": turns("<image>\nwhat?", "cube", "how large?", "very")},
        {"image": second, "conversations": turns("<image>\nwhat?", "ball")},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return read(SourceSpec(path=str(path), template="vicuna"), "test")


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def test_score_counts_exact_and_accurate_answers(asked: list[Question]) -> None:
    predictions = ["answer 0", "Answer one.", "answer 2", "the answer three", "", "no", "no", " answer 7 "]
    found = score(asked, predictions)
    assert [sample.exact for sample in found.samples] == [True, False, True, False, False, False, False, True]
    assert [sample.accurate for sample in found.samples] == [True, True, True, True, False, False, False, True]
    assert (found.n, found.exact_match.mean, found.accuracy.mean) == (8, 3 / 8, 5 / 8)
    assert 0 < found.accuracy.low < 5 / 8 < found.accuracy.high < 1


def test_every_question_of_every_row_is_asked_and_written(vlm: VLM, source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out" / "answers.jsonl"
    found = evaluate(vlm, source, "square", batch_size=2, max_new_tokens=5, out=out)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(line["row"], line["turn"], line["question"], line["answer"]) for line in lines] == [
        (0, 0, "what?", "cube"),
        (0, 1, "how large?", "very"),
        (1, 0, "what?", "ball"),
    ]
    assert [line["prediction"] for line in lines] == [sample.prediction for sample in found.samples]
    assert lines[0]["file"] == source.spec.path
    assert [path.name for path in out.parent.iterdir()] == ["answers.jsonl"]


def test_the_template_is_the_source_s_own(vlm: VLM, source: Source) -> None:
    own = evaluate(vlm, source, "square", max_new_tokens=8)
    vicuna = evaluate(vlm, source, "square", template="vicuna", max_new_tokens=8)
    chat = evaluate(vlm, source, "square", template="chat", max_new_tokens=8)
    assert own.samples == vicuna.samples
    assert own.samples != chat.samples


def test_nothing_is_written_when_the_evaluation_fails(vlm: VLM, source: Source, tmp_path: Path) -> None:
    Path(source.records[1].images[0]).write_bytes(b"broken")
    with pytest.raises(DataError, match="row 1, field 'image'"):
        evaluate(vlm, source, "square", max_new_tokens=2, out=tmp_path / "answers.jsonl")
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_quarantined_row_is_counted_and_its_questions_are_left_out(vlm: VLM, source: Source) -> None:
    whole = evaluate(vlm, source, "square", max_new_tokens=4)
    Path(source.records[0].images[0]).write_bytes(b"broken")
    found = evaluate(vlm, source, "square", max_new_tokens=4, on_bad_row="quarantine")
    assert found.samples == whole.samples[2:]
    assert {row.key.row for row in found.bad} == {0}
    assert found.summary()["bad_rows"] == 1
    Path(source.records[1].images[0]).write_bytes(b"broken")
    with pytest.raises(DataError, match=r"no question can be asked \(2 rows"):
        evaluate(vlm, source, "square", max_new_tokens=4, on_bad_row="quarantine")


def right(asked: list[Question], which: set[int], **options: bool) -> Evaluation:
    return score(asked, [q.answer if number in which else "?" for number, q in enumerate(asked)], **options)


def test_the_difference_is_paired(asked: list[Question]) -> None:
    better, worse = right(asked, {0, 1, 2, 3}), right(asked, {0, 1})
    assert difference(better, worse).mean == 0.25
    assert difference(better, better).high == 0
    assert difference(worse, better).mean == -0.25


def test_evaluations_of_other_questions_are_not_compared(asked: list[Question]) -> None:
    with pytest.raises(ValueError, match=r"different questions: test\.json row 0"):
        difference(right(asked, set()), right(asked[1:], set()))
    with pytest.raises(ValueError, match="same samples twice"):
        difference(right(asked, set()), right(asked[:-1], set()))


def test_every_question_has_its_prediction(asked: list[Question]) -> None:
    with pytest.raises(ValueError, match="1 predictions for 8 questions"):
        score(asked, ["?"])


def test_questions_on_one_picture_are_drawn_together(asked: list[Question]) -> None:
    many = [asked[0]] * 20 + [asked[4]] * 20
    alone, together = right(many, set(range(20))), right(many, set(range(20)), by_picture=True)
    assert together.accuracy.mean == alone.accuracy.mean == 0.5
    assert (together.accuracy.low, together.accuracy.high) == (0, 1)
    assert alone.accuracy.low > 0.3


def test_the_table_shows_every_row_and_the_paired_difference(asked: list[Question]) -> None:
    rows = {"control": right(asked, {0, 1}), "distilled": right(asked, {0, 1, 2, 3})}
    console = Console(file=io.StringIO(), width=140)
    console.print(as_table(rows, against="control", title="easy-VQA"))
    text = console.file.getvalue()
    assert "25.0% (" in text and "50.0% (" in text
    assert "+25.0 (" in text
    with pytest.raises(ValueError, match="no row 'teacher'"):
        as_table(rows, against="teacher")


def test_the_summary_is_json(asked: list[Question]) -> None:
    summary = json.loads(json.dumps(right(asked, {0}, by_picture=True).summary()))
    assert summary["n"] == 8
    assert summary["pictures"] == 5
    assert summary["accuracy"]["mean"] == 1 / 8
    assert summary["intervals"] == "bootstrap over pictures"
