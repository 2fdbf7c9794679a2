"""What a stage's micro-batches look like: encoded rows in the stage's own order, without decoding a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from distilvlm.data import Batch, Grouping, Order, StageData
from distilvlm.data.batch import CHOSEN, IGNORED, MISMATCHED, REJECTED, SampleKey
from distilvlm.data.collate import collate
from distilvlm.data.problems import RowError
from distilvlm.data.sample import Sample, stand_in
from distilvlm.data.sampler import shares
from distilvlm.data.stage import stage_order
from distilvlm.data.template import SAFE_ID
from distilvlm.losses.objective import Objective
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe

ENCODED = 256
"""Samples that are encoded to learn the mean length of a stage's rows."""

LOOKED_AT = 2_000
"""Updates whose words are counted to find the largest micro-batch; no tokens are made for it."""

ASSUMED = {"plain": (8, 24), "chat": (64, 64), "vicuna": (96, 160)}
"""Text positions of a sample, read and learned, where the data is not here: about LLaVA's captions and instructions."""


@dataclass(frozen=True, order=True)
class Size:
    """How large a micro-batch is; ordered by what it takes."""

    positions: int  # with padding
    rows: int  # of the loss head
    lines: int
    real: int  # positions without padding
    learned: int  # response rows
    pictures: int
    sequences: int  # of a preference both

    @staticmethod
    def of(batch: Batch, objective: Objective) -> Size:
        positions = batch.input_ids.numel()
        return Size(
            positions,
            objective.rows(batch.response_rows, batch.visual_rows).numel(),
            len(batch.input_ids),
            int(batch.attention_mask.sum()),
            batch.response_rows.numel(),
            0 if batch.features is None else len(batch.features),
            batch.samples,
        )


@dataclass(frozen=True)
class Shapes:
    """Micro-batches of a stage, of this process."""

    updates: list[list[Size]]  # of sampled updates, each micro-batch's
    typical: Batch  # a micro-batch of median size
    largest: Batch
    record: Batch  # a sample of median length alone, as a teacher sees it that fills a cache
    pictures: int | None  # distinct pictures that the stage reads, for kept features
    total: int | None  # updates of the stage
    samples: int | None  # of the stage's data
    assumed: str | None = None  # what stands in for data that is not here
    shown: int | None = None  # of the samples, how many the stage shows at least once; None where its data is not here


def of_stage(
    recipe: Recipe,
    index: int,
    objective: Objective,
    student: VLM,
    data: StageData | None,
    samples: int | None,
    world: int,
) -> Shapes:
    """The shapes of stage `index`.

    Args:
        data: the stage's data; None where it is not here: shapes are then assumed.
        samples: rows that the recipe says the missing data has.
        world: processes that share an update.

    Raises:
        DataError: none of the rows that were looked at can be used.
    """
    stage, grouping = recipe.stages[index], Grouping.of(recipe.machine, recipe.stages[index])

    def size(batch: Batch) -> Size:
        return Size.of(batch, objective)

    width = student.model.config.vision_config.hidden_size  # pyright: ignore
    if data is None:
        kinds = [ASSUMED[recipe.data[name].template] for name in stage.data]
        sample = _assumed(student, width, *max(kinds, key=sum), stage.max_length)
        if objective.preference:
            other = MISMATCHED if objective.preference_kind == "kto_unpaired" else REJECTED
            sample = replace(sample, role=CHOSEN, second=replace(sample, role=other))
        own = -(-stage.optim.batch // world)
        lengths = [len(sequence.input_ids) for sequence in sample.sequences]
        if grouping.tokens is not None:  # what stands in for the data may be longer than it is
            grouping = replace(grouping, tokens=max(grouping.tokens, grouping.positions(lengths)))
        together = [len(group) for group in grouping.split([(0, at) for at in range(own)], lambda _: lengths)]
        batch = collate([sample] * together[0], grouping.packed)
        updates = stage.optim.updates
        if updates is None and samples is not None:
            updates = Order(samples, stage.optim.batch, 0, "").total_updates(stage.optim.epochs)
        text = len(sample.input_ids) - student.layout.placeholders
        counts = [size(collate([sample] * count, grouping.packed)) for count in together]
        answers = ", with each of its two answers" if objective.preference else ""
        assumed = f"its data is not here: every row is taken for one picture and {text} positions of text{answers}"
        return Shapes([counts], batch, batch, collate([sample]), None, updates, samples, assumed)

    order = stage_order(recipe, index, data)
    total = order.total_updates(stage.optim.epochs, stage.optim.updates)
    count = min(total, max(2, min(16, ENCODED // stage.optim.batch)))
    numbers = sorted({int(number) for number in np.linspace(0, total - 1, count)})
    made: list[list[Batch]] = []
    for number in numbers:
        groups = grouping.split(shares(order.update(number), world)[0], data.sequence_lengths)
        made.append([collate([_sample(data, width, at) for _, at in group], grouping.packed) for group in groups])
    batches = sorted((batch for update in made for batch in update), key=size)
    largest = batches[-1]
    if grouping.tokens is None:  # else all of them are of about one size
        group = _largest_group(data, order, total, world, grouping)
        largest = max([collate([_sample(data, width, at) for at in group], grouping.packed), largest], key=size)
    shown = sorted((at for number in numbers for _, at in order.update(number)), key=lambda at: data.lengths[at])
    return Shapes(
        updates=[[size(batch) for batch in update] for update in made],
        typical=batches[len(batches) // 2],
        largest=largest,
        record=collate([_sample(data, width, shown[len(shown) // 2])]),
        pictures=_distinct_pictures(data, order, total),
        total=total,
        samples=len(data),
    )


def mean_and_median(per_update: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(per_update), statistics.median(per_update)


def _sample(data: StageData, width: int, index: int) -> Sample:
    record = data.record(index)
    features = torch.zeros(len(record.images), data.placeholders, width) if record.images else None
    try:
        return data.assemble(index, features=features)
    except RowError:  # the run's own check names it; a stand-in of one token is what quarantine makes of it
        return stand_in(record, data.placeholders)


def _assumed(student: VLM, width: int, read: int, learned: int, max_length: int) -> Sample:
    layout = student.layout
    length = min(layout.placeholders + read + learned, max_length)
    labels = torch.full((length,), IGNORED)
    labels[-learned:] = SAFE_ID
    places = torch.arange(layout.placeholders)
    return Sample(
        key=SampleKey("assumed", "assumed", 0),
        input_ids=torch.full((length,), SAFE_ID),
        labels=labels,
        placeholder_positions=places,
        visual_positions=places[torch.tensor(layout.visual)],
        placeholders=layout.placeholders,
        features=torch.zeros(1, layout.placeholders, width),
    )


def _largest_group(data: StageData, order: Order, total: int, world: int, grouping: Grouping) -> list[int]:
    """The samples of the micro-batch with the most words and visual tokens, of the updates looked at."""
    words = data.lengths
    groups = (
        [index for _, index in group]
        for number in {int(n) for n in np.linspace(0, total - 1, min(total, LOOKED_AT))}
        for group in grouping.split(shares(order.update(number), world)[0], data.sequence_lengths)
    )
    return max(groups, key=lambda group: (grouping.positions(words[group].tolist()), group))


def _distinct_pictures(data: StageData, order: Order, total: int) -> int:
    if total >= order.updates_per_epoch:
        seen: Sequence[int] = range(len(data))
    else:
        seen = [index for number in range(total) for _, index in order.update(number)]
    looked_at = seen[:20_000]
    distinct = len({path for index in looked_at for path in data.record(index).images})
    return round(distinct * len(seen) / max(1, len(looked_at)))
