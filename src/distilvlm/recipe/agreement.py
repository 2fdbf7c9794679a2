"""What the sections of encoders, and the stages that use them, must agree in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distilvlm.recipe.encoders import ANCHOR

if TYPE_CHECKING:
    from distilvlm.recipe.schema import Recipe, StageSpec


def check_encoders(recipe: Recipe) -> None:
    """Raises ValueError, naming stage and field."""
    for name, spec in recipe.encoders.items():
        if spec.source is not None and spec.config is not None:
            raise ValueError(f"encoders.{name}: give only one of 'from' and 'config'")
        if spec.source is None and spec.config is None and name != ANCHOR:
            raise ValueError(
                f"encoders.{name}: give 'from' (pretrained) or 'config' (random); only '{ANCHOR}' may leave both out"
            )
        if spec.source is None and spec.config is None and (spec.size, spec.layer) != (None, None):
            raise ValueError(
                f"encoders.{name}: a copy of the student has its size and layer: leave 'size' and 'layer' out"
            )
        if name == ANCHOR and spec.pool is not None:
            raise ValueError(f"encoders.{ANCHOR}.pool: the anchor is compared token by token; leave it out")
        if "." in name:
            raise ValueError(f"encoders.{name}: names of encoders have no '.'")
    if recipe.cache is not None and not recipe.encoders:
        raise ValueError("'cache' keeps features of 'encoders', and the recipe has none: remove it")
    if recipe.cache is not None and recipe.pictures.augment is not None:
        raise ValueError("'pictures.augment' changes pictures that 'cache' keeps features of: remove one of the two")
    if recipe.student.encoder_alone and recipe.teacher is not None:
        raise ValueError("the student is a vision encoder alone, and 'teacher' is a language model's: use 'encoders'")
    for stage in recipe.stages:
        if recipe.student.encoder_alone and stage.loss.of_language:
            zeros = ", ".join(f"{name}: 0" for name in stage.loss.of_language)
            raise ValueError(
                f"stage '{stage.name}' has a loss term of language, and the student is a vision encoder alone: set "
                f"loss: {{{zeros}}}"
            )
        if "adapters" in stage.train and not stage.loss.encoder:
            raise ValueError(f"stage '{stage.name}' trains adapters, which only loss.encoder reaches: give it a weight")
        if stage.loss.encoder:
            _check_comparison(recipe, stage)


def _check_comparison(recipe: Recipe, stage: StageSpec) -> None:
    how = stage.encoder
    if not recipe.encoders:
        raise ValueError(f"stage '{stage.name}' has loss.encoder, but the recipe has no 'encoders'")
    for name in [*(how.teachers or []), *([how.importance] if how.importance else [])]:
        if name not in recipe.encoders:
            raise ValueError(
                f"stage '{stage.name}' compares with '{name}', but 'encoders' has {sorted(recipe.encoders)}"
            )
    source = how.importance or ANCHOR
    if how.token_weights != "none" and source not in recipe.encoders:
        raise ValueError(
            f"stage '{stage.name}' weighs tokens by an encoder's attention, and there is no '{ANCHOR}': name one in "
            "encoder.importance, or set encoder.token_weights to none"
        )
    if how.teacher_weights != "none" and ANCHOR not in recipe.encoders:
        raise ValueError(
            f"stage '{stage.name}' weighs teachers by how they agree with the '{ANCHOR}', which 'encoders' lacks: add "
            "it, or set encoder.teacher_weights to none"
        )
    if how.importance and recipe.encoders[how.importance].pool is not None:
        raise ValueError(f"encoders.{how.importance}.pool: its attention weighs tokens, so they stay as they are")
