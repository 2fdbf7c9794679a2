from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor


class Server:
    """Runs recipes in children of a process that has torch imported already; see server.py."""

    def __init__(self, directory: Path) -> None:
        self._log = directory / "operations"
        self._errors = (directory / "stderr").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, recipe: Path, directory: Path, **request: Any) -> tuple[list[int], list[str]]:
        """Exit statuses of the processes, and the labels of the main one's file operations."""
        for old in self._log.parent.glob("operations*"):
            old.unlink()
        whole = {"recipe": str(recipe), "directory": str(directory), "log": str(self._log), **request}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(whole), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        self.killed: bool = answer["killed"]  # whether the last run was still there when it was to be killed
        log = Path(f"{self._log}0")
        return answer["statuses"], log.read_text().splitlines() if log.exists() else []

    def finish(self, recipe: Path, directory: Path, **request: Any) -> list[str]:
        """Run to the end; the labels of its file operations."""
        statuses, operations = self.run(recipe, directory, **request)
        assert not any(statuses), self.errors()
        return operations

    def errors(self) -> str:
        self._errors.flush()
        return Path(self._errors.name).read_text()[-4000:]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    yield running
    running.close()


def weights(run: Path) -> dict[str, Tensor]:
    """Everything that the stages of a run trained, and the finished student."""
    files = [*sorted(run.glob("stages/*/final/weights.safetensors")), *sorted((run / "model").glob("*.safetensors"))]
    assert files, f"{run} has no finished stage"
    return {f"{file.relative_to(run)}:{name}": t for file in files for name, t in load_file(file).items()}
