"""The page: everything that a run or a comparison left behind, as one HTML file that needs nothing else."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import distilvlm
from distilvlm.models.files import write_whole
from distilvlm.recipe import differences

from . import intervals, wording
from .axes import reading
from .curves import StageCharts, stage_charts
from .formats import ComparisonFile, Interval
from .masks import masks
from .pictures import Album
from .read import Comparison, Run, read
from .samples import Kind, choose
from .skipped import skipped, unasked

COLOURS = 8
"""Series colours that the style sheet defines."""

WORDY = 60
"""Characters of a mean answer from which samples stand below each other, not in two columns."""


@dataclass(frozen=True)
class QuestionResults:
    """One question set of a comparison."""

    name: str
    title: str
    about: str
    gaps: intervals.Table | None
    scores: intervals.Table | None  # by the measure of the differences
    other: intervals.Table | None  # by the other measure; None where it says the same
    kinds: list[Kind] | None  # None where no answers are kept
    missing: list[str]  # models without an answers file
    asked: int
    shown: int

    @property
    def wordy(self) -> bool:
        """Whether answers need the whole width."""
        given = [one.text for kind in self.kinds or [] for card in kind.cards for a in card.asked for one in a.given]
        return sum(len(text) for text in given) > WORDY * len(given)


@dataclass(frozen=True)
class SeedSection:
    """The runs of one seed."""

    seed: int
    runs: list[Run]
    reused: list[str]  # runs of an earlier seed that serve this one, too
    absent: list[str]  # runs whose directory is not there
    charts: list[StageCharts]  # of the models
    others: list[StageCharts]  # of the runs that the models start from
    departures: Mapping[str, list[str]]  # by model: fields that differ from the first seed's recipe


def write_report(directory: str | Path, out: str | Path | None = None, samples: int = 24) -> Path:
    """Write the page of a run or of a comparison; returns where it is.

    Args:
        directory: a run directory, finished or not, or a comparison directory.
        out: the file; default `report.html` in the directory, the one file there that no run and no comparison wrote.
        samples: questions shown per question set.

    Raises:
        ReportError: the directory is neither, or a file in it is damaged.
    """
    directory = Path(directory)
    page = render(read(directory), samples)
    path = Path(out) if out is not None else directory / "report.html"
    write_whole(path, page.encode())
    return path


def render(subject: Run | Comparison, samples: int = 24) -> str:
    """The page as HTML."""
    return _comparison(subject, samples) if isinstance(subject, Comparison) else _run(subject)


def _run(run: Run) -> str:
    series = {run.name: 0}
    parent = run.path.parent.parent
    within = parent.name if (parent / "comparison.json").exists() else ""
    return _page(
        "run.html.jinja",
        run=run,
        within=within,
        series=series,
        charts=stage_charts({run.name: run}, series),
        masks=masks([run]),
        skipped=skipped([(run.name, run)]),
    )


def _comparison(comparison: Comparison, samples: int) -> str:
    file = comparison.file
    # The same colour all over the page: by the model's place in the file.
    series = {name: number % COLOURS for number, name in enumerate(file.models)}
    seeds: list[SeedSection] = []
    first = comparison.seeds[0]
    told: set[Path] = set()
    for seed in comparison.seeds:
        departures = {
            model: differences(first.there[model].recipe, run.recipe)
            for model, run in seed.there.items()
            if seed is not first and model in first.there
        }
        absent = [name for name, run in seed.runs.items() if run is None]
        absent += [name for name in file.models if name not in seed.runs]
        new = {name: run for name, run in seed.there.items() if run.path not in told}
        told |= {run.path for run in new.values()}
        models = {name: run for name, run in seed.there.items() if name in series}
        others = {name: run for name, run in new.items() if name not in series}
        seeds.append(
            SeedSection(
                seed=seed.scores.seed,
                runs=list(new.values()),
                reused=[name for name in seed.there if name not in new],
                absent=absent,
                charts=stage_charts(models, series),
                others=stage_charts(
                    others, {name: number % COLOURS for number, name in enumerate(others, len(series))}
                ),
                departures=departures,
            )
        )
    return _page(
        "comparison.html.jinja",
        comparison=comparison,
        file=file,
        series=series,
        results=[_results(comparison, name, series, samples) for name in file.questions],
        seeds=seeds,
        masks=masks(seeds[0].runs),  # other seeds see the same data by the same template
        skipped=skipped([(_label(run, seed, seeds), run) for seed in seeds for run in seed.runs]),
        unasked=unasked(file),
        headline=headlines(file),
    )


def _label(run: Run, seed: SeedSection, seeds: Sequence[SeedSection]) -> str:
    return f"{run.name} (seed {seed.seed})" if len(seeds) > 1 else run.name


def headlines(file: ComparisonFile) -> list[tuple[str, str, Interval, str]]:
    """(question set, difference, its interval on the first seed, verdict over seeds) of the difference that matters."""
    pair = main_pair(file)
    if pair is None:
        return []
    name = f"{pair[0]} - {pair[1]}"
    found: list[tuple[str, str, Interval, str]] = []
    for questions, about in file.questions.items():
        cells = [seed.differences.get(questions, {}).get(name) for seed in file.seeds]
        there = [cell for cell in cells if cell is not None]
        if there:
            found.append((about.title or questions, name.replace(" - ", " − "), there[0], intervals.verdict(cells)))
    return found


def main_pair(file: ComparisonFile) -> tuple[str, str] | None:
    """The two models whose difference the comparison is about: the student with and without its teacher, if named so,
    else the first stated difference of two models, else the last two models."""
    if {"distilled", "control"} <= {*file.models}:
        return "distilled", "control"
    stated = [pair for pair in file.differences if all(name in file.models for name in pair)]
    models = list(file.models)
    return stated[0] if stated else (models[-1], models[-2]) if len(models) > 1 else None


def _results(comparison: Comparison, name: str, series: Mapping[str, int], samples: int) -> QuestionResults:
    file, about = comparison.file, comparison.file.questions[name]
    colours = dict(series)
    measure = intervals.measured(file, name)
    scores = intervals.scores(file, name, measure, colours)
    other = intervals.scores(file, name, "accuracy" if measure == "exact_match" else "exact_match", colours)
    if scores is not None and other is not None and [r.cells for r in scores.rows] == [r.cells for r in other.rows]:
        other = None
    answers = comparison.answers(file.seeds[0].seed, name)
    kinds = missing = None
    if answers is not None:
        kinds = choose(answers, list(file.models), main_pair(file), series, measure, samples)
        missing = [model for model in (*file.baselines, *file.models) if model not in answers]
    drawn = next(
        (row.intervals for seed in file.seeds for row in seed.rows.get(name, {}).values() if row.intervals), ""
    )
    pictures = f" about {about.pictures:,} pictures" if about.pictures else ""
    return QuestionResults(
        name=name,
        title=about.title or name,
        about=f"{about.n:,} questions{pictures}" + (f"; 95% intervals: {drawn}" if drawn else ""),
        gaps=intervals.gaps(file, name, colours),
        scores=scores,
        other=other,
        kinds=kinds,
        missing=missing or [],
        asked=sum(kind.count for kind in kinds or []),
        shown=sum(kind.shown for kind in kinds or []),
    )


def _page(template: str, **content: Any) -> str:
    page = files("distilvlm.report") / "page"
    environment = Environment(
        loader=PackageLoader("distilvlm.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "share": wording.share,
        "points": wording.points,
        "bytes": wording.size,
        "seconds": wording.duration,
        "off": wording.relative_error,
        "command": wording.command,
        "transform": wording.transform,
        "terms": wording.terms,
        "moment": wording.moment,
        "machine": wording.machine,
        "token": wording.token,
        "clipped": wording.clipped,
        "questions": wording.questions,
        "rows": wording.rows,
        "reading": reading,
    }
    return environment.get_template(template).render(
        album=Album(),
        style=Markup((page / "style.css").read_text(encoding="utf-8")),
        script=Markup((page / "conveniences.js").read_text(encoding="utf-8")),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        maker=f"distilvlm {distilvlm.__version__}, Python {platform.python_version()}",
        **content,
    )
