"""Commands of the pages that end in seconds on tiny data, given as they stand there and in their order."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distilvlm import cli

from .bench import set_up
from .pages import ROOT, commands

RUN = {
    "docs/index.md": ("--help", "plan"),
    "docs/distil.md": ("data check", "doctor", "run", "evaluate", "report"),
    "docs/report.md": ("report runs/mine",),
    "docs/recipe.md": ("plan", "doctor"),
    "docs/data.md": (
        *("data convert folders", "data convert vqa", "data convert yolo", "data convert rows closed-train"),
        *("data convert rows shards", "data mix", "data check"),
    ),
    "docs/hallucination.md": (
        "data convert yolo scenes",
        "hallucination polling runs/mine/model --data polls.jsonl --images scenes",
        "run",
        "hallucination polling runs/preferred",
        "hallucination captions --answers",
    ),
    "docs/grounding.md": ("data convert voc",),
    "docs/sparse.md": ("upcycle",),
    "docs/teachers.md": ("cache",),
}
"""Page → how the commands begin that are run; the others need weights, servers, or hours."""

PLACES = {"docs/teachers.md": "cached"}
"""Pages whose commands are given in a directory of their own."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("bench")
    set_up(directory)
    yield directory


@pytest.mark.parametrize("page", RUN)
def test_commands_do_what_the_page_says(
    page: str, bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_configure_logging", lambda: None)
    monkeypatch.chdir(bench / PLACES.get(page, "."))
    found = [command.arguments for command in commands(ROOT / page) if command.arguments is not None]
    for beginning in RUN[page]:
        assert any(shlex.join(arguments).startswith(beginning) for arguments in found), f"{page}: no {beginning}"
    for arguments in found:
        if not shlex.join(arguments).startswith(RUN[page]):
            continue
        monkeypatch.setattr(sys, "argv", ["distilvlm", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        told = capsys.readouterr()
        assert not end.value.code, f"{page}: {shlex.join(arguments)}\n{told.err}"
        if "--out" in arguments:
            out = Path(arguments[arguments.index("--out") + 1])
            held_out = out.with_name(f"{out.stem}-test.jsonl")
            assert (held_out if "--hold-out" in arguments else out).exists(), shlex.join(arguments)


def test_the_run_of_the_pages_leaves_what_they_list(bench: Path) -> None:
    listed = {"recipe.yaml", "about.json", "doctor.json", "cost.json", "events.jsonl", "report.html", "model"}
    assert listed <= {path.name for path in (bench / "runs" / "mine").iterdir()}
    text = (ROOT / "docs" / "distil.md").read_text()
    assert all(f"`{name}" in text for name in listed - {"report.html"})
