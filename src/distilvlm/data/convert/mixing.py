"""Several data files as one: what an epoch of a recipe with these weights shows, and where each row comes from."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from distilvlm.data.convert import forms
from distilvlm.data.convert.conversion import listing, named_beside
from distilvlm.data.convert.items import Fault
from distilvlm.data.convert.output import whole, write_whole
from distilvlm.data.preferences import check_family, family
from distilvlm.data.problems import DataError, RowError
from distilvlm.data.records import Preferences
from distilvlm.data.sampler import Order, showings
from distilvlm.data.streams import MalformedRow, open_rows
from distilvlm.data.turns import kind
from distilvlm.recipe.schema import SourceSpec
from distilvlm.storage import is_inside

ORIGIN = "mixed"
"""Field of a mixed row that says where it comes from: source, file, row, and which showing of it this is."""


@dataclass
class Part:
    """One source of a mixture."""

    file: str
    weight: float
    rows: int  # that it has, as far as `take` goes
    written: int  # repeats are counted
    different: int  # rows that are among them
    bad: int = 0  # that were to be written and can't be used

    @property
    def left_out(self) -> int:
        """Rows that are not in the mixture, but for bad ones."""
        return self.rows - self.different - self.bad


@dataclass(frozen=True)
class Mixed:
    """What was written, of which source."""

    out: Path
    images: Path  # the directory that rows name their pictures from
    rows: int
    parts: Mapping[str, Part]
    bad: tuple[Fault, ...]
    bad_file: Path | None

    def entry(self) -> str:
        """The recipe's `data:` section for it, for a recipe in its directory."""
        images = os.path.relpath(self.images, self.out.parent.absolute())
        told = {"path": self.out.name, "images": images, "rows": self.rows}
        return yaml.safe_dump({"data": {self.out.stem: told}}, sort_keys=False, allow_unicode=True).rstrip()


def weighted(
    sources: Mapping[str, SourceSpec], weights: Mapping[str, float], counts: Mapping[str, int]
) -> dict[str, SourceSpec]:
    """The sources with other weights, or with those that make so many rows of an epoch.

    Raises:
        DataError: a name is no source's or has both, a number is not above 0, or a file can't be read.
    """
    for name in [*weights, *counts]:
        if name not in sources:
            raise DataError(f"there is no source '{name}'; there are {', '.join(sources)}")
        if name in weights and name in counts:
            raise DataError(f"'{name}' has a weight and a count: give one")
        if (number := weights.get(name, counts.get(name, 0))) <= 0:
            raise DataError(f"'{name}': {number} is not above 0; leave the source out")
    told = {**weights, **{name: count / _length(sources[name]) for name, count in counts.items()}}
    return {
        name: spec.model_copy(update={"weight": told[name]}) if name in told else spec for name, spec in sources.items()
    }


def parts_of(sources: Mapping[str, SourceSpec]) -> dict[str, Part]:
    """How many rows of each an epoch shows. Raises DataError: a file can't be read, or has no row."""
    parts: dict[str, Part] = {}
    for name, spec in sources.items():
        rows = _length(spec)
        shown = showings(rows, spec.weight)
        parts[name] = Part(spec.path, spec.weight, rows, shown, min(rows, shown))
    return parts


def recipe_section(sources: Mapping[str, SourceSpec]) -> str:
    """The `data:` section of a recipe that trains on such a mixture without a file of its own."""
    told = {name: spec.model_dump(exclude_defaults=True) for name, spec in sources.items()}
    return yaml.safe_dump({"data": told}, sort_keys=False, allow_unicode=True).rstrip()


