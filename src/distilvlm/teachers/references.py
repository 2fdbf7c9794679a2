"""Log-probabilities that a reference gives to the answers of preference records, once per record and kept on disk.

A preference loss needs nothing else of its reference, so two numbers a record stand for the teacher, which can leave
memory before the stage begins (LLaVA-MoD's code runs it twice in every step).

The store is a directory of JSONL files, each written whole: {"key", "first", "second"}, log-probabilities in nats. A
record's key covers its tokens, what of them counts and its pictures; the store's name covers the reference itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection
from pathlib import Path

from torch import Tensor

from distilvlm.data import Batch, Grouping, StageData
from distilvlm.data.collate import collate
from distilvlm.losses import Answers
from distilvlm.models.files import write_whole

from .local import LocalTeacher
from .remote import RemoteTeacher

logger = logging.getLogger(__name__)

RECORDS = 256
"""Records of one file: what a killed run computes again, at most."""

BYTES = 134
"""Of a record in the store, about."""


class References:
    """What a teacher thinks of preference records.

    Args:
        directory: where stores lie; one below it is this teacher's.
        teacher: the reference.
        precision: dtype of products, as autocast names it; part of the store's name.
    """

    def __init__(self, directory: Path, teacher: LocalTeacher | RemoteTeacher, precision: str) -> None:
        facts = f"{teacher.identity} {precision}"
        self.place = directory / hashlib.sha256(facts.encode()).hexdigest()[:16]
        self.teacher = teacher

    def fill(
        self,
        data: StageData,
        grouping: Grouping,
        rank: int = 0,
        world: int = 1,
        wait: Callable[[], None] = lambda: None,
        shown: Collection[int] | None = None,
    ) -> dict[int, tuple[float, float]]:
        """Compute what is not kept yet, every process its share; returns both log-probabilities of each record.

        Args:
            data: of the stage, without reference log-probabilities.
            grouping: which records go through the teacher together. Under autocast, products run in its dtype.
            wait: returns when every process has called it.
            shown: the records that the stage shows, if that is not all of them.

        Raises:
            DataError: a record can't be loaded.
        """
        keys = {index: data.preference_key(index) for index in sorted(range(len(data)) if shown is None else shown)}
        known = self._kept()
        wait()  # nobody writes before everybody has read: each would leave out other records
        first: dict[str, int] = {}  # a record that comes twice is looked at once
        for index, key in keys.items():
            first.setdefault(key, index)
        missing = [index for key, index in first.items() if key not in known]
        if missing:
            logger.info("reference: %d of %d records are looked at by the teacher", len(missing), len(keys))
        for start in range(rank * RECORDS, len(missing), world * RECORDS):
            own = missing[start : start + RECORDS]
            pairs = self._look(data, own, grouping)
            self._write([(keys[index], *pair) for index, pair in zip(own, pairs, strict=True)])
        wait()
        known = self._kept()
        return {index: known[key] for index, key in keys.items()}

    def _look(self, data: StageData, indices: list[int], grouping: Grouping) -> list[tuple[float, float]]:
        found: dict[int, tuple[float, float]] = {}
        for members in grouping.split([(0, index) for index in indices], data.sequence_lengths):
            batch = collate([data[at] for at in members], grouping.packed).to(self.teacher.student_device)
            both = self._of(batch).view(-1, 2).tolist()
            found |= {index: (float(a), float(b)) for (_, index), (a, b) in zip(members, both, strict=True)}
        return [found[index] for index in indices]

    def _of(self, batch: Batch) -> Tensor:
        """[samples] log-probability of each answer."""
        given = self.teacher.targets(batch, batch.response_rows, batch.features)
        assert given.hidden is not None and given.head is not None  # both kinds of reference are exact
        rows = batch.response_rows
        answers = Answers.of(given.hidden, given.head, rows, batch.owners_of(rows), rows, batch.response_targets)
        return answers.log_probabilities(batch.samples)

    def _kept(self) -> dict[str, tuple[float, float]]:
        known: dict[str, tuple[float, float]] = {}
        for file in sorted(self.place.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                known[entry["key"]] = (entry["first"], entry["second"])
        return known

    def _write(self, entries: list[tuple[str, float, float]]) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"key": key, "first": a, "second": b}) for key, a, b in entries]
        name = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
        write_whole(self.place / f"{name}.jsonl", ("\n".join(lines) + "\n").encode())
