"""Readers: LLaVA's JSON and OpenAI-style messages become records; what can't is named, never dropped in silence."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distilvlm.data import preferences
from distilvlm.data.batch import BadRow
from distilvlm.data.glance import Glance, glance
from distilvlm.data.problems import DataError, RowError
from distilvlm.data.records import Preferences, Records
from distilvlm.data.streams import MalformedRow, Stored, open_rows
from distilvlm.data.streams.listing import Listing
from distilvlm.data.streams.records import ReadRecords
from distilvlm.data.streams.survey import survey
from distilvlm.data.turns import Draft, Form, conversation, kind, listed
from distilvlm.recipe.schema import SourceSpec
from distilvlm.storage import is_inside

logger = logging.getLogger(__name__)

NAMES: dict[Preferences | None, str] = {None: "conversations", "pairs": "pairs of answers", "rated": "rated answers"}
"""What is counted."""


@dataclass
class Source:
    """A data source that was read: its records, and everything about it that was not as it should be."""

    name: str  # in the recipe's `data`
    spec: SourceSpec
    format: str  # "llava" or "messages": as given, or as found
    records: Records
    bad: list[BadRow] = field(default_factory=list)
    neutralised: int = 0  # typed image tokens (and private-use characters) made harmless; of a pair, on both sides
    markers_added: int = 0  # records with a picture whose text had no place for it
    answers_dropped: int = 0  # answers before the first question, left out as LLaVA does
    preferences: Preferences | None = None  # what its records are, if they are preferences: told from the first row


def read(spec: SourceSpec, name: str) -> Source:
    """Read the data source `name`. Rows that can't be used are in `Source.bad`; see `problems.raise_or_quarantine`.

    Raises:
        DataError: the file can't be read, its format is unknown, or it has another number of rows than the recipe says.
    """
    rows = open_rows(spec.path)
    if spec.rows is not None and len(rows) != spec.rows:
        if spec.take is None:
            deque(rows.stretch(0, len(rows)), maxlen=0)  # a malformed file is told as what it is
        raise DataError(
            f"{spec.path} has {len(rows)} rows, but data.{name}.rows says {spec.rows}: is it the right file, whole?"
        )
    count = len(rows) if spec.take is None else min(spec.take, len(rows))
    root = Path(spec.images) if spec.images else _beside(spec.path)
    format, preferences = _told(spec, name, rows, count)
    drafted = Drafted("llava" if format == "llava" else "messages", preferences, root)
    found = survey(name, rows, count, Looked(drafted, Listing(root)), root, [format, preferences])
    source = Source(
        name,
        spec,
        format,
        ReadRecords(name, spec.path, rows, root, replace(drafted, root=None), found),
        found.bad,
        found.neutralised,
        found.markers_added,
        found.answers_dropped,
        preferences,
    )
    logger.info(
        "data '%s': %d %s (%s) from %s; %d bad rows, %d typed image tokens neutralised, %d missing markers added, "
        "%d leading answers left out",
        *(name, len(source.records), NAMES[source.preferences], source.format, spec.path, len(source.bad)),
        *(source.neutralised, source.markers_added, source.answers_dropped),
    )
    return source


def _beside(path: str) -> Path:
    """The directory that pictures' names are relative to, where nothing else is said."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _told(spec: SourceSpec, name: str, rows: Stored, count: int) -> tuple[str, Preferences | None]:
    """The form and the kind of rows that a source holds, told from the first one."""
    first = next((value for value in rows.stretch(0, count) if isinstance(value, dict)), None)
    if first is None:
        return spec.format, None
    format = spec.format
    if format == "auto":
        format = _detect(first, spec.path, name)
        logger.info("data '%s': format '%s', told from the first row", name, format)
    return format, preferences.family(first)


@dataclass(frozen=True)
class Drafted:
    """Makes rows drafts of records; loader processes can be handed it.

    Args:
        form: of the rows, and what kind of them the source holds.
        root: where their pictures must be; None: that was looked at.
    """

    form: Form
    preferences: Preferences | None
    root: Path | None

    def __call__(self, value: Any) -> Draft:
        """Raises `RowError`."""
        if isinstance(value, MalformedRow):
            raise RowError(value.field, value.reason)
        if not isinstance(value, dict):
            raise RowError("row", f"is {kind(value)}, not an object")
        preferences.check_family(value, self.preferences)
        return _drafted(value, self.form, self.root)


@dataclass(frozen=True)
class Looked:
    """What is asked of a row that is looked at for the first time; loader processes can be handed it."""

    drafted: Drafted
    pictures: Listing

    def __call__(self, value: Any) -> Glance | Draft:
        """Raises `RowError`."""
        if self.drafted.preferences is None:
            found = glance(value, self.drafted.form)
            if found is not None and all([is_inside(name) or self.pictures.has(name) for name in found.images]):
                return found
        return self.drafted(value)


def check_llava(value: dict[str, Any], root: Path) -> None:
    """Raise the `RowError` that makes a LLaVA row unusable, if any; `read` takes every other."""
    _drafted(value, "llava", root)


def _drafted(value: dict[str, Any], form: Form, root: Path | None) -> Draft:
    if preferences.family(value) is not None:
        return preferences.draft(value, form, root)
    key = "conversations" if form == "llava" else "messages"
    return conversation(value, form, key, listed(value, key), root)


def _detect(value: dict[str, Any], path: str, name: str) -> Form:
    if preferences.family(value) is not None:
        form = preferences.form(value)
        if form is not None:
            return form
    elif "conversations" in value:
        return "llava"
    elif "messages" in value:
        return "messages"
    raise DataError(
        f"{path}: the first row has neither 'conversations' (LLaVA) nor 'messages' (OpenAI) nor a 'prompt' "
        f"with answers, only {sorted(map(str, value))}; set data.{name}.format, or convert the file "
        "(distilvlm data convert)"
    )


def one_kind(sources: Sequence[Source]) -> Preferences | None:
    """What the records of a stage's sources are. Raises DataError where some are and others are not."""
    kinds: dict[Preferences | None, Source] = {source.preferences: source for source in sources if len(source.records)}
    if len(kinds) > 1:
        told = " and ".join(f"'{source.name}' of {NAMES[kind]}" for kind, source in kinds.items())
        raise DataError(f"a stage trains on data of one kind, but there is {told}: give each a stage of its own")
    return next(iter(kinds), None)
