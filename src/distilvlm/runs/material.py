"""What a stage trains on: its sources, checked before the first step, in an order that is a function of the update."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.numpy import load, save

from distilvlm.data import BadRow, DataError, DataReport, Grouping, Order, Source, StageData, raise_or_quarantine
from distilvlm.data.alignment import TeacherView
from distilvlm.data.geometry import canvas, decode
from distilvlm.data.stage import background, source_of, stage_data, stage_order
from distilvlm.data.streams import state
from distilvlm.models.alone import Encoder
from distilvlm.models.features import FeatureReader, FeatureStore
from distilvlm.models.files import write_whole
from distilvlm.models.fingerprint import fingerprint
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, StageSpec
from distilvlm.storage import is_remote

from .directory import RunDirectory, recalled
from .encoders import Encoders

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Material:
    """A stage's data, its order, and how many updates it takes."""

    data: StageData
    order: Order
    updates: int
    report: DataReport


def check(
    recipe: Recipe,
    stage: StageSpec,
    vlm: VLM | Encoder,
    place: RunDirectory,
    accelerator: Accelerator,
    view: TeacherView | None = None,
) -> tuple[StageData, DataReport]:
    """Look at the data of a stage that is still to come: what is wrong with it must not come to light after days.

    Args:
        view: of a teacher that reads rows of its own.

    Returns the rows that can be used, without kept features, and what the look at them found.

    Raises:
        DataError: as `prepare`.
    """
    sources = [source_of(recipe, stage, name) for name in stage.data]
    data = stage_data(recipe, stage, vlm.tokenizer, vlm.layout, sources, teacher=view)
    report = _checked(data, recipe, stage, place, accelerator)
    return data.without(report.bad) if report.bad else data, report


def prepare(
    recipe: Recipe,
    index: int,
    vlm: VLM | Encoder,
    place: RunDirectory,
    accelerator: Accelerator,
    encoders: Encoders | None = None,
    view: TeacherView | None = None,
) -> Material:
    """Read and check the data of stage `index`; keep the features of its pictures if the recipe wants that.

    Args:
        encoders: what the stage's encoders need of a picture, or have kept of it.
        view: of a teacher that reads rows of its own.

    Raises:
        DataError: a file or row can't be used (rows: unless the recipe quarantines them).
    """
    stage = recipe.stages[index]
    sources = [source_of(recipe, stage, name) for name in stage.data]
    reader, unreadable = None, []
    if recipe.pictures.features is not None:
        reader, unreadable = _features(recipe, vlm, accelerator, sources)
    if encoders is not None:
        unreadable += [bad for path, reason in encoders.unreadable.items() for bad in _owners(sources, path, reason)]
    size, seen = (None, None) if encoders is None else (encoders.canvas_size, encoders.reader)
    data = stage_data(recipe, stage, vlm.tokenizer, vlm.layout, sources, reader, size, seen, view)
    report = _checked(data, recipe, stage, place, accelerator)
    known = {row.key for row in report.bad}
    report.bad.extend(row for row in unreadable if row.key not in known)
    logger.info("stage '%s': %s", stage.name, report)
    raise_or_quarantine(report.bad, recipe.machine.on_bad_row)
    if accelerator.is_main_process:
        quarantine(place.quarantine(0), stage, report.bad)
    if report.bad:
        data = data.without(report.bad)
    order = stage_order(recipe, index, data)
    return Material(data, order, order.total_updates(stage.optim.epochs, stage.optim.updates), report)


