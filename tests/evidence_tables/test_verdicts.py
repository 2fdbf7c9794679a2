"""The rule by which a claim holds, and the page that says so, on made-up results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distilvlm.evaluate import EXACT, Evaluation, Interval
from distilvlm.evaluate.measures import Answered
from distilvlm.evaluate.report import summed
from evidence import page
from evidence.results import read, record
from evidence.tables import TABLES
from evidence.verdicts import Claim, verdict

CLAIM = Claim("a is better than b", "paper", "shapes", "exact_match", ("a", "b"))


def around(*means: float, width: float = 0.02) -> list[Interval]:
    return [Interval(mean, mean - width, mean + width) for mean in means]


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        (around(0.05, 0.03, 0.01), "holds"),  # one interval reaches 0
        (around(0.05, 0.01, 0.01), "not decided here"),  # two do
        (around(0.05, 0.05, -0.001), "not decided here"),  # one has another direction
        (around(-0.05, -0.03, -0.01), "does not hold"),
        (around(-0.05, -0.03, 0.001), "not decided here"),
        (around(0.001, 0.0, 0.002, width=0.003), "does not hold"),  # less than a point, for sure
        (around(0.0, 0.0, 0.0, width=0.0), "does not hold"),
        (around(0.005, 0.004, 0.006, width=0.001), "holds"),  # little, but there
        (around(0.05, 0.05), "not decided here: 2 of 3 seeds, so far holds"),
        (around(0.0), "not decided here: 1 of 3 seeds, so far open"),
    ],
)
def test_a_claim_is_judged_by_the_rule(differences: list[Interval], expected: str) -> None:
    assert verdict(CLAIM, differences, lower_is_better=False, share=True) == expected


def test_less_is_more_where_lower_is_better() -> None:
    assert verdict(CLAIM, around(-0.05, -0.03, -0.04), lower_is_better=True, share=True) == "holds"
    assert verdict(CLAIM, around(0.05, 0.03, 0.04), lower_is_better=True, share=True) == "does not hold"


def test_what_is_no_share_has_no_points() -> None:
    small = around(0.001, 0.0, 0.002, width=0.003)
    assert verdict(CLAIM, small, lower_is_better=False, share=False) == "not decided here"


def test_the_same_is_the_same_to_the_last_digit() -> None:
    same = replace(CLAIM, kind="same")
    assert verdict(same, around(0, 0, 0, width=0), lower_is_better=False, share=True) == "holds"
    assert verdict(same, around(0, 0, 1e-9, width=0), lower_is_better=False, share=True) == "does not hold"


def answers(right: int, of: int = 40) -> Evaluation:
    """So many right answers, each about a picture of its own."""
    samples = [
        Answered(
            "f", row, 0, str(row), (f"{row}.png",), "What?", "red", "red" if row < right else "blue", row < right, True
        )
        for row in range(of)
    ]
    return summed(tuple(samples), EXACT, by_picture=True)


def comparison(directory: Path, table: str, rights: list[dict[str, int]]) -> None:
    """What a finished comparison of the table's rows leaves behind; `rights`: row → right answers, a seed."""
    measure = [
        {"name": one.name, "title": one.title, "better": one.better, "percent": one.percent, "headline": one.headline}
        for one in EXACT.figures
    ]
    told: dict[str, Any] = {
        "title": "Made up",
        "description": "Nothing was trained.",
        "machine": "none",
        "versions": {"torch": "2", "transformers": "5"},
        "models": {},
        "questions": {"shapes": {"title": "Shapes", "measure": "exact", "n": 40, "pictures": 40}},
        "measures": {"exact": measure},
        "differences": [claim.rows for claim in TABLES[table].claims],
        "seeds": [],
    }
    for seed, given in enumerate(rights):
        rows = {name: answers(right) for name, right in given.items()}
        for name, row in rows.items():
            file = directory / f"seed-{seed}/answers/shapes/{name}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            row.write(file)
        run = directory / f"seed-{seed}/run"
        run.mkdir()
        times = {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:02:00+00:00"}
        (run / "about.json").write_text(json.dumps(times))
        summaries = {"shapes": {name: row.summary() for name, row in rows.items()}}
        told["seeds"].append({"seed": seed, "rows": summaries, "runs": {"run": f"seed-{seed}/run"}})
    (directory / "comparison.json").write_text(json.dumps(told))


def test_the_page_says_what_holds_and_what_does_not(tmp_path: Path) -> None:
    rows = {name for claim in TABLES["llava-kd"].claims for name in claim.rows}
    made_up = [{**dict.fromkeys(rows, 20), "pt-sft-sft": right, "dpt-sft": 10} for right in (30, 34, 32)]
    place = tmp_path / "results"
    place.mkdir()
    comparison(tmp_path, "llava-kd", made_up)
    record(TABLES["llava-kd"], tmp_path, place)
    assert sorted(file.name for file in place.iterdir()) == [f"llava-kd-{seed}.json" for seed in range(3)]
    page.write(tmp_path / "page.md", place)
    text = (tmp_path / "page.md").read_text()
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    helps = lines["A second fine-tuning without a teacher helps"]
    assert "+30.0 [+25.0, +35.0]" in helps and helps.endswith("| holds |")
    assert lines["Distilled pre-training helps fine-tuning (DPT-SFT over PT-SFT)"].endswith("| does not hold |")
    assert lines["pt-sft-sft"].endswith("| 80.0 [75.0, 85.0] |")  # mean and range over seeds
    assert "2 min for seed 0" in text and "`scripts/evidence combined --seeds 3`" in text  # the latter is not made yet


def test_a_claim_that_was_not_measured_is_named(tmp_path: Path) -> None:
    rows = {name: 20 for claim in TABLES["llava-kd"].claims for name in claim.rows if name != "doubled-rate"}
    comparison(tmp_path, "llava-kd", [rows])
    record(TABLES["llava-kd"], tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"over twice the rate.*dpt-sft-dft - doubled-rate"):
        list(page.claims(TABLES["llava-kd"], read("llava-kd", tmp_path)))
