"""Where the answers come from that `distilvlm hallucination` scores, who judges them, and how that is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.console import Console

from .options import interruptible, quiet_transformers

if TYPE_CHECKING:
    from distilvlm.evaluate import Asked, Evaluation, Measure
    from distilvlm.evaluate.hallucination import Case, Endpoint, Judgement, Prompted, Synonyms


def needed(answers: Path | None) -> Path:
    if answers is None:
        raise typer.BadParameter("say what is asked, or give --answers", param_hint="--data")
    return answers


def read_each(given: Path | Sequence[Path] | None, files: Sequence[Asked]) -> list[str] | None:
    """The answers in one file for each file of questions."""
    from distilvlm.evaluate.hallucination import read_answers

    if given is None or (isinstance(given, Sequence) and not given):
        return None
    paths = [given] if isinstance(given, Path) else list(given)
    if len(paths) != len(files):
        raise typer.BadParameter(f"{len(paths)} files of answers for {len(files)} of questions", param_hint="--answers")
    return [text for path, one in zip(paths, files, strict=True) for text in read_answers(path, one.questions)]


@dataclass(frozen=True)
class Asking:
    """Where answers come from."""

    model: str | None
    template: Literal["chat", "vicuna", "plain"]
    batch_size: int
    max_new_tokens: int
    on_bad_row: Literal["fatal", "quarantine"]
    workflow: str | None = None  # of a model with adaptors

    def answers(self, asked: Asked, given: list[str] | None) -> tuple[Asked, list[str]]:
        """What was asked, and the answers: those given, or the model's."""
        import torch

        from distilvlm.data import raise_or_quarantine
        from distilvlm.evaluate import ask
        from distilvlm.models.save import geometry_of, load

        if (self.model is None) == (given is None):
            raise typer.BadParameter("give a MODEL or its --answers, one of both", param_hint="MODEL")
        if given is not None or self.model is None:
            raise_or_quarantine(asked.bad, self.on_bad_row)
            return asked, given or []
        quiet_transformers()
        vlm = load(self.model).use(self.workflow)
        if torch.cuda.is_available():
            vlm.to("cuda")
        return ask(
            vlm,
            asked,
            geometry_of(self.model),
            template=self.template,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            on_bad_row=self.on_bad_row,
        )

    def source(self, data: Path | Sequence[Path], answers: Path | Sequence[Path] | None) -> dict[str, Any]:
        """What JSON says of where the answers come from."""

        def names(paths: Path | Sequence[Path]) -> str | list[str]:
            return str(paths) if isinstance(paths, Path) else [str(path) for path in paths]

        whose = {"answers": names(answers)} if self.model is None and answers else {"model": self.model}
        return {**whose, "data": names(data)}

    def called(self, answers: Path | Sequence[Path] | None) -> str:
        """The model's, or its answers', name in a table."""
        return file_name(answers) if self.model is None else model_name(self.model)


def model_name(model: str) -> str:
    """A model's name in a table: of RUN/model that of the run."""
    path = Path(model)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def file_name(answers: Path | Sequence[Path] | None, taken: Mapping[str, Any] | None = None) -> str:
    path = answers if isinstance(answers, Path) or not answers else answers[0]
    name = path.stem if isinstance(path, Path) else "answers"
    return f"{name} (against)" if taken and name in taken else name


@dataclass(frozen=True)
class Judging:
    """The judge that was chosen, before a model is asked for hours what it shall judge."""

    choice: str
    prompt: Path | None
    kept: Path | None  # where an http judge's words go
    endpoint: Endpoint | None  # of an http judge

    @classmethod
    def by(
        cls, choice: str, prompt: Path | None, kept: Path | None, out: Path | None, url: str | None, model: str | None
    ) -> Judging:
        """Raises typer.BadParameter, JudgeError: an http judge whose words have no place, or that is nowhere."""
        from distilvlm.evaluate.hallucination import Endpoint

        if choice != "http":
            return cls(choice, prompt, None, None)
        kept = kept or (out and out.with_name(f"{out.stem}-judged.jsonl"))
        if kept is None:
            raise typer.BadParameter("say where the judge's words are kept, or give --out", param_hint="--judged")
        return cls(choice, prompt, kept, Endpoint.from_environment(url, model))

    @property
    def name(self) -> str:
        names = {"rule": "words of objects", "http": self.endpoint and self.endpoint.model}
        return names.get(self.choice) or Path(self.choice).name

    def rate(
        self, asked: Asked, predictions: Sequence[str], table: Synonyms | None
    ) -> tuple[list[Case], list[Judgement]]:
        """MMHal-Bench's judgements; `table` is the rule's, by default the names of what the pictures show."""
        from distilvlm.evaluate.hallucination import Synonyms, rater

        names = dict.fromkeys(str(name) for one in asked.questions for name in one.meta["image_content"])
        return self._said(asked, predictions, table or Synonyms.of_names(names), rater)

    def name_objects(
        self, asked: Asked, predictions: Sequence[str], table: Synonyms
    ) -> tuple[list[Case], list[Judgement]]:
        """Object HalBench's: the objects that each answer names."""
        from distilvlm.evaluate.hallucination import namer

        return self._said(asked, predictions, table, namer)

    def _said(
        self,
        asked: Asked,
        predictions: Sequence[str],
        table: Synonyms,
        prompted: Callable[[Endpoint, str | None], Prompted],
    ) -> tuple[list[Case], list[Judgement]]:
        from distilvlm.evaluate.hallucination import Case, LocalRule, Rated, judged

        cases = [Case.of(question, text) for question, text in zip(asked.questions, predictions, strict=True)]
        if self.choice == "rule":
            return cases, judged(cases, LocalRule(table))
        if self.endpoint is None:
            return cases, judged(cases, Rated(self.choice, cases))
        judge = prompted(self.endpoint, self.prompt and self.prompt.read_text())
        with interruptible():
            return cases, judged(cases, judge, self.kept)


def scored(asked: Asked, given: Mapping[str, Sequence[str]], measures: Mapping[str, Measure]) -> dict[str, Evaluation]:
    from distilvlm.evaluate import score

    return {
        name: score(asked.questions, texts, measure=measures[name], by_picture=True, bad=asked.bad)
        for name, texts in given.items()
    }


def tell(
    rows: Mapping[str, Evaluation],
    against: str | None,
    source: Mapping[str, Any],
    out: Path | None,
    as_json: bool,
    title: str = "",
) -> None:
    """Write the first row's answers, print all rows' figures and its differences from `against`."""
    from distilvlm.evaluate import difference, figure_table

    name, first = next(iter(rows.items()))
    if out is not None:
        first.write(out)
    if not as_json:
        Console().print(figure_table(rows, against=against, title=title))
        return
    told = dict(source)
    told |= ({"judge": title} if title else {}) | first.summary()
    told["others"] = {other: evaluation.summary() for other, evaluation in rows.items() if other != name}
    if against is not None:
        gaps = {figure.name: difference(first, rows[against], figure.name) for figure in first.measure.figures}
        told |= {"against": against, "differences": {key: gap and asdict(gap) for key, gap in gaps.items()}}
    typer.echo(json.dumps(told, indent=1))
