"""`distilvlm encoder`: how good a vision encoder is by itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from .options import Json, quiet_transformers

if TYPE_CHECKING:
    from distilvlm.evaluate import Evaluation

app = typer.Typer()

Pictures = Annotated[Path, typer.Option(help="Directory of a folder per class, or rows whose answer is the class.")]


@app.command()
def encoder(
    name: Annotated[
        str, typer.Argument(metavar="ENCODER", help="Directory or hub id of a vision encoder, or a run that made one.")
    ],
    train: Pictures,
    test: Pictures,
    against: Annotated[str | None, typer.Option(help="Another encoder or run, to compare with.")] = None,
    images: Annotated[Path | None, typer.Option(help="Directory of the pictures of data files.")] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            help="Hidden state that is read of what is no run; default: the other's, if that is a run; else -2."
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Picture side in pixels; default alike, else its own.")
    ] = None,
    geometry: Annotated[
        Literal["square", "pad", "crop"] | None,
        typer.Option(help="How pictures become squares; default alike, else square."),
    ] = None,
    pooling: Annotated[
        Literal["mean", "cls", "both"], typer.Option(help="How tokens become a vector: mean of patches, CLS, or both.")
    ] = "mean",
    neighbours: Annotated[int, typer.Option(min=1, help="Training pictures that vote in k-NN.")] = 20,
    take: Annotated[int | None, typer.Option(min=1, help="So many training pictures at most, evenly by class.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for one JSON line per picture and measure.")] = None,
    batch_size: int = 32,
    as_json: Json = False,
) -> None:
    """Measure a vision encoder on labelled pictures: k-NN and linear probe, with 95% intervals over pictures.

    Of a run that learned from teachers, also how far it is from their features on the test pictures, beside what always
    predicting their mean would be.
    """
    from distilvlm.evaluate import majority
    from distilvlm.evaluate.encoders import LABELS, Labels, labelled, scored, subjects, taken

    quiet_transformers()
    logging.getLogger("distilvlm").setLevel(logging.WARNING)  # the tables say it all
    labels = Labels(taken(labelled(train, images), take), labelled(test, images))
    usual = majority(question.answer for question in labels.training.questions)
    rows = {which: {"majority": scored(labels, [usual] * len(labels.test.questions), which)} for which in LABELS}
    sources = [name] if against is None else [name, against]
    called = _called(sources)
    for source, one in subjects(sources, layer, size, geometry).items():
        for which, evaluation in one.measured(labels, pooling, neighbours, batch_size).items():
            rows.setdefault(which, {})[called[source]] = evaluation
            if out is not None:
                evaluation.write(out / f"{which}-{called[source].replace('/', '-')}.jsonl")
    told = _tell(rows, called[name], None if against is None else called[against], not as_json)
    if as_json:
        typer.echo(json.dumps({"encoder": name, "against": against, **told}, indent=1))


def _called(sources: Sequence[str]) -> dict[str, str]:
    """Short names for paths and hub ids, as far as they differ; of RUN/model the run's."""
    paths = {source: Path(source) for source in sources}
    short = {
        source: path.parent.name if path.name == "model" and path.parent.name else path.name
        for source, path in paths.items()
    }
    return short if len({*short.values()}) == len(short) else {source: source for source in sources}


def _tell(
    rows: Mapping[str, Mapping[str, Evaluation]], name: str, against: str | None, show: bool
) -> dict[str, dict[str, Any]]:
    """What JSON says of each measure, and a table if wanted; differences are from `against`, if measured so, too."""
    from distilvlm.evaluate import difference, figure_table

    told: dict[str, dict[str, Any]] = {}
    for which, evaluations in rows.items():
        both = name in evaluations and against in evaluations and name != against
        if show:
            ordered = {one: evaluations[one] for one in (name, *evaluations) if one in evaluations}
            Console().print(figure_table(ordered, against=against if both else None, title=which.replace("_", " ")))
        told[which] = {"rows": {one: evaluation.summary() for one, evaluation in evaluations.items()}}
        if both and against is not None:
            gap = difference(evaluations[name], evaluations[against])
            told[which]["difference"] = gap and asdict(gap)
    return told
