"""How a stage's student is compared with what encoders saw. Encoders stand outside of what is wrapped; the adapters are
with the student, and inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from distilvlm.losses.encoder import Comparing, Pair, comparing, token_weights
from distilvlm.models.adapters import Adapters, Tokens
from distilvlm.models.alone import Encoder
from distilvlm.models.encoders import Seen, query_of, regrid
from distilvlm.models.vlm import VLM, VisionLayout
from distilvlm.recipe import ANCHOR, Recipe, StageSpec
from distilvlm.teachers.encoders import Shape, importance_source, width


def rules_of(stage: StageSpec) -> Comparing:
    """A stage's preset with what it changes of it. Raises ValueError for an unknown preset."""
    changes = stage.encoder.model_dump(exclude={"preset", "teachers", "importance"})
    return comparing(stage.encoder.preset, **changes)


def adapt(recipe: Recipe, student: VLM | Encoder, shapes: Mapping[str, Shape]) -> None:
    """Put adapters between the student and the encoders of all its stages; they are with it while it trains.

    Raises:
        ValueError: stages that want different adapters: what one has trained goes on in the next.
    """
    stages = [stage for stage in recipe.stages if stage.loss.encoder]
    if not stages:
        return
    rules = [rules_of(stage) for stage in stages]
    for stage, own in zip(stages, rules, strict=True):
        for field in ("adapter", "side", "standardise"):
            if getattr(own, field) != getattr(rules[0], field):
                raise ValueError(
                    f"encoder.{field} is {getattr(rules[0], field)!r} in stage '{stages[0].name}' and "
                    f"{getattr(own, field)!r} in '{stage.name}': adapters go on from stage to stage, so it must be one"
                )
    side = student.layout.size // student.layout.patch
    if sum(student.layout.visual) != side * side:
        raise ValueError(
            f"the student hands on {sum(student.layout.visual)} of its {side}×{side} patches, which cannot be compared "
            "place by place: set student.vision.select to 'patches'"
        )
    used = {name for stage in stages for name in recipe.teachers_of(stage)}
    forms = _forms(shapes, sorted(used & shapes.keys(), key=lambda name: (name != ANCHOR, list(shapes).index(name))))
    adapters = Adapters(Tokens(width(student), (side, side)), forms, rules[0], recipe.seed)
    student.model.adapters = adapters.to(student.model.device)


def adapters_of(model: nn.Module) -> Adapters | None:
    """Those that `adapt` has put there."""
    return getattr(model, "adapters", None)


class Comparison:
    """A stage's rules, teachers and importance.

    Args:
        shapes: of all encoders that the recipe uses.
    """

    def __init__(self, recipe: Recipe, stage: StageSpec, shapes: Mapping[str, Shape]) -> None:
        self.rules = rules_of(stage)
        self.source = importance_source(stage)
        self._forms = _forms(shapes, recipe.teachers_of(stage))  # the anchor first

    @property
    def teachers(self) -> list[str]:
        """The anchor first."""
        return list(self._forms)

    def install(self, model: nn.Module) -> None:
        """Let the student's adapters work by this stage's rules, for its teachers."""
        adapters = adapters_of(model)
        assert adapters is not None  # `adapt` was called
        adapters.rules, adapters.teachers = self.rules, self._forms

    def pairs(
        self, model: nn.Module, layout: VisionLayout, features: Tensor, seen: Mapping[str, Seen]
    ) -> Sequence[Pair]:
        """Student and teachers of a batch's pictures, where they are compared.

        Args:
            features: [pictures, placeholders, d] that a projector would read; registers among them are left out.
            seen: what encoders saw in the same pictures.
        """
        adapters = adapters_of(model)
        assert adapters is not None
        tokens = features[:, torch.tensor(layout.visual, device=features.device)]  # [pictures, n, d]
        source = None if self.source is None else seen[self.source]
        weights = query = None
        if source is not None and self.rules.token_weights != "none":
            assert source.importance is not None  # it was asked of this encoder
            weights = token_weights(self.rules.token_weights, source.importance, source.attention)
        if source is not None and self.rules.teacher_weights != "none":
            query = _query(seen[ANCHOR], source)
        grid = None if source is None else source.grid
        return adapters(tokens, {name: seen[name].tokens for name in self._forms}, weights, grid, query)


def _query(anchor: Seen, source: Seen) -> Tensor:
    """What teachers are scored against, in the student's space: the anchor's CLS, or its tokens weighed by importance,
    which may be another encoder's."""
    if anchor.cls is None and anchor.importance is None:
        assert source.importance is not None
        anchor = replace(anchor, importance=regrid(source.importance, source.grid, anchor.grid))
    return query_of(anchor)


def _forms(shapes: Mapping[str, Shape], names: Iterable[str]) -> dict[str, Tokens]:
    return {name: Tokens(shapes[name].channels, shapes[name].grid) for name in names}
