"""The golden harness: `pytest -m golden --golden DIR` compares with outputs of the methods' reference code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden_cases import find


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        metavar="DIR",
        help="directory of .npz files with golden cases; default: tests/golden",
    )


def pytest_report_header(config: pytest.Config) -> list[str]:
    golden = find(config.getoption("golden"))
    lines = [f"golden cases: {len(golden.cases)} in {golden.directory}"]
    if golden.not_built:
        lines.append(f"golden files of methods that are not built yet, not collected: {', '.join(golden.not_built)}")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" in metafunc.fixturenames:
        cases = find(metafunc.config.getoption("golden")).cases
        metafunc.parametrize("golden_case", cases, ids=[f"{case.file}:{case.name}" for case in cases])
