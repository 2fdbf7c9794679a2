"""`distilvlm data convert FORMAT SOURCE --out FILE.jsonl`: a command per format."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .options import Json
from .progress import counting

if TYPE_CHECKING:
    from distilvlm.data.convert import Converted

app = typer.Typer(
    no_args_is_help=True, help="Bring data into the one record form (LLaVA JSONL), whole or not at all; one per format."
)

Source = Annotated[Path, typer.Argument(help="What is converted.")]
Out = Annotated[Path, typer.Option("--out", help="File to write, .jsonl; with --hold-out NAME-train and NAME-test.")]
Images = Annotated[Path | None, typer.Option(help="Directory of the pictures.")]
Stored = Annotated[
    Path | None, typer.Option("--images", help="Directory that embedded pictures are written to; default: pictures/.")
]
Where = Annotated[
    list[str] | None,
    typer.Option("--where", metavar="FIELD=VALUE", help="Keep only such rows; several values of a field: any of them."),
]
OnePerPicture = Annotated[
    bool, typer.Option("--one-per-picture", help="A picture's questions become turns of one conversation.")
]
Turns = Annotated[int | None, typer.Option(min=1, help="At most so many questions in a conversation.")]
HoldOut = Annotated[
    float, typer.Option(metavar="SHARE", help="Share of the pictures, by content, that goes to a test file.")
]
Seed = Annotated[int, typer.Option(help="Of the split.")]
OnBadRow = Annotated[
    Literal["fatal", "quarantine"],
    typer.Option(help="Stop at what can't be used, or leave it out and list it in NAME-bad.jsonl."),
]
Template = Annotated[str, typer.Option(help='Template of what is asked; "" asks nothing (captions).')]
Answer = Annotated[str, typer.Option(help="Template of the answer.")]
ImageField = Annotated[str | None, typer.Option(help="Field of the picture; default: a usual name.")]
TalkField = Annotated[str | None, typer.Option(help="Field of the conversation; default: a usual name.")]
QuestionField = Annotated[str | None, typer.Option(help="Field of the question; default: a usual name.")]
AnswerField = Annotated[str | None, typer.Option(help="Field of the answer; default: a usual name.")]
Task = Annotated[
    Literal["detect", "grounding", "list", "count", "caption", "presence", "pairs"],
    typer.Option(
        help="detect: where each thing is; grounding: where the only thing of its kind is; list: which things there "
        "are; count: how many of each; caption: a sentence of them; presence: is it there, yes or no; pairs: true and "
        "false captions and answers, as preferences."
    ),
]
ThingQuestion = Annotated[
    str | None, typer.Option(help='What is asked, with {thing} ({a} {thing}); default "Locate every {thing}."')
]
Negatives = Annotated[
    Literal["random", "popular", "adversarial"],
    typer.Option(
        help="Absent things of presence and pairs: any; the most common; those mostly seen with what is there."
    ),
]
Rated = Annotated[bool, typer.Option("--rated", help="Write each pair as two rated answers.")]
Absent = Annotated[int, typer.Option(min=0, help="Ask about so many things, too, that a picture does not show.")]
Decimals = Annotated[int, typer.Option(min=1, max=6, help="Of a box [x1, y1, x2, y2], 0 to 1 of the padded square.")]


@app.command()
def folders(
    source: Source,
    out: Out,
    question: Template = "What is this?",
    answer: Answer = "{label}",
    pretty: Annotated[bool, typer.Option("--pretty", help="_ and - of a class name become spaces.")] = False,
    task: Annotated[
        Literal["class", "presence", "pairs"],
        typer.Option(help="class: what is it; presence: is there one, yes or no; pairs: a true and a false answer."),
    ] = "class",
    negatives: Negatives = "random",
    rated: Rated = False,
    images: Annotated[Path | None, typer.Option(help="Directory above SOURCE that rows name pictures from.")] = None,
    where: Where = None,
    hold_out: HoldOut = 0.0,
    seed: Seed = 0,
    on_bad_row: OnBadRow = "fatal",
    as_json: Json = False,
) -> None:
    """A folder per class: SOURCE/CLASS/picture.jpg. The class is the answer."""
    _convert("folders", locals())


@app.command()
def yolo(
    source: Source,
    out: Out,
    split: Annotated[
        str, typer.Option(help="train, val or test, as the YAML has it, or several: train,val.")
    ] = "train",
    task: Task = "detect",
    question: ThingQuestion = None,
    absent: Absent = 0,
    decimals: Decimals = 2,
    negatives: Negatives = "random",
    rated: Rated = False,
    images: Annotated[Path | None, typer.Option(help="The data set's directory; default: the YAML's `path`.")] = None,
    where: Where = None,
    one_per_picture: OnePerPicture = False,
    turns: Turns = None,
    hold_out: HoldOut = 0.0,
    seed: Seed = 0,
    on_bad_row: OnBadRow = "fatal",
    as_json: Json = False,
) -> None:
    """Boxes in YOLO's form: SOURCE is the YAML file; images/ and labels/ lie where it says."""
    _convert("yolo", locals())


