"""Ask every student the same questions; what the same model was asked before is read back, not asked again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from distilvlm.data import Source, raise_or_quarantine, read
from distilvlm.evaluate import Evaluation, evaluate, majority, question_only, questions_of, rescored, score
from distilvlm.models.features import FeatureReader
from distilvlm.models.files import sha256, write_whole
from distilvlm.models.save import geometry_of, load
from distilvlm.recipe import Recipe, SourceSpec

from .schema import BASELINES, QuestionSpec


def read_questions(questions: Mapping[str, QuestionSpec]) -> dict[str, Source]:
    """The files of all question sets."""
    return {name: read(spec.source, name) for name, spec in questions.items()}


def baselines(spec: QuestionSpec, source: Source) -> dict[str, Evaluation]:
    """What is right without looking: the most common training answer, and the best guess from the question alone.

    Raises:
        DataError: rows of the training file can't be used.
    """
    training = read(SourceSpec(path=spec.training, images=spec.training_images or spec.images), "training")
    raise_or_quarantine(training.bad, "fatal")
    pairs = [(question.text, question.answer) for question in questions_of(training.records)]
    asked = list(questions_of(source.records))
    usual, blind = majority(answer for _, answer in pairs), question_only(pairs)
    given = ([usual for _ in asked], [blind(question.text) for question in asked])
    return {name: score(asked, texts, by_picture=True) for name, texts in zip(BASELINES, given, strict=True)}


class Asker:
    """The questions of a comparison, put to one student after the other.

    Args:
        questions: the sets.
        read: their files, read.
    """

    def __init__(self, questions: Mapping[str, QuestionSpec], read: Mapping[str, Source]) -> None:
        self._questions, self.read = questions, read

    def ask(self, name: str, model: Path, recipe: Recipe, answers: Path) -> dict[str, Evaluation]:
        """Every set → what the student in `model` answered; also written to ANSWERS/SET/NAME.jsonl.

        It answers in the precision in which it was trained.
        """
        results = {label: self._known(label, name, model, recipe, answers) for label in self._questions}
        if None in results.values():
            vlm = load(model, torch.bfloat16 if recipe.machine.precision == "bf16" else torch.float32)
            if torch.cuda.is_available():
                vlm.to("cuda")
            features = None if recipe.pictures.features is None else FeatureReader(recipe.pictures.features)
            for label, spec in self._questions.items():
                if results[label] is not None:
                    continue
                results[label] = evaluate(
                    vlm,
                    self.read[label],
                    geometry_of(model),
                    template=spec.template,
                    batch_size=spec.batch,
                    max_new_tokens=spec.max_new_tokens,
                    features=features,
                    out=answers / label / f"{name}.jsonl",
                    by_picture=True,
                )
                stamp = json.dumps(self._stamp(label, model, recipe))
                write_whole(answers / label / f"{name}.asked.json", stamp.encode())
        return {label: result for label, result in results.items() if result is not None}

    def _known(self, label: str, name: str, model: Path, recipe: Recipe, answers: Path) -> Evaluation | None:
        stamp, out = (answers / label / f"{name}{end}" for end in (".asked.json", ".jsonl"))
        if not (stamp.exists() and out.exists() and json.loads(stamp.read_text()) == self._stamp(label, model, recipe)):
            return None
        return rescored(out, by_picture=True)

    def _stamp(self, label: str, model: Path, recipe: Recipe) -> dict[str, object]:
        """All that an answer depends on."""
        spec = self._questions[label]
        return {
            "model": sha256(model / "manifest.json"),
            "questions": sha256(Path(spec.path)),
            "precision": recipe.machine.precision,
            **spec.model_dump(include={"template", "batch", "max_new_tokens"}),
        }
