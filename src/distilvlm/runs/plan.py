"""What a recipe will do, without doing it: parts, counts, updates, rows per loss term, cost. Needs no weights."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from distilvlm import cost
from distilvlm.cost import StageCost
from distilvlm.cost import shapes as sizes
from distilvlm.cost.network import Traffic, traffic
from distilvlm.data import DataError, Source, StageData, showings
from distilvlm.data.problems import RowError
from distilvlm.data.stage import source_of, stage_data
from distilvlm.data.streams import here
from distilvlm.models import NotHere, parts
from distilvlm.models.alone import Encoder
from distilvlm.models.compose import build_student
from distilvlm.models.stages import students
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, StageSpec, load_recipe
from distilvlm.recipe.models import ModelSpec
from distilvlm.recipe.schema import SourceSpec
from distilvlm.teachers.encoder_cache import kept_bytes
from distilvlm.teachers.encoders import shapes, used
from distilvlm.teachers.own_rows import view
from distilvlm.train import objective_of
from distilvlm.train.encoders import adapt, adapters_of

SAMPLED = 200
"""Rows of a source that are encoded to estimate rows of the loss terms per sample."""


@dataclass(frozen=True)
class PartCount:
    name: str
    parameters: int


@dataclass(frozen=True)
class ModelPlan:
    """A model's parts. `missing` says why they are unknown, e.g. weights that another run makes first."""

    source: str
    parts: list[PartCount]
    visual_tokens: int | None
    missing: str | None = None

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)


@dataclass(frozen=True)
class EncoderPlan:
    """An encoder that teaches. `missing` says why it is unknown what it gives."""

    name: str
    source: str
    size: int | None = None  # of its pictures in pixels
    grid: tuple[int, int] | None = None  # of its tokens, pooled if they are
    channels: int | None = None
    bytes: int | None = None  # that what it sees in a picture takes in the cache; None without one
    missing: str | None = None


@dataclass(frozen=True)
class StagePlan:
    """A stage, resolved. Rows are per sample that has them, of a preference those of both answers; None where data is
    not here to be looked at."""

    name: str
    transform: list[str]
    parameters: int | None  # of the student in this stage, without a sparse one's shared experts of zeros
    active: int | None  # of these, what serves one token
    trains: list[PartCount]
    data: list[str]
    samples: int | None
    updates: int | None
    batch: int
    lr: float
    loss: dict[str, float]
    rows: dict[str, float | None]  # loss term -> mean rows per sample
    schedule: dict[str, str] = field(default_factory=dict)  # weights that change, and the temperature, in words
    compared_by: str = ""  # divergence and temperature, as far as they are not the default
    cost: StageCost | None = None  # None where it was not asked for, or the student is not here
    network: Traffic | None = None  # of a teacher elsewhere that is asked in training, where the data is here


