"""What a recipe's micro-batches may be made of where a loss is of the micro-batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distilvlm.recipe.schema import Recipe

OF_MICRO_BATCHES = ("token_mean", "padding", "undetached_z0", "capacity")
"""Departures whose loss is one of the micro-batch, and not of its samples."""


def check_batches(recipe: Recipe) -> None:
    """Samples may only be put together by their lengths, and rows packed, where that changes no loss.

    Raises:
        ValueError: it does.
    """
    machine = recipe.machine
    capacity: str | None = None
    for stage in recipe.stages:
        if stage.upcycles is not None and stage.upcycles.capacity is not None:
            capacity = stage.name
        if machine.packing and "padding" in stage.reference:
            raise ValueError(
                f"stage '{stage.name}': reference: [padding] counts padding, and packed rows have none between "
                "samples: set machine.packing to false, or leave 'padding' out"
            )
        if machine.tokens is None:
            continue
        advice = "set machine.tokens to null and machine.micro_batch to the samples that the loss is of"
        if found := [name for name in OF_MICRO_BATCHES if name in stage.reference]:
            raise ValueError(
                f"stage '{stage.name}': reference: [{', '.join(found)}] makes its loss one of the micro-batch, and "
                f"machine.tokens chooses the samples of a micro-batch by their lengths: {advice}"
            )
        if capacity is not None:
            raise ValueError(
                f"stage '{stage.name}': its experts have a capacity (upcycled in '{capacity}'), which is of the "
                f"micro-batch, and machine.tokens chooses the samples of a micro-batch by their lengths: {advice}"
            )
