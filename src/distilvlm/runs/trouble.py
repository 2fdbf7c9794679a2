"""An update that was not made: its batch is kept, where it went wrong is found, and what to do is said.

RUN/trouble/STAGE-UPDATE-PROCESS/
  batch.safetensors   token ids, rows, canvases or features of the micro-batch
  report.json         what is wrong and where; each sample with its pictures and its own loss terms
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor

from distilvlm.data import Batch, Grouping, groups
from distilvlm.data.collate import collate
from distilvlm.models.files import directory_whole
from distilvlm.recipe import Recipe, StageSpec
from distilvlm.train import ExplodingError, Loop, UpdateError
from distilvlm.train.inspection import Finding, inspect
from distilvlm.train.parallel import sharded

from .directory import RunDirectory, RunError
from .material import Material

logger = logging.getLogger(__name__)

BOOKKEEPING = {"workers", "checkpoint_every", "keep", "trackers", "timeout", "explosion"}
"""Fields of `machine:` that change no bit of an update."""

ADVICE = {
    "weights": "Weights were not finite before this update. Look at where they come from: the student's files, or a "
    "checkpoint that was made by other code",
    "given": "What the student learns from is not finite, so look there: a teacher in bf16 or of few bits "
    "(teacher.precision), kept features of another tower or a damaged store (remove it, it is made again)",
    "forward": "With bf16, which may be too coarse for these weights, --set machine.precision=fp32 may be set in this "
    "run. Else weights have grown: a lower optim.lr, optim.clip: 1.0 or a longer optim.warmup, in a new run",
    "loss": "The loss of these samples is not finite though all outputs are. Look at the samples; a lower "
    "loss weight, or a higher loss.temperature, in a new run",
    "gradient": "A lower optim.lr or a longer optim.warmup, in a new run; with bf16, --set machine.precision=fp32 may "
    "be set in this one. optim.clip does not help: the gradient can't be scaled any more",
    "norm": "A lower optim.lr or a longer optim.warmup, in a new run",
    "nothing": "If the same command gets past it, memory or device failed: test them. Else look at the batch",
    "split": "The same command without a launcher goes on from the last checkpoint with one process, which looks for "
    "the module and the sample. With bf16, --set machine.precision=fp32 may be set in this run",
    "exploding": "A lower optim.lr, a longer optim.warmup or optim.clip: 1.0, in a new run; or look at the samples. To "
    "go on all the same: --set machine.explosion.then=warn",
}


def account(
    error: UpdateError,
    loop: Loop,
    material: Material,
    recipe: Recipe,
    stage: StageSpec,
    place: RunDirectory,
    accelerator: Accelerator,
) -> UpdateError:
    """The error with all that could be found out; what there is to look at is kept. A collective call."""
    exploding = isinstance(error, ExplodingError)
    batch = loop.now.suspect or loop.now.batch
    try:
        found = _found(error, loop, material, recipe, stage, accelerator)
    except Exception as second:  # what was wrong at first must be told in any case
        logger.exception("the update could not be looked into")
        found = Finding("nothing", f"not found: looking for it failed ({type(second).__name__}: {second})")
    kind = "exploding" if exploding else found.kind
    told: str | None = None
    known: list[bool] = gather_object([found.batch is not None])
    if found.batch is not None or not any(known):  # who has nothing to do with it keeps nothing, if somebody has
        kept = _keep(error, found, found.batch or batch, material, recipe, stage, place, accelerator)
        told = _told(found, kept, accelerator)
    everywhere: list[tuple[str, str | None]] = gather_object([(kind, told)])
    lines = [line for _, line in everywhere if line is not None]
    decisive = next((one for one, line in everywhere if line is not None), kind)
    text = "\n".join(
        [
            f"stage '{stage.name}': {error}; the weights and the last checkpoint are as they were before it.",
            *lines,
            f"→ {ADVICE[decisive]}.",
            *([] if exploding else [f"  {AGAIN}"]),
        ]
    )
    return error.told(text)


AGAIN = (
    "The same command would come to the same numbers: it refuses to, until something that changes them has changed. "
    "Another optim or loss section is another run (--dir)"
)


def refuse_again(recipe: Recipe, stage: StageSpec, done: int, place: RunDirectory, processes: int) -> None:
    """Raises RunError where the run would only come to the update at which it stopped before, with the same numbers.

    Args:
        done: updates of the stage that are made.
    """
    for file in sorted(place.trouble.glob(f"{stage.name}-*/report.json")):
        report = json.loads(file.read_text())
        if report["stage"] != stage.name or report["update"] <= done or not report["repeats"]:
            continue
        if report["circumstances"] == _circumstances(recipe, processes):
            raise RunError(
                f"stage '{stage.name}' stopped at update {report['update']} ({report['what']}), and nothing that "
                f"changes its numbers has changed since: it would stop there again. What to do stands in {file}. If it "
                f"lay in a file that is repaired, or in the machine, remove {file.parent}, and the run goes on"
            )


def _circumstances(recipe: Recipe, processes: int) -> dict[str, Any]:
    """What decides on the bits of an update beside the recipe, of which only `machine:` may change in a run."""
    machine = recipe.machine.model_dump(mode="json", exclude=BOOKKEEPING)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"machine": machine, "processes": processes, "versions": versions}


def _found(
    error: UpdateError, loop: Loop, material: Material, recipe: Recipe, stage: StageSpec, accelerator: Accelerator
) -> Finding:
    if sharded(recipe.machine, accelerator):
        what = "the loss of this batch" if loop.now.suspect is not None else "no loss of this process"
        return Finding(
            "split", f"{what}; by which module is not looked for where processes hold parts", batch=loop.now.suspect
        )
    number = error.update - 1
    exploding = isinstance(error, ExplodingError)
    made = _made(material, Grouping.of(recipe.machine, stage), number, accelerator)
    return inspect(loop, made, len(material.order.update(number)), finite=exploding)


def _made(
    material: Material, grouping: Grouping, number: int, accelerator: Accelerator
) -> Iterator[tuple[Batch, Callable[[], Sequence[Batch]]]]:
    """This process's micro-batches of an update once more, each with its samples as batches of their own."""
    data, rank, world = material.data, accelerator.process_index, accelerator.num_processes
    for group in groups(data, material.order, number, rank, world, grouping):
        samples = [data[at] for at in group]
        alone = partial(map, partial(collate, packed=grouping.packed), [[one] for one in samples])
        yield collate(samples, grouping.packed), lambda alone=alone: list(alone())


