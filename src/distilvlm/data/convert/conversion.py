"""From a source in any known format to LLaVA rows in a JSONL file, whole or not at all."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import yaml

from distilvlm.data.convert import (
    conversations,
    datasets,
    folders,
    grounded,
    parquet,
    preference,
    refcoco,
    voc,
    vqa,
    yolo,
)
from distilvlm.data.convert.items import Fault, Item, Reading
from distilvlm.data.convert.output import lines, row, write_whole
from distilvlm.data.convert.pictures import Pictures
from distilvlm.data.convert.split import held_out
from distilvlm.data.preferences import check_family, family
from distilvlm.data.problems import SHOWN, DataError, RowError
from distilvlm.data.readers import check_llava
from distilvlm.data.records import Preferences

logger = logging.getLogger(__name__)

FORMATS: dict[str, Callable[..., Reading]] = {
    "folders": folders.read,
    "yolo": yolo.read,
    "voc": voc.read,
    "vqa": vqa.read,
    "conversations": conversations.read,
    "parquet": parquet.read,
    "datasets": datasets.read,
    "preference": preference.read,
    "refcoco": refcoco.read,
    "grounded": grounded.read,
}

EMBEDDED = frozenset({"parquet", "datasets", "preference"})
"""Formats that hold the pictures themselves (JSON files do not): they are written to `images`, by default `pictures`
beside OUT."""

Where = Mapping[str, Any]
"""Field → the value that a row must have in it to be kept, or a list of which it must have one."""


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote and what it did not."""

    train: Path  # OUT, or OUT-train where some was held out
    test: Path | None
    images: Path  # the directory that rows name their pictures from
    rows: int  # of both files
    pictures: int  # different files that the rows of both show
    answers: int
    test_rows: int
    test_pictures: int
    left_out: Mapping[str, int]  # reason → items
    bad: tuple[Fault, ...]  # left out, too: only with on_bad_row="quarantine"
    bad_file: Path | None
    preferences: Preferences | None = None  # what the rows are, if they are no plain conversations

    def entry(self, beside: Path | None = None) -> str:
        """The recipe's `data:` section for these files, for a recipe in the directory `beside` (default: of OUT)."""
        beside = (beside or self.train.parent).absolute()
        images = os.path.relpath(self.images, beside)
        sources: dict[str, dict[str, Any]] = {}
        for path, rows in ((self.train, self.rows - self.test_rows), (self.test, self.test_rows)):
            if path is not None:
                file = os.path.relpath(path.absolute(), beside)
                sources[path.stem] = {"path": file, "images": images, "rows": rows}
        return yaml.safe_dump({"data": sources}, sort_keys=False, allow_unicode=True).rstrip()


def convert(
    format: str,
    source: str | Path,
    out: str | Path,
    *,
    images: str | Path | None = None,
    where: Where | None = None,
    one_per_picture: bool = False,
    turns: int | None = None,
    hold_out: float = 0.0,
    seed: int = 0,
    on_bad_row: Literal["fatal", "quarantine"] = "fatal",
    **options: Any,
) -> Converted:
    """Write the rows of `source` as LLaVA JSONL to `out`.

    Each row is `{"id", "image", "conversations", "meta"}`; `meta` is what else the source says of it. Preferences have
    two conversations, or a label (see `output.row`). Pictures that lie on the disk stay where they are. Nothing is
    written unless everything is.

    Args:
        format: a key of FORMATS; `options` are those of its module's `read`.
        images: directory of the pictures; default: what the format says (EMBEDDED: where they are written).
        where: keep only rows whose fields have these values (white space around them does not count).
        one_per_picture: the questions of a picture become turns of one conversation, as LLaVA does it: its visual
            tokens are then paid for once.
        turns: at most so many questions in a conversation; the rest makes further ones.
        hold_out: share of the pictures that go to a test file, by content (see `split.held_out`). `out` x.jsonl then
            becomes x-train.jsonl and x-test.jsonl.
        seed: of the split.
        on_bad_row: "quarantine" lists what can't be used in x-bad.jsonl and goes on.

    Raises:
        DataError: the source or an option can't be used; rows that can't (lists them, unless quarantined).
    """
    source, out = Path(source), Path(out)
    _check_options(format, out, hold_out, turns, one_per_picture)
    if images is None and format in EMBEDDED and not conversations.is_json(source):
        images = out.parent / "pictures"
    reading = _reader(format, options)(source, None if images is None else Path(images), **options)
    pictures = Pictures(reading.images)
    items, bad = _usable(reading, where or {}, pictures)
    bad_file = None
    if bad:
        if on_bad_row == "fatal":
            raise DataError(listing(bad))
        bad_file = named_beside(out, "bad")
    if not items:
        raise DataError(f"{source}: no row is left to write; left out: {_reasons(reading.left_out, len(bad))}")
    if one_per_picture:
        items = _conversations(items, turns)
    if reading.rated:
        items = _unpaired(items)

    away = held_out(items, hold_out, seed, pictures.digest) if hold_out else [False] * len(items)
    test = [item for item, is_away in zip(items, away, strict=True) if is_away]
    train = [item for item, is_away in zip(items, away, strict=True) if not is_away]
    if hold_out and not (test and train):
        side = "test" if train else "training"
        raise DataError(
            f"hold_out={hold_out}: no picture of {len(_shown(items))} fell to the {side} side; take another"
        )
    train_file, test_file = (named_beside(out, "train"), named_beside(out, "test")) if hold_out else (out, None)
    files = {train_file: lines(train)}
    if test_file is not None:
        files[test_file] = lines(test)
    if bad_file is not None:
        files[bad_file] = b"".join(json.dumps(asdict(fault)).encode() + b"\n" for fault in bad)
    write_whole(files, [named_beside(out, "bad")])
    return Converted(
        train=train_file,
        test=test_file,
        images=reading.images,
        rows=len(items),
        pictures=len(_shown(items)),
        answers=sum(turn.speaker == "gpt" for item in items for turn in item.turns),
        test_rows=len(test),
        test_pictures=len(_shown(test)),
        left_out=dict(reading.left_out),
        bad=tuple(bad),
        bad_file=bad_file,
        preferences=items[0].preferences,
    )


