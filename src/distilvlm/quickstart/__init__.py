"""`distilvlm quickstart`: a teacher, a control and a distilled student, trained and compared in minutes on a CPU.

The recipes lie beside this file; `quickstart.yaml` says what is compared.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from distilvlm.compare import Results, compare

from . import questions

__all__ = ["quickstart"]


def quickstart(directory: str | Path, seeds: int = 1) -> Results:
    """Write easy-VQA's data into `directory`, then train, ask and compare there; see `compare.compare`.

    The same call continues what was interrupted.
    """
    questions.write(Path(directory).absolute() / "data")
    with as_file(files("distilvlm.quickstart")) as recipes:
        return compare(recipes / "quickstart.yaml", directory, seeds)
