"""Faults of loss terms: no rows, no gradient, nothing to teach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distilvlm.data import StageData
from distilvlm.doctor import Finding, trial
from distilvlm.doctor.parts import trained
from distilvlm.models import load
from distilvlm.models.save import save
from distilvlm.teachers import Targets
from distilvlm.train import objective_of

from .conftest import Examine, examined, material, only, said, write_model
from .test_models import ALONE, TEXT_ONLY

Write = Callable[..., dict[str, Any]]
LANGUAGE_ONLY = {"stages.dft.train": ["language"], "stages.dft.optim.batch": 2, "stages.sft.optim.batch": 2}
TEXT_ROWS = [("what colour is the sky", "blue", []), ("is the sky blue", "the sky is blue", [])]


def test_every_term_is_zero_for_equals_and_more_for_unequals(place: Path) -> None:
    recipe, student, teacher, data, _ = material(place)
    stage = recipe.stages[2]
    leaves = trained(student, stage.train)
    objective = objective_of(stage)
    with trial.untouched(student.model, teacher.vlm.model):
        trials = trial.try_terms(student, teacher, objective, leaves, trial.samples_of(data["dft"]))
    assert list(trials) == ["text", "response", "visual", "relation"]
    assert [trials[name].rows for name in ("visual", "relation")] == [8, 8]  # two pictures of four tokens
    for name in ("response", "visual", "relation"):
        assert abs(trials[name].itself) < 1e-6 < trials[name].perturbed
        assert trials[name].value > 1e-6
    for tried in trials.values():
        assert tried.gradients.keys() == leaves.keys()
        assert all(norm > 0 for norm in tried.gradients.values())


def test_a_few_short_samples_of_either_kind_are_tried(place: Path) -> None:
    data: dict[str, StageData] = material(place)[3]
    assert [sample.pictures is not None for sample in trial.samples_of(data["dft"])] == [True, True, False]
    lengths = [len(sample.input_ids) for sample in trial.samples_of(data["dft"])]
    assert max(lengths) < max(len(data["dft"].encoded(index).input_ids) for index in range(10))


def test_a_visual_term_without_pictures(look: Examine, source: Write) -> None:
    changes = {"data.questions": source(TEXT_ROWS, healthy=False), "stages.sft.train": ["language"], **LANGUAGE_ONLY}
    told = only(
        look(changes), "terms.rows", "error", "visual: no rows", "set loss.visual to 0", "add rows with pictures"
    )
    assert [finding.text.partition(":")[0] for finding in told] == ["visual", "relation"]


def test_a_projector_that_no_row_reaches(look: Examine, source: Write) -> None:
    changes = {"data.questions": source(TEXT_ROWS, healthy=False), "teacher": None, **TEXT_ONLY, **LANGUAGE_ONLY}
    found = look(changes)
    told = only(found, "terms.gradient", "error", "no loss term gives projector a gradient", "add rows with pictures")
    assert [finding.stage for finding in told] == ["sft"]


def test_a_term_that_only_some_parts_feel(look: Examine) -> None:
    """The picture stands first in the plain template: its rows do not depend on an embedding that is not the head."""
    changes = {
        "student.language.config.tie_word_embeddings": False,
        "stages.dpt.train": ["projector", "language.embedding"],
        "stages.dpt.loss": {"text": 1, "response": 0, "visual": 1, "relation": 0},
    }
    told = only(look(changes), "terms.gradient", "warning", "visual gives language.embedding no gradient")
    assert [finding.stage for finding in told] == ["dpt"]


def test_a_temperature_at_which_nothing_is_taught(look: Examine) -> None:
    found = look({"stages.dft.loss.temperature": 1e12})
    told = only(found, "terms.positive", "error", "the term can't teach", "set loss.temperature (now 1e+12) near 1")
    assert [finding.text.partition(":")[0] for finding in told] == ["response", "visual"]


def test_weights_that_are_not_finite(look: Examine, place: Path, tmp_path: Path) -> None:
    vlm = load(write_model(tmp_path / "whole", place / "tower", place / "tokenizer", 16, 2))
    with torch.no_grad():
        next(p for name, p in vlm.model.named_parameters() if name.endswith("mlp.up_proj.weight"))[0, 0] = torch.nan
    save(vlm, tmp_path / "broken", "square")
    found = look({"student": {"from": str(tmp_path / "broken"), **ALONE}})
    only(found, "terms.finite", "error", "not a finite number", "look for weights that are not finite")


def test_a_student_that_differs_from_itself_is_our_own_fault(look: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    right = trial._Trial._itself

    def wrong(self: trial._Trial) -> Targets:
        targets = right(self)
        return Targets(targets.hidden.roll(1, dims=0), targets.head)

    monkeypatch.setattr(trial._Trial, "_itself", wrong)
    monkeypatch.setattr("distilvlm.doctor.terms.ZERO", {4: 1e-6})  # the tiny student's logits are nearly all alike
    only(look(), "terms.zero", "error", "is its own teacher, which must give 0", "report it")


def test_a_teacher_that_is_the_student(look: Examine, place: Path, tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "model", place / "tower", place / "tokenizer", 16, 2))
    told = only(
        look({"student": {"from": model, **ALONE}, "teacher.from": model}), "terms.same", "warning", "teacher.from"
    )
    assert [finding.stage for finding in told] == ["dpt"]  # by dft the student is another


def test_terms_are_tried_without_the_teacher_where_it_is_not_there_yet(look: Examine, tmp_path: Path) -> None:
    found = look({"teacher.from": str(tmp_path / "runs" / "teacher" / "model")})
    only(found, "teacher.weights", "error", "train it first: distilvlm run RECIPE --dir")
    assert len(said(found, "terms.relation")) == 2


def test_a_stage_that_is_not_given_is_not_looked_at(place: Path) -> None:
    recipe, student, teacher, data, reports = material(place)
    found: list[Finding] = examined(recipe, student, teacher, {"dft": data["dft"]}, {"dft": reports["dft"]})
    assert {finding.stage for finding in found if finding.family in ("terms", "rows")} == {"dft"}
