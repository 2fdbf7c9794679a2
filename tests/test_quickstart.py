"""The embedded default: its data is drawn from the training split alone, and its two students differ in losses only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distilvlm.compare import load_comparison
from distilvlm.data import read
from distilvlm.evaluate import questions_of
from distilvlm.quickstart import questions
from distilvlm.recipe import Recipe, SourceSpec, load_recipe

ROOM = Path(questions.__file__).parent


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
    assert questions.caption(pairs) == caption


def test_every_training_question_is_asked_once_and_test_is_as_published(files: questions.Files) -> None:
    rows = json.loads((files.directory / "conversations.json").read_text())
    asked = [t["value"] for row in rows for t in row["conversations"] if t["from"] == "human"]
    described = sum("what is in the image?" in question for question in asked)
    assert len(asked) - described == 38_575
    assert 0.28 < described / len(rows) < 0.32
    source = read(SourceSpec(path=str(files.test)), "test")
    assert len(source.records) == 9_673 and not source.bad
    assert len(list(files.directory.glob("*/images/*.png"))) == 5_000


def test_every_word_is_one_token_in_a_question_and_as_an_answer(files: questions.Files) -> None:
    tokenizer = AutoTokenizer.from_pretrained(files.directory / "tokenizer")
    answers = {
        answer for question, answer in _asked(files.directory / "conversations.json") if "in the image" not in question
    }
    assert len(answers) == 13
    assert all(len(tokenizer.tokenize(" " + answer)) == 1 for answer in answers)


def _asked(path: Path) -> list[tuple[str, str]]:
    records = read(SourceSpec(path=str(path)), "training").records
    return [(question.text, question.answer) for question in questions_of(records)]


def test_control_and_distilled_differ_in_losses_only(tmp_path: Path) -> None:
    control, distilled = (_recipe(name, tmp_path) for name in ("control", "distilled"))
    plain = [stage.model_dump(exclude={"name", "loss"}) for stage in control.stages]
    assert [stage.model_dump(exclude={"name", "loss"}) for stage in distilled.stages] == plain
    assert control.student == distilled.student and control.data == distilled.data
    assert not any(stage.loss.needs_teacher for stage in control.stages)
    assert [stage.loss.needs_teacher for stage in distilled.stages] == [True, False, True]


def test_every_run_finds_what_the_comparison_made_before_it(tmp_path: Path) -> None:
    comparison = load_comparison(ROOM / "quickstart.yaml", tmp_path)
    assert comparison.asked == ["teacher", "control", "distilled"]
    made = {str(tmp_path / "seed-0" / run.name / "model") for run in comparison.runs}
    for run in comparison.runs:
        recipe = _recipe(Path(run.recipe).stem, tmp_path)
        sources = [recipe.student.source, recipe.teacher and recipe.teacher.source]
        assert all(source in made for source in sources if source is not None)
        assert all(Path(spec.path).is_relative_to(tmp_path / "data") for spec in recipe.data.values())


def _recipe(name: str, directory: Path) -> Recipe:
    comparison = load_comparison(ROOM / "quickstart.yaml", directory)
    variables = {run.variable: str(directory / "seed-0" / run.name / "model") for run in comparison.runs}
    return load_recipe(ROOM / f"{name}.yaml", variables={"COMPARISON": str(directory), **variables})
