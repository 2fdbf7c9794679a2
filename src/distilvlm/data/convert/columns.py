"""A row in LLaVA's form ↔ the columns of a parquet file, exactly; and what columns of other writers say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distilvlm.data.convert.embedded import name_of
from distilvlm.data.convert.forms import named
from distilvlm.data.problems import RowError

TALKS = ("conversations", "chosen", "rejected")
PICTURES = ("images", "image")

REST = "rest"
"""Column of everything that the others do not tell, as a JSON object."""


def schema(row: Mapping[str, Any]) -> Any:
    """The Arrow schema of a file whose first row this is."""
    import pyarrow as pa

    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as `datasets` has its Image
    fields = [("id", pa.string()), ("images", pa.list_(picture))]
    fields += [(name, turns) for name in TALKS if name in row]
    if isinstance(row.get("label"), bool):
        fields.append(("label", pa.bool_()))
    return pa.schema([*fields, (REST, pa.string())])


def columns(row: Mapping[str, Any], pictures: Sequence[bytes | None]) -> dict[str, Any]:
    """A row as columns.

    Args:
        pictures: the bytes of each, or None for one that is only named.
    """
    told: dict[str, Any] = {
        "id": row["id"] if isinstance(row.get("id"), str) else None,
        "images": [{"bytes": held, "path": name} for name, held in zip(named(row), pictures, strict=True)],
        "label": row["label"] if isinstance(row.get("label"), bool) else None,
    }
    for name in TALKS:
        told[name] = [{"from": turn["from"], "value": turn["value"]} for turn in row[name]] if name in row else None
    known = {} if "images" in row else _shown(told["images"])
    known |= {name: value for name, value in told.items() if value is not None and name != "images"}
    rest = {name: value for name, value in row.items() if name not in known or known[name] != value}
    return {**told, REST: json.dumps(rest, ensure_ascii=False) if rest else None}


def restored(told: Mapping[str, Any]) -> tuple[dict[str, Any], list[bytes | None]]:
    """The row whose columns were `told` (of other writers' files: with all that they say), and its pictures.

    Raises:
        RowError: a column holds what no JSON does, or what is no picture.
    """
    found = [picture for name in PICTURES for picture in _pictures(told.get(name), name)]
    row = {name: value for name, value in told.items() if value is not None and name not in (REST, *PICTURES)}
    rest = _rest(told.get(REST))
    if "images" not in rest:
        row |= _shown([{"path": name} for name, _ in found])
    row |= rest
    for name, value in row.items():
        try:
            json.dumps(value)
        except TypeError:
            raise RowError(name, f"is {type(value).__name__}, which no JSON holds: leave the column out") from None
    return row, [held for _, held in found]


def _shown(pictures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One picture is `image: name`, several are a list."""
    names = [picture["path"] for picture in pictures]
    return {"image": names[0] if len(names) == 1 else names} if names else {}


def _rest(given: Any) -> dict[str, Any]:
    try:
        rest = json.loads(given)
    except (TypeError, ValueError):
        rest = None
    if isinstance(rest, dict):
        return rest
    return {} if given is None else {REST: given}  # another writer's column of that name


def _pictures(value: Any, column: str) -> Iterator[tuple[str, bytes | None]]:
    """Name and bytes of pictures given by path, by bytes, or by both; one without a name gets one of its content."""
    for one in value if isinstance(value, list) else [value]:
        held, name = (one.get("bytes"), one.get("path")) if isinstance(one, Mapping) else (one, None)
        if isinstance(held, str):
            held, name = None, held
        if held is None and name is None:
            continue
        if held is not None and not isinstance(held, bytes):
            raise RowError(column, f"is {type(one).__name__}, neither the path nor the bytes of a picture file")
        try:
            yield name or name_of(held or b""), held
        except ValueError as error:
            raise RowError(column, str(error)) from None
