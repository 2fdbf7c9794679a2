"""Rows in another form (LLaVA's JSON, messages, parquet, WebDataset shards), one at a time, each as it was."""

from __future__ import annotations

import base64
import binascii
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from distilvlm.data.convert import arrow, columns, datasets, forms, parquet, shards, tables
from distilvlm.data.convert.conversations import is_json
from distilvlm.data.convert.conversion import listing, named_beside
from distilvlm.data.convert.embedded import Store, name_of
from distilvlm.data.convert.items import Fault
from distilvlm.data.convert.output import whole, write_whole
from distilvlm.data.preferences import check_family, family
from distilvlm.data.problems import DataError, RowError
from distilvlm.data.records import Preferences
from distilvlm.data.streams import MalformedRow, open_rows
from distilvlm.data.turns import kind, picture_path
from distilvlm.storage import is_remote

Form = Literal["llava", "messages", "parquet", "webdataset"]

ROWS_OF_A_GROUP, BYTES_OF_A_GROUP = 512, 32 << 20
"""What a parquet file's row group holds at most (one row, if that has more)."""

Opened = tuple[dict[str, Any], list[bytes | None]]
"""A row in LLaVA's form, and of each of its pictures the bytes, or None where it lies in a file of its own."""


@dataclass(frozen=True)
class Rewritten:
    """What was written, and what was not."""

    out: Path
    files: int
    rows: int
    pictures: int  # that the rows show, each time they do
    renamed: int  # of these, those that were stored under another name: theirs was another picture's, or led elsewhere
    images: Path | None  # the directory that rows name their pictures from; None where they are embedded
    bad: tuple[Fault, ...]
    bad_file: Path | None

    def entry(self) -> str:
        """The recipe's `data:` section for it, for a recipe in its directory."""
        parent = self.out.parent.absolute()
        images = {} if self.images is None else {"images": os.path.relpath(self.images, parent)}
        told = {"path": self.out.name, **images, "rows": self.rows}
        return yaml.safe_dump({"data": {self.out.stem: told}}, sort_keys=False, allow_unicode=True).rstrip()


def rewrite(
    source: str | Path,
    out: str | Path,
    to: Form,
    *,
    images: str | Path | None = None,
    pictures: Literal["embedded", "paths"] = "embedded",
    shard_size: int = 1000,
    split: str | None = None,
    on_bad_row: Literal["fatal", "quarantine"] = "fatal",
    progress: Callable[[int], None] | None = None,
) -> Rewritten:
    """Write every row of `source` in another form. Whatever a row says is kept, in the same order; back in its own form
    it is equal, but for speakers (then human, gpt, system), and for a picture that is stored under another name.

    Args:
        source: a JSON list or JSONL file of either form; parquet files, a directory that `save_to_disk` wrote, or tar
            shards (a file, a directory, a pattern with `*`). Rows must hold whole conversations.
        out: a file, for "webdataset" a directory; whole or not there.
        images: of a JSON source, the directory of its pictures (default: the file's); otherwise where embedded pictures
            go if they do not stay embedded (default: `pictures` beside `out`).
        pictures: whether parquet holds the pictures or names them.
        shard_size: rows of a tar file.
        split: of parquet files or of a saved data set, see `parquet.read` and `datasets.read`.
        on_bad_row: "quarantine" lists what can't be used in NAME-bad.jsonl and goes on.
        progress: called with the number of rows seen, after each.

    Raises:
        DataError: `out` is there already; the source can't be read; rows that can't be used (lists them).
    """
    name, source, out = str(source), Path(source), Path(out)
    _check(out, to, shard_size)
    own = is_json(source)
    embeds = to == "webdataset" or (to == "parquet" and pictures == "embedded")
    root = Path(images or (source.parent if own else out.parent / "pictures")).absolute()
    passing = _Passing(root, None if embeds else Store(root))
    bad: list[Fault] = []
    with whole(out) as partial:
        with _Writer.of(to, partial, out.stem, shard_size) as writer:
            for seen, (file, number, value) in enumerate(_rows(name, split)):
                try:
                    row, held = passing.opened(value)
                    if not bad or on_bad_row == "quarantine":
                        writer.add(row, held)
                except RowError as error:
                    bad.append(Fault(file, number, error.field, error.reason))
                if progress:
                    progress(seen + 1)
        if bad and on_bad_row == "fatal":
            raise DataError(listing(bad))
        if not writer.rows:
            raise DataError(f"{source}: no row is left to write; {len(bad)} can't be used")
    bad_file = named_beside(out.with_suffix(".jsonl"), "bad") if bad else None
    if bad_file is not None:
        write_whole({bad_file: b"".join(json.dumps(asdict(fault)).encode() + b"\n" for fault in bad)}, [])
    where = None if embeds else root
    return Rewritten(out, writer.files, writer.rows, passing.pictures, passing.renamed, where, tuple(bad), bad_file)


def _check(out: Path, to: Form, shard_size: int) -> None:
    if to not in get_args(Form):
        raise DataError(f"to: {to!r} is none of {', '.join(get_args(Form))}")
    suffix = {"llava": ".jsonl", "messages": ".jsonl", "parquet": ".parquet", "webdataset": ""}[to]
    if out.suffix != suffix:
        raise DataError(f"out: {out} " + (f"must end in {suffix}" if suffix else "becomes a directory: no suffix"))
    if shard_size < 1:
        raise DataError("shard_size: at least 1 row")
    if to == "parquet":
        arrow.need_pyarrow()


