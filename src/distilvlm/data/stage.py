"""The data of a recipe's stage, as a student sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from distilvlm.data.alignment import TeacherView
from distilvlm.data.dataset import FeatureReader, SeenReader, StageData
from distilvlm.data.pictures import read_pictures
from distilvlm.data.readers import Source, read
from distilvlm.data.sampler import Order
from distilvlm.recipe.schema import Recipe, StageSpec


class View(Protocol):
    """What an encoder was trained to see."""

    @property
    def mean(self) -> tuple[float, float, float]: ...  # of RGB in [0, 1]


class Layout(View, Protocol):
    """What data needs to know of a vision tower; `models.VisionLayout` is one."""

    @property
    def size(self) -> int: ...  # side of the canvas in pixels
    @property
    def placeholders(self) -> int: ...  # positions per picture
    @property
    def visual(self) -> tuple[bool, ...]: ...  # [placeholders] False for a register


def background(view: View) -> tuple[int, int, int]:
    """The colour that pictures are padded with: the tower's mean, as LLaVA has it."""
    red, green, blue = (int(value * 255) for value in view.mean)
    return red, green, blue


def source_of(recipe: Recipe, stage: StageSpec, name: str) -> Source:
    """Source `name` as `stage` reads it: conversations, or pictures alone. Raises DataError as the readers."""
    return (read_pictures if stage.pictures_alone else read)(recipe.data[name], name)


def stage_data(
    recipe: Recipe,
    stage: StageSpec,
    tokenizer: Any,
    layout: Layout,
    sources: Sequence[Source],
    reader: FeatureReader | None = None,
    encoder_size: int | None = None,
    seen_reader: SeenReader | None = None,
    teacher: TeacherView | None = None,
) -> StageData:
    """What `stage` trains on, made of its `sources` (as `source_of` gave them).

    Args:
        reader: kept features instead of pictures.
        encoder_size: side of the canvas that encoders see, if it is not the student's.
        seen_reader: what encoders saw, kept on disk.
        teacher: of a teacher that reads rows of its own; of use to stages that compare with it only.

    Raises:
        ValueError, DataError: as `StageData`.
    """
    return StageData(
        sources,
        None if stage.pictures_alone else tokenizer,
        placeholders=layout.placeholders,
        visual=layout.visual,
        pictures=recipe.pictures,
        size=layout.size,
        max_length=stage.max_length,
        seed=recipe.seed,
        background=background(layout),
        feature_reader=reader,
        on_bad_row=recipe.machine.on_bad_row,
        encoder_size=encoder_size,
        seen_reader=seen_reader,
        teacher=teacher if stage.loss.compares else None,
        identifies=recipe.teacher is not None and recipe.teacher.kind == "cached" and stage.loss.compares,
    )


def stage_order(recipe: Recipe, index: int, data: StageData) -> Order:
    """The order in which stage `index` sees its samples.

    Seeded by the stage's place and not its name: runs that are compared see their samples in the same order.
    """
    stage = recipe.stages[index]
    return Order(
        len(data),
        stage.optim.batch,
        recipe.seed,
        str(index),
        stage.order,
        data.lengths,
        data.picture_counts,
        data.mixture,
        data.blocks if stage.order == "shards" else None,
    )
