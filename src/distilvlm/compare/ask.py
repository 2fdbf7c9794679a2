"""Ask every student the same questions; what the same model was asked before is read back, not asked again.

Students that answer in words have the sets in words, students that are an encoder alone those of encoders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from distilvlm.evaluate import Evaluation
from distilvlm.models.features import FeatureReader
from distilvlm.models.files import sha256, write_whole
from distilvlm.models.save import Geometry, geometry_of, load
from distilvlm.recipe import Recipe

from .encoders import EncoderAnswers, PictureSet
from .prepare import content
from .questions import Questions

ASKED = {"template", "batch", "max_new_tokens", "workflow", "task", "split", "shots", "limit", "window", "stride"}
"""What of a question set's fields an answer in words depends on."""


class Asker:
    """The questions of a comparison, put to one student after the other."""

    def __init__(self, sets: Mapping[str, Questions | PictureSet]) -> None:
        self._sets = sets

    def ask(self, name: str, run: Path, recipe: Recipe, answers: Path) -> dict[str, Evaluation]:
        """Every set for such a student → what the one that `run` finished answered; also written to
        ANSWERS/SET/NAME.jsonl."""
        sets = {label: one for label, one in self._sets.items() if one.spec.of_encoders == recipe.student.encoder_alone}
        results = {label: self._known(one, answers / label / name, run, recipe) for label, one in sets.items()}
        if None in results.values():
            student = EncoderAnswers(run) if recipe.student.encoder_alone else _Words(run / "model", recipe)
            for label, questions in sets.items():
                if results[label] is not None:
                    continue
                out = _beside(answers / label / name, ".jsonl")
                results[label] = student.answer(questions, out)
                stamp = json.dumps(_stamp(questions, run, recipe))
                write_whole(_beside(answers / label / name, ".asked.json"), stamp.encode())
        return {label: result for label, result in results.items() if result is not None}

    def _known(self, questions: Questions | PictureSet, place: Path, run: Path, recipe: Recipe) -> Evaluation | None:
        stamp, out = (_beside(place, end) for end in (".asked.json", ".jsonl"))
        if not (stamp.exists() and out.exists() and json.loads(stamp.read_text()) == _stamp(questions, run, recipe)):
            return None
        return questions.again(out)


class _Words:
    """The answers of a vision-language model, in the precision in which it was trained."""

    def __init__(self, model: Path, recipe: Recipe) -> None:
        self._vlm = load(model, torch.bfloat16 if recipe.machine.precision == "bf16" else torch.float32)
        if torch.cuda.is_available():
            self._vlm.to("cuda")
        self._geometry: Geometry = geometry_of(model)
        self._features = None if recipe.pictures.features is None else FeatureReader(recipe.pictures.features)

    def answer(self, questions: Questions | PictureSet, out: Path) -> Evaluation:
        assert not isinstance(questions, PictureSet)  # `Asker` chooses
        if self._vlm.adaptors:
            self._vlm.use(questions.spec.workflow)
        return questions.ask(self._vlm, self._geometry, self._features, out)


def _beside(place: Path, end: str) -> Path:
    return place.with_name(place.name + end)


def _stamp(questions: Questions | PictureSet, run: Path, recipe: Recipe) -> dict[str, object]:
    """All that an answer depends on."""
    model = sha256(run / "model" / "manifest.json")
    if isinstance(questions, PictureSet):
        asked = questions.stamp
    else:
        asked = {"questions": content(questions.place)}
        asked |= questions.spec.model_dump(include=ASKED, exclude_none=True)
    return {"model": model, "precision": recipe.machine.precision, **asked}