def _rows(name: str, split: str | None) -> Iterator[tuple[str, int, Any]]:
    """(file, number, row): JSON as it is read; of other files the opened row, or why it is none."""
    source = Path(name)
    if not is_remote(name) and _is_table(source):
        is_saved = source.is_dir() and datasets.is_saved(source)
        table = datasets.table(source, split) if is_saved else parquet.table(source, split)
        for file, number, told in table.rows:
            named = tables.named(told, table.labels)
            yield file, number, _tried(lambda named=named: columns.restored(named))
        return
    if split is not None:
        raise DataError(f"{name} has no splits: leave split out")
    rows, own = open_rows(name), is_json(source)
    for number, value in enumerate(rows.stretch(0, len(rows))):
        packed = isinstance(value, dict) and not own
        yield name, number, _tried(lambda row=value: shards.restored(row)) if packed else value


def _is_table(source: Path) -> bool:
    if source.is_dir():
        return datasets.is_saved(source) or any(source.rglob("*.parquet"))
    return source.suffix == ".parquet"


def _tried(opened: Callable[[], Opened]) -> Opened | RowError:
    try:
        return opened()
    except RowError as error:
        return error


@dataclass
class _Passing:
    """What a row goes through on its way."""

    root: Path
    store: Store | None  # where embedded pictures go; None: they are embedded again
    pictures: int = 0
    renamed: int = 0
    is_first: bool = True
    preferences: Preferences | None = None  # what rows are, told from the first

    def opened(self, value: Any) -> Opened:
        """The row in LLaVA's form, its pictures where the output wants them. Raises `RowError`."""
        if isinstance(value, RowError):
            raise value
        if isinstance(value, MalformedRow):
            raise RowError(value.field, value.reason)
        given, held = value if isinstance(value, tuple) else (value, None)
        if not isinstance(given, Mapping):
            raise RowError("row", f"is {kind(given)}, not an object")
        row = forms.to_llava(given)
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RowError("row", "holds half of a surrogate pair; write the file anew") from None
        if self.is_first:
            self.is_first, self.preferences = False, family(row)
        check_family(row, self.preferences)
        names = forms.named(row)
        if held is None or len(held) != len(names):
            held = [None] * len(names)
        made = [self._picture(name, content) for name, content in zip(names, held, strict=True)]
        self.pictures += len(names)
        return forms.renamed(row, [name for name, _ in made]), [content for _, content in made]

    def _picture(self, name: str, content: bytes | None) -> tuple[str, bytes | None]:
        try:
            if content is None and name.startswith("data:"):
                content = _decoded(name)
                name = name_of(content)
            if self.store is None:
                if content is None:
                    content = (self.root / picture_path(name, "image", self.root)).read_bytes()
                return name, content
            if content is None:
                return name, None
            kept = self.store.keep_as(name, content)
        except RowError:
            raise
        except (ValueError, OSError) as error:
            raise RowError("image", f"{name[:80]}: {error}") from None
        self.renamed += kept != name
        return kept, None


def _decoded(url: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ValueError("is no data:...;base64 picture")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ValueError(f"its base64 is broken: {error}") from None


class _Writer(AbstractContextManager["_Writer"]):
    """Rows as files of a form."""

    def __init__(self) -> None:
        self.rows = 0
        self.files = 1
        self.open = ExitStack()

    @classmethod
    def of(cls, to: Form, path: Path, name: str, shard_size: int) -> _Writer:
        if to == "webdataset":
            return _Shards(path, name, shard_size)
        return _Parquet(path) if to == "parquet" else _Lines(path, to)

    def add(self, row: dict[str, Any], held: Sequence[bytes | None]) -> None:
        """Raises `RowError`: the form can't hold it."""
        self._add(row, held)
        self.rows += 1

    def _add(self, row: dict[str, Any], held: Sequence[bytes | None]) -> None:
        raise NotImplementedError

    def __exit__(self, *error: object) -> None:
        self.open.close()


class _Lines(_Writer):
    def __init__(self, path: Path, to: Form) -> None:
        super().__init__()
        self.stream = self.open.enter_context(path.open("xb"))
        self.to = to

    def _add(self, row: dict[str, Any], held: Sequence[bytes | None]) -> None:
        made = forms.to_messages(row) if self.to == "messages" else row
        self.stream.write(json.dumps(made, ensure_ascii=False).encode() + b"\n")


class _Parquet(_Writer):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.schema: Any = None
        self.waiting: list[dict[str, Any]] = []
        self.size = 0

    def _add(self, row: dict[str, Any], held: Sequence[bytes | None]) -> None:
        import pyarrow.parquet as pq

        if self.schema is None:
            self.schema = columns.schema(row)
            self.file = self.open.enter_context(pq.ParquetWriter(self.path, self.schema, compression="zstd"))
        self.waiting.append(columns.columns(row, held))
        self.size += sum(len(content) for content in held if content is not None)
        if len(self.waiting) >= ROWS_OF_A_GROUP or self.size >= BYTES_OF_A_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        self.file.write_table(pa.Table.from_pylist(self.waiting, self.schema))
        self.waiting, self.size = [], 0

    def __exit__(self, *error: object) -> None:
        if self.waiting and error[0] is None:
            self._flush()
        super().__exit__(*error)


class _Shards(_Writer):
    def __init__(self, directory: Path, name: str, size: int) -> None:
        super().__init__()
        directory.mkdir()
        self.files = 0
        self.directory, self.name, self.size = directory, name, size
        self.tar: tarfile.TarFile | None = None

    def _add(self, row: dict[str, Any], held: Sequence[bytes | None]) -> None:
        if self.tar is None or self.rows == self.files * self.size:
            self.open.close()
            path = self.directory / f"{self.name}-{self.files:06d}.tar"
            self.tar = tarfile.open(path, "x", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed with the writer)
            self.open.enter_context(self.tar)
            self.files += 1
        shards.add(self.tar, self.rows, row, [content for content in held if content is not None])
