"""A damaged file stops with its name; nothing is shown by halves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from distilvlm.report.read import ReportError, read


@pytest.fixture
def broken(comparison: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "comparison"
    shutil.copytree(comparison, copy, ignore=shutil.ignore_patterns("model"))
    return copy


def test_a_strange_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"neither a run \(no recipe.yaml\) nor a comparison"):
        read(tmp_path)
    with pytest.raises(ReportError, match="no such directory"):
        read(tmp_path / "missing")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("comparison.json", "{", r"comparison.json is damaged \(not JSON"),
        ("comparison.json", "[]", "holds no JSON object"),
        ("comparison.json", '{"name": "x"}', "field 'models'"),
        ("seed-0/distilled/recipe.yaml", "name: [", "recipe.yaml does not load"),
        ("seed-0/distilled/events.jsonl", '{"event": "update"\n', "events.jsonl, line 1 is damaged"),
        ("seed-0/distilled/events.jsonl", '{"event": "update", "stage": "dpt"}\n', "events.jsonl, line 1: field"),
        ("seed-0/distilled/about.json", "\x00", "about.json is damaged"),
        ("seed-0/distilled/doctor.json", '{"findings": [{"level": "bad"}]}', r"doctor.json: field 'findings.0"),
        ("seed-0/distilled/cost.json", "{}", "cost.json: field 'stages'"),
        ("seed-0/distilled/quarantine.jsonl", "{}\n", "quarantine.jsonl, line 1: field"),
    ],
)
def test_a_damaged_file_is_named(broken: Path, file: str, content: str, message: str) -> None:
    (broken / file).write_text(content)
    with pytest.raises(ReportError, match=message):
        read(broken)


def test_an_update_of_an_unknown_stage_is_refused(broken: Path) -> None:
    events = broken / "seed-0" / "distilled" / "events.jsonl"
    events.write_text(events.read_text().replace('"dpt"', '"another"'))
    with pytest.raises(ReportError, match="line 1: stage 'another' is not in"):
        read(broken)


def test_rows_of_a_model_that_the_head_does_not_name_are_refused(broken: Path) -> None:
    content = json.loads((broken / "comparison.json").read_text())
    del content["models"]["control"]
    (broken / "comparison.json").write_text(json.dumps(content))
    with pytest.raises(ReportError, match=r"seed 0 has rows of models \['control'\], which the head does not name"):
        read(broken)


def test_answers_to_other_questions_are_refused(broken: Path) -> None:
    file = broken / "seed-0" / "answers" / "colours" / "control.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    subject = read(broken)
    with pytest.raises(ReportError, match=r"control.jsonl answers other questions than majority.jsonl"):
        subject.answers(0, "colours")  # type: ignore[union-attr]
