"""The golden harness: `pytest -m golden --golden DIR` compares with outputs of the methods' reference code."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distilvlm.cost import estimate
from tests.golden_cases import Golden, find

# Some tests fork, and a child waits for ever for OpenMP threads that only its parent has: none are started here. Models
# of this size are faster on one thread anyway.
torch.set_num_threads(1)

SHIPPED = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def keep_log_level() -> Iterator[None]:
    """Commands that are called in this process quieten the package's log; the next test reads it."""
    logger = logging.getLogger("distilvlm")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def no_estimate_before_a_run() -> Iterator[None]:
    """An estimate takes seconds, a run here a fraction of one; tests of estimates ask for the fixture `estimates`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distilvlm.runs.expense.estimate", lambda *_, **__: [])
        yield


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test estimate their cost."""
    monkeypatch.setattr("distilvlm.runs.expense.estimate", estimate)


def asked_for(config: pytest.Config) -> Golden:
    return find(config.getoption("--golden") or SHIPPED)  # the option is registered by distilvlm.pytest_plugin


def pytest_report_header(config: pytest.Config) -> list[str]:
    golden = asked_for(config)
    lines = [f"golden cases: {len(golden.cases)} in {golden.directory}"]
    if golden.not_built:
        lines.append(f"golden files of methods that are not built yet, not collected: {', '.join(golden.not_built)}")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, golden in (("golden_case", asked_for(metafunc.config)), ("shipped_case", find(SHIPPED))):
        if fixture in metafunc.fixturenames:
            ids = [f"{case.file}:{case.name}" for case in golden.cases]
            metafunc.parametrize(fixture, golden.cases, ids=ids)
