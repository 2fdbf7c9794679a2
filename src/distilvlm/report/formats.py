"""The JSON files that a report reads, field by field. Unknown fields are left alone: a later version may write more."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator


class Content(BaseModel):
    """Base of every file's content."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Interval(Content):
    """A mean and its 95% interval, as shares."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


class Figures(Content):
    """Figures by name, which stand in the file beside the other fields; null: undefined."""

    figures: dict[str, Interval | None]

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        figures = {name: value for name, value in content.items() if value is None or _is_interval(value)}
        return {**content, "figures": figures}


def _is_interval(value: Any) -> bool:
    return isinstance(value, dict) and {"mean", "low", "high"} <= {*value}


class Summary(Figures):
    """`Evaluation.summary()`: one model's figures on one question set."""

    n: int
    pictures: int
    bad_rows: int = 0
    intervals: str = ""
    categories: dict[str, Figures] = {}  # the same figures, of each kind of question


class Figure(Content):
    """A figure of a measure: `evaluate.measures.Figure`."""

    name: str
    title: str
    better: Literal["higher", "lower", "neither"] = "higher"
    about: str = ""
    percent: bool = True
    headline: bool = True


class Answering(Content):
    """How fast a model answers, one answer and `together` at a time, and what memory it takes beside the process's."""

    tokens_per_second: float
    together_per_second: float
    together: int
    tokens: int
    peak_memory_bytes: float | None = None
    precision: str = ""
    machine: str = ""
    date: str = ""


class ModelFacts(Content):
    """`compare.facts.Facts`; older files have parameters only."""

    parameters: int | None = None
    language_model_parameters: int | None = None
    active_parameters: int | None = None
    disk_bytes: int | None = None
    training_seconds: float | None = None
    answering: Answering | None = None


class Roles(Content):
    """The teacher, and the control that it is ahead of."""

    teacher: str
    control: str


class QuestionSet(Content):
    title: str = ""
    measure: str | None = None  # what its differences are of; None: not told
    n: int
    pictures: int = 0


class SeedScores(Content):
    """One seed: scores by question set and model, differences by question set and "a - b", run directories by model."""

    seed: int
    rows: dict[str, dict[str, Summary]]
    differences: dict[str, dict[str, Interval | None]] = {}  # null: undefined
    closed: dict[str, dict[str, Interval | None]] = {}  # question set → model; null: there is no gap
    runs: dict[str, str] = {}


class Trend(Content):
    """Runs that differ in one quantity."""

    over: str
    runs: dict[float, str]  # value → run


class ComparisonFile(Content):
    """`comparison.json`."""

    name: str
    title: str = ""
    description: str = ""
    command: str | list[str] = ""
    date: str = ""
    machine: dict[str, Any] | str = ""
    versions: dict[str, str] = {}
    seconds: dict[str, float] = {}
    of_seeds: bool = True  # False: models from anywhere, and one column
    roles: Roles | None = None
    models: dict[str, ModelFacts]
    baselines: list[str] = []
    measures: dict[str, list[Figure]] = {}  # the first is what differences are of; older files have none
    questions: dict[str, QuestionSet]
    differences: list[tuple[str, str]] = []
    trends: list[Trend] = []
    seeds: list[SeedScores]

    def column(self, seed: int) -> str:
        """The head of a seed's column."""
        return f"seed {seed}" if self.of_seeds else "score"


class Typed(Content):
    """A command of a run that was continued."""

    at: str
    command: list[str]


class AboutRun(Content):
    """`RUN/about.json`."""

    command: list[str] = []
    commands: list[Typed] = []  # of the start and of each continuation
    started: str | None = None
    finished: str | None = None
    machine: dict[str, Any] = {}
    versions: dict[str, str | None] = {}
    processes: int = 1


class Trains(Content):
    parameters: int
    dtype: str = ""


class Student(Content):
    """The student as a stage trains it."""

    parameters: int
    active_parameters: int  # that serve one token
    sparse_layers: list[int] = []


class Adaptors(Content):
    """Of a student that has any: the one that trains, part by part, and what each takes beside the base, 'text'."""

    active: str
    structure: str
    positions: list[int]
    parts: dict[str, int]
    bytes: dict[str, int]


class AboutStage(Content):
    """`RUN/stages/NN-NAME/about.json`."""

    stage: str
    transform: list[Any] = []
    student: Student | None = None
    trains: dict[str, Trains] = {}
    data: dict[str, dict[str, Any]] = {}
    updates: int | None = None
    terms: dict[str, float] = {}
    adaptors: Adaptors | None = None
    seconds: float | None = None


class Finding(Content):
    check: str
    level: Literal["ok", "warning", "error"]
    stage: str | None = None
    text: str
    fix: str = ""


class Doctor(Content):
    """`RUN/doctor.json`."""

    findings: list[Finding]


class Cost(Content):
    peak_memory_bytes: float | None = None
    seconds_per_update: float | None = None
    disk_bytes: float | None = None


class Look(Content):
    """What a teacher's look at all records takes, before a stage of preferences."""

    records: int | None = None
    peak_memory_bytes: float | None = None
    seconds: float | None = None


class StageCost(Content):
    stage: str
    estimate: Cost
    measured: Cost | None = None
    look: Look | None = None  # estimated


class CostFile(Content):
    """`RUN/cost.json`."""

    stages: list[StageCost]


class FileEntry(Content):
    bytes: int
    sha256: str


class Manifest(Content):
    """`RUN/model/manifest.json`."""

    files: dict[str, FileEntry]


class LayerUse(Content):
    """How a sparse layer was used by the tokens of an update."""

    load: list[float]
    entropy: float
    dropped: float


class Update(Content):
    """An "update" line of `events.jsonl`."""

    stage: str
    number: int
    loss: float
    terms: dict[str, float] = {}
    rate: float
    gradient_norm: float
    samples: int = 0
    seconds: float
    wait: float = 0.0  # seconds of these without a micro-batch to work on
    routing: list[LayerUse] = []  # of a sparse student, layer by layer
    vision_routing: list[LayerUse] = []  # of a vision tower with experts, layer by layer


class LookedAt(Content):
    """Where an encoder looks in one picture."""

    picture: str
    weights: list[float]  # of the patches, row by row; sum to 1


class ImportanceMap(Content):
    """Where one encoder looks in some of the pictures that a run trains on."""

    encoder: str
    grid: tuple[int, int]
    geometry: Literal["square", "pad", "crop"]
    used_by: list[str] = []  # in words: which stage weighs tokens by it, and how
    pictures: list[LookedAt]

    @model_validator(mode="after")
    def _one_weight_per_patch(self) -> ImportanceMap:
        rows, columns = self.grid
        for one in self.pictures:
            if len(one.weights) != rows * columns:
                raise ValueError(f"{one.picture} has {len(one.weights)} weights on a grid of {rows} by {columns}")
        return self


class ImportanceFile(Content):
    """`RUN/importance.json`."""

    maps: list[ImportanceMap]


class Quarantined(Content):
    """A line of `quarantine.jsonl`."""

    stage: str = ""
    source: str = ""
    file: str
    row: int
    field: str = ""
    reason: str


class Answer(Content):
    """A line of an answers file: `evaluate.measures.Answered`."""

    file: str
    row: int
    turn: int
    pictures: tuple[str, ...] = ()
    question: str
    answer: str
    prediction: str
    exact: bool
    accurate: bool
    details: dict[str, Any] = {}

    @property
    def place(self) -> tuple[str, int, int]:
        return self.file, self.row, self.turn
