"""Numbers and choices of a recipe that are allowed, and hardly ever meant."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from distilvlm.data import Order, StageData
from distilvlm.models.alone import Encoder
from distilvlm.models.parts import parameters_of, require_trainable, sizes, summary
from distilvlm.models.upcycling import upcycled_layers
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, StageSpec

from . import parts
from .finding import Finding
from .template import spread

RATES = (1e-7, 1e-2)
"""Learning rates outside are hardly ever meant: published ones lie between 1e-6 and 2e-3."""

PROMPTS = 20
"""So many different human texts are questions; LLaVA's captions come with eleven ways to ask for one."""

SAMPLED = 200
"""Rows whose human text is looked at."""


def check(
    recipe: Recipe, shapes: Mapping[str, VLM | Encoder], teacher: VLM | None, data: Mapping[str, StageData]
) -> list[Finding]:
    """What can be seen in the recipe itself.

    Args:
        shapes: stage -> the student as it trains there; stages where it can't be had are missing.
        teacher: None where it can't be had.
    """
    found = [*_unused(recipe), *_resets(recipe)]
    if recipe.pictures.augment is not None and recipe.pictures.features is not None:
        text = "pictures.augment changes pictures that pictures.features keeps features of: they would not see it"
        found.append(Finding("settings.augment", "error", text, "remove one of the two"))
    for stage in recipe.stages:
        found += [*_parts(stage, shapes.get(stage.name)), *_rates(stage), *_batch(recipe, stage)]
        found += _departures(stage, shapes.get(stage.name))
        if stage.name in data:
            found += [*_length(stage, data[stage.name]), *_questions(stage, data[stage.name])]
    if shapes and teacher is not None:
        found += _sizes(recipe, next(iter(shapes.values())), teacher)
    return found


def order_of(stage: StageSpec, data: StageData) -> Order:
    """How many samples an epoch of a stage shows, and how many updates that makes; not in which order."""
    return Order(len(data), stage.optim.batch, 0, "", mixture=data.mixture)


def updates_of(stage: StageSpec, data: StageData) -> int:
    """Updates of a stage on all rows of its data."""
    return order_of(stage, data).total_updates(stage.optim.epochs, stage.optim.updates)


def _unused(recipe: Recipe) -> Iterator[Finding]:
    used = {name for stage in recipe.stages for name in stage.data}
    for name in recipe.data:
        if name not in used:  # not a warning: recipes that extend one another share their data
            yield Finding("settings.unused", "ok", f"data '{name}' is used by no stage")
    if recipe.teacher is not None and not any(stage.loss.needs_teacher for stage in recipe.stages):
        text = "the recipe has a teacher, but no stage has a term that needs it: nothing is distilled"
        fix = "give response, visual, relation or preference a weight in a stage's loss, or set teacher: null"
        yield Finding("settings.unused", "warning", text, fix)


def _resets(recipe: Recipe) -> Iterator[Finding]:
    before: set[str] = set()
    for stage in recipe.stages:
        for part in stage.resets:
            # 'language' covers 'language.head', and the other way round
            if not any(f"{part}.".startswith(f"{name}.") or f"{name}.".startswith(f"{part}.") for name in before):
                # Not a warning: the published LLaVA-KD resets a language model that its first stage left alone.
                text = f"resets {part}, which no earlier stage trains: that changes nothing"
                yield Finding("settings.reset", "ok", text, stage=stage.name)
        before |= set(stage.train)


def _parts(stage: StageSpec, student: VLM | Encoder | None) -> Iterator[Finding]:
    """Names that the run would trip over when it gets to this stage."""
    for part, rate in stage.optim.rates.items():
        if part not in stage.train:
            text = f"optim.rates gives {part} a rate of {rate:g}, but the stage trains {', '.join(stage.train)}"
            fix = f"name '{part}' in stages.{stage.name}.train, or remove its rate"
            yield Finding("settings.rates", "error", text, fix, stage.name)
    if student is None:
        return
    for part in [*parts.known(student, stage.train), *stage.resets]:
        try:
            if part in stage.train:
                require_trainable(student.model, part)
            parameters_of(student.model, part)
        except ValueError as error:
            fix = "name parts that the student has: projector, language, vision, language.attention, adaptor, ..."
            yield Finding("settings.parts", "error", str(error), fix, stage.name)


def _rates(stage: StageSpec) -> Iterator[Finding]:
    low, high = RATES
    for part in stage.train:
        rate = stage.optim.rates.get(part, stage.optim.lr)
        if not low <= rate <= high:
            what = "more than weights stand" if rate > high else "too little to move anything"
            fix = (
                f"set stages.{stage.name}.optim.lr; LLaVA's: 1e-3 for the projector alone, 2e-5 with the language model"
            )
            yield Finding("settings.rate", "warning", f"{part} trains at {rate:g}: {what}", fix, stage.name)


