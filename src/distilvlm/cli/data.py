"""`distilvlm data`: convert what people have, look at what a recipe trains on."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from . import convert
from .options import Json, Overrides, quiet_transformers

if TYPE_CHECKING:
    from distilvlm.data import BadRow, DataReport, Source
    from distilvlm.recipe import StageSpec

app = typer.Typer(no_args_is_help=True, help="Convert, check and count training data.")
app.add_typer(convert.app, name="convert")

Target = Annotated[Path, typer.Argument(help="A recipe (.yaml), or a data file in LLaVA's or OpenAI's form.")]
Images = Annotated[
    Path | None, typer.Option(help="Directory of a data file's pictures; default: the file's. Not for recipes.")
]
Stage = Annotated[str | None, typer.Option(help="Only what this stage of the recipe trains on.")]


@app.command()
def check(
    target: Target,
    images: Images = None,
    stage: Stage = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every picture, too, not only its header.")] = False,
    set: Overrides = None,
    as_json: Json = False,
) -> None:
    """Name every row that can't be used; exit code 1 if there is one. Recipes: with template and context, as a run."""
    from distilvlm.data.statistics import unreadable

    sources, reports = _looked_at(target, images, stage, set)
    found = [row for source in sources for row in source.bad]
    found += [row for report in _different(reports) for row in report.bad]
    if decode or not reports:  # a report has looked at the headers
        found += [row for source in sources for row in unreadable(source, decode)]
    bad: dict[tuple[Any, ...], BadRow] = {}
    for row in found:  # several stages may train on it
        bad.setdefault((row.key, row.field), row)
    if as_json:
        rows = [{**asdict(row.key), "field": row.field, "reason": row.reason} for row in bad.values()]
        told = {"rows": sum(_rows(source) for source in sources), **_preferences(sources), "bad": rows}
        typer.echo(json.dumps(told, indent=1))
    else:
        for row in bad.values():
            typer.echo(str(row))
        kinds = "".join(f"; {count:,} {what}" for what, count in _preferences(sources).items() if count)
        typer.echo(f"{len(bad)} of {sum(_rows(source) for source in sources):,} rows can't be used{kinds}")
    if bad:
        raise typer.Exit(1)


@app.command()
def stats(
    target: Target,
    images: Images = None,
    stage: Stage = None,
    against: Annotated[
        Path | None, typer.Option(help="Another data file: which of its pictures are in TARGET, too?")
    ] = None,
    against_images: Annotated[
        Path | None, typer.Option(help="Directory of that file's pictures; default: --images, or the file's.")
    ] = None,
    content: Annotated[
        bool, typer.Option("--content", help="Compare pictures by content (reads them all), not by file.")
    ] = False,
    set: Overrides = None,
    as_json: Json = False,
) -> None:
    """Count rows, turns, answers, pictures, and what sources share; for a recipe, also positions and shares."""
    from distilvlm.data import read
    from distilvlm.data.statistics import describe, shared
    from distilvlm.data.table import common_answers, report_table, shared_pictures, statistics_table
    from distilvlm.recipe import SourceSpec

    sources, reports = _looked_at(target, images, stage, set)
    pairs = list(combinations(sources, 2))
    if against is not None:
        where = against_images or images
        other = read(SourceSpec(path=str(against), images=None if where is None else str(where)), against.stem)
        pairs += [(source, other) for source in sources]
        sources = [*sources, other]
    found = {source.name: describe(source) for source in sources}
    common = [(first.name, second.name, shared(first, second, content)) for first, second in pairs]
    if as_json:
        told = {
            "sources": {name: {**asdict(one), "majority": one.majority} for name, one in found.items()},
            "stages": {name: _report_json(report) for name, report in reports.items()},
            "shared": [{"first": first, "second": second, **asdict(one)} for first, second, one in common],
        }
        typer.echo(json.dumps(told, indent=1))
        return
    console = Console()
    for report in _different(reports):
        console.print(report_table([name for name, one in reports.items() if one is report], report))
    console.print(statistics_table(found))
    for name, one in found.items():
        typer.echo(common_answers(name, one))
    for first, second, one in common:
        typer.echo(shared_pictures(first, second, one))


def _looked_at(
    target: Path, images: Path | None, stage: str | None, overrides: list[str] | None
) -> tuple[list[Source], dict[str, DataReport]]:
    """The sources of a data file or of a recipe's stages; for a recipe also what its stages would see of them."""
    from distilvlm.data import DataError, read
    from distilvlm.data.stage import source_of, stage_data
    from distilvlm.models import NotHere
    from distilvlm.models.compose import build_student
    from distilvlm.recipe import SourceSpec, load_recipe

    logging.getLogger("distilvlm").setLevel(logging.WARNING)  # what is printed says it all
    if target.suffix not in (".yaml", ".yml"):
        if stage is not None or overrides:
            raise DataError(f"{target} is no recipe (.yaml): --stage and --set are for recipes")
        return [read(SourceSpec(path=str(target), images=None if images is None else str(images)), target.stem)], {}
    if images is not None:
        raise DataError(f"{target} is a recipe: its data names the pictures; --images is for data files")
    quiet_transformers()
    recipe = load_recipe(target, overrides or [])
    stages = [one for one in recipe.stages if stage in (None, one.name)]
    if not stages:
        raise DataError(f"no stage '{stage}'; there are {', '.join(one.name for one in recipe.stages)}")
    sources = {(name, one.pictures_alone): source_of(recipe, one, name) for one in stages for name in one.data}
    try:
        student = build_student(
            recipe.student, recipe.seed, meta=True
        )  # a tokenizer and a number of visual tokens will do
    except NotHere as error:
        typer.echo(f"the student is not here ({error}): nothing is said about templates and positions", err=True)
        return list(sources.values()), {}
    reports: dict[tuple[Any, ...], DataReport] = {}
    for one in stages:
        if (key := _seen(one)) not in reports:
            own = [sources[name, one.pictures_alone] for name in one.data]
            if not any(len(source.records) for source in own):
                continue  # every row is bad, as the readers tell
            reports[key] = stage_data(recipe, one, student.tokenizer, student.layout, own).check()
    return list(sources.values()), {one.name: reports[_seen(one)] for one in stages if _seen(one) in reports}


def _seen(stage: StageSpec) -> tuple[Any, ...]:
    """What decides on what a stage sees of its data: stages that agree in it share a report."""
    return (stage.max_length, stage.pictures_alone, *stage.data)


def _preferences(sources: list[Source]) -> dict[str, int]:
    """How many records of the readers are preferences."""
    counts = {"pairs": 0, "rated": 0}
    for source in sources:
        if source.preferences is not None:
            counts[source.preferences] += len(source.records)
    return counts


def _different(reports: dict[str, DataReport]) -> list[DataReport]:
    return list({id(report): report for report in reports.values()}.values())


def _report_json(report: DataReport) -> dict[str, Any]:
    told = report.as_json()
    for name, counts in told["sources"].items():
        counts["share"] = report.share(name)
    return told


def _rows(source: Source) -> int:
    return len(source.records) + len(source.bad)