def _check_options(format: str, out: Path, hold_out: float, turns: int | None, one_per_picture: bool) -> None:
    if format not in FORMATS:
        raise DataError(f"no format '{format}'; known are {', '.join(FORMATS)}")
    if out.suffix != ".jsonl":
        raise DataError(f"out: {out} must end in .jsonl, which it becomes")
    if not 0 <= hold_out < 1:
        raise DataError(f"hold_out: {hold_out} is no share of the pictures: from 0 to less than 1")
    if turns is not None and (turns < 1 or not one_per_picture):
        raise DataError("turns: a number of at least 1, together with one_per_picture")


def _reader(format: str, options: Mapping[str, Any]) -> Callable[..., Reading]:
    reader = FORMATS[format]
    known = [name for name, p in inspect.signature(reader).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise DataError(f"format '{format}' has no option '{name}'; it has {', '.join(known)}")
    return reader


def _usable(reading: Reading, where: Where, pictures: Pictures) -> tuple[list[Item], list[Fault]]:
    wanted = {
        name: [_text(value) for value in (values if isinstance(values, (list, tuple)) else [values])]
        for name, values in where.items()
    }
    items: list[Item] = []
    bad: list[Fault] = []
    fields: set[str] = set()
    first: dict[str, Any] | None = None
    for item in reading.items:
        if isinstance(item, Fault):
            bad.append(item)
            continue
        fields.update(map(str, item.fields))
        unwanted = next((name for name, values in wanted.items() if not _is_in(item.fields.get(name), values)), None)
        if unwanted is not None:
            reading.left_out[f"{unwanted} is not {' or '.join(wanted[unwanted])}"] += 1
            continue
        problems = [problem for name in item.images if (problem := pictures.problem(name)) is not None]
        if problems:
            bad.append(item.fault(item.image_field, problems[0]))
            continue
        made = row(item)
        first = made if first is None else first
        try:
            check_family(made, family(first))
            check_llava(made, reading.images)
        except RowError as error:
            bad.append(item.fault(error.field, error.reason))
        else:
            items.append(item)
    for name in wanted:
        if name not in fields:
            raise DataError(f"where: no row has a field '{name}'; there are {', '.join(sorted(fields)) or 'none'}")
    return items, bad


def _is_in(value: Any, values: Sequence[str]) -> bool:
    return value is not None and _text(value) in values


def _text(value: Any) -> str:
    """A value as it is typed: true and false as JSON and YAML have them."""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _conversations(items: Sequence[Item], turns: int | None) -> list[Item]:
    """Items about one same picture joined, in order, where the picture first comes.

    Raises:
        DataError: there are preferences among them, which are of one answer.
    """
    if any(item.preferences for item in items):
        raise DataError("one_per_picture: answers that are compared or rated can't be joined; leave it out")
    by_picture: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        one_question = [turn.speaker for turn in item.turns] == ["human", "gpt"]
        joins = len(item.images) == 1 and one_question and not item.marked
        by_picture.setdefault(item.images if joins else ("", item.file, str(item.row), item.id), []).append(item)
    joined: list[Item] = []
    for group in by_picture.values():
        waiting = iter(group)
        while part := list(islice(waiting, turns)):
            joined.append(part[0] if len(part) == 1 else _joined(part))
    return joined


def _joined(items: Sequence[Item]) -> Item:
    first = items[0]
    turns = tuple(turn for item in items for turn in item.turns)
    meta = {"turns": [{"id": item.id, **item.meta} for item in items]}
    return Item(first.file, first.row, first.id, first.images, turns, {}, meta)


def _unpaired(items: Sequence[Item]) -> list[Item]:
    """Pairs as two rated answers each. All good ones come first, so that a rated answer is not followed by another to
    its own question (training compares it with the next row's, see `StageData`).

    Raises:
        DataError: there are no pairs.
    """
    if any(item.preferences != "pairs" for item in items):
        raise DataError("rated: only pairs become rated answers, and these rows are none; leave it out")
    good = [replace(item, id=f"{item.id}:chosen", other=(), desirable=True) for item in items]
    bad = [replace(item, id=f"{item.id}:rejected", turns=item.other, other=(), desirable=False) for item in items]
    return [*good, *bad]


def _shown(items: Sequence[Item]) -> set[str]:
    return {name for item in items for name in item.images}


def named_beside(out: Path, part: str) -> Path:
    """NAME-part.jsonl beside NAME.jsonl."""
    return out.with_name(f"{out.stem}-{part}{out.suffix}")


def listing(bad: Sequence[Fault]) -> str:
    """What is said of rows that stop a conversion."""
    lines = [f"  {fault}" for fault in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"  ... and {len(bad) - SHOWN} more")
    count = "1 row can't" if len(bad) == 1 else f"{len(bad)} rows can't"
    advice = "Mend them, or leave them out and list them in a file: on_bad_row quarantine (--on-bad-row quarantine)."
    return "\n".join([f"{count} be converted:", *lines, advice])


def _reasons(left_out: Counter[str], bad: int) -> str:
    reasons = [f"{count} ({reason})" for reason, count in left_out.items()]
    return ", ".join([*reasons, *([f"{bad} (bad rows)"] if bad else [])]) or "none"