def mix(
    sources: Mapping[str, SourceSpec],
    out: str | Path,
    seed: int = 0,
    on_bad_row: Literal["fatal", "quarantine"] = "fatal",
    progress: Callable[[int], None] | None = None,
) -> Mixed:
    """Write what an epoch shows: of weight 2 every row twice, of 0.5 half of the rows; which, and in which order, is
    decided by `seed`. Rows are in LLaVA's form; `mixed` in each says where it comes from.

    Args:
        sources: name → file; `images`, `take` and `weight` count.
        out: .jsonl; whole or not there.
        on_bad_row: "quarantine" lists what can't be used in NAME-bad.jsonl and goes on without.
        progress: called with the number of rows written, after each.

    Raises:
        DataError: `out` is there already; a file can't be read or holds its pictures itself; files of different kinds
            or templates; rows that can't be used (lists them).
    """
    out = Path(out)
    if out.suffix != ".jsonl":
        raise DataError(f"out: {out} must end in .jsonl, which it becomes")
    if len({spec.template for spec in sources.values()}) > 1:
        raise DataError("sources with different templates can't be one file: its rows would share one")
    parts, names = parts_of(sources), list(sources)
    opened = [open_rows(spec.path) for spec in sources.values()]
    roots = [_root(spec) for spec in sources.values()]
    common = Path(os.path.commonpath(roots))
    moved = [os.path.relpath(root, common) for root in roots]
    mixture = [(part.rows, part.weight) for part in parts.values()]
    total = sum(rows for rows, _ in mixture)
    order = Order(total, sum(part.written for part in parts.values()), seed, "mix", mixture=mixture)
    starts = np.cumsum([0, *(rows for rows, _ in mixture)])
    faults: dict[tuple[int, int], Fault] = {}
    missed: Counter[tuple[int, int]] = Counter()  # showings of these
    reading = _Reading()
    written = 0
    with whole(out) as partial:
        with partial.open("xb") as stream:
            for showing, index in order.update(0):
                source = int(np.searchsorted(starts, index, side="right")) - 1
                row, name = index - int(starts[source]), names[source]
                try:
                    value = reading.llava(opened[source][row], moved[source])
                except RowError as error:
                    faults[source, row] = Fault(sources[name].path, row, error.field, error.reason)
                    missed[source, row] += 1
                    continue
                origin = {"source": name, "file": sources[name].path, "row": row, "showing": showing}
                if ORIGIN in value:
                    origin["before"] = value[ORIGIN]
                stream.write(json.dumps({**value, ORIGIN: origin}).encode() + b"\n")
                written += 1
                if progress:
                    progress(written)
        bad = [faults[place] for place in sorted(faults)]
        if bad and on_bad_row == "fatal":
            raise DataError(listing(bad))
        if not written:
            raise DataError(f"no row is left to write; {len(bad)} can't be used")
    for (source, _), times in missed.items():
        part = parts[names[source]]
        part.bad += 1
        part.different -= 1
        part.written -= times
    bad_file = named_beside(out, "bad") if bad else None
    if bad_file is not None:
        write_whole({bad_file: b"".join(json.dumps(asdict(fault)).encode() + b"\n" for fault in bad)}, [])
    return Mixed(out, common, written, parts, tuple(bad), bad_file)


class _Reading:
    """Rows of all files, in one form and of one kind."""

    def __init__(self) -> None:
        self.first: tuple[Preferences | None] | None = None

    def llava(self, value: Any, moved: str) -> dict[str, Any]:
        """A row in LLaVA's form, its pictures named through the directory `moved`. Raises RowError, DataError."""
        if isinstance(value, MalformedRow):
            raise RowError(value.field, value.reason)
        if not isinstance(value, dict):
            raise RowError("row", f"is {kind(value)}, not an object")
        row = forms.to_llava(value)
        if self.first is None:
            self.first = (family(row),)
        check_family(row, self.first[0])
        names = forms.named(row)
        if any(is_inside(name) for name in names):
            raise DataError(
                "shards and parquet files hold their pictures, a mixture names them: write them out first, "
                "distilvlm data convert rows SOURCE --to llava --out FILE.jsonl"
            )
        return forms.renamed(row, [_moved(name, moved) for name in names])


def _moved(name: str, through: str) -> str:
    return name if through == "." or ":" in name[:8] else os.path.join(through, name)  # noqa: PTH118 (once per row)


def _root(spec: SourceSpec) -> str:
    return os.path.abspath(spec.images or Path(spec.path).parent)  # noqa: PTH100 (no links resolved)


def _length(spec: SourceSpec) -> int:
    rows = len(open_rows(spec.path))
    if not rows:
        raise DataError(f"{spec.path} has no row")
    return min(rows, spec.take or rows)


def by_name(files: Sequence[Path], images: Mapping[str, str]) -> dict[str, SourceSpec]:
    """Sources of data files, called by their names without suffix.

    Raises:
        DataError: two are called the same, or `images` names another.
    """
    sources = {file.stem: SourceSpec(path=str(file), images=images.get(file.stem)) for file in files}
    if len(sources) < len(files):
        raise DataError("two files have the same name: call them otherwise, or name them in a recipe's `data`")
    if unknown := [name for name in images if name not in sources]:
        raise DataError(f"images: there is no source '{unknown[0]}'; there are {', '.join(sources)}")
    return sources
