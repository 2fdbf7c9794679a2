"""A run whose teacher has another tokenizer, another template and another grid of pictures, end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

import distilvlm
from distilvlm.cost import estimate
from distilvlm.doctor import doctor
from distilvlm.models import build
from distilvlm.recipe import RecipeError, load_recipe
from distilvlm.report import write_report
from distilvlm.runs.directory import RunError
from distilvlm.runs.events import read_events
from distilvlm.teachers import TeacherError
from tests.data.small_data import LLAMA2, exact_tokenizer

from .tiny import VISION, language, write_recipe

KD = {"text": 1.0, "response": 1.0, "visual": 1.0, "relation": 0.5}
ALIGNED = {"tokens": "aligned", "visual": "interpolate"}


def write(directory: Path, chat_template: str = LLAMA2, **teacher: str) -> Path:
    """A stage without and one with a teacher that spells byte by byte, but for "a ", and sees 3 × 3 patches."""
    optim = {"lr": 0.01, "batch": 4, "updates": 2}
    trained = {"train": ["projector", "language"], "data": ["questions"], "optim": optim}
    exact_tokenizer([("a", "Ġ"), ("e", "d")], chat_template, eos="</s>", bos="<s>").save_pretrained(directory / "other")
    return write_recipe(
        directory,
        teacher={
            "vision": {"config": VISION | {"image_size": 24}},
            "language": {"config": language(24), "tokenizer": str(directory / "other")},
            **teacher,
        },
        stages=[{"name": "sft", **trained}, {"name": "dft", **trained, "loss": KD}],
    )


def test_a_teacher_of_another_tokenizer_and_grid_teaches(tmp_path: Path) -> None:
    recipe = write(tmp_path, **ALIGNED)
    run = distilvlm.run(recipe, directory=tmp_path / "run")
    assert run.model.exists()
    events = read_events(tmp_path / "run" / "events.jsonl")
    updates = [event for event in events if event["event"] == "update" and event["stage"] == "dft"]
    assert len(updates) == 2
    for update in updates:
        assert update["terms"].keys() == KD.keys()
        assert all(math.isfinite(value) and value > 0 for value in update["terms"].values())
        assert update["terms"]["response"] <= 2 and update["terms"]["visual"] <= 2
    (told,) = [event for event in events if event["event"] == "alignment"]
    assert (told["stage"], told["share"]) == ("dft", pytest.approx(told["paired"] / told["learned"]))
    (finding,) = [
        one
        for one in json.loads((tmp_path / "run" / "doctor.json").read_text())["findings"]
        if one["check"] == "alignment.share"
    ]
    assert finding["stage"] == "dft" and f"{told['paired']:,} of {told['learned']:,}" in finding["text"]
    page = write_report(tmp_path / "run").read_text()
    assert f"{told['share']:.0%} of the tokens have a partner" in page


def test_an_assigned_teacher_of_the_same_tokenizer_teaches(tmp_path: Path) -> None:
    recipe = yaml.safe_load(write(tmp_path, visual="assignment").read_text())
    recipe["teacher"]["language"]["tokenizer"] = str(tmp_path / "tokenizer")
    (tmp_path / "assigned.yaml").write_text(yaml.safe_dump(recipe))
    distilvlm.run(tmp_path / "assigned.yaml", directory=tmp_path / "run")
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [event["share"] for event in events if event["event"] == "alignment"] == [1.0]
    assert all(
        event["terms"]["visual"] > 0 for event in events if event["event"] == "update" and event["stage"] == "dft"
    )


def test_its_memory_is_planned_from_its_own_rows(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, **ALIGNED))
    assert recipe.teacher is not None
    student, teacher = (build(spec, 1, meta=True) for spec in (recipe.student, recipe.teacher))
    planned = estimate(recipe, student, teacher, measure=False, device="cpu", stages=["dft"])
    assert planned[0].memory["working"] > 0 and not planned[0].notes
    (tmp_path / "questions.json").unlink()
    (absent,) = estimate(recipe, student, teacher, measure=False, device="cpu", stages=["dft"])
    assert absent.notes == (
        "not estimated: the teacher reads rows of its own, and the data that they are made of is not here",
    )


def test_without_the_options_it_is_refused(tmp_path: Path) -> None:
    recipe = write(tmp_path)
    with pytest.raises(TeacherError, match="tokens: aligned"):
        distilvlm.run(recipe, directory=tmp_path / "run")
    found = {finding.check: finding for finding in doctor(recipe, directory=tmp_path / "run")}
    assert "teacher.tokens: aligned" in found["vocabulary.tokens"].fix
    assert "teacher.visual: interpolate" in found["visual.tokens"].fix


def test_a_teacher_with_which_nothing_is_aligned_is_refused(tmp_path: Path) -> None:
    adding = LLAMA2.replace(
        "{{ ' ' + message['content'] | trim + ' ' +", "{% generation %}{{ message['content'] + '!' +"
    )
    adding = adding.replace("eos_token }}{% endif %}", "eos_token }}{% endgeneration %}{% endif %}")
    recipe = write(tmp_path, adding, **ALIGNED)
    (finding,) = [one for one in doctor(recipe, directory=tmp_path / "run") if one.check == "alignment.share"]
    assert finding.level == "error" and finding.text.startswith("0.0% of the tokens to learn (0 of ")
    with pytest.raises(RunError, match=r"0\.0% of the tokens"):
        distilvlm.run(recipe, directory=tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.kind": "cached", "teacher.tokens": "aligned"}, r"kind 'cached' can't have yet"),
        (
            {"teacher.kind": "remote", "teacher.remote": {"url": "http://x"}, "teacher.visual": "interpolate"},
            r"kind 'remote' can't have yet",
        ),
        ({"teacher.tokens": "aligned", "teacher.visual": "assignment"}, r"assignment compares logits id by id"),
        ({"teacher.tokens": "aligned", "stages.dft.reference": ["unshifted_mask"]}, r"student's own rows"),
        (
            {"teacher.tokens": "aligned", "stages.sft.loss": {"text": 0, "preference": 1}},
            r"'sft' learns from preferences",
        ),
    ],
)
def test_recipes_that_rows_of_its_own_do_not_fit_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path), changes)
