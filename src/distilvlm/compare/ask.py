"""Ask every student the same questions; what the same model was asked before is read back, not asked again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from distilvlm.evaluate import Evaluation, answered, evaluate
from distilvlm.models.features import FeatureReader
from distilvlm.models.files import sha256, write_whole
from distilvlm.models.save import geometry_of, load
from distilvlm.recipe import Recipe

from .questions import QuestionSet


class Asker:
    """The questions of a comparison, put to one student after the other."""

    def __init__(self, sets: Mapping[str, QuestionSet]) -> None:
        self._sets = sets

    def ask(self, name: str, model: Path, recipe: Recipe, answers: Path) -> dict[str, Evaluation]:
        """Every set → what the student in `model` answered; also written to ANSWERS/SET/NAME.jsonl.

        It answers in the precision in which it was trained.
        """
        results = {label: self._known(label, name, model, recipe, answers) for label in self._sets}
        if None in results.values():
            vlm = load(model, torch.bfloat16 if recipe.machine.precision == "bf16" else torch.float32)
            if torch.cuda.is_available():
                vlm.to("cuda")
            features = None if recipe.pictures.features is None else FeatureReader(recipe.pictures.features)
            for label, questions in self._sets.items():
                if results[label] is not None:
                    continue
                if vlm.adaptors:
                    vlm.use(questions.spec.workflow)
                results[label] = evaluate(
                    vlm,
                    questions.asked,
                    geometry_of(model),
                    measure=questions.measure,
                    template=questions.spec.template,
                    batch_size=questions.spec.batch,
                    max_new_tokens=questions.spec.max_new_tokens,
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
        # Judged anew: an answer depends on model and question alone, what it is worth on synonyms and annotations, too.
        found = self._sets[label].score([sample.prediction for sample in answered(out)])
        found.write(out)
        return found

    def _stamp(self, label: str, model: Path, recipe: Recipe) -> dict[str, object]:
        """All that an answer depends on."""
        spec = self._sets[label].spec
        return {
            "model": sha256(model / "manifest.json"),
            "questions": sha256(Path(spec.path)),
            "precision": recipe.machine.precision,
            **spec.model_dump(include={"template", "batch", "max_new_tokens", "workflow"}, exclude_none=True),
        }
