"""Identities of a data set's records, kept on disk: a run that starts again need not write and hash every record anew,
which takes minutes for a published data set and its pictures.

They are of a data file's content, its template, the tokenizer and how long a row may be; where one of these has changed
they are made anew. A picture is taken for the same while its file's size and time of change are; what trains is told by
its content all the same, because a sample brings its own identity from the loader (`StageData`).

    DIRECTORY/HASH.safetensors   of a data file as a stage reads it: rows, answers, responses, pictures, their states
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from distilvlm.data import Source, StageData
from distilvlm.data.identity import LENGTH, Identity
from distilvlm.data.streams import content
from distilvlm.models.files import write_whole

VERSION = 1
"""Of what makes identities, beside the versions of packages."""

UNKNOWN = -1
"""Stands in `responses` of a record that was not asked for yet."""


def identities(data: StageData, indices: Iterable[int], directory: Path) -> Iterator[tuple[int, Identity]]:
    """Each index with `data.identity` of it, from what `directory` has as far as it goes; the rest is added to it.

    Raises:
        RowError, PictureError: a record can't be used.
    """
    kept = [_Kept(data, source, directory) for source in data.sources]
    try:
        for index in indices:
            number, record = data.place(index)
            yield index, kept[number].identity(index, record)
    finally:
        for one in kept:
            one.write()


class _Kept:
    """Of one source. Pictures stand in columns, as many as a record has at most."""

    def __init__(self, data: StageData, source: Source, directory: Path) -> None:
        self.data, self.source = data, source
        template = data.templates[source.spec.template]
        told = json.dumps([str(Path(source.spec.path).absolute()), template.kind, data.max_length])
        self.file = directory / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.safetensors"
        self.facts = json.dumps(
            {
                "version": VERSION,
                "packages": {name: importlib.metadata.version(name) for name in ("distilvlm", "tokenizers")},
                "file": content(source.spec.path),
                "format": source.spec.format,
                "images": str(source.records.root),
                "template": str(template.tokenizer.chat_template),
                "tokenizer": hashlib.sha256(template.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
                "placeholders": data.placeholders,
            },
            sort_keys=True,
        )
        records, columns = len(source.records), int(source.records.pictures.max(initial=0))
        self.answers = np.zeros((records, LENGTH // 2), np.uint8)
        self.responses = np.full(records, UNKNOWN, np.int32)
        self.pictures = np.zeros((records, columns, LENGTH // 2), np.uint8)
        self.states = np.zeros((records, columns, 2), np.int64)  # bytes and nanoseconds of each picture's file
        self.changed = False
        self._read()

    def identity(self, index: int, record: int) -> Identity:
        images = self.data.record(index).images
        states = [_state(path) for path in images]
        own = self.states[record, : len(images)]
        if self.responses[record] != UNKNOWN and own.tolist() == states:
            pictures = (key.tobytes().hex() for key in self.pictures[record, : len(images)])
            return Identity(self.answers[record].tobytes().hex(), tuple(pictures), int(self.responses[record]))
        found = self.data.identity(index)
        self.answers[record] = _bytes(found.answers)
        self.responses[record] = found.responses
        for column, key in enumerate(found.pictures):
            self.pictures[record, column] = _bytes(key)
            self.states[record, column] = states[column]
        self.changed = True
        return found

    def write(self) -> None:
        if self.changed:
            tensors = {name: getattr(self, name) for name in ("answers", "responses", "pictures", "states")}
            tensors["rows"] = self.source.records.rows
            write_whole(self.file, lambda partial: save_file(tensors, partial, {"facts": self.facts}))
            self.changed = False

    def _read(self) -> None:
        """Take over what is of the same facts, row by row: other rows may be unusable now."""
        if not self.file.exists():
            return
        with safe_open(self.file, "numpy") as file:
            if file.metadata()["facts"] != self.facts:
                return
            kept: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        _, ours, theirs = np.intersect1d(self.source.records.rows, kept["rows"], return_indices=True)
        columns = min(self.pictures.shape[1], kept["pictures"].shape[1])
        self.answers[ours], self.responses[ours] = kept["answers"][theirs], kept["responses"][theirs]
        self.pictures[ours, :columns] = kept["pictures"][theirs, :columns]
        self.states[ours, :columns] = kept["states"][theirs, :columns]


def _state(path: str) -> list[int]:
    """What a change of a picture shows in; nothing that is kept is like one that is not there."""
    try:
        found = os.stat(path)  # noqa: PTH116 - of a path of text, for every picture of a data set
    except OSError:
        return [-1, -1]
    return [found.st_size, found.st_mtime_ns]


def _bytes(key: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(key), np.uint8)
