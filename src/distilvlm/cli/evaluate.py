"""`distilvlm evaluate`: a model asked a published test, a suite of one's own, or rows with their answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from .answers import file_name, model_name, tell
from .hallucination import Template
from .options import Json, Workflow, interruptible, quiet_transformers

if TYPE_CHECKING:
    from distilvlm.evaluate import Evaluation
    from distilvlm.evaluate.suites import Opened

app = typer.Typer()
logger = logging.getLogger(__name__)

SUITE_FILES = (".yaml", ".yml")
STEPS = 20
"""How often it is told how far an asking is."""


@app.command()
def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Directory or hub id of a LLaVA-style checkpoint, or of adaptors.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Of a suite: the directory of its files. Else: rows with their answers."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="vqav2, vizwiz, textvqa, gqa, scienceqa, scienceqa-img, mmbench, mmbench-cn, mmmu, mme, pope, chair, "
            "refcoco, refcoco+, refcocog, coco-captions, flickr30k, mmlu, ceval; or a file (.yaml) of your own."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a suite; default: the one that is usually reported.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Of a suite, instead of the published one: {question} ...")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of a suite: so many questions, spread evenly.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two files of answers to the same questions, instead of a MODEL.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Of rows: the pictures' directory; default: the file's.")] = None,
    template: Template = "chat",
    out: Annotated[
        Path | None, typer.Option(help="File for one JSON line per question; with it a suite goes on where it stopped.")
    ] = None,
    features: Annotated[Path | None, typer.Option(help="Directory of kept vision features, as in the recipe.")] = None,
    batch_size: int = 16,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Default: the suite's; of rows 128.")] = None,
    workflow: Workflow = None,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the model's weights.")] = "fp32",
    by_picture: Annotated[bool, typer.Option(help="Of rows: draw whole pictures in the bootstrap.")] = False,
    on_bad_row: Annotated[
        Literal["fatal", "quarantine"], typer.Option(help="Stop at a row that can't be used, or leave it out.")
    ] = "fatal",
    as_json: Json = False,
) -> None:
    """Ask a model a published test or your own questions; compare two models' answers. With 95% intervals."""
    if compare is not None:
        if model or data or suite:
            raise typer.BadParameter("compares two files: leave MODEL, --data and --suite out", param_hint="--compare")
        _compare(*compare, as_json)
        return
    if model is None:
        raise typer.BadParameter("say which model is asked, or --compare two files of answers", param_hint="MODEL")
    own = suite is not None and Path(suite).suffix in SUITE_FILES
    if data is None and not own:
        what = "its questions are" if suite is None else "the suite's files are: see docs/suites.md"
        raise typer.BadParameter(f"say where {what}", param_hint="--data")
    for option, given, of_suite in (
        ("--split", split, True),
        ("--prompt", prompt, True),
        ("--limit", limit, True),
        ("--images", images, False),
        ("--by-picture", by_picture or None, False),
    ):
        if given is not None and (suite is not None) != of_suite:
            whose = "suites (--suite)" if of_suite else "rows; a suite has its own"
            raise typer.BadParameter(f"is of {whose}", param_hint=option)

    from distilvlm.evaluate.suites import Asking
    from distilvlm.models.features import FeatureReader

    quiet_transformers()
    kept = None if features is None else FeatureReader(features)
    asking = Asking(template, batch_size, kept, out, on_bad_row, _told())
    if suite is None:
        assert data is not None
        _rows(model, data, images, asking, max_new_tokens or 128, workflow, precision, by_picture, as_json)
        return
    with interruptible():
        found, title, source = _suite(
            model, suite, data, asking, workflow, precision, split=split, prompt=prompt, limit=limit,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip
    if found is not None:
        tell({model_name(model): found}, None, source, None, as_json, title)


def _suite(
    model: str, name: str, data: Path | None, asking: Any, workflow: str | None, precision: str, **options: Any
) -> tuple[Evaluation | None, str, dict[str, Any]]:
    """The evaluation (of the first process), a title, and what JSON says of where it comes from."""
    from distilvlm.data.problems import DataError
    from distilvlm.evaluate.suites import TextSuite, ask_suite, own_suite, suite_named, weigh_suite
    from distilvlm.models.save import geometry_of

    source = {"model": model, "suite": name, "data": str(data or Path(name).parent)}
    if Path(name).suffix in SUITE_FILES:
        chosen, given = own_suite(name)
    else:
        chosen, given = suite_named(name), None
    if isinstance(chosen, TextSuite):
        assert data is not None
        if options["prompt"] or options["max_new_tokens"]:
            raise DataError(f"{name} is asked by the likelihood of its options: it has no prompt and nothing to cut")
        choices = chosen.read(data, options["split"] or chosen.split)
        if (limit := options["limit"]) is not None and limit < len(choices):
            choices = [choices[number * len(choices) // limit] for number in range(limit)]
        found = weigh_suite(_loaded(model, workflow, precision, text=True), chosen, choices, asking)
        return found, chosen.title, {**source, "questions": len(choices)}
    opened: Opened = chosen.opened(source["data"], given=given, **options)
    found = ask_suite(_loaded(model, workflow, precision), opened, geometry_of(model), asking)
    return found, f"{chosen.title}, asked: {opened.prompt}", {**source, "prompt": opened.prompt, "split": opened.split}


def _rows(
    model: str,
    data: Path,
    images: Path | None,
    asking: Any,
    max_new_tokens: int,
    workflow: str | None,
    precision: str,
    by_picture: bool,
    as_json: bool,
) -> None:
    from distilvlm.data import read
    from distilvlm.evaluate import as_table
    from distilvlm.evaluate import evaluate as measure
    from distilvlm.models.save import geometry_of
    from distilvlm.recipe import SourceSpec

    source = read(SourceSpec(path=str(data), images=None if images is None else str(images)), "data")
    vlm = _loaded(model, workflow, precision)
    result = measure(
        vlm,
        source,
        geometry_of(model),
        template=asking.template,
        batch_size=asking.batch_size,
        max_new_tokens=max_new_tokens,
        features=asking.features,
        out=asking.out,
        by_picture=by_picture,
        on_bad_row=asking.on_bad_row,
    )
    if as_json:
        asked = {"model": model, **({"workflow": vlm.workflow} if vlm.adaptors else {}), "data": str(data)}
        typer.echo(json.dumps({**asked, **result.summary()}, indent=1))
    else:
        Console().print(as_table({f"{model} ({vlm.workflow})" if vlm.adaptors else model: result}))


def _compare(first: Path, second: Path, as_json: bool) -> None:
    from distilvlm.evaluate.suites import compared

    found = compared(first, second)
    name = file_name(first)
    other = file_name(second, {name: None})
    source = {"answers": [str(first), str(second)], "alone": found.alone}
    tell(dict(zip((name, other), found.each, strict=True)), other, source, None, as_json)


def _loaded(model: str, workflow: str | None, precision: str, text: bool = False) -> Any:
    import torch

    from distilvlm.evaluate.suites.processes import device
    from distilvlm.models import save, text_only

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    vlm = (text_only if text else save).load(model, dtype).use(workflow)
    return vlm.to(device())


def _told() -> Callable[[int, int], None]:
    """Say how far the asking is, now and then."""
    said = 0

    def tell_it(done: int, total: int) -> None:
        nonlocal said
        if done * STEPS // max(1, total) > said:
            said = done * STEPS // total
            logger.info("%d of %d questions answered", done, total)

    return tell_it
