"""The model card beside a finished student: `model/README.md`, with the metadata that hubs read.

What the run and its recipe do not tell is said to be unknown, and not guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from distilvlm.models.files import write_whole
from distilvlm.recipe import Recipe

from . import intervals, wording
from .formats import ComparisonFile, Interval, Summary
from .read import COMPARISON, ReportError, Run, formed, json_object

ANSWERS = "answers"
"""Of a run: where `evaluate --out RUN/answers/gqa.jsonl` puts what it was asked."""


MADE = "<!-- Made by `distilvlm report`, which writes it anew as long as this line stands. -->"


@dataclass(frozen=True)
class Result:
    """One question set."""

    key: str
    title: str
    figure: str
    name: str  # the figure's, for programs
    value: Interval
    percent: bool
    n: int


def write_card(run: Run) -> Path | None:
    """Write a finished run's card; one that somebody has made theirs (without our line) is left alone: None."""
    path = run.path / "model" / "README.md"
    if path.exists() and MADE not in path.read_text(encoding="utf-8"):
        return None
    write_whole(path, card(run).encode())
    return path


def card(run: Run) -> str:
    """The card of a finished run's student."""
    recipe = run.recipe
    text = [
        f"---\n{metadata(run).to_yaml()}\n---\n",
        MADE,
        "",
        f"# {run.name}\n",
        recipe.description.strip() or _WHAT[recipe.student.encoder_alone],
        "",
    ]
    return "\n".join([*text, *made(run), ""])


def metadata(run: Run) -> ModelCardData:
    """What hubs read of the run's student."""
    recipe, found = run.recipe, results(run)
    alone = recipe.student.encoder_alone
    stock = not any(stage.spec.inserts is not None for stage in run.stages)
    return ModelCardData(
        license=recipe.licence,
        base_model=bases(recipe) or None,
        datasets=[spec.path for spec in recipe.data.values() if _hub_id(spec.path)] or None,
        pipeline_tag="image-feature-extraction" if alone else "image-text-to-text",
        library_name="transformers" if stock else "distilvlm",
        tags=["distilvlm", "distillation", *([] if alone else ["llava", "vision-language"])],
        model_name=run.name,
        eval_results=[_eval_result(one, alone) for one in found] or None,
    )


def made(run: Run) -> list[str]:
    """Lines of the card that only the run tells: data, training, evaluation, use and limits."""
    recipe = run.recipe
    lines = ["## Licence", "", _licence(recipe), "", "## Intended use and limits", ""]
    lines += [recipe.intended_use or "Not stated in the recipe (`intended_use`).", "", _LIMITS, ""]
    lines += ["## Data", "", "| source | rows | licence |", "|---|---:|---|"]
    told = [stage.about.data for stage in run.stages if stage.about is not None]
    counts = {name: facts.get("samples") for data in told for name, facts in data.items()}
    for name, spec in recipe.data.items():
        rows = counts.get(name)
        file = spec.path if _hub_id(spec.path) else Path(spec.path).name
        lines.append(
            _row(f"{name} ({file})", "not recorded" if rows is None else f"{rows:,}", spec.licence or UNSTATED)
        )
    lines += ["", "## How it was trained", ""]
    teacher = f" Its teacher is {_origin(recipe.teacher)}." if recipe.teacher is not None else ""
    lines += [f"The student begins as {_origin(recipe.student)}.{teacher}"]
    lines += ["", "| stage | trains | on | updates | loss |", "|---|---|---|---:|---|"]
    for stage in run.stages:
        trains, data = ", ".join(stage.spec.train), ", ".join(stage.spec.data)
        lines.append(_row(stage.spec.name, trains, data, f"{len(stage.updates):,}", wording.terms(stage)))
    if run.about is not None:
        where, when = wording.machine(run.about.machine), wording.moment(run.about.finished)
        lines += ["", f"On {where}, {when}, seed {recipe.seed}."]
    lines += ["", "## Evaluation", ""]
    found = results(run)
    if not found:
        return [*lines, "Not evaluated: nothing was asked of it that lies beside the run."]
    lines += ["| questions | n | figure | value [95% interval] |", "|---|---:|---|---:|"]
    for one in found:
        figure = one.figure + (", %" if one.percent else "")
        lines.append(_row(one.title, f"{one.n:,}", figure, wording.share(one.value, one.percent)))
    return lines


