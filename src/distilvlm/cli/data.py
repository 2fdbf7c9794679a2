"""`distilvlm data`: convert what people have, look at what a recipe trains on, make one file of several."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from . import convert
from .options import Json, Overrides, quiet_transformers
from .progress import counting

if TYPE_CHECKING:
    from distilvlm.data import BadRow, DataReport, Source
    from distilvlm.data.contents import Contents
    from distilvlm.recipe import SourceSpec, StageSpec

app = typer.Typer(no_args_is_help=True, help="Convert, check, count and mix training data.")
app.add_typer(convert.app, name="convert")

Target = Annotated[str, typer.Argument(help="A recipe (.yaml), or data: LLaVA's or OpenAI's form, shards, parquet.")]
Images = Annotated[
    Path | None, typer.Option(help="Directory of a data file's pictures; default: the file's. Not for recipes.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default: as many as there are cores.")]
Stage = Annotated[str | None, typer.Option(help="Only what this stage of the recipe trains on.")]


@app.command()
def check(
    target: Target,
    images: Images = None,
    stage: Stage = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every picture, too, not only its header.")] = False,
    duplicates: Annotated[
        bool, typer.Option("--duplicates", help="Read every picture, for files that are the same under several names.")
    ] = False,
    workers: Workers = None,
    out: Annotated[
        Path | None, typer.Option(help="JSONL file for every row that can't be used or is there twice, a line each.")
    ] = None,
    set: Overrides = None,
    as_json: Json = False,
) -> None:
    """Look at every row: what can't be used, by kinds, and what is there twice. Exit code 1 if a row can't be used.

    Recipes: with template and context, as a run.
    """
    from distilvlm.data.convert.output import write_whole
    from distilvlm.data.defects import grouped, kind_of, repeated, report
    from distilvlm.data.parallel import at_most

    with at_most(workers):
        sources, reports = _looked_at(target, images, stage, set)
        contents = [_contents(source, decode, duplicates) for source in sources]
    found = [row for source in sources for row in source.bad]
    found += [row for report in _different(reports) for row in report.bad]
    found += [row for one in contents for row in one.bad()]
    bad: dict[tuple[Any, ...], BadRow] = {}
    for row in found:  # several stages may train on it
        bad.setdefault((row.key, row.field), row)
    again = [twice for one in contents for twice in repeated(one)]
    if out is not None:
        told = [*((kind_of(row).name, row) for row in bad.values()), *again]
        lines = [{**asdict(row.key), "kind": kind, "field": row.field, "reason": row.reason} for kind, row in told]
        write_whole({out: b"".join(json.dumps(line).encode() + b"\n" for line in lines)}, [])
    total = sum(_rows(source) for source in sources)
    if as_json:
        kinds = [
            {"kind": one.kind.name, "rows": len(one.rows), "fix": one.kind.fix} for one in grouped([*bad.values()])
        ]
        rows = [{**asdict(row.key), "field": row.field, "reason": row.reason} for row in bad.values()]
        twice = [{**asdict(row.key), "kind": kind, "field": row.field, "reason": row.reason} for kind, row in again]
        told = {"rows": total, **_preferences(sources), "kinds": kinds, "bad": rows, "again": twice}
        typer.echo(json.dumps(told, indent=1))
    else:
        for line in report([*bad.values()], again, "All of them: --out FILE.jsonl" if out is None else f"All: {out}"):
            typer.echo(line)
        kinds = "".join(f"; {count:,} {what}" for what, count in _preferences(sources).items() if count)
        typer.echo(f"{len(bad)} of {total:,} rows can't be used{kinds}")
    if bad:
        raise typer.Exit(1)


@app.command()
def stats(
    target: Target,
    images: Images = None,
    stage: Stage = None,
    against: Annotated[str | None, typer.Option(help="Other data: which of its pictures are in TARGET, too?")] = None,
    against_images: Annotated[
        Path | None, typer.Option(help="Directory of that file's pictures; default: --images, or the file's.")
    ] = None,
    content: Annotated[
        bool, typer.Option("--content", help="Compare pictures by content (reads them all), not by file.")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Count the texts' tokens, too: a model's directory or name on the hub.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="With --tokenizer: how many rows have more tokens of text?")
    ] = None,
    workers: Workers = None,
    set: Overrides = None,
    as_json: Json = False,
) -> None:
    """Count rows, turns, answers, pictures and their sizes, tokens, and what sources share; for a recipe also positions
    and shares."""
    from distilvlm.data import DataError, contents, read
    from distilvlm.data.parallel import at_most
    from distilvlm.data.statistics import PictureStatistics, TokenStatistics, describe, shared
    from distilvlm.data.table import (
        common_answers,
        picture_table,
        report_table,
        shared_pictures,
        statistics_table,
        token_table,
    )
    from distilvlm.recipe import SourceSpec

    if max_length is not None and tokenizer is None:
        raise DataError("--max-length is for tokens: name a --tokenizer")
    words = None if tokenizer is None else _tokenizer(tokenizer)
    with at_most(workers):
        sources, reports = _looked_at(target, images, stage, set)
        pairs = list(combinations(sources, 2))
        if against is not None:
            where = against_images or images
            other = read(SourceSpec(path=against, images=None if where is None else str(where)), _named(against))
            pairs += [(source, other) for source in sources]
            sources = [*sources, other]
        found = {source.name: describe(source) for source in sources}
        seen = {source.name: PictureStatistics.of(_contents(source, False, content)) for source in sources}
        tokens: dict[str, TokenStatistics] = {}
        for source in sources if words is not None else ():
            with counting(f"{source.name}: tokens") as progress:
                tokens[source.name] = TokenStatistics.of(contents.tokens(source, words, progress), max_length)
    common = [(first.name, second.name, shared(first, second, content)) for first, second in pairs]
    if as_json:
        told = {
            "sources": {name: {**asdict(one), "majority": one.majority} for name, one in found.items()},
            "pictures": {name: asdict(one) for name, one in seen.items()},
            "tokens": {name: asdict(one) for name, one in tokens.items()},
            "stages": {name: _report_json(report) for name, report in reports.items()},
            "shared": [{"first": first, "second": second, **asdict(one)} for first, second, one in common],
        }
        typer.echo(json.dumps(told, indent=1))
        return
    console = Console()
    for report in _different(reports):
        console.print(report_table([name for name, one in reports.items() if one is report], report))
    console.print(statistics_table(found))
    console.print(picture_table(seen))
    if tokens:
        console.print(token_table(tokens, {name: one.rows for name, one in found.items()}, max_length))
    for name, one in found.items():
        typer.echo(common_answers(name, one))
    for first, second, one in common:
        typer.echo(shared_pictures(first, second, one))


@app.command()
def mix(
    sources: Annotated[list[Path], typer.Argument(help="Data files, or one recipe (.yaml) with weights.")],
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=W", help="Rows of FILE NAME.jsonl W times; 0.5: half of them. Default: 1."),
    ] = None,
    count: Annotated[list[str] | None, typer.Option(metavar="NAME=N", help="So many rows of it.")] = None,
    images: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="Directory of its pictures; default: the file's.")
    ] = None,
    stage: Stage = None,
    out: Annotated[
        Path | None, typer.Option(help="JSONL file to write; without, what it would hold and a recipe's `data:`.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of which rows are taken, and of their order.")] = 0,
    on_bad_row: convert.OnBadRow = "fatal",
    set: Overrides = None,
    as_json: Json = False,
) -> None:
    """Several files as one: the rows that an epoch with these weights shows, each with where it comes from."""
    from distilvlm.data.convert import by_name, mix, parts_of, recipe_section, weighted
    from distilvlm.data.table import mixture_table

    specs = (
        _recipe_sources(sources[0], stage, set) if _is_recipe(sources[0]) else by_name(sources, dict(_pairs(images)))
    )
    weights = {name: float(value) for name, value in _pairs(weight, float)}
    counts = {name: int(value) for name, value in _pairs(count, int)}
    specs = weighted(specs, weights, counts)
    if out is None:
        parts, entry, told = parts_of(specs), recipe_section(specs), {}
    else:
        with counting("rows") as progress:
            done = mix(specs, out, seed, on_bad_row, progress)
        parts, entry, told = done.parts, done.entry(), asdict(done)
    if as_json:
        shown = {name: {**asdict(part), "left_out": part.left_out} for name, part in parts.items()}
        typer.echo(json.dumps({**told, "parts": shown, "data": entry}, indent=1, default=str))
        return
    Console().print(mixture_table(parts))
    if out is not None:
        typer.echo(f"{out}: {told['rows']:,} rows")
        if told["bad"]:
            typer.echo(f"left out: {len(told['bad'])} that can't be used, listed in {told['bad_file']}")
    typer.echo(f"\nFor a recipe in {'.' if out is None else out.parent}:\n{entry}")


def _looked_at(
    target: str, images: Path | None, stage: str | None, overrides: list[str] | None
) -> tuple[list[Source], dict[str, DataReport]]:
    """The sources of a data file or of a recipe's stages; for a recipe also what its stages would see of them."""
    from distilvlm.data import DataError, read
    from distilvlm.data.stage import source_of, stage_data
    from distilvlm.models import NotHere
    from distilvlm.models.compose import build_student
    from distilvlm.recipe import SourceSpec, load_recipe

    logging.getLogger("distilvlm").setLevel(logging.WARNING)  # what is printed says it all
    if not _is_recipe(target):
        if stage is not None or overrides:
            raise DataError(f"{target} is no recipe (.yaml): --stage and --set are for recipes")
        return [read(SourceSpec(path=target, images=None if images is None else str(images)), _named(target))], {}
    if images is not None:
        raise DataError(f"{target} is a recipe: its data names the pictures; --images is for data files")
    quiet_transformers()
    recipe = load_recipe(Path(target), overrides or [])
    stages = [one for one in recipe.stages if stage in (None, one.name)]
    if not stages:
        raise DataError(f"no stage '{stage}'; there are {', '.join(one.name for one in recipe.stages)}")
    sources = {(name, one.pictures_alone): source_of(recipe, one, name) for one in stages for name in one.data}
    try:
        # A tokenizer and a number of visual tokens will do.
        student = build_student(recipe.student, recipe.seed, meta=True)
    except NotHere as error:
        typer.echo(f"the student is not here ({error}): nothing is said about templates and positions", err=True)
        return list(sources.values()), {}
    reports: dict[tuple[Any, ...], DataReport] = {}
    for one in stages:
        if (key := _seen(one)) not in reports:
            own = [sources[name, one.pictures_alone] for name in one.data]
            if not any(len(source.records) for source in own):
                continue  # every row is bad, as the readers tell
            data = stage_data(recipe, one, student.tokenizer, student.layout, own)
            with counting(f"stage {one.name}") as progress:
                reports[key] = data.check(progress)
    return list(sources.values()), {one.name: reports[_seen(one)] for one in stages if _seen(one) in reports}


