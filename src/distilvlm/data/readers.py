"""Readers: LLaVA's JSON and OpenAI-style messages become records; what can't is named, never dropped in silence."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distilvlm.data import preferences
from distilvlm.data.batch import BadRow, SampleKey
from distilvlm.data.problems import DataError, RowError
from distilvlm.data.records import Preferences, Records
from distilvlm.data.rows import MalformedRow, rows
from distilvlm.data.turns import Draft, Form, conversation, kind, listed
from distilvlm.recipe.schema import SourceSpec

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
    path = Path(spec.path)
    root = Path(spec.images) if spec.images else path.parent
    source = Source(name, spec, spec.format, Records(name, str(path), root))
    drafts = _Drafts(source, root)
    count = 0
    for row, value in enumerate(rows(path)):
        count = row + 1
        if spec.take is not None and row >= spec.take:
            if spec.rows is None:
                break
            continue  # the rest is only counted
        try:
            draft = drafts.of(value)
        except RowError as error:
            source.bad.append(BadRow(SampleKey(name, str(path), row), error.field, error.reason))
            continue
        source.records.append(row, _identity(value, row), draft.images, draft.turns, draft.other, draft.desirable)
        source.neutralised += draft.neutralised
        source.markers_added += draft.marker_added
        source.answers_dropped += draft.answers_dropped
    if spec.rows is not None and count != spec.rows:
        raise DataError(f"{path} has {count} rows, but data.{name}.rows says {spec.rows}: is it the right file, whole?")
    logger.info(
        "data '%s': %d %s (%s) from %s; %d bad rows, %d typed image tokens neutralised, %d missing markers added, "
        "%d leading answers left out",
        *(name, len(source.records), NAMES[source.preferences], source.format, path, len(source.bad)),
        *(source.neutralised, source.markers_added, source.answers_dropped),
    )
    return source


def _identity(value: dict[str, Any], row: int) -> str:
    given = value.get("id")
    return str(row) if given is None else str(given)


def check_llava(value: dict[str, Any], root: Path) -> None:
    """Raise the `RowError` that makes a LLaVA row unusable, if any; `read` takes every other."""
    _drafted(value, "llava", root)


class _Drafts:
    """Rows as drafts of records. The first row says which form and which kind of rows the file holds."""

    def __init__(self, source: Source, root: Path) -> None:
        self.source = source
        self.root = root
        self.is_first = True

    def of(self, value: Any) -> Draft:
        source = self.source
        if isinstance(value, MalformedRow):
            raise RowError("row", value.reason)
        if not isinstance(value, dict):
            raise RowError("row", f"is {kind(value)}, not an object")
        if self.is_first:
            if source.format == "auto":
                source.format = _detect(value, source)
                logger.info("data '%s': format '%s', told from the first row", source.name, source.format)
            source.preferences = preferences.family(value)
            self.is_first = False
        preferences.check_family(value, source.preferences)
        return _drafted(value, "llava" if source.format == "llava" else "messages", self.root)


def _drafted(value: dict[str, Any], form: Form, root: Path) -> Draft:
    if preferences.family(value) is not None:
        return preferences.draft(value, form, root)
    key = "conversations" if form == "llava" else "messages"
    return conversation(value, form, key, listed(value, key), root)


def _detect(value: dict[str, Any], source: Source) -> Form:
    if preferences.family(value) is not None:
        form = preferences.form(value)
        if form is not None:
            return form
    elif "conversations" in value:
        return "llava"
    elif "messages" in value:
        return "messages"
    raise DataError(
        f"{source.spec.path}: the first row has neither 'conversations' (LLaVA) nor 'messages' (OpenAI) nor a 'prompt' "
        f"with answers, only {sorted(map(str, value))}; set data.{source.name}.format, or convert the file "
        "(distilvlm data convert)"
    )
