"""The student's weights along the stages: what each transform and each finished stage does to them.

A continued run replays this from the recipe, so weights that no stage trains are never stored twice.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from distilvlm.models import parts, routing
from distilvlm.models.alone import Encoder
from distilvlm.models.compose import build_student
from distilvlm.models.stages import choosing, made_sparse, mixed, students, with_adaptor
from distilvlm.models.vlm import VLM
from distilvlm.recipe.encoders import Mix
from distilvlm.recipe.schema import Recipe, StageSpec
from distilvlm.recipe.transforms import Insert, Upcycle
from distilvlm.teachers.encoders import shapes
from distilvlm.train.encoders import adapt

from . import checkpoint

logger = logging.getLogger(__name__)


class Student:
    """The student and which of its parameters stages have changed since the start. Adapters to encoders that teach it
    are with it as long as it trains."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._changed: set[str] = set()
        self.vlm: VLM | Encoder = build_student(recipe.student, recipe.seed)
        self.shapes = shapes(recipe, self.vlm)
        adapt(recipe, self.vlm, self.shapes)
        self._check_names()

    def again(self, finished: Sequence[tuple[StageSpec, Path]]) -> None:
        """Build it anew as it is behind stages that are finished, each with where it left what it trained."""
        del self.vlm  # two at once may not fit
        gc.collect()
        self._changed = set()
        self.vlm = build_student(self._recipe.student, self._recipe.seed)
        adapt(self._recipe, self.vlm, self.shapes)
        for stage, final in finished:
            self.replay(stage, final)

    def _check_names(self) -> None:
        """A wrong name in the last stage must not come to light after days."""
        found = students(self._recipe, self.vlm)
        for stage in self._recipe.stages:
            for name in stage.train:
                parts.require_trainable(found[stage.name].model, name)
            for name in stage.resets:
                parts.parameters_of(found[stage.name].model, name)

    def transform(self, stage: StageSpec) -> None:
        """Apply what the stage does to the student before it trains."""
        for transform in stage.transform:
            if isinstance(transform, Upcycle):
                assert isinstance(self.vlm, VLM)  # `students` has refused another one
                self.vlm = made_sparse(self.vlm, transform, self._recipe.seed)
            elif isinstance(transform, Insert):
                assert isinstance(self.vlm, VLM)
                with_adaptor(self.vlm, transform)
            elif isinstance(transform, Mix):
                self.vlm = mixed(self.vlm, transform, self._recipe.seed)
            else:
                self._reset(transform.parts)

    def choose(self, stage: StageSpec) -> dict[str, dict[str, nn.Parameter]]:
        """Freeze all but what the stage trains; returns part -> name -> parameter."""
        routing.install(self.vlm.model, *choosing(self._recipe, stage))
        return parts.choose(self.vlm.model, stage.train).parameters

    def mark_trained(self, names: set[str]) -> None:
        self._changed |= names

    def replay(self, stage: StageSpec, final: Path) -> None:
        """Do to the student what a finished stage did."""
        self.transform(stage)
        trained = {name: p for members in self.choose(stage).values() for name, p in members.items()}
        checkpoint.load_weights(final, trained)
        self.mark_trained(set(trained))

    def _reset(self, names: list[str]) -> None:
        """Put parts back to their weights before the first stage."""
        wanted: dict[str, nn.Parameter] = {}
        for part in names:
            wanted |= parts.parameters_of(self.vlm.model, part)
        stale = wanted.keys() & self._changed
        if not stale:
            logger.info("reset of %s: no stage has changed it, nothing to do", ", ".join(names))
            return
        # Built again rather than kept: a copy of a large language model for the sake of one moment is dear.
        student = build_student(self._recipe.student, self._recipe.seed)
        adapt(self._recipe, student, self.shapes)
        fresh = dict(student.model.named_parameters())
        with torch.no_grad():
            for name in stale:
                wanted[name].copy_(fresh[name])
        self._changed -= stale
        logger.info("reset of %s: %d parameters back to their starting weights", ", ".join(names), len(stale))
