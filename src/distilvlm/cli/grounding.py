"""`distilvlm grounding`: where a model says that things are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .answers import Asking, file_name, read_each, scored, tell
from .hallucination import Answers, Images, Model, OnBadRow, Out, Template
from .options import Json, Workflow

app = typer.Typer()


@app.command()
def grounding(
    data: Annotated[
        Path, typer.Option("--data", help="LLaVA rows with meta.boxes and meta.size, as `data convert` writes them.")
    ],
    model: Model = None,
    images: Images = None,
    answers: Answers = None,
    against: Annotated[
        list[Path] | None, typer.Option(help="Another model's answers to the same questions; repeatable.")
    ] = None,
    training: Annotated[
        Path | None, typer.Option(help="Rows whose answers the rows majority and question-only know.")
    ] = None,
    workflow: Workflow = None,
    template: Template = "chat",
    out: Out = None,
    draw: Annotated[Path | None, typer.Option(help="PNG: pictures with the true boxes and every model's.")] = None,
    drawn: Annotated[int, typer.Option(min=1, help="So many pictures at most.")] = 24,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    on_bad_row: OnBadRow = "fatal",
    as_json: Json = False,
) -> None:
    """Ask a model where things are (RefCOCO, or your own boxes): accuracy at IoU 0.5, by first box and by any."""
    from distilvlm.data import read
    from distilvlm.evaluate import Asked, asked_of
    from distilvlm.evaluate.grounding import GROUNDING, blind_answers
    from distilvlm.evaluate.grounding import draw as draw_boxes
    from distilvlm.recipe import SourceSpec

    if draw is not None and draw.suffix.lower() != ".png":
        raise typer.BadParameter(f"{draw} must end in .png, which it becomes", param_hint="--draw")

    def questions(file: Path) -> Asked:
        return asked_of(read(SourceSpec(path=str(file), images=None if images is None else str(images)), file.stem))

    asked = questions(data)
    known = None if training is None else [(one.text, one.answer) for one in questions(training).questions]
    blind_answers(asked.questions)  # rows without true boxes must not come to light after the model has answered
    asking = Asking(model, template, batch_size, max_new_tokens, on_bad_row, workflow)
    asked, predictions = asking.answers(asked, read_each(answers, [asked]))
    given = {asking.called(answers): predictions}
    for file in against or []:
        given[file_name(file, given)] = read_each(file, [asked]) or []
    models = list(given)
    given |= blind_answers(asked.questions, known)
    rows = scored(asked, given, dict.fromkeys(given, GROUNDING))
    if draw is not None:
        draw_boxes({name: rows[name] for name in models}, draw, limit=drawn)
    compared = models[1] if against else "question-only" if known else "whole picture"
    tell(rows, compared, asking.source(data, answers), out, as_json)
