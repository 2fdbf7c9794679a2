"""The embedded default: its data is drawn from the training split alone, and its two students differ in losses only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distilvlm.data import read
from distilvlm.evaluate import questions_of, score
from distilvlm.quickstart import questions
from distilvlm.quickstart.steps import RECIPES, write_recipes
from distilvlm.quickstart.table import Comparison, write_table
from distilvlm.recipe import SourceSpec, load_recipe


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> questions.Files:
    return questions.write(tmp_path_factory.mktemp("quickstart") / "data")


@pytest.mark.parametrize(
    ("pairs", "caption"),
    [
        ([("what is the blue shape?", "circle")], "a blue circle"),
        ([("is there a red shape?", "no"), ("is there not a teal shape?", "no")], "a teal shape"),
        ([("is a circle present?", "yes"), ("is no gray shape present?", "yes")], "a circle"),
        ([("is there a red shape?", "no")], "a shape"),
    ],
)
def test_captions_say_what_the_answers_tell(pairs: list[tuple[str, str]], caption: str) -> None:
    assert questions._caption(pairs) == caption


def test_every_training_question_is_asked_once_and_test_is_as_published(files: questions.Files) -> None:
    rows = json.loads((files.directory / "conversations.json").read_text())
    asked = [t["value"] for row in rows for t in row["conversations"] if t["from"] == "human"]
    described = sum("what is in the image?" in question for question in asked)
    assert len(asked) - described == 38_575
    assert 0.28 < described / len(rows) < 0.32
    source = read(SourceSpec(path=str(files.test)), "test")
    assert len(source.records) == 9_673 and not source.bad
    assert len(files.pictures) == 5_000


def test_every_word_is_one_token_in_a_question_and_as_an_answer(files: questions.Files) -> None:
    tokenizer = AutoTokenizer.from_pretrained(files.directory / "tokenizer")
    answers = {answer for _, answer in questions.training_pairs()}
    assert len(answers) == 13
    assert all(len(tokenizer.tokenize(" " + answer)) == 1 for answer in answers)


def test_control_and_distilled_differ_in_losses_only(tmp_path: Path) -> None:
    write_recipes(tmp_path)
    assert {p.stem for p in tmp_path.glob("*.yaml")} == set(RECIPES)
    control, distilled = (load_recipe(tmp_path / f"{name}.yaml") for name in ("control", "distilled"))
    plain = [stage.model_dump(exclude={"name", "loss"}) for stage in control.stages]
    assert [stage.model_dump(exclude={"name", "loss"}) for stage in distilled.stages] == plain
    assert control.student == distilled.student and control.data == distilled.data
    assert not any(stage.loss.needs_teacher for stage in control.stages)
    assert [stage.loss.needs_teacher for stage in distilled.stages] == [True, False, True]


def test_the_table_holds_every_row_with_its_interval(files: questions.Files, tmp_path: Path) -> None:
    source = read(SourceSpec(path=str(files.test), take=200), "test")
    asked = list(questions_of(source.records))
    right = score(asked, [question.answer for question in asked], by_picture=True)
    wrong = score(asked, ["no" for _ in asked], by_picture=True)
    rows = {"majority": wrong, "question-only": wrong, "teacher": right, "control": wrong, "distilled": right}
    parameters = {"teacher": 4, "control": 1, "distilled": 1}
    write_table([Comparison(0, rows, parameters)], tmp_path, {"data": 1.0})
    table = (tmp_path / "table.md").read_text()
    assert "| teacher | 4 | 100.0 [100.0, 100.0] |" in table
    content = json.loads((tmp_path / "table.json").read_text())
    gap = content["seeds"][0]["differences"]["distilled - control"]
    assert gap["mean"] == pytest.approx(1 - wrong.exact_match.mean)
    assert content["machine"] and content["date"] and content["command"] == "distilvlm quickstart --seeds 1"
