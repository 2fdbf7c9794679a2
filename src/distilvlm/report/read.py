"""From directories to what the page shows. What is absent is None; what is there and damaged stops by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from distilvlm.models.files import MANIFEST
from distilvlm.recipe import Recipe, StageSpec, read_dump
from distilvlm.runs.directory import RunDirectory

from .formats import (
    AboutRun,
    AboutStage,
    Answer,
    ComparisonFile,
    Content,
    CostFile,
    Doctor,
    ImportanceFile,
    Manifest,
    Quarantined,
    SeedScores,
    Summary,
    Update,
)
from .intervals import figures

Form = TypeVar("Form", bound=Content)

COMPARISON = "comparison.json"


class ReportError(ValueError):
    """A directory can't be reported on; the message names the file and says what to do."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run, as far as it went."""

    index: int
    spec: StageSpec
    about: AboutStage | None
    updates: list[Update]
    finished: bool

    @property
    def planned(self) -> int | None:
        """Updates of the whole stage; None where only the data's size would tell."""
        if self.about is not None and self.about.updates is not None:
            return self.about.updates
        return len(self.updates) if self.finished else self.spec.optim.updates

    @property
    def seconds(self) -> float:
        return sum(update.seconds for update in self.updates)

    @property
    def wait(self) -> float:
        """Seconds of these in which the (main) process waited for its data."""
        return sum(update.wait for update in self.updates)


@dataclass(frozen=True)
class Run:
    """A run directory."""

    name: str  # as the page calls it: the recipe's, or the model's in a comparison
    path: Path
    recipe: Recipe
    recipe_text: str
    stages: list[Stage]
    about: AboutRun | None
    doctor: Doctor | None
    cost: CostFile | None
    importance: ImportanceFile | None
    manifest: Manifest | None
    checks: list[dict[str, Any]]  # the reports of `data/`, one per set of files
    quarantine: list[Quarantined]

    @property
    def finished(self) -> bool:
        return self.manifest is not None


@dataclass(frozen=True)
class SeedRuns:
    """The runs of one seed, by name: of the models, and of those that they start from."""

    scores: SeedScores
    runs: dict[str, Run | None]  # None where its directory is not there

    @property
    def there(self) -> dict[str, Run]:
        return {model: run for model, run in self.runs.items() if run is not None}


@dataclass(frozen=True)
class Comparison:
    """A comparison directory."""

    path: Path
    file: ComparisonFile
    seeds: list[SeedRuns]

    def answers(self, seed: int, questions: str) -> dict[str, list[Answer]] | None:
        """Answers of every baseline and model to one question set, in the same order; None where none are kept.

        Raises:
            ReportError: a file is damaged, or two files answer different questions.
        """
        folder = self.path / f"seed-{seed}" / "answers" / questions
        names = [*self.file.baselines, *self.file.models]
        found = {
            name: _lines(folder / f"{name}.jsonl", Answer) for name in names if (folder / f"{name}.jsonl").exists()
        }
        if not found:
            return None
        first = next(iter(found))
        places = [answer.place for answer in found[first]]
        for name, answers in found.items():
            if [answer.place for answer in answers] != places:
                raise ReportError(
                    f"{folder / name}.jsonl answers other questions than {first}.jsonl beside it: "
                    "make the comparison again, or remove the file"
                )
        return found


def read(directory: Path) -> Run | Comparison:
    """The comparison or the run in `directory`.

    Raises:
        ReportError: it is neither, or a file in it is damaged.
    """
    if not directory.is_dir():
        raise ReportError(f"{directory}: no such directory")
    if (directory / COMPARISON).exists():
        return _comparison(directory)
    if (directory / "recipe.yaml").exists():
        return read_run(directory)
    raise ReportError(
        f"{directory} is neither a run (no recipe.yaml) nor a comparison (no {COMPARISON}): give a directory that "
        "`distilvlm run` or a comparison wrote"
    )


