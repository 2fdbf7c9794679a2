"""Ask every student the same questions; what the same model was asked before is read back, not asked again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from distilvlm.evaluate import Evaluation
from distilvlm.models.features import FeatureReader
from distilvlm.models.files import sha256, write_whole
from distilvlm.models.save import geometry_of, load
from distilvlm.recipe import Recipe

from .prepare import content
from .questions import Questions

ASKED = {"template", "batch", "max_new_tokens", "workflow", "task", "split", "shots", "limit", "window", "stride"}
"""What of a question set's fields an answer depends on."""


class Asker:
    """The questions of a comparison, put to one student after the other."""

    def __init__(self, sets: Mapping[str, Questions]) -> None:
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
                out = answers / label / f"{name}.jsonl"
                results[label] = questions.ask(vlm, geometry_of(model), features, out)
                stamp = json.dumps(self._stamp(label, model, recipe))
                write_whole(answers / label / f"{name}.asked.json", stamp.encode())
        return {label: result for label, result in results.items() if result is not None}

    def _known(self, label: str, name: str, model: Path, recipe: Recipe, answers: Path) -> Evaluation | None:
        stamp, out = (answers / label / f"{name}{end}" for end in (".asked.json", ".jsonl"))
        if not (stamp.exists() and out.exists() and json.loads(stamp.read_text()) == self._stamp(label, model, recipe)):
            return None
        return self._sets[label].again(out)

    def _stamp(self, label: str, model: Path, recipe: Recipe) -> dict[str, object]:
        """All that an answer depends on."""
        spec = self._sets[label].spec
        return {
            "model": sha256(model / "manifest.json"),
            "questions": content(self._sets[label].place),
            "precision": recipe.machine.precision,
            **spec.model_dump(include=ASKED, exclude_none=True),
        }
