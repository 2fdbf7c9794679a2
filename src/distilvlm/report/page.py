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

from . import wording
from .axes import reading
from .card import write_card
from .curves import StageCharts, stage_charts
from .importance import FULL, importance
from .masks import masks
from .overview import overview
from .pictures import Album
from .read import Comparison, Run, read
from .results import headlines, results
from .scatter import marker
from .skipped import skipped, unasked

COLOURS = 8
"""Series colours that the style sheet defines."""


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


SAMPLES = 24
"""Questions shown per question set."""


def write_report(directory: str | Path, out: str | Path | None = None, samples: int = SAMPLES) -> Path:
    """Write the page of a run or of a comparison; returns where it is. A finished run's model gets its card, too.

    Args:
        directory: a run directory, finished or not, or a comparison directory.
        out: the file; default `report.html` in the directory, with the card the only file there that no run and no
            comparison wrote.
        samples: questions shown per question set.

    Raises:
        ReportError: the directory is neither, or a file in it is damaged.
    """
    directory = Path(directory)
    subject = read(directory)
    page = render(subject, samples)
    if isinstance(subject, Run) and subject.finished:
        write_card(subject)
    path = Path(out) if out is not None else directory / "report.html"
    write_whole(path, page.encode())
    return path


def render(subject: Run | Comparison, samples: int = SAMPLES) -> str:
    """The page as HTML."""
    return _comparison(subject, samples) if isinstance(subject, Comparison) else _run(subject)


def _run(run: Run) -> str:
    series = {run.name: 0}
    parent = run.path.parent.parent
    album = Album()
    within = parent.name if (parent / "comparison.json").exists() else ""
    return _page(
        "run.html.jinja",
        run=run,
        within=within,
        series=series,
        charts=stage_charts({run.name: run}, series),
        masks=masks([run]),
        skipped=skipped([(run.name, run)]),
        importance=importance(run.importance, album),
        full_heat=FULL,
        album=album,
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
        absent += [name for name in file.models if name not in seed.runs and file.of_seeds]
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
        overview=overview(file, series),
        results=[results(comparison, name, series, samples) for name in file.questions],
        seeds=seeds,
        masks=masks(seeds[0].runs),  # other seeds see the same data by the same template
        skipped=skipped([(_label(run, seed, seeds), run) for seed in seeds for run in seed.runs]),
        unasked=unasked(file),
        headline=headlines(file),
        album=Album(),
    )


def _label(run: Run, seed: SeedSection, seeds: Sequence[SeedSection]) -> str:
    return f"{run.name} (seed {seed.seed})" if len(seeds) > 1 else run.name


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
        "student": wording.student,
        "moment": wording.moment,
        "machine": wording.machine,
        "token": wording.token,
        "count": wording.count,
        "clipped": wording.clipped,
        "questions": wording.questions,
        "rows": wording.rows,
        "reading": reading,
        "marker": marker,
    }
    return environment.get_template(template).render(
        style=Markup((page / "style.css").read_text(encoding="utf-8")),
        script=Markup((page / "conveniences.js").read_text(encoding="utf-8")),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        maker=f"distilvlm {distilvlm.__version__}, Python {platform.python_version()}",
        **content,
    )