def read_run(directory: Path, name: str | None = None) -> Run:
    """A run, finished or not. Raises ReportError for a damaged file."""
    place = RunDirectory(directory)
    text = _text(place.recipe)
    try:
        recipe = read_dump(text)
    except ValueError as error:
        raise ReportError(f"{place.recipe} does not load: {error}") from error
    by_stage: dict[str, list[Update]] = {stage.name: [] for stage in recipe.stages}
    finished: set[str] = set()
    for number, event in _json_lines(place.events):
        kind = event.get("event") if isinstance(event, dict) else None
        if kind == "update":
            update = formed(event, Update, f"{place.events}, line {number}")
            if update.stage not in by_stage:
                raise ReportError(f"{place.events}, line {number}: stage '{update.stage}' is not in {place.recipe}")
            by_stage[update.stage].append(update)
        elif kind == "stage_finished":
            finished.add(event.get("stage", ""))
    stages = [
        Stage(
            index,
            spec,
            _optional(place.stage(index, spec.name) / "about.json", AboutStage),
            by_stage[spec.name],
            spec.name in finished,
        )
        for index, spec in enumerate(recipe.stages)
    ]
    return Run(
        name=name or recipe.name,
        path=place.path,
        recipe=recipe,
        recipe_text=text,
        stages=stages,
        about=_optional(place.path / "about.json", AboutRun),
        doctor=_optional(place.path / "doctor.json", Doctor),
        cost=_optional(place.path / "cost.json", CostFile),
        importance=_optional(place.path / "importance.json", ImportanceFile),
        manifest=_optional(place.model / MANIFEST, Manifest),
        # Without what a kill has left half-written, under names with a dot.
        checks=[json_object(file) for file in sorted((place.path / "data").glob("[!.]*.json"))],
        quarantine=[row for file in sorted(place.path.glob("quarantine*.jsonl")) for row in _lines(file, Quarantined)],
    )


def _comparison(directory: Path) -> Comparison:
    path = directory / COMPARISON
    file = formed(json_object(path), ComparisonFile, str(path))
    if not file.seeds:
        raise ReportError(f"{path}: 'seeds' is empty, so there is nothing to compare yet")
    for scores in file.seeds:
        for questions, rows in scores.rows.items():
            strangers = [name for name in rows if name not in file.models and name not in file.baselines]
            if questions not in file.questions or strangers:
                what = f"models {strangers}" if strangers else f"the question set '{questions}'"
                raise ReportError(f"{path}: seed {scores.seed} has rows of {what}, which the head does not name")
            _check_figures(file, questions, rows, f"{path}: seed {scores.seed}, {questions}")
    known: dict[str, Run | None] = {}  # a run may serve several seeds
    for scores in file.seeds:
        for model, where in scores.runs.items():
            if where not in known:
                there = (directory / where / "recipe.yaml").exists()
                known[where] = read_run(directory / where, model) if there else None
    models = list(file.models)
    seeds: list[SeedRuns] = []
    for scores in file.seeds:  # models first, as the page lists them
        names = sorted(scores.runs, key=lambda name: models.index(name) if name in models else len(models))
        seeds.append(SeedRuns(scores, {name: known[scores.runs[name]] for name in names}))
    return Comparison(directory, file, seeds)


def _check_figures(file: ComparisonFile, questions: str, rows: Mapping[str, Summary], where: str) -> None:
    for figure in figures(file, questions):
        for model, summary in rows.items():
            if figure.name not in summary.figures:
                raise ReportError(f"{where}: '{model}' has no '{figure.name}', which the set's measure tells")


def _optional(path: Path, form: type[Form]) -> Form | None:
    return formed(json_object(path), form, str(path)) if path.exists() else None


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises ReportError where it is none."""
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise ReportError(f"{path} is damaged (not JSON: {error}): restore it, or remove it") from error
    if not isinstance(content, dict):
        raise ReportError(f"{path} is damaged: it holds no JSON object")
    return content


def formed(content: Any, form: type[Form], where: str) -> Form:
    """Content as its form. Raises ReportError, which names the field."""
    try:
        return form.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(step) for step in first["loc"]) or "(whole)"
        raise ReportError(f"{where}: field '{field}': {first['msg']}") from error


def _lines(path: Path, form: type[Form]) -> list[Form]:
    return [formed(value, form, f"{path}, line {number}") for number, value in _json_lines(path)]


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every whole line of a file, if there is one; a last line cut off is left out."""
    lines = _text(path).split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise ReportError(f"{path}, line {number} is damaged (not JSON: {error}): restore the file") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is damaged: not UTF-8 at byte {error.start}") from error
