from __future__ import annotations

from pathlib import Path

import pytest

from distilvlm.cost import estimate
from distilvlm.recipe import load_recipe
from distilvlm.report.page import render
from distilvlm.report.read import read
from distilvlm.runs.execute import run
from tests.report.tiny import write_comparison, write_new_files
from tests.runs.tiny import write_recipe
from tests.runs.tiny_mod import write_mod_recipe


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of three stages; what is written into it by hand replaces what it recorded itself."""
    directory = tmp_path_factory.mktemp("report")
    run(write_recipe(directory), directory=directory / "run")
    write_new_files(directory / "run")
    return directory / "run"


@pytest.fixture(scope="session")
def comparison(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("comparison"), finished, finished.parent / "pictures")


@pytest.fixture(scope="session")
def run_page(finished: Path) -> str:
    return render(read(finished))


@pytest.fixture(scope="session")
def comparison_page(comparison: Path) -> str:
    return render(read(comparison))


@pytest.fixture(scope="session")
def sparse_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three stages: dense, sparse, preferences."""
    directory = tmp_path_factory.mktemp("sparse")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("distilvlm.runs.expense.estimate", estimate)  # whichever test asks for the run first
    changes = ["stages.d2s.reference=[capacity]", "stages.pd.loss.desirable=1.5"]
    run(load_recipe(write_mod_recipe(directory), changes), directory=directory / "run")
    monkeypatch.undo()
    return directory / "run"


@pytest.fixture(scope="session")
def sparse_page(sparse_run: Path) -> str:
    return render(read(sparse_run))
