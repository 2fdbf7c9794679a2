"""Registers `pytest --golden DIR`.

A conftest cannot: before it is read, pytest takes the DIR of an option it does not know for a path to collect from, and
looks for the project there. Installed plugins are asked first. The harness itself is in tests/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=None,
        metavar="DIR",
        help="directory of .npz files with outputs of the methods' reference code; default: tests/golden",
    )


def pytest_configure(config: Any) -> None:
    # pyproject.toml says so too, but is not read when DIR lies outside of the project.
    config.addinivalue_line("markers", "golden: compares with outputs of the methods' reference code")