@app.command()
def voc(
    source: Source,
    out: Out,
    split: Annotated[str | None, typer.Option(help="Only what ImageSets/Main/SPLIT.txt lists.")] = None,
    difficult: Annotated[Literal["keep", "leave"], typer.Option(help="Objects marked difficult.")] = "keep",
    origin: Annotated[int, typer.Option(min=0, max=1, help="Pixel that counting starts from: VOC's 1, or 0.")] = 1,
    task: Task = "detect",
    question: ThingQuestion = None,
    absent: Absent = 0,
    decimals: Decimals = 2,
    negatives: Negatives = "random",
    rated: Rated = False,
    images: Images = None,
    where: Where = None,
    one_per_picture: OnePerPicture = False,
    turns: Turns = None,
    hold_out: HoldOut = 0.0,
    seed: Seed = 0,
    on_bad_row: OnBadRow = "fatal",
    as_json: Json = False,
) -> None:
    """Boxes in Pascal VOC's form: SOURCE holds Annotations/*.xml and JPEGImages/ (or annotations/ and images/)."""
    _convert("voc", locals())


@app.command()
def vqa(
    source: Source,
    out: Out,
    images: Images = None,
    annotations: Annotated[Path | None, typer.Option(help="VQAv2's ..._annotations.json.")] = None,
    question: Template = "{question}",
    answer: Answer = "{answer}",
    image_field: ImageField = None,
    question_field: QuestionField = None,
    answer_field: AnswerField = None,
    picture: Annotated[str | None, typer.Option(help='Name of a row\'s picture file, e.g. "{image_id}.png".')] = None,
    where: Where = None,
    one_per_picture: OnePerPicture = False,
    turns: Turns = None,
    hold_out: HoldOut = 0.0,
    seed: Seed = 0,
    on_bad_row: OnBadRow = "fatal",
    as_json: Json = False,
) -> None:
    """Rows of picture, question and answer: JSON, JSONL, CSV, or VQAv2's questions with --annotations."""
    _convert("vqa", locals())


@app.command()
def conversations(
    source: Source,
    out: Out,
    images: Images = None,
    question: Template = "{question}",
    answer: Answer = "{answer}",
    image_field: ImageField = None,
    conversation_field: TalkField = None,
    question_field: QuestionField = None,
    answer_field: AnswerField = None,
    where: Where = None,
    hold_out: HoldOut = 0.0,
    seed: Seed = 0,
    on_bad_row: OnBadRow = "fatal",
    as_json: Json = False,
) -> None:
    """LLaVA's JSON or OpenAI-style messages, to be filtered or split by picture."""
    _convert("conversations", locals())


