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
    first: StageSpec | None = None
    for stage in recipe.stages:
        if recipe.student.encoder_alone and stage.loss.of_language:
            zeros = ", ".join(f"{name}: 0" for name in stage.loss.of_language)
            raise ValueError(
                f"stage '{stage.name}' has a loss term of language, and the student is a vision encoder alone: set "
                f"loss: {{{zeros}}}"
            )
        if "adapters" in stage.train and not stage.loss.encoder:
            raise ValueError(f"stage '{stage.name}' trains adapters, which only loss.encoder reaches: give it a weight")
        if not stage.loss.encoder:
            continue
        _check_comparison(recipe, stage)
        if first is not None and (first.encoder.adapter, first.encoder.side) != (
            stage.encoder.adapter,
            stage.encoder.side,
        ):
            raise ValueError(
                f"stages '{first.name}' and '{stage.name}' have different adapters (encoder.adapter, encoder.side): "
                "adapters go on from stage to stage, so these fields must be the same"
            )
        first = first or stage


def _check_comparison(recipe: Recipe, stage: StageSpec) -> None:
    how = stage.encoder
    if not recipe.encoders:
        raise ValueError(f"stage '{stage.name}' has loss.encoder, but the recipe has no 'encoders'")
    for name in [*(how.teachers or []), *([how.importance] if how.importance else [])]:
        if name not in recipe.encoders:
            raise ValueError(
                f"stage '{stage.name}' compares with '{name}', but 'encoders' has {sorted(recipe.encoders)}"
            )
    weighs = how.token_weights != "none" or how.teacher_weights != "none"
    source = how.importance or ANCHOR
    if weighs and source not in recipe.encoders:
        raise ValueError(
            f"stage '{stage.name}' weighs tokens or teachers by an encoder's attention, and there is no '{ANCHOR}': "
            "name one in encoder.importance, or set encoder.token_weights and teacher_weights to none"
        )
    if how.importance and recipe.encoders[how.importance].pool is not None:
        raise ValueError(f"encoders.{how.importance}.pool: its attention weighs tokens, so they stay as they are")
