"""What a cached teacher takes: bytes on disk, and of its head in memory."""

from __future__ import annotations

from distilvlm.data import StageData
from distilvlm.data.stage import stage_order
from distilvlm.models import forward
from distilvlm.recipe import Recipe
from distilvlm.recipe.teachers import KeepSpec
from distilvlm.teachers.keeping import Keeping

from .memory import Situation
from .shapes import Shapes


def kept_bytes(keep: KeepSpec, situation: Situation, shapes: Shapes, records: int) -> int:
    """What is kept of so many of the stage's records, without the head."""
    assert situation.teacher is not None
    vocabulary, width = forward.head_weight(situation.teacher.model).shape
    common, visual = min(vocabulary, situation.student.embedding_rows), sum(situation.student.layout.visual)
    keeping = Keeping(keep, common, width, visual, situation.teacher_dtype, autocast=False)
    sizes = [size for update in shapes.updates for size in update]
    learned, pictures, samples = (
        sum(getattr(size, name) for size in sizes) for name in ("learned", "pictures", "sequences")
    )
    size = records * keeping.answers_bytes(learned / samples)
    if not (situation.objective.visual or situation.objective.relation):
        return size
    seen = records * pictures / samples
    if shapes.pictures is not None and shapes.shown:  # many records may show the same picture
        seen = shapes.pictures * records / shapes.shown
    return size + round(keeping.picture_bytes() * seen)


def head_bytes(keep: KeepSpec, situation: Situation) -> int:
    """Of the teacher that is in memory while a stage trains: its head, where hidden rows are kept."""
    assert situation.teacher is not None
    if "hidden" not in (keep.responses, keep.visual):
        return 0
    return forward.head_weight(situation.teacher.model).numel() * situation.teacher_dtype.itemsize


def shown(recipe: Recipe, index: int, data: StageData) -> set[int]:
    """The samples that stage `index` shows."""
    optim, order = recipe.stages[index].optim, stage_order(recipe, index, data)
    updates = order.total_updates(optim.epochs, optim.updates)
    if updates >= order.updates_per_epoch and all(weight >= 1 for _, weight in data.mixture):
        return set(range(len(data)))
    return {sample for number in range(updates) for _, sample in order.update(number)}


def seen_before(recipe: Recipe, index: int) -> list[int]:
    """Earlier stages that show a cached teacher records of the same data as stage `index`, and ask as much of it."""
    spec = recipe.stages[index]
    return [
        number
        for number, one in enumerate(recipe.stages[:index])
        if one.data == spec.data
        and one.max_length == spec.max_length
        and one.loss.compares
        and bool(one.loss.visual or one.loss.relation) >= bool(spec.loss.visual or spec.loss.relation)
    ]
