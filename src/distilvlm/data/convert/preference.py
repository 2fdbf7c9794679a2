"""Preferences in tables: RLAIF-V as published, pairs and rated answers in the forms that the readers take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distilvlm.data.convert import conversations, datasets, parquet
from distilvlm.data.convert.arrow import store
from distilvlm.data.convert.embedded import Store, pictures, shown_pictures
from distilvlm.data.convert.items import IMAGE_TOKEN, Item, Reading, Turn
from distilvlm.data.convert.tables import PICTURE_COLUMNS, Table, column, identity, kept, made, named
from distilvlm.data.convert.talk import turns
from distilvlm.data.convert.vqa import ID_FIELDS
from distilvlm.data.preferences import PROMPTS, family, form, label, sides
from distilvlm.data.problems import DataError, RowError
from distilvlm.data.turns import Placed

QUESTIONS = (*PROMPTS, "question", "query")
"""Columns of a prompt; RLAIF-V's is `question`."""


def read(
    source: Path,
    images: Path | None = None,
    *,
    split: str | None = None,
    rated: bool = False,
    image_field: str | None = None,
    question_field: str | None = None,
    chosen_field: str | None = None,
    rejected_field: str | None = None,
) -> Reading:
    """Pairs of answers (or rated ones), a row each.

    RLAIF-V-Dataset on the hub has `image` {bytes, path}, `question`, `chosen` and `rejected` as text, and `ds_name`,
    `origin_dataset`, `origin_split`, `idx` and `image_path`, which are kept as `meta`. Answers may also be turns or
    whole conversations, and a rated answer is `completion`, or ends `conversations` or `messages`, with `label` true or
    false (TRL's forms; what this package writes).

    Args:
        source: parquet files (a file, a directory, a pattern with `*`), a directory that `save_to_disk` wrote, or a
            JSON list or JSONL file.
        images: where embedded pictures are written to; of a JSON file, where its pictures lie (default: beside it).
        split: as `parquet` and `datasets`.
        rated: write each pair as two rated answers, for methods that learn from single ones.
        image_field, question_field, chosen_field, rejected_field: default: usual names.

    Raises:
        DataError: the files can't be read, or a column is not there.
    """
    is_json = conversations.is_json(source)
    if is_json and split is not None:
        raise DataError(f"{source} is one file without splits: leave split out")
    table = conversations.table(source) if is_json else _arrow(source, split)
    image = column("image", image_field, PICTURE_COLUMNS, table.names, source, needed=False) or "image"
    question = column("question", question_field, QUESTIONS, table.names, source, needed=False)
    is_rated = "label" in table.names and not (chosen_field or rejected_field or "chosen" in table.names)
    names = {} if question is None or (question in PROMPTS and question_field is None) else {question: "prompt"}
    if not is_rated:
        for side, given in (("chosen", chosen_field), ("rejected", rejected_field)):
            names[str(column(side, given, (side,), table.names, source))] = side
    pictured = None if is_json else store(images, source)

    def item(file: str, number: int, row: Mapping[str, Any]) -> Item:
        return _item(file, number, named(row, table.labels), names, image, pictured)

    root = (images or source.parent).absolute() if pictured is None else pictured.directory
    return Reading(root, made(table.rows, item), rated=rated)


def _arrow(source: Path, split: str | None) -> Table:
    return datasets.table(source, split) if datasets.is_saved(source) else parquet.table(source, split)


def _item(
    file: str, number: int, row: Mapping[str, Any], names: Mapping[str, str], image: str, store: Store | None
) -> Item:
    """Raises ValueError: (place, what is wrong)."""
    called = {known: name for name, known in names.items()}
    told = {
        names.get(name, name): value.strip() if isinstance(value, str) else value
        for name, value in row.items()
        if value is not None and (name in names or name not in called)
    }
    told |= {side: None for side in ("chosen", "rejected") if side in called and side not in told}
    images = pictures(row.get(image), image, store)
    is_rated = family(told) == "rated"
    try:
        talks = sides(told, form(told) or "messages")
        desirable = label(told) if is_rated else None
    except RowError as error:
        raise ValueError(called.get(error.field, error.field), error.reason) from None
    spoken = [_spoken(key, talk, images, image, store) for key, talk in talks]
    if len({shown for _, shown in spoken}) > 1:
        raise ValueError("rejected", "shows other pictures than chosen: both must show the same, in order")
    first, shown = spoken[0]
    scalars = kept(row)
    used = {image, *names, *PROMPTS, "chosen", "rejected", *(("completion", "label") if is_rated else ()), *ID_FIELDS}
    return Item(
        file=file,
        row=number,
        id=identity(row, number, (*ID_FIELDS, "idx")),
        images=shown,
        turns=first,
        fields=scalars,
        meta={key: value for key, value in scalars.items() if key not in used},
        marked=any(IMAGE_TOKEN in turn.text for turns, _ in spoken for turn in turns if turn.speaker == "human"),
        image_field=image,
        other=spoken[1][0] if len(spoken) > 1 else (),
        desirable=desirable,
    )


def _spoken(
    key: str, talk: Placed, images: tuple[str, ...], place: str, store: Store | None
) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    spoken, shown = turns([turn for _, turn in talk], key, [where for where, _ in talk])
    return spoken, shown_pictures(images, place, shown, key, store)
