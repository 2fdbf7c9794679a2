"""A run's directory: the only place that a run writes to, and only `run/` writes into it.

RUN/
  recipe.yaml                  what is run, resolved
  about.json                   the command, the machine, the versions, when it began and ended
  doctor.json                  what the doctor found before the first step
  teacher.json                 which model a teacher elsewhere is
  quantised.json               how far a teacher in 8 or 4 bits is from its weights in bf16
  cost.json                    memory, time and disk of each stage: estimated and measured
  events.jsonl                 every term of every update
  quarantine.jsonl             rows that could not be used (quarantine-N.jsonl: met by process N)
  importance.json              where encoders look that weigh tokens, in the first pictures
  standards.safetensors        what encoders' features are standardised by
  data/                        what the check of each data set found, so that continuing does not look again
  stages/00-dpt/
    about.json                 what the stage trains, on what, against what
    checkpoints/00000500/      what continuing needs, while the stage runs
    final/                     what the stage trained
  trouble/                     updates that were not made: batches of a loss that is not finite, with what was found
  adapters/                    what stood between the student and its encoders, for measuring; no part of the student
  model/                       the finished student: a stock Hugging Face checkpoint, its adaptors without their base,
                               or an encoder alone
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from distilvlm.models.files import PARTIAL, sweep, verify, write_whole
from distilvlm.recipe import differences, dump_recipe, read_dump
from distilvlm.recipe.schema import Recipe

logger = logging.getLogger(__name__)


LOCK = "lock"
"""Which process works in a directory (lock.py)."""

FREE = ("machine.", *(f"teacher.remote.{name}:" for name in ("url", "key_variable", "timeout", "patience")))
"""Fields that may differ between continuations: how a run runs, and where its teacher is."""


class RunError(RuntimeError):
    """A run directory can't be used as asked; the message says why and what to do."""


def recalled(file: Path) -> Any:
    """What a JSON file says that a run can make again; None where it is not there, or damaged, which is told."""
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s is damaged (%s): made anew", file, error)
        return None


class RunDirectory:
    """Paths of a run, and whether it continues or begins."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.recipe = self.path / "recipe.yaml"
        self.about = self.path / "about.json"
        self.doctor = self.path / "doctor.json"
        self.cost = self.path / "cost.json"
        self.teacher = self.path / "teacher.json"
        self.quantised = self.path / "quantised.json"
        self.events = self.path / "events.jsonl"
        self.importance = self.path / "importance.json"
        self.standards = self.path / "standards.safetensors"
        self.adapters = self.path / "adapters"
        self.trouble = self.path / "trouble"
        self.references = self.path / "references"
        self.model = self.path / "model"
        self.trackers = self.path / "trackers"

    def quarantine(self, process: int) -> Path:
        """Each process has a file of its own: what two add to one at once would be lost."""
        return self.path / ("quarantine.jsonl" if process == 0 else f"quarantine-{process}.jsonl")

    def stage(self, index: int, name: str) -> Path:
        return self.path / "stages" / f"{index:02d}-{name}"

    def checkpoints(self, index: int, name: str) -> Path:
        return self.stage(index, name) / "checkpoints"

    def final(self, index: int, name: str) -> Path:
        return self.stage(index, name) / "final"

    @property
    def finished(self) -> bool:
        return self.model.is_dir() and not verify(self.model, contents=False)

    def claim(self, recipe: Recipe) -> None:
        """Begin with `recipe`, or make sure that the recipe here is the same.

        Raises:
            RunError: the directory holds something else, or a run of another recipe.
        """
        if self.recipe.exists():
            try:
                ours = read_dump(self.recipe.read_text())
            except ValueError as error:
                raise RunError(
                    f"{self.recipe} is damaged, or was changed by hand, and no longer loads: {error}. Put it back as "
                    "it was when the run began: the same command with a new --dir writes it before its first step"
                ) from error
            changed = [line for line in differences(ours, recipe) if not line.startswith(FREE)]
            if changed:
                raise RunError(
                    f"{self.path} is a run of another recipe; these fields differ:\n  "
                    + "\n  ".join(changed)
                    + "\nContinue it with its own recipe, or give another --dir"
                )
            return
        there = [entry.name for entry in self.path.iterdir()] if self.path.exists() else []
        strangers = sorted(name for name in there if name != LOCK and not name.startswith(PARTIAL))
        if strangers:
            raise RunError(f"{self.path} is not a run and not empty ({', '.join(strangers[:3])}): give another --dir")
        write_whole(self.recipe, dump_recipe(recipe).encode())

    def claim_teacher(self, identity: str) -> None:
        """Note which model a teacher elsewhere is, or make sure that it is the one that this run began with.

        Raises:
            RunError: it is another one.
        """
        if not self.teacher.exists():
            write_whole(self.teacher, (json.dumps({"identity": identity}, indent=1) + "\n").encode())
            return
        before = recalled(self.teacher)
        if before is None:
            raise RunError(f"{self.teacher} is damaged: remove it if this run began with {identity}, which answers now")
        if before["identity"] != identity:
            raise RunError(
                f"{self.path} began with another teacher: {before['identity']}, and now {identity} answers. Serve the "
                "one it began with, or give another --dir"
            )

    def sweep(self) -> None:
        """Clear what a killed process left half-written."""
        for folder in [self.path, *(entry for entry in self.path.rglob("*") if entry.is_dir())]:
            sweep(folder)

    def kept(self, recipe: Recipe) -> str:
        """What of a run of `recipe` is on the disk, for people."""
        found: list[str] = []
        for index, stage in enumerate(recipe.stages):
            if self.final(index, stage.name).is_dir():
                found.append(f"stage '{stage.name}'")
            elif saved := sorted(self.checkpoints(index, stage.name).glob("[0-9]*")):
                found.append(f"stage '{stage.name}' up to update {int(saved[-1].name)}")
        return " and ".join(found) or "nothing but what the look at the data found"