@app.command()
def parquet(
    source: Annotated[Path, typer.Argument(help="A file, a directory of files, or a quoted pattern.")],
    out: Out,
    split: Annotated[str | None, typer.Option(help="Only files called so: train-00000-of-00002.parquet.")] = None,
    images: Stored = None,
    question: Template = "{question}",
    answer: Answer = "{answer}",
    image_field: ImageField = None,
    conversation_field: TalkField = None,
    question_field: QuestionField = None,
    answer_field: AnswerField = None,
    where: Where = None,
    one_per_picture: OnePerPicture = False,
    turns: Turns = None,
    hold_out: HoldOut = 0.0,
    seed: Seed = 0,
    on_bad_row: OnBadRow = "fatal",
    as_json: Json = False,
) -> None:
    """Parquet with embedded pictures: columns with conversations, messages, or question and answer."""
    _convert("parquet", locals())


@app.command()
def datasets(
    source: Annotated[Path, typer.Argument(help="A directory written by save_to_disk.")],
    out: Out,
    split: Annotated[str | None, typer.Option(help="Of a DatasetDict.")] = None,
    images: Stored = None,
    question: Template = "{question}",
    answer: Answer = "{answer}",
    image_field: ImageField = None,
    conversation_field: TalkField = None,
    question_field: QuestionField = None,
    answer_field: AnswerField = None,
    where: Where = None,
    one_per_picture: OnePerPicture = False,
    turns: Turns = None,
    hold_out: HoldOut = 0.0,
    seed: Seed = 0,
    on_bad_row: OnBadRow = "fatal",
    as_json: Json = False,
) -> None:
    """A saved Hugging Face data set (save_to_disk); columns as for parquet."""
    _convert("datasets", locals())


@app.command()
def preference(
    source: Annotated[Path, typer.Argument(help="Parquet files (directory, quoted pattern), saved data set, or JSON.")],
    out: Out,
    split: Annotated[str | None, typer.Option(help="Of parquet files or of a saved data set.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Where embedded pictures go; default: pictures/. JSON: where pictures lie.")
    ] = None,
    rated: Rated = False,
    image_field: ImageField = None,
    question_field: QuestionField = None,
    chosen_field: Annotated[str | None, typer.Option(help="Field of the better answer; default: chosen.")] = None,
    rejected_field: Annotated[str | None, typer.Option(help="Field of the worse answer; default: rejected.")] = None,
    where: Where = None,
    hold_out: HoldOut = 0.0,
    seed: Seed = 0,
    on_bad_row: OnBadRow = "fatal",
    as_json: Json = False,
) -> None:
    """Pairs of answers (RLAIF-V as published, TRL's columns, LLaVA's or OpenAI's JSON), or rated answers."""
    _convert("preference", locals())


@app.command()
def refcoco(
    source: Annotated[Path, typer.Argument(help="REC_refcoco_unc_val.jsonl and the like, or refer's refs as JSON.")],
    out: Out,
    images: Images = None,
    annotations: Annotated[Path | None, typer.Option(help="Of refs: refer's instances.json.")] = None,
    split: Annotated[str | None, typer.Option(help="Of refs: train, val, testA, testB, test.")] = None,
    question: Annotated[
        str | None, typer.Option(help="What is asked, with {expression}; default: LLaVA-1.5's sentence.")
    ] = None,
    decimals: Decimals = 2,
    where: Where = None,
    one_per_picture: OnePerPicture = False,
    turns: Turns = None,
    hold_out: HoldOut = 0.0,
    seed: Seed = 0,
    on_bad_row: OnBadRow = "fatal",
    as_json: Json = False,
) -> None:
    """Referring expressions (RefCOCO, RefCOCO+, RefCOCOg): a box for each."""
    _convert("refcoco", locals())


@app.command()
def grounded(
    source: Source,
    out: Out,
    images: Images = None,
    image_field: ImageField = None,
    conversation_field: TalkField = None,
    where: Where = None,
    hold_out: HoldOut = 0.0,
    seed: Seed = 0,
    on_bad_row: OnBadRow = "fatal",
    as_json: Json = False,
) -> None:
    """LLaVA's JSON whose conversations hold boxes [x1, y1, x2, y2] already: every box is checked."""
    _convert("grounded", locals())