@dataclass(frozen=True)
class Plan:
    """Everything `distilvlm plan` prints."""

    name: str
    student: ModelPlan
    teacher: ModelPlan | None
    stages: list[StagePlan]
    machine: str | None = None  # where costs were measured
    encoders: list[EncoderPlan] = field(default_factory=list)
    processes: int = 1  # that train together; costs are of each

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    measure: bool = False,
    processes: int | None = None,
) -> Plan:
    """Resolve a recipe.

    Args:
        measure: estimate memory, time and disk of every stage, too, which takes some seconds of this machine.
        processes: that will train together, each on a device as this machine's; default: as a launcher says, or 1.

    Raises:
        RecipeError: the recipe is wrong.
        ValueError: a stage names a part that the student does not have, or that cannot train; or the student cannot
            become sparse as a stage wants it.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    student, student_plan = _model(recipe.student, recipe.seed)
    teacher, teacher_plan = (None, None) if recipe.teacher is None else _model(recipe.teacher, recipe.seed)
    assert not isinstance(teacher, Encoder)  # the schema refuses one
    encoders = [] if student is None else _encoders(recipe, student)
    sources = _sources(recipe)
    trained_as = {} if student is None else students(recipe, student)
    data = {} if student is None else _data(recipe, student, teacher, sources)
    stages = [
        _stage(
            recipe, stage, trained_as.get(stage.name), teacher, student_plan, sources[stage.name], data.get(stage.name)
        )
        for stage in recipe.stages
    ]
    machine: str | None = None
    if measure and student is not None:
        costs = cost.estimate(recipe, student, teacher, data=data, world=processes)
        stages = [replace(stage, cost=one) for stage, one in zip(stages, costs, strict=True)]
        machine = cost.this_machine()
    return Plan(recipe.name, student_plan, teacher_plan, stages, machine, encoders, processes)


def _encoders(recipe: Recipe, student: VLM | Encoder) -> list[EncoderPlan]:
    """What is known of each; the student on the meta device gets the adapters to those of which enough is."""
    missing: dict[str, str] = {}
    found = shapes(recipe, student, missing)
    adapt(recipe, student, found)
    plans: list[EncoderPlan] = []
    for name in used(recipe):
        spec = recipe.encoders[name]
        source = spec.source or (f"random {spec.config.get('model_type', '?')}" if spec.config else "the student")
        if name in missing:
            plans.append(EncoderPlan(name, source, missing=missing[name]))
        else:
            one = found[name]
            kept = None if recipe.cache is None else kept_bytes(recipe.cache, one)
            plans.append(EncoderPlan(name, source, one.size, one.grid, one.channels, kept))
    return plans


def _model(spec: ModelSpec, seed: int) -> tuple[VLM | Encoder | None, ModelPlan]:
    names = (
        [spec.source]
        if spec.source
        else [
            (part.source or f"random {part.config.get('model_type', '?') if part.config else '?'}")
            for part in (spec.vision, spec.language)
            if part is not None
        ]
    )
    source = " + ".join(str(name) for name in names)
    try:
        vlm = build_student(spec, seed, meta=True)
    except NotHere as error:
        return None, ModelPlan(source, [], None, missing=str(error))
    counts = [PartCount(row.name, row.parameters) for row in parts.summary(vlm.model)]
    return vlm, ModelPlan(source, counts, sum(vlm.layout.visual))


Sources = Mapping[str, Source | None]
"""Name in the recipe -> the source if its file is here; a plan of a published recipe is of use before its data is
downloaded."""


def _data(
    recipe: Recipe, student: VLM | Encoder, teacher: VLM | None, sources: Mapping[str, Sources]
) -> dict[str, StageData]:
    """Stage name -> its data, of the stages whose every file is here and can be read as tokens."""
    beside = None
    if teacher is not None and recipe.teacher is not None and isinstance(student, VLM):
        beside = view(recipe.teacher, teacher, student)
    found: dict[str, StageData] = {}
    for stage in recipe.stages:
        own = [source for source in sources[stage.name].values() if source is not None]
        if len(own) == len(stage.data) and (stage.pictures_alone or student.tokenizer is not None):
            found[stage.name] = stage_data(recipe, stage, student.tokenizer, student.layout, own, teacher=beside)
    return found


def _sources(recipe: Recipe) -> dict[str, Sources]:
    """Stage name -> its sources, each file read once for all stages that read it alike."""
    read: dict[tuple[str, bool], Source | None] = {}
    for stage in recipe.stages:
        for name in stage.data:
            if (name, stage.pictures_alone) not in read:
                is_here = here(recipe.data[name].path)
                read[name, stage.pictures_alone] = source_of(recipe, stage, name) if is_here else None
    return {stage.name: {name: read[name, stage.pictures_alone] for name in stage.data} for stage in recipe.stages}


def _stage(
    recipe: Recipe,
    stage: StageSpec,
    student: VLM | Encoder | None,
    teacher: VLM | None,
    plan: ModelPlan,
    sources: Sources,
    data: StageData | None,
) -> StagePlan:
    """`student` as the stage trains it."""
    trains: list[PartCount] = []
    parameters = active = None
    if student is not None:
        parameters, active = parts.sizes(student.model)
        # Adapters to encoders that are not here are not known.
        names = [name for name in stage.train if name != "adapters" or adapters_of(student.model)]
        chosen = parts.choose(student.model, names).parameters
        trains = [PartCount(name, sum(p.numel() for p in members.values())) for name, members in chosen.items()]
    counts = [_samples(recipe.data[name], sources[name]) for name in stage.data]
    samples = None if None in counts else sum(count for count in counts if count is not None)
    updates = stage.optim.updates
    if updates is None and samples is not None and stage.optim.epochs is not None:
        updates = math.ceil(round(stage.optim.epochs * math.ceil(samples / stage.optim.batch), 6))
    weights = stage.loss.weights
    visual = None if plan.visual_tokens is None else float(plan.visual_tokens)
    positions, learned = _rows(stage, data)
    of_pictures = ("visual", "relation", "encoder", "expert_balance")
    rows = {name: visual if name in of_pictures else learned for name in weights}
    if "balance" in rows:
        rows["balance"] = positions
    network = None
    if isinstance(student, VLM) and data is not None and recipe.teacher is not None and recipe.teacher.kind == "remote":
        objective, index = objective_of(stage, recipe.teacher), recipe.stages.index(stage)
        asked = sizes.of_stage(recipe, index, objective, student, data, samples, world=1)
        network = traffic(recipe, stage, student, teacher, asked)
    return StagePlan(
        name=stage.name,
        transform=[str(transform) for transform in stage.transform],
        parameters=parameters,
        active=active,
        trains=trains,
        data=list(stage.data),
        samples=samples,
        updates=updates,
        batch=stage.optim.batch,
        lr=stage.optim.lr,
        loss=weights,
        rows=rows,
        schedule={name: str(ramp) for name, ramp in stage.loss.schedule.items()},
        compared_by=stage.loss.compared_by,
        network=network,
    )


def _samples(spec: SourceSpec, source: Source | None) -> int | None:
    """How many samples an epoch shows of a source."""
    rows = spec.rows if spec.rows is None or spec.take is None else min(spec.rows, spec.take)
    count = rows if source is None else len(source.records)
    return None if count is None else showings(count, spec.weight)


def _rows(stage: StageSpec, data: StageData | None) -> tuple[float | None, float | None]:
    """Mean positions and supervised tokens per sample over the first rows of each source."""
    if data is None or data.pictures_alone:
        return None, None
    positions: list[int] = []
    learned: list[int] = []
    start = 0
    for count, _ in data.mixture:
        for index in range(start, start + min(SAMPLED, count)):
            try:
                sequences = data.sequences(index)
            except RowError:
                continue  # the run's own check names it; here it only would not count towards the mean
            positions.append(sum(len(encoded.input_ids) for encoded in sequences))
            learned.append(sum(encoded.learned for encoded in sequences))
        start += count
    if not learned:
        raise DataError(f"stage '{stage.name}': none of the first {SAMPLED} rows of its data has anything to learn")
    return sum(positions) / len(positions), sum(learned) / len(learned)
