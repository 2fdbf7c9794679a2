"""What a conversion writes: items as rows in the one record form, files whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distilvlm.data.convert.items import IMAGE_TOKEN, Item, Turn
from distilvlm.data.problems import DataError


def lines(items: Sequence[Item]) -> bytes:
    """JSONL."""
    return b"".join(json.dumps(row(item), ensure_ascii=False).encode("utf-8", "replace") + b"\n" for item in items)


def row(item: Item) -> dict[str, Any]:
    """An item in LLaVA's form. Its picture's place is in front of the first question, where LLaVA has it.

    A pair is two whole conversations, `chosen` and `rejected` (LLaVA-MoD's form); a rated answer ends a conversation
    with a `label`.
    """
    row: dict[str, Any] = {"id": item.id}
    if item.images:
        row["image"] = item.images[0] if len(item.images) == 1 else list(item.images)
    if item.other:
        row["chosen"] = _talk(item, item.turns)
        row["rejected"] = _talk(item, item.other)
    else:
        row["conversations"] = _talk(item, item.turns)
    if item.desirable is not None:
        row["label"] = item.desirable
    if item.meta:
        row["meta"] = dict(item.meta)
    return row


def _talk(item: Item, turns: Sequence[Turn]) -> list[dict[str, str]]:
    talk = [{"from": turn.speaker, "value": turn.text} for turn in turns]
    first = next((turn for turn in talk if turn["from"] == "human"), None)
    if item.images and not item.marked and first is not None:
        first["value"] = (f"{IMAGE_TOKEN}\n" * len(item.images) + first["value"]).rstrip("\n")
    return talk


def write_whole(files: Mapping[Path, bytes], stale: Sequence[Path]) -> None:
    """All files under another name first, then renamed: a full disk or a kill leaves no half of a file behind.

    What an earlier conversion left under `stale` goes, and several files go before they are replaced: a training file
    must not stand beside the test file of another split.
    """
    partial = {path: path.with_name(f".partial-{uuid.uuid4().hex[:12]}-{path.name}") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial[path].open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        for path in [*stale, *(files if len(files) > 1 else ())]:
            path.unlink(missing_ok=True)
        for path, written in partial.items():
            written.replace(path)
    finally:
        for written in partial.values():
            written.unlink(missing_ok=True)


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Where to write what becomes `out`, a file or a directory, if nothing is raised; of anything else nothing is left.

    Raises:
        DataError: `out` is there already.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise DataError(f"{out} is there already: remove it, or name another (out)")
    partial = out.with_name(f".partial-{uuid.uuid4().hex[:12]}-{out.name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        partial.replace(out)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
