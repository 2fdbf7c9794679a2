"""`distilvlm hallucination`: what a model says is there and is not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .answers import Asking, Judging, file_name, needed, read_each, scored, tell
from .options import Json, Workflow

app = typer.Typer(
    no_args_is_help=True,
    help="Objects that a model makes up: polling (POPE), captions (CHAIR), MMHal-Bench, Object HalBench. Each command "
    "asks MODEL, or scores answers that are there already (--answers).",
)

Model = Annotated[str | None, typer.Argument(help="Directory or hub id of a checkpoint; without one --answers.")]
Images = Annotated[Path | None, typer.Option(help="Directory of the pictures; default: the data file's.")]
Answers = Annotated[Path | None, typer.Option(help="Answers that are there already, JSON or JSONL.")]
Against = Annotated[Path | None, typer.Option(help="Another model's answers to the same questions, to compare with.")]
COCO = Annotated[
    list[Path] | None, typer.Option("--annotations", help="COCO's instances_*.json, captions_*.json; repeatable.")
]
Words = Annotated[
    Path | None, typer.Option("--synonyms", help="One object a line, then other words for it; default: names alone.")
]
References = Annotated[
    bool, typer.Option("--references", help="What true captions name is there, too, as CHAIR has it.")
]
Template = Annotated[Literal["chat", "vicuna", "plain"], typer.Option(help="chat: the model's own.")]
Out = Annotated[Path | None, typer.Option(help="File for one JSON line per answer.")]
Responses = Annotated[Path | None, typer.Option(help="File for the answers as the benchmark's own script reads them.")]
OnBadRow = Annotated[
    Literal["fatal", "quarantine"], typer.Option(help="Stop at a row that can't be used, or leave it out.")
]
JudgeName = Annotated[
    str, typer.Option("--judge", help="rule: by words; http: a language model; or a file of judgements.")
]
Prompt = Annotated[Path | None, typer.Option(help="What an http judge is asked; default: ours.")]
Kept = Annotated[Path | None, typer.Option(help="Where an http judge's words are kept; default: OUT-judged.jsonl.")]
Address = Annotated[str | None, typer.Option(envvar="OPENAI_BASE_URL", help="Of an http judge, up to /v1.")]
JudgeModel = Annotated[str | None, typer.Option(envvar="OPENAI_MODEL", help="Of an http judge.")]


@app.command()
def polling(
    data: Annotated[
        list[Path], typer.Option("--data", help="POPE's files, or LLaVA rows with yes and no; repeatable.")
    ],
    model: Model = None,
    images: Images = None,
    answers: Annotated[
        list[Path] | None, typer.Option(help="Answers that are there already: a file per --data.")
    ] = None,
    against: Annotated[list[Path] | None, typer.Option(help="Another model's answers: a file per --data.")] = None,
    training: Annotated[Path | None, typer.Option(help="Polling questions that the row question-only knows.")] = None,
    template: Template = "chat",
    out: Out = None,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    workflow: Workflow = None,
    on_bad_row: OnBadRow = "fatal",
    as_json: Json = False,
) -> None:
    """Is there a ...? F1, accuracy, precision, recall and yes-ratio, by kind of question (POPE)."""
    from distilvlm.evaluate.hallucination import POLLING, blind_answers, read_polling, together

    files = [read_polling(file, images, pictures=model is not None) for file in data]
    asking = Asking(model, template, batch_size, max_new_tokens, on_bad_row, workflow)
    asked, predictions = asking.answers(together(files), read_each(answers, files))
    known = None
    if training is not None:
        known = [(one.text, one.answer) for one in read_polling(training, images, pictures=False).questions]
    given = {asking.called(answers): predictions, **blind_answers(asked.questions, known)}
    if against:
        given[file_name(against, given)] = read_each(against, files) or []
    rows = scored(asked, given, dict.fromkeys(given, POLLING))
    tell(rows, list(given)[-1] if against else "always-yes", asking.source(data, answers), out, as_json)


@app.command()
def captions(
    model: Model = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="LLaVA rows; not needed for --answers that name their pictures.")
    ] = None,
    images: Images = None,
    answers: Answers = None,
    against: Against = None,
    annotations: COCO = None,
    synonyms: Words = None,
    references: References = False,
    template: Template = "chat",
    out: Out = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    workflow: Workflow = None,
    on_bad_row: OnBadRow = "fatal",
    as_json: Json = False,
) -> None:
    """Describe ...: CHAIR and coverage, from captions and what annotations say is there."""
    from distilvlm.data import read
    from distilvlm.evaluate import asked_of
    from distilvlm.evaluate.hallucination import annotated, described
    from distilvlm.evaluate.hallucination import captions as measure_of
    from distilvlm.recipe import SourceSpec

    file = data or needed(answers)
    source = SourceSpec(path=str(file), images=None if images is None else str(images))
    asked = described(file) if data is None else asked_of(read(source, file.stem))
    asked, table = annotated(asked, annotations or [], synonyms)
    asking = Asking(model, template, batch_size, max_new_tokens, on_bad_row, workflow)
    asked, predictions = asking.answers(asked, read_each(answers, [asked]))
    given = {asking.called(answers): predictions}
    if against is not None:
        given[file_name(against, given)] = read_each(against, [asked]) or []
    measure = measure_of(table, references=references)
    rows = scored(asked, given, dict.fromkeys(given, measure))
    tell(rows, list(given)[-1] if against else None, asking.source(file, answers), out, as_json)


@app.command()
def mmhal(
    model: Model = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="response_template.json; default: --answers, which has the questions.")
    ] = None,
    images: Images = None,
    answers: Answers = None,
    judge: JudgeName = "rule",
    synonyms: Words = None,
    prompt: Prompt = None,
    judged: Kept = None,
    judge_url: Address = None,
    judge_model: JudgeModel = None,
    template: Template = "chat",
    responses: Responses = None,
    out: Out = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    workflow: Workflow = None,
    on_bad_row: OnBadRow = "fatal",
    as_json: Json = False,
) -> None:
    """MMHal-Bench: hallucination rate and score, by a judge of your choice."""
    from distilvlm.evaluate.hallucination import Synonyms, ratings, read_mmhal, write_mmhal

    file = data or needed(answers)
    judging = Judging.by(judge, prompt, judged, out, judge_url, judge_model)
    asked = read_mmhal(file, images, pictures=model is not None)
    asking = Asking(model, template, batch_size, max_new_tokens, on_bad_row, workflow)
    asked, predictions = asking.answers(asked, read_each(answers, [asked]))
    if responses is not None:
        write_mmhal(responses, asked, predictions)
    table = Synonyms.read(synonyms) if synonyms else None
    cases, said = judging.rate(asked, predictions, table)
    name = asking.called(answers)
    rows = scored(asked, {name: predictions}, {name: ratings(cases, said)})
    tell(rows, None, asking.source(file, answers), out, as_json, f"judged by {judging.name}")


@app.command()
def objhal(
    annotations: Annotated[
        list[Path], typer.Option("--annotations", help="COCO's instances_*.json, captions_*.json; repeatable.")
    ],
    model: Model = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="obj_halbench_300_with_image.jsonl; not needed for --answers.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Directory of the pictures; those in the file go there; default: pictures/.")
    ] = None,
    answers: Answers = None,
    judge: JudgeName = "rule",
    synonyms: Words = None,
    references: References = False,
    prompt: Prompt = None,
    judged: Kept = None,
    judge_url: Address = None,
    judge_model: JudgeModel = None,
    template: Template = "chat",
    responses: Responses = None,
    out: Out = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    workflow: Workflow = None,
    on_bad_row: OnBadRow = "fatal",
    as_json: Json = False,
) -> None:
    """Object HalBench: hallucination per response and per mention, by words or by a judge of your choice."""
    from distilvlm.evaluate.hallucination import annotated, described, named_by, read_objhal, write_objhal
    from distilvlm.evaluate.hallucination import captions as measure_of

    file = data or needed(answers)
    judging = Judging.by(judge, prompt, judged, out, judge_url, judge_model)
    asked = described(file) if data is None else read_objhal(file, images, pictures=model is not None)
    asked, table = annotated(asked, annotations, synonyms)
    asking = Asking(model, template, batch_size, max_new_tokens, on_bad_row, workflow)
    asked, predictions = asking.answers(asked, read_each(answers, [asked]))
    name = asking.called(answers)
    if responses is not None:
        write_objhal(responses, asked, predictions, name)
    cases, said = judging.name_objects(asked, predictions, table)
    measure = measure_of(table, references=references, finder=named_by(cases, said, table))
    rows = scored(asked, {name: predictions}, {name: measure.led_by("response_rate", "mention_rate", "coverage")})
    tell(rows, None, asking.source(file, answers), out, as_json, f"objects named by {judging.name}")
