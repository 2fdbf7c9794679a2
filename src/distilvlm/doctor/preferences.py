"""Stages of preferences: do their data, kind of loss and settings go together?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distilvlm.data import DataReport, StageData
from distilvlm.data.readers import NAMES
from distilvlm.recipe import Recipe, StageSpec

from .finding import Finding

SHAPING = {
    "desirable": (1.0, ("kto", "kto_unpaired")),
    "undesirable": (1.0, ("kto", "kto_unpaired")),
    "label_smoothing": (0.0, ("dpo",)),
}
"""What shapes a preference loss -> its value without effect, and the kinds that it has an effect on."""


def check(recipe: Recipe, data: Mapping[str, StageData], reports: Mapping[str, DataReport]) -> list[Finding]:
    """Every stage, by its settings; those whose data is at hand by that, too."""
    found: list[Finding] = []
    for stage in recipe.stages:
        found += _settings(stage)
        if stage.name in data:
            found += _kind(stage, data[stage.name])
        if stage.name in reports and stage.loss.preference:
            found += _labels(stage, reports[stage.name])
    return found


def fit(stage: StageSpec, data: StageData) -> bool:
    """Whether the stage can learn from data of this kind."""
    return data.preferences == _wanted(stage)


def _wanted(stage: StageSpec) -> str | None:
    if not stage.loss.preference:
        return None
    return "rated" if stage.loss.preference_kind == "kto_unpaired" else "pairs"


def _kind(stage: StageSpec, data: StageData) -> Iterator[Finding]:
    if fit(stage, data):
        return
    sources = " and ".join(f"'{source.name}'" for source in data.sources)
    text, kind = f"data {sources} is made of {NAMES[data.preferences]}", stage.loss.preference_kind
    if not stage.loss.preference:
        text += ", but the stage has no preference term: it would learn the rejected answers, too"
        fix = f"set stages.{stage.name}.loss to {{text: 0, preference: 1}}, or give the stage conversations"
    elif data.preferences is None:
        text += f", but a preference loss ({kind}) compares answers"
        fix = (
            "give rows with chosen and rejected answers, or rated ones; `distilvlm data convert preference` makes them"
        )
    elif kind == "kto_unpaired":
        text += ", but preference_kind kto_unpaired is of single rated answers"
        fix = f"set stages.{stage.name}.loss.preference_kind to kto (or dpo, ipo, hinge)"
    else:
        text += f", but preference_kind {kind} compares two answers to one question"
        fix = f"set stages.{stage.name}.loss.preference_kind to kto_unpaired"
    yield Finding("preferences.data", "error", text, fix, stage.name)


def _labels(stage: StageSpec, report: DataReport) -> Iterator[Finding]:
    if report.rated and report.desirable in (0, report.rated):
        which = "desirable" if report.desirable else "undesirable"
        text = f"all {report.rated:,} answers that were looked at are rated {which}: nothing tells good from bad"
        yield Finding("preferences.labels", "warning", text, "add answers of the other label", stage.name)


def _settings(stage: StageSpec) -> Iterator[Finding]:
    loss = stage.loss
    if not loss.preference:
        return
    for name, (neutral, kinds) in SHAPING.items():
        value = getattr(loss, name)
        if value != neutral and loss.preference_kind not in kinds:
            text = f"loss.{name} is {value:g}, which preference_kind {loss.preference_kind} does not know"
            fix = f"remove it, or set preference_kind to {' or '.join(kinds)}"
            yield Finding("preferences.settings", "warning", text, fix, stage.name)
