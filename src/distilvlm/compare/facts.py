"""What a finished model is and what it cost, whatever it is asked: parameters, bytes, seconds of training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distilvlm.models import build
from distilvlm.models.compose import build_student
from distilvlm.models.parts import ADAPTORS, named, sizes
from distilvlm.recipe import ModelSpec, Recipe
from distilvlm.report.read import read_run

from .speed import Answering

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Facts:
    """Of one model; None of what is not known: of a model whose answers alone are there, everything.

    Attributes:
        language_model_parameters, active_parameters: all of the language model, and of the whole those that serve one
            token in the active workflow; None of a vision encoder alone.
        disk_bytes: of its directory's files.
        training_seconds: in updates, with the runs that it continues; None where no run tells.
        answering: how fast and in how much memory it answers, where that was measured.
    """

    parameters: int | None = None
    language_model_parameters: int | None = None
    active_parameters: int | None = None
    disk_bytes: int | None = None
    training_seconds: float | None = None
    answering: Answering | None = None

    @property
    def counted(self) -> int | None:
        """What tables of answers in words tell models apart by."""
        return self.parameters if self.language_model_parameters is None else self.language_model_parameters


def facts_of(model: Path, run: Path | None, answering: Answering | None = None) -> Facts:
    """Args:
    model: a directory that `load` loads; its weights are not read.
    run: the run directory that made it, if there is one.
    """
    recipe = None if run is None else read_run(run).recipe
    disk = sum(file.stat().st_size for file in model.iterdir() if file.is_file())
    seconds = None if run is None else training_seconds(run)
    if recipe is not None and recipe.student.encoder_alone:
        assert recipe.student.vision is not None
        vision = recipe.student.vision.model_copy(update={"source": str(model), "config": None})
        alone = build_student(ModelSpec(vision=vision), seed=0, meta=True).model
        return Facts(sum(parameter.numel() for parameter in alone.parameters()), None, None, disk, seconds, None)
    student = build(ModelSpec.model_validate({"from": str(model)}), seed=0, meta=True)
    _, active = sizes(student.model)
    everything = named(student.model)
    language = [*student.model.model.language_model.parameters()]
    language += [p for name, p in everything.items() if name.startswith(ADAPTORS) and ".projector." not in name]
    total = sum(p.numel() for p in everything.values())
    return Facts(total, sum(p.numel() for p in language), active, disk, seconds, answering)


def training_seconds(run: Path) -> float:
    """Of the run's updates, and of those of the runs whose students it continues, one after the other."""
    read = read_run(run)
    before = _continued(read.recipe)
    return sum(stage.seconds for stage in read.stages) + (0 if before is None else training_seconds(before))


def _continued(recipe: Recipe) -> Path | None:
    """The run whose finished student this recipe begins with."""
    source = recipe.student.source
    run = None if source is None else Path(source).parent
    return run if run is not None and Path(source or "").name == "model" and (run / RECIPE).is_file() else None
