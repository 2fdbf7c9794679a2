"""What was left out or changed, and why: rows, ends of rows, typed image tokens, questions that were not asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .formats import ComparisonFile, Quarantined
from .read import Run, Stage

REASONS = {
    "cut": "samples cut at the end: longer than the stage's max_length",
    "neutralised": "image tokens typed into a text, made harmless",
    "markers_added": "records with a picture whose text had no place for it: put in front",
    "answers_dropped": "answers before the first question, left out as LLaVA does",
}
"""Counts of a `DataReport` that stand for something left out or changed, in words."""


@dataclass(frozen=True)
class Count:
    stage: str
    source: str
    samples: int
    number: int
    why: str


@dataclass(frozen=True)
class Skipped:
    """What one run left out. Runs (of several seeds, say) that left out the same are told once."""

    runs: tuple[str, ...]
    counts: tuple[Count, ...]
    rows: tuple[Quarantined, ...]
    checked: tuple[str, ...]  # stages whose data check is recorded
    unrecorded: tuple[str, ...]  # stages of which nothing is known, if others' are


def skipped(runs: Sequence[tuple[str, Run]]) -> list[Skipped]:
    """What every run left out, by the label that the page gives it."""
    found: list[Skipped] = []
    for label, run in runs:
        one = _of(label, run)
        same = next((at for at, other in enumerate(found) if replace(other, runs=()) == replace(one, runs=())), None)
        if same is None:
            found.append(one)
        else:
            found[same] = replace(found[same], runs=(*found[same].runs, label))
    return found


def unasked(file: ComparisonFile) -> dict[tuple[str, int, int], list[str]]:
    """(question set, seed, rows that an evaluation left out) -> baselines and models."""
    found: dict[tuple[str, int, int], list[str]] = {}
    for seed in file.seeds:
        for questions, rows in seed.rows.items():
            for model, summary in rows.items():
                if summary.bad_rows:
                    found.setdefault((questions, seed.seed, summary.bad_rows), []).append(model)
    return found


def _of(label: str, run: Run) -> Skipped:
    counts: list[Count] = []
    known: list[str] = []
    for stage in run.stages:
        if stage.about is not None and stage.about.data:
            known.append(stage.spec.name)
            counts += [count for source, report in stage.about.data.items() for count in _counts(stage, source, report)]
    unknown = [stage.spec.name for stage in run.stages if stage.spec.name not in known]
    if not known and run.checks:  # made before stages kept their own: the checks do not say whose they are
        named = [check.get("sources", {"": check}) for check in run.checks]
        counts = [
            count for sources in named for source, report in sources.items() for count in _counts(None, source, report)
        ]
        known, unknown = unknown, []
    if not known:
        unknown = []
    return Skipped((label,), tuple(counts), tuple(run.quarantine), tuple(known), tuple(unknown))


def _counts(stage: Stage | None, source: str, report: Mapping[str, Any]) -> list[Count]:
    name = "" if stage is None else stage.spec.name
    return [
        Count(name, source, int(report.get("samples") or 0), int(report[key]), why)
        for key, why in REASONS.items()
        if report.get(key)
    ]