def results(run: Run) -> list[Result]:
    """What the run's student was asked: in the comparison that it is part of, and by `evaluate --out RUN/answers/…`.

    Raises ReportError for a damaged file.
    """
    return [*_compared(run), *_answered(run)]


def bases(recipe: Recipe) -> list[str]:
    """Hub ids of what the student was made of."""
    student = recipe.student
    parts = (student.source, *(part.source for part in (student.vision, student.language) if part is not None))
    return [source for source in parts if source is not None and _hub_id(source)]


def _compared(run: Run) -> list[Result]:
    file = run.path.resolve().parent.parent / COMPARISON
    if not file.is_file():
        return []
    told = formed(json_object(file), ComparisonFile, str(file))
    found: list[Result] = []
    for seed in told.seeds:
        names = [name for name, where in seed.runs.items() if (file.parent / where).resolve() == run.path.resolve()]
        for questions, rows in seed.rows.items() if names else ():
            figure = intervals.figures(told, questions)[0]
            row = rows.get(names[0])
            value = None if row is None else row.figures.get(figure.name)
            if row is not None and value is not None:
                title = told.questions[questions].title or questions
                found.append(Result(questions, title, figure.title, figure.name, value, figure.percent, row.n))
        if names:
            break  # a run that serves several seeds was asked once
    return found


def _answered(run: Run) -> list[Result]:
    found: list[Result] = []
    for file in sorted((run.path / ANSWERS).glob("*.json")):
        content = json_object(file)
        summary, asked = formed(content, Summary, str(file)), content.get("asked")
        if not isinstance(asked, dict) or "suite" not in asked:
            raise ReportError(f"{file} does not say what was asked: it is not from `distilvlm evaluate --suite --out`")
        main = next(((name, value) for name, value in summary.figures.items() if value is not None), None)
        if main is not None:
            key = "-".join(part for part in (asked["suite"], asked.get("split")) if part)
            found.append(Result(key, key, main[0], main[0], main[1], main[1].high <= 1, summary.n))
    return found


def _eval_result(one: Result, alone: bool) -> EvalResult:
    task = "image-classification" if alone else "visual-question-answering"
    value = round((100 if one.percent else 1) * one.value.mean, 2)
    return EvalResult(
        task_type=task, dataset_type=one.key, dataset_name=one.title, metric_type=one.name, metric_name=one.figure,
        metric_value=value,
    )  # fmt: skip


def _origin(spec: Any) -> str:
    if spec.source is not None:
        return f"`{_shown(spec.source)}`"
    parts = (("a vision encoder", spec.vision), ("a language model", spec.language))
    said = [
        f"{name} `{_shown(part.source)}`" if part.source else f"{name} of random weights"
        for name, part in parts
        if part is not None
    ]
    return " and ".join(said)


def _shown(source: str) -> str:
    """A source without the folders of the machine that it was on: a hub id, or the last names of a path."""
    path = Path(source)
    return source if _hub_id(source) else "/".join(path.parts[-2:]) if path.name == "model" else path.name


def _licence(recipe: Recipe) -> str:
    return f"Licence: {recipe.licence}." if recipe.licence else f"Licence: {UNSTATED} (`licence`)."


def _hub_id(name: str) -> bool:
    """Whether it reads like a hub id and is no place of this machine."""
    owner = name.split("/")[0]
    return (
        name.count("/") == 1
        and owner != ""
        and not owner.startswith("~")
        and "." not in owner
        and (not Path(name).exists())
    )


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


UNSTATED = "not stated in the recipe"

_WHAT = {
    False: "A vision-language model, trained with distilvlm.",
    True: "A vision encoder, trained with distilvlm.",
}

_LIMITS = (
    "Its answers can be wrong and can name what is not in the picture; it was measured on what stands under Evaluation "
    "and on nothing else. What its teacher, its parts and its data know wrongly, it may have learned."
)