def _keep(
    error: UpdateError,
    found: Finding,
    batch: Batch | None,
    material: Material,
    recipe: Recipe,
    stage: StageSpec,
    place: RunDirectory,
    accelerator: Accelerator,
) -> Path:
    """Keep the batch and what is known, whole or not at all."""
    directory = place.trouble / f"{stage.name}-{error.update:08d}-{accelerator.process_index}"
    keys = [] if batch is None else batch.keys[:: 2 if stage.loss.preference else 1]  # both answers have their record's
    pictures = {record.key: record.images for record in map(material.data.record, _indices(error, material))}
    rows = [{**asdict(key), "pictures": [str(path) for path in pictures.get(key, ())]} for key in keys]
    for row, terms in zip(rows, found.samples, strict=False):  # these are there where something was found
        row["terms"] = terms
    report = {
        "what": error.what,
        "stage": stage.name,
        "update": error.update,
        "process": accelerator.process_index,
        "micro_batch": found.micro_batch,
        "kind": found.kind,
        "where": found.where,
        "terms": error.terms,
        "rate": error.rate,
        "gradient_norm": error.norm,
        "samples": rows,
        "sizes": None if batch is None else batch.sizes,
        "advice": ADVICE["exploding" if isinstance(error, ExplodingError) else found.kind],
        "repeats": not isinstance(error, ExplodingError),
        "circumstances": _circumstances(recipe, accelerator.num_processes),
    }
    with directory_whole(directory, replace=True) as partial_directory:
        if batch is not None:
            tensors = {name: value.cpu().contiguous() for name, value in _tensors(batch).items()}
            save_file(tensors, partial_directory / "batch.safetensors")
        (partial_directory / "report.json").write_text(json.dumps(_plain(report), indent=1, allow_nan=False) + "\n")
    return directory


def _indices(error: UpdateError, material: Material) -> list[int]:
    return [index for _, index in material.order.update(error.update - 1)]


def _told(found: Finding, kept: Path, accelerator: Accelerator) -> str:
    who = f"process {accelerator.process_index}, " if accelerator.num_processes > 1 else ""
    where = f"{who}micro-batch {found.micro_batch}" if found.micro_batch else who.removesuffix(", ")
    line = f"  {where + ': ' if where else ''}{found.where}"
    if found.batch is not None and found.samples:
        keys = found.batch.keys[:: len(found.batch.keys) // len(found.samples)]
        bad = [at for at, terms in enumerate(found.samples) if not all(map(math.isfinite, terms.values()))]
        losses = [terms["loss"] for terms in found.samples]
        if bad:
            rows = "; ".join(f"{keys[at].file} row {keys[at].row}" for at in bad[:4])
            line += f"; so is alone: {rows}" + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
        else:
            at = losses.index(max(losses))
            line += f"; the largest loss alone: {losses[at]:.4g}, {keys[at].file} row {keys[at].row}"
    return f"{line}; kept in {kept}"


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """What a batch holds, by name; 'teacher.NAME' of what its teacher reads."""
    found = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    theirs = {} if batch.teacher is None else _tensors(batch.teacher)
    return found | {f"teacher.{name}": value.clone() for name, value in theirs.items()}  # both may hold the same one


def _plain(value: Any) -> Any:
    """As JSON can have it: what is not finite as a word."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
