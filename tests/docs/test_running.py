"""Commands of the pages that end in seconds on tiny data, given as they stand there and in their order."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distilvlm import cli

from .bench import set_up
from .pages import PAGES, ROOT, commands

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
        "data convert yolo",
        "hallucination polling runs/mine/model --data polls.jsonl",
        "hallucination captions",
        "run",
        "hallucination polling runs/preferred",
    ),
    "docs/grounding.md": ("data convert voc", "grounding"),
    "docs/sparse.md": ("upcycle",),
    "docs/teachers.md": ("cache",),
    "docs/chat.md": ("chat",),
    "README.md": ("data convert", "upcycle", "chat"),
}
"""Page → how the commands begin that are run; the others need weights, servers, data sets of others, or time."""

ELSEWHERE = {
    "cache": ("teachers/test_encoder_cache.py", '["cache", '),
    "compare": ("compare/test_compare.py", " compare("),
    "convert-checkpoint": ("models/test_move_kd.py", '["convert-checkpoint", '),
    "doctor": ("doctor/test_settings.py", '"doctor"'),
    "encoder": ("compare/test_encoders.py", '"encoder"'),
    "evaluate": ("runs/test_adaptor_run.py", '"evaluate", '),
    "export": ("export/test_llama_cpp.py", " export("),
    "grounding": ("evaluate/test_grounding.py", '"grounding", '),
    "hallucination": ("evaluate/test_hallucination_commands.py", '"hallucination", '),
    "plan": ("runs/test_plan.py", " plan("),
    "prepare": ("models/test_packaged.py", " prepare("),
    "report": ("report/test_page.py", '"report", '),
    "run": ("runs/test_kills.py", "server.finish(recipe"),
    "serve": ("serve/test_stopping.py", '"serve", '),
    "teach": ("teachers/test_teach.py", '["teach", '),
    "text": ("evaluate/test_text.py", '"text", '),
}
"""How a command begins that is not run as it stands on its page → the tests (below tests/) that give it, or call what
it does, with data of their own, and where that stands in them."""

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
    monkeypatch.setattr(sys, "stdin", io.StringIO("what?\n"))
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_not_run_here_is_run_by_other_tests(page: Path) -> None:
    here = RUN.get(str(page.relative_to(ROOT)), ())
    for command in commands(page):
        given = shlex.join(command.arguments or ("--help",))
        if not given.startswith(("--help", *here)):
            assert given.startswith(tuple(ELSEWHERE)), f"no test runs {command}"


@pytest.mark.parametrize("beginning", ELSEWHERE)
def test_the_tests_that_are_named_give_that_command(beginning: str) -> None:
    tests, call = ELSEWHERE[beginning]
    assert call in (ROOT / "tests" / tests).read_text()


def test_the_run_of_the_pages_leaves_what_they_list(bench: Path) -> None:
    listed = {"recipe.yaml", "about.json", "doctor.json", "cost.json", "events.jsonl", "report.html", "model"}
    assert listed <= {path.name for path in (bench / "runs" / "mine").iterdir()}
    text = (ROOT / "docs" / "distil.md").read_text()
    assert all(f"`{name}" in text for name in listed - {"report.html"})
