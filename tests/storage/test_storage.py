"""What is kept, and pictures inside of files, are what they were, or it is said."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from distilvlm.storage.inside import cell, opened
from distilvlm.storage.kept import keep

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def test_a_disk_that_loses_what_was_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILVLM_CACHE", str(tmp_path))

    def make(stream: object) -> tuple[dict[str, np.ndarray], dict[str, object]]:
        return {"starts": np.arange(9)}, {"rows": 9}

    with monkeypatch.context() as losing:
        losing.setattr(os, "fsync", lambda number: os.ftruncate(number, 0))
        with pytest.raises(OSError, match=rf"{tmp_path}\S+ was written, but is not whole: is the disk well\?"):
            keep("rows.json", 1, make)
    assert keep("rows.json", 1, make).arrays["starts"].tolist() == list(range(9))


def test_a_row_that_a_parquet_file_no_longer_has_is_told(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    address = cell(str(file), "image", 2, 0)
    pq.write_table(pa.table({"image": [b"red", b"green", b"blue"]}), file)
    assert opened(address).read() == b"blue"
    pq.write_table(pa.table({"image": [b"red"]}), file)
    with pytest.raises(OSError, match=r"rows\.parquet has no row 2: it has changed"):
        opened(address)
