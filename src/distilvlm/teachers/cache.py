"""What a teacher thinks, on disk: computed once, record by record, for all runs that show the same to it.

    CACHE/                 shards as models/shards.py keeps them, refused if what made them has changed, and
      head.safetensors     the teacher's head, where hidden rows are kept
      weights.json         the hash of the teacher's weights, remembered while its files stay as they are
      identities/          the keys of records that were shown, so that they are not made again
      nearness.json        how near what is kept was to a teacher that computes in micro-batches
      quantised.json       how far a teacher in 8 or 4 bits is from its weights in bf16

A record's answers lie under the key of its tokens and pictures, a picture's visual rows under the key of the picture
and all before it (data/identity.py), computed with the first record that shows them. Every record is a forward of its
own, so what is kept does not depend on its neighbours, on the number of processes or on kills. It has the bits of a
local teacher's with `machine.micro_batch: 1`, if a picture's rows are of the record at hand or of one of its padded
length; otherwise products of other shapes round otherwise, and nearness.py says how much it comes to.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distilvlm.data import StageData
from distilvlm.data.stage import background
from distilvlm.models import forward, parts
from distilvlm.models.compose import build
from distilvlm.models.files import write_whole
from distilvlm.models.fingerprint import fingerprint
from distilvlm.models.shards import ShardStore, about_shard, hash_of
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe

from .identities import identities
from .interface import TeacherError
from .keeping import Item, Keeping
from .loading import local_teacher, weights_of
from .local import LocalTeacher, meanings, require_same_meanings, require_same_visual_tokens
from .reduced import rest
from .weights import remembered

RECORDS, BYTES = 256, 2**28
"""Of a shard, at most: what a killed fill computes again."""

TIMED = 3
"""Times that the record of median length is looked at to say how long all take."""


@dataclass(frozen=True, eq=False)
class Record:
    """A record that stages show."""

    data: StageData
    index: int
    source: str
    length: int


@dataclass(frozen=True)
class Asked:
    """Key -> the first record that gives it, and its bytes; in the order in which they are computed."""

    records: dict[str, Record]
    bytes: dict[str, int]


@dataclass(frozen=True)
class TeacherExpense:
    """What filling the cache takes."""

    records: dict[str, int]  # source -> records that the teacher has to look at
    bytes: int  # on disk
    seconds: float  # of one process


class TeacherCache:
    """The cache of a recipe's teacher.

    Args:
        student: whose rows the targets are of; what counts is its tokenizer, its layout and the length of its
            vocabulary.
        student_device: where targets are wanted.

    Raises:
        FeatureError: the cache was made otherwise; says what of teacher, tokenizer, template, preprocessing, precision
            or of what is kept has changed.
        TeacherError: teacher and student can't be compared row by row.
        NotHere: the teacher's directory is not there.
    """

    def __init__(self, recipe: Recipe, student: VLM, student_device: torch.device) -> None:
        assert recipe.teacher is not None
        self.recipe, self.spec, self.keep = recipe, recipe.teacher, recipe.teacher.keep
        self.student_device = student_device
        self.outline = build(self.spec, recipe.seed, meta=True)
        require_same_meanings(meanings(student), meanings(self.outline))
        require_same_visual_tokens(self.outline.layout, student.layout)
        self._student, self._vlm, self._local = student, None, None
        vocabulary, width = forward.head_weight(self.outline.model).shape
        self.keeping = Keeping(
            self.keep,
            min(vocabulary, forward.head_weight(student.model).shape[0]),
            width,
            sum(student.layout.visual),
            torch.bfloat16 if self.spec.held == "bf16" else torch.float32,
            recipe.machine.precision == "bf16",
        )
        self.directory = Path(self.keep.path).absolute()
        self.quantised = self.directory / "quantised.json"
        self.head_file = self.directory / "head.safetensors"
        self.keeps_head = "hidden" in (self.keep.responses, self.keep.visual)
        self.store = ShardStore(self.directory, self._made_with())

    def asked(self, shown: Mapping[str, tuple[StageData, Collection[int]]]) -> Asked:
        """The keys of what stages show.

        Args:
            shown: stage -> its data and the samples that are shown.

        Raises:
            RowError, PictureError: a record can't be used.
        """
        records: dict[str, Record] = {}
        sizes: dict[str, int] = {}
        for stage in self.recipe.stages:
            data, indices = shown.get(stage.name, (None, ()))
            visual = bool(stage.loss.visual or stage.loss.relation)
            if data is None:
                continue
            lengths = data.lengths  # of all samples, made anew each time
            for index, identity in identities(data, indices, self.directory / "identities"):
                source = data.sources[data.place(index)[0]].name
                one = Record(data, index, source, int(lengths[index]))
                for key, size in self.keeping.sizes(identity, visual).items():
                    records.setdefault(key, one)
                    sizes.setdefault(key, size)
        return Asked(records, sizes)

    def complete(self, asked: Asked) -> bool:
        """Whether nothing is missing."""
        return not self.store.missing(asked.records) and (self.head_file.exists() or not self.keeps_head)

    def expense(self, asked: Asked) -> TeacherExpense:
        """What filling takes; the teacher is loaded and timed where something is missing."""
        missing = self.store.missing(asked.records)
        records = {asked.records[key] for key in missing}
        size = sum(asked.bytes[key] for key in missing)
        if not records:
            return TeacherExpense({}, size, 0.0)
        middle = sorted(records, key=lambda record: record.length)[len(records) // 2]
        teacher, times = self.teacher(), list[float]()
        for _ in range(TIMED):
            start = time.perf_counter()
            self.keeping.of_sample(middle.data[0, middle.index], teacher, missing)
            times.append(time.perf_counter() - start)
        sources = Counter(record.source for record in records)
        return TeacherExpense(dict(sources), size, statistics.median(times) * len(records))

    def require_room(self, expense: TeacherExpense) -> None:
        """Raises TeacherError where the disk has less room than the cache would take."""
        free = shutil.disk_usage(self.directory).free
        if expense.bytes > free:
            raise TeacherError(
                f"the teacher's cache needs {expense.bytes / 1e9:.1f} GB more, and {self.directory} has "
                f"{free / 1e9:.1f} GB free: give another teacher.keep.path, or keep less (teacher.keep.responses: "
                "top_k, teacher.keep.visual: relation, teacher.keep.precision: bf16)"
            )

    def fill(
        self, asked: Asked, rank: int = 0, world: int = 1, progress: Callable[[int, int], object] | None = None
    ) -> None:
        """Compute what is missing, every process its share of the shards; go on after a kill by calling it again.

        Args:
            progress: called with the keys that are done, those of earlier fills included, and their total.

        Raises:
            DataError: a record can't be loaded.
        """
        if self.keeps_head and not self.head_file.exists():
            head = {"head": self.teacher().head.detach().cpu().contiguous()}
            about = {"about": json.dumps({"sha256": hash_of(head)})}
            write_whole(self.head_file, lambda partial: save_file(head, partial, about))
        wanted = asked.records.keys()
        with self.store.filling(wanted):
            shards = self.store.plan(wanted, lambda new: _grouped(new, asked))
            mine = [(i, keys) for i, keys in enumerate(shards) if not wanted.isdisjoint(keys)]
            total, done = sum(len(keys) for _, keys in mine), 0
            for number, (i, keys) in enumerate(mine):
                if not self.store.place(i).exists():
                    if number % world != rank or not wanted >= set(keys):
                        continue  # another process's, or of another run that is filling this cache, too
                    items = self._computed(keys, asked)
                    self.store.write(i, items, ragged=True, rest=_rest_of(items))
                done += len(keys)
                if progress:
                    progress(done, total)

    def require(self, asked: Asked) -> None:
        """Raises TeacherError where something is missing; says how much of which source."""
        if missing := self.store.missing(asked.records):
            lacking = Counter(record.source for record in {asked.records[key] for key in missing})
            told = ", ".join(f"{count} records of source '{source}'" for source, count in sorted(lacking.items()))
            raise TeacherError(
                f"{self.directory} lacks what the teacher thinks of {told}. If another process is filling it, start "
                "again when it is done; else fill it: distilvlm cache RECIPE"
            )

    def teacher(self) -> LocalTeacher:
        """The teacher in this process, loaded when it is first asked for."""
        if self._local is None:
            vlm = self._vlm or weights_of(self.recipe)
            self._local, self._vlm = local_teacher(self.recipe, self._student, self.student_device, vlm), None
        return self._local

    def release(self) -> None:
        """Let the teacher leave memory."""
        self._local = self._vlm = None
        self.keeping.release()

    def _made_with(self) -> dict[str, object]:
        """By the names that a refusal calls them."""
        keep, layout = self.keep, self._student.layout
        counts = {"top_k": keep.top_k, "sampled": keep.draws}
        reduced = keep.responses != "hidden" or keep.visual == "relation"
        vocabulary = json.dumps(sorted(meanings(self.outline).items())).encode()
        template = str(getattr(self._student.tokenizer, "chat_template", None))

        def weights() -> str:
            self._vlm = weights_of(self.recipe)
            return fingerprint(self._vlm.model, beside=parts.beside(self._vlm.model))

        return {
            "version": 1,
            "teacher: weights": remembered(self.directory / "weights.json", self.spec, self.recipe.seed, weights),
            "tokenizer": hashlib.sha256(vocabulary).hexdigest(),
            "template: chat": hashlib.sha256(template.encode()).hexdigest(),
            "preprocessing: size, mean and deviation": [layout.size, *layout.mean, *layout.std],
            "preprocessing: geometry": self.recipe.pictures.geometry,
            "preprocessing: colour of padding": list(background(layout)),
            "preprocessing: backend": f"Pillow {PIL.__version__.partition('.')[0]}",  # pixels change with the first
            "preprocessing: tokens of a picture": [layout.placeholders, self.keeping.visual_rows],
            "precision: weights": self.spec.precision,
            "precision: products": self.recipe.machine.precision,
            "precision: kept": keep.precision,
            "kept: of answers": keep.responses,
            "kept: ids of a row": counts.get(keep.responses),
            "kept: of pictures": keep.visual,
            "kept: ids that are compared": self.keeping.common if reduced else None,
        }

    def _computed(self, keys: list[str], asked: Asked) -> list[Item]:
        """What is kept under each key; keys that one record gives stand together."""
        items: list[Item] = []
        last: Record | None = None
        found: dict[str, Item] = {}
        for key in keys:
            record = asked.records[key]
            if record is not last:
                last = record
                found = self.keeping.of_sample(record.data[0, record.index], self.teacher(), keys)
            items.append(found.get(key, {}))
        return items


def read_head(cache: TeacherCache) -> Tensor:
    """The kept head, on the CPU. Raises TeacherError where it is not what was written."""
    tensors = load_file(cache.head_file)
    if hash_of(tensors) != about_shard(cache.head_file)["sha256"]:
        raise TeacherError(f"{cache.head_file} is damaged: remove it and fill the cache again (distilvlm cache RECIPE)")
    return tensors["head"]


def _grouped(new: list[str], asked: Asked) -> list[list[str]]:
    """Keys to shards; what one record gives stays together."""
    shards: list[list[str]] = []
    size = records = 0
    last: Record | None = None
    for key in new:
        if asked.records[key] is not last:
            last, records = asked.records[key], records + 1
            if not shards or records > RECORDS or size > BYTES:
                shards.append([])
                size, records = 0, 1
        shards[-1].append(key)
        size += asked.bytes[key]
    return shards


def _rest_of(items: list[Item]) -> dict[str, float]:
    """What kept ids leave out of the teacher's mass, over the rows of a shard."""
    rows = [rest(item["answers.log_probabilities"]) for item in items if "answers.log_probabilities" in item]
    left = torch.cat(rows) if rows else torch.zeros(0)
    return {"rows": len(left), "sum": float(left.sum()), "most": float(left.max()) if len(left) else 0.0}
