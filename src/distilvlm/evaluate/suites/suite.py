"""What a suite is: files as their authors publish them, a prompt, and the measure of the authors' own script."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distilvlm.data.batch import BadRow, SampleKey
from distilvlm.data.convert.items import filled
from distilvlm.data.problems import DataError, RowError
from distilvlm.evaluate.measures import Measure
from distilvlm.evaluate.questions import Asked, Question

SHORT = "{question}\nAnswer the question using a single word or phrase."
"""LLaVA-1.5's prompt for short answers."""

LETTER = "{question}\n{options}\nAnswer with the option's letter from the given choices directly."
"""LLaVA-1.5's prompt for multiple choice."""

PICTURES = (".jpg", ".png", ".jpeg", ".webp")


@dataclass(frozen=True)
class Sources:
    """Where a suite's files are, and how it asks.

    Args:
        root: the directory that holds them (`--data`).
        prompt: template of a question; each suite says which {names} it has.
        split: of the published ones.
        given: role → file, where it has another name than the published one (a user's suite file says it).
    """

    root: Path
    prompt: str
    split: str = ""
    given: Mapping[str, str] = field(default_factory=dict)

    def asked(self, **values: Any) -> str:
        """The prompt with its names filled in. Raises DataError for a name that the suite does not have."""
        return filled(self.prompt, values, "prompt").strip()

    def file(self, role: str, *patterns: str) -> Path:
        """The file of that role: the one given, or the only one that fits the first pattern that any file fits.

        Raises:
            DataError: there is none, or several.
        """
        found = self.files(role, *patterns)
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(self.root)) for path in found)
            raise DataError(f"{self.root} has several files of {role}: {names}; leave one, or choose a split (--split)")
        return found[0]

    def files(self, role: str, *patterns: str) -> list[Path]:
        """All files of that role, in order of their names; errors as `file`, but for several."""
        if role in self.given:
            path = self.root / self.given[role]
            if not path.exists():
                raise DataError(f"{role}: no file {path}")
            return [path]
        for pattern in patterns:
            if found := sorted(self.root.glob(pattern)):
                return found
        raise DataError(f"{self.root} has no {' or '.join(patterns)} ({role}): see docs/suites.md for what to download")

    def optional(self, role: str, *patterns: str) -> Path | None:
        """As `file`, None where there is none and none was named."""
        there = role in self.given or any(next(self.root.glob(pattern), None) for pattern in patterns)
        return self.file(role, *patterns) if there else None

    def picture(self, *names: str) -> str:
        """The first file below the directory of pictures that is there.

        Raises:
            RowError: there is none.
        """
        roots = [self.root / self.given["pictures"], self.root] if "pictures" in self.given else [self.root]
        for root in roots:
            for name in names:
                if name and (root / name).is_file():
                    return str(root / name)
        raise RowError("image", f"no file {' or '.join(names)} in {roots[0]}")


Reader = Callable[[Sources], Asked]

MeasureOf = Callable[[Sources, Asked], Measure]
"""Where files are and what is asked → how it is measured: most suites always measure alike."""


@dataclass(frozen=True)
class Opened:
    """A suite with its questions, ready to be asked."""

    name: str
    asked: Asked
    measure: Measure
    prompt: str
    split: str
    max_new_tokens: int

    @property
    def identity(self) -> dict[str, Any]:
        """What makes answers to it comparable: changed, they are answers to something else."""
        each = [(one.text, one.answer, [Path(path).name for path in one.record.images]) for one in self.asked.questions]
        return {
            "suite": self.name,
            "measure": self.measure.name,
            "split": self.split,
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "questions": hashlib.sha256(json.dumps(each).encode()).hexdigest(),
        }


@dataclass(frozen=True)
class Suite:
    """A published test.

    Args:
        name: as `--suite` says it.
        title: for people.
        read: files → questions.
        measure: questions → their measure.
        prompt: the published one; `--prompt` or a suite's file changes it.
        max_new_tokens: where an answer that does not end is cut.
        split: the one that is asked by default; "" where a suite has one only.
    """

    name: str
    title: str
    read: Reader
    measure: MeasureOf
    prompt: str = SHORT
    max_new_tokens: int = 16
    split: str = ""

    def opened(
        self,
        root: str | Path,
        *,
        prompt: str | None = None,
        split: str | None = None,
        max_new_tokens: int | None = None,
        limit: int | None = None,
        given: Mapping[str, str] | None = None,
    ) -> Opened:
        """The suite with its questions.

        Args:
            root, given: as of `Sources`.
            prompt, split, max_new_tokens: instead of the suite's own.
            limit: so many questions at most, spread evenly over all.

        Raises:
            DataError: a file is missing or malformed, or there is no question; names the file.
        """
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"{self.name}: no directory {root}: name the one that holds the suite's files (--data)")
        if split and not self.split:
            raise DataError(f"{self.name} has no splits: leave --split out")
        where = Sources(root, self.prompt if prompt is None else prompt, split or self.split, given or {})
        asked = self.read(where)
        if not asked.questions and not asked.bad:
            raise DataError(f"{asked.name}: no question of {self.name}")
        measure = self.measure(where, asked)
        tokens = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        return Opened(self.name, spread(asked, limit), measure, where.prompt, where.split, tokens)


def gathered(
    file: Path,
    rows: Iterable[tuple[int, Any]],
    question: Callable[[int, Mapping[str, Any]], Question | Iterable[Question] | None],
) -> Asked:
    """What `question` makes of every row (0-based number, value); rows that can't be asked are told of as bad.

    Args:
        question: one or several of a row; None leaves it out. May raise RowError.
    """
    questions: list[Question] = []
    bad: list[BadRow] = []
    for number, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise RowError("row", getattr(row, "reason", "is no object with fields"))
            made = question(number, row)
            questions += [made] if isinstance(made, Question) else list(made or ())
        except RowError as error:
            bad.append(BadRow(SampleKey(file.stem, str(file), number), error.field, error.reason))
    return Asked(str(file), tuple(questions), tuple(bad))


def content(file: Path) -> Any:
    """A JSON file's value. Raises DataError where it can't be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} can't be read as JSON: {error}") from None


def listed(file: Path, key: str | None = None) -> list[Any]:
    """The list that a JSON file is, or that it has under `key`. Raises DataError where there is none."""
    value = content(file)
    found = value.get(key) if key is not None and isinstance(value, Mapping) else value
    if not isinstance(found, list):
        raise DataError(f"{file}: {'no list' if key is None else f'no list {key!r}'} in it: is it the published file?")
    return found


def field_of(row: Mapping[str, Any], name: str) -> Any:
    """A row's field. Raises RowError where it is missing."""
    if row.get(name) is None:
        raise RowError(name, f"is missing; the row has {', '.join(sorted(map(str, row)))}")
    return row[name]


def spread(asked: Asked, limit: int | None) -> Asked:
    """So many questions at most, spread evenly; those that are judged together (`meta.group`) stay together."""
    if limit is None:
        return asked
    groups: dict[object, list[Question]] = {}
    for one in asked.questions:
        groups.setdefault(one.meta.get("group", one.place), []).append(one)
    each = list(groups.values())
    wanted = max(1, min(len(each), limit * len(each) // max(1, len(asked.questions))))
    chosen = [each[number * len(each) // wanted] for number in range(wanted)] if each else []
    return Asked(asked.name, tuple(one for group in chosen for one in group), asked.bad)
