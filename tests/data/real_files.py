"""Real data sets, where a machine has them: the tests that use them skip elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).parents[2].parent / "shared" / "data"


def real(name: str) -> Path:
    """The directory of a data set, below $DISTILVLM_DATA or `shared/data` beside the repository."""
    directory = Path(os.environ.get("DISTILVLM_DATA", BESIDE)) / name
    if not directory.is_dir():
        pytest.skip(f"no {directory}: set DISTILVLM_DATA to a directory that holds {name}/")
    return directory