def _batch(recipe: Recipe, stage: StageSpec) -> Iterator[Finding]:
    micro, batch = recipe.machine.micro_batch, stage.optim.batch
    if micro > batch and recipe.machine.tokens is None:
        text = f"machine.micro_batch is {micro}, but an update has only {batch} samples: the rest is never filled"
        yield Finding("settings.micro_batch", "warning", text, f"set machine.micro_batch={batch}", stage.name)


def _departures(stage: StageSpec, student: VLM | Encoder | None) -> Iterator[Finding]:
    """Where the stage is as LLaVA-MoD's code on purpose."""
    if not stage.reference:
        return
    loss, sparse = stage.loss, student is None or bool(upcycled_layers(student.model.config))
    effective = {
        "unshifted_mask": loss.response,
        "token_mean": loss.text or loss.response,
        "doubled_balance": loss.text and loss.balance,
        "padding": loss.balance,
        "undetached_z0": loss.preference and loss.preference_kind == "kto",
        "gumbel": sparse,
        "capacity": sparse,
    }
    idle = [name for name in stage.reference if not effective[name]]
    text = f"as LLaVA-MoD's code, and not as this package's default: {', '.join(stage.reference)}"
    yield Finding("settings.reference", "ok", text, stage=stage.name)
    if idle:
        text = f"reference names {', '.join(idle)}, which changes nothing: the stage has no term or no experts for it"
        fix = f"take {' and '.join(idle)} out of stages.{stage.name}.reference"
        yield Finding("settings.reference", "warning", text, fix, stage.name)


def _length(stage: StageSpec, data: StageData) -> Iterator[Finding]:
    """Stages that are over before they began."""
    samples, optim = order_of(stage, data).per_epoch, stage.optim
    if samples < optim.batch:
        text = f"a batch of {optim.batch} is more than the {samples} samples of an epoch: every update is smaller"
        yield Finding(
            "settings.batch", "warning", text, f"set stages.{stage.name}.optim.batch to {samples}", stage.name
        )
    elif optim.epochs is not None and optim.epochs * samples < optim.batch:
        text = f"{optim.epochs:g} epochs of {samples:,} samples are less than one update of {optim.batch}"
        yield Finding("settings.updates", "warning", text, f"raise stages.{stage.name}.optim.epochs", stage.name)
    updates = updates_of(stage, data)
    rising = math.ceil(optim.warmup * updates)
    if rising >= updates:
        text = f"all {updates} updates are warm-up" if updates > 1 else "the only update is warm-up, at a rate of 0"
        fix = f"set stages.{stage.name}.optim.warmup to 0, or train for more updates"
        yield Finding("settings.warmup", "warning", text, fix, stage.name)


def _questions(stage: StageSpec, data: StageData) -> Iterator[Finding]:
    """The plain template throws the human text away: right for captions, wrong for questions."""
    if not any(name.partition(".")[0] in ("language", "adaptor") for name in stage.train):
        return
    plain = {source.name for source in data.sources if source.spec.template == "plain"}
    if not plain:
        return
    asked: dict[str, set[str]] = {name: set() for name in plain}
    for index in spread(data.picture_counts.nonzero()[0], SAMPLED):
        record = data.record(index)
        if record.key.source in plain:
            asked[record.key.source] |= {turn.text for turn in record.turns if turn.role == "user"}
    for name, texts in asked.items():
        if len(texts) > PROMPTS:
            text = (
                f"template 'plain' throws the human text away, and data '{name}' has questions: {len(texts)} different "
                f"ones in the {SAMPLED} rows looked at. The language model learns answers without them"
            )
            yield Finding("settings.plain", "warning", text, f"set data.{name}.template: chat (or vicuna)", stage.name)


def _sizes(recipe: Recipe, student: VLM | Encoder, teacher: VLM) -> Iterator[Finding]:
    if not any(stage.loss.needs_teacher for stage in recipe.stages):
        return
    ours, theirs = (_language_size(vlm) for vlm in (student, teacher))
    if theirs < ours:
        text = f"the teacher's language model is smaller than the student's ({theirs:,} and {ours:,} parameters)"
        yield Finding(
            "settings.teacher", "warning", text, "name a larger teacher, or a smaller student (language.layers)"
        )


def _language_size(vlm: VLM | Encoder) -> int:
    """Parameters of the language model that serve a token, those of an active adaptor among them."""
    others = sum(row.parameters for row in summary(vlm.model) if parts.owner(row.name, ["vision", "projector"]))
    return sizes(vlm.model)[1] - others  # an adaptor's own projector is as large as the one that it stands in for