def _checked(
    data: StageData, recipe: Recipe, stage: StageSpec, place: RunDirectory, accelerator: Accelerator
) -> DataReport:
    """`data.check()`, or what it found when this run looked at the same files before.

    A check tokenises every row: minutes for a published data set, and a run may be continued often. Rows in quarantine
    stay there for the whole run: one that is mended between two continuations would shift the order of all others.

    Raises:
        DataError: there are bad rows, and the recipe wants to stop at them.
    """
    marks = ["pictures"] if data.pictures_alone else []
    if data.teacher is not None:
        marks += ["teacher", data.teacher.placeholders]
    seen_as = [stage.max_length, data.placeholders, *marks]
    specs = [source.spec for source in data.sources]
    looked_at = [[_place(one.path), *state(one.path), one.model_dump(mode="json"), *seen_as] for one in specs]
    digest = hashlib.sha256(json.dumps(looked_at).encode()).hexdigest()
    kept = place.path / "data" / f"{digest[:16]}.json"
    lengths = kept.with_suffix(".safetensors")
    with accelerator.main_process_first():  # the others find the main process's report
        found, known = recalled(kept), None
        try:
            known = load(lengths.read_bytes()) if lengths.exists() else None
        except SafetensorError as error:
            logger.warning("%s is damaged (%s): made anew", lengths, error)
            found = None
        if found is not None:
            report = DataReport.restored(found)
            if known is not None:
                data.recall_lengths(known)
        else:
            report = data.check()
            raise_or_quarantine(report.bad, recipe.machine.on_bad_row)
            write_whole(lengths, save(data.known_lengths))
            write_whole(kept, json.dumps(report.as_json()).encode())
    _require_room(recipe, stage, report, sequences=1 if data.preferences is None else 2)
    return report


def _require_room(recipe: Recipe, stage: StageSpec, report: DataReport, sequences: int) -> None:
    """A micro-batch has room for any sample, of so many sequences.

    Raises:
        DataError: it may not.
    """
    grouping = Grouping.of(recipe.machine, stage)
    needed = grouping.positions([report.longest] * sequences)
    if grouping.tokens is not None and needed > grouping.tokens:
        two = " with both its answers" if sequences > 1 else ""
        raise DataError(
            f"stage '{stage.name}': its longest row has {report.longest:,} positions and takes {needed:,} of a "
            f"micro-batch{two}, which has {grouping.tokens:,}. Set machine.tokens to {needed} or more, or "
            f"stages.{stage.name}.max_length to less"
        )


def _place(path: str) -> str:
    return path if is_remote(path) else str(Path(path).absolute())


def quarantine(file: Path, stage: StageSpec, bad: Iterable[BadRow]) -> None:
    """Add rows to a quarantine file, each once, however often the run is continued."""
    lines = file.read_text().splitlines() if file.exists() else []
    entries = [{"stage": stage.name, **asdict(row.key), "field": row.field, "reason": row.reason} for row in bad]
    merged = list(dict.fromkeys([*lines, *(json.dumps(entry) for entry in entries)]))
    if merged != lines:
        write_whole(file, ("\n".join(merged) + "\n").encode())


def _features(
    recipe: Recipe, vlm: VLM | Encoder, accelerator: Accelerator, sources: Sequence[Source]
) -> tuple[FeatureReader, list[BadRow]]:
    """Fill the feature store, every process its share of the pictures; returns rows whose picture can't be decoded."""
    assert recipe.pictures.features is not None
    geometry, size, padding = recipe.pictures.geometry, vlm.layout.size, background(vlm.layout)
    tower = vlm.model.model.vision_tower.to(accelerator.device)  # pyright: ignore
    store = FeatureStore(recipe.pictures.features, vlm.layout, fingerprint(tower), geometry)
    paths = dict.fromkeys(path for source in sources for record in source.records for path in record.images)

    def fill(rank: int, world: int) -> dict[str, str]:
        return store.fill(
            paths,
            vlm,
            lambda path: canvas(decode(path), geometry, size, padding),
            batch=32,
            rank=rank,
            world=world,
            skip_unreadable=recipe.machine.on_bad_row == "quarantine",
        )

    fill(accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    unreadable = fill(0, 1)  # nothing is left to compute: it tells what other processes could not read
    return store.reader(), [bad for path, reason in unreadable.items() for bad in _owners(sources, path, reason)]


def _owners(sources: Sequence[Source], path: str, reason: str) -> list[BadRow]:
    """The rows that show a picture which could not be read."""
    records = (record for source in sources for record in source.records)
    return [BadRow(record.key, "image", reason) for record in records if path in record.images]