def _contents(source: Source, decoded: bool, content: bool) -> Contents:
    from distilvlm.data.contents import look

    with counting(source.name) as progress:
        return look(source, decoded=decoded, content=content, progress=progress)


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from distilvlm.data import DataError

    quiet_transformers()
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of a damaged file it can be any
        raise DataError(f"--tokenizer {name} can't be loaded: {type(error).__name__}: {error}") from None


def _named(path: str) -> str:
    """What a source is called; of a pattern, without what stands for others."""
    return re.sub(r"[*?{}\[\]]", "", Path(path).stem).strip("-_.") or "data"


def _is_recipe(path: Path | str) -> bool:
    return Path(path).suffix in (".yaml", ".yml")


def _recipe_sources(path: Path, stage: str | None, overrides: list[str] | None) -> dict[str, SourceSpec]:
    """What a recipe, or a stage of it, names as data."""
    from distilvlm.data import DataError
    from distilvlm.recipe import load_recipe

    recipe = load_recipe(path, overrides or [])
    if stage is None:
        return dict(recipe.data)
    names = next((one.data for one in recipe.stages if one.name == stage), None)
    if names is None:
        raise DataError(f"no stage '{stage}'; there are {', '.join(one.name for one in recipe.stages)}")
    return {name: recipe.data[name] for name in names}


def _pairs(given: list[str] | None, kind: Callable[[str], Any] = str) -> list[tuple[str, str]]:
    """NAME=VALUE of options."""
    found: list[tuple[str, str]] = []
    for text in given or []:
        name, equals, value = text.partition("=")
        try:
            kind(value)
        except ValueError:
            equals = ""
        if not (equals and name and value):
            raise typer.BadParameter(f"'{text}': write NAME={'VALUE' if kind is str else 'NUMBER'}")
        found.append((name, value))
    return found


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