@app.command()
def rows(
    source: Annotated[
        str, typer.Argument(help="LLaVA's JSON or messages; parquet or tar files (directory, quoted pattern).")
    ],
    to: Annotated[
        Literal["llava", "messages", "parquet", "webdataset"], typer.Option(help="The form that is written.")
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write (.jsonl, .parquet), or directory of shards.")],
    images: Annotated[
        Path | None,
        typer.Option(help="Of JSON: directory of its pictures. Else: where embedded ones go; default: pictures/."),
    ] = None,
    pictures: Annotated[
        Literal["embedded", "paths"], typer.Option(help="Whether parquet holds the pictures or names them.")
    ] = "embedded",
    shard_size: Annotated[int, typer.Option(min=1, help="Rows of a tar file.")] = 1000,
    split: Annotated[str | None, typer.Option(help="Of parquet files or of a saved data set.")] = None,
    on_bad_row: OnBadRow = "fatal",
    as_json: Json = False,
) -> None:
    """Rows in another form, each as it was: LLaVA's JSON, messages, parquet, WebDataset shards, in all directions."""
    from distilvlm.data.convert import rewrite

    with counting("rows") as progress:
        done = rewrite(
            source,
            out,
            to,
            images=images,
            pictures=pictures,
            shard_size=shard_size,
            split=split,
            on_bad_row=on_bad_row,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(asdict(done), indent=1, default=str))
        return
    files = f" in {done.files} shards" if to == "webdataset" and done.files > 1 else ""
    typer.echo(f"{done.out}: {done.rows} rows{files}, {done.pictures} pictures")
    if done.renamed:
        typer.echo(f"{done.renamed} pictures are called by their content now: their names were not theirs alone")
    if done.bad:
        typer.echo(f"left out: {len(done.bad)} that can't be used, listed in {done.bad_file}; the first: {done.bad[0]}")
    typer.echo(f"\nFor a recipe in {done.out.parent}:\n{done.entry()}")


def _convert(format: str, given: dict[str, Any]) -> None:
    from distilvlm.data.convert import convert

    as_json, source, out = given.pop("as_json"), given.pop("source"), given.pop("out")
    done = convert(format, source, out, **{**given, "where": _conditions(given["where"] or [])})
    if as_json:
        typer.echo(json.dumps(asdict(done), indent=1, default=str))
    else:
        _tell(done)


def _conditions(texts: list[str]) -> dict[str, list[str]]:
    conditions: defaultdict[str, list[str]] = defaultdict(list)
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"'{text}': write FIELD=VALUE", param_hint="--where")
        conditions[name.strip()].append(value)
    return dict(conditions)


def _tell(done: Converted) -> None:
    """Counts, and what to paste into a recipe."""
    rows = {None: "rows", "pairs": "pairs of answers", "rated": "rated answers"}[done.preferences]
    if done.test is None:
        answers = f", {done.answers} answers" if done.preferences is None else ""
        typer.echo(f"{done.train}: {done.rows} {rows}{answers}, {done.pictures} pictures")
    else:
        rest = done.rows - done.test_rows, done.pictures - done.test_pictures
        typer.echo(f"{done.train}: {rest[0]} {rows}, {rest[1]} pictures")
        typer.echo(
            f"{done.test}: {done.test_rows} {rows}, {done.test_pictures} pictures, none of them in the other file"
        )
    for reason, count in done.left_out.items():
        typer.echo(f"left out: {count} ({reason})")
    if done.bad:
        typer.echo(f"left out: {len(done.bad)} that can't be used, listed in {done.bad_file}; the first: {done.bad[0]}")
    typer.echo(f"\nFor a recipe in {done.train.parent}:\n{done.entry()}")
