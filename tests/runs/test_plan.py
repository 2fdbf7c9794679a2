"""A plan of stages behind an upcycle counts on the sparse student, and rows of both answers of a preference."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from distilvlm.data import DataError
from distilvlm.runs.plan import Plan, StagePlan, plan
from distilvlm.runs.plan_table import print_plan
from tests.runs.tiny import write_recipe
from tests.runs.tiny_mod import write_mod_recipe

RECIPES = Path(__file__).parents[2] / "recipes"

# Parameters of the language model in millions: all and active; then of what trains in the sparse stages.
PUBLISHED = {
    "qwen2-0.5b": (964.8, 651.0, 786.2),
    "qwen1.5-1.8b": (3054.0, 2243.0, 2035.0),
    "qwen1.5-0.5b": (775.5, 567.8, 521.2),
    None: (3278.0, 2122.0, 2894.0),  # Qwen2-1.5B
}
VISION = 303_507_456
"""Of CLIP's tower."""


def shown(resolved: Plan, width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    print_plan(resolved, console)
    return console.export_text()


def trained(stage: StagePlan) -> dict[str, int]:
    return {part.name: part.parameters for part in stage.trains}


@pytest.mark.parametrize("pair", PUBLISHED)
def test_published_students_have_their_published_sizes_without_weights(pair: str | None) -> None:
    resolved = plan(RECIPES / "llava-mod.yaml", [] if pair is None else [f"preset={pair}"])
    init, d2d, d2s, pd = resolved.stages
    whole, active, trains = PUBLISHED[pair]
    projector = trained(d2s)["projector"]
    assert init.parameters == init.active == d2d.parameters == resolved.student.parameters
    for stage in (d2s, pd):
        assert stage.parameters is not None and stage.active is not None
        assert (stage.parameters - VISION - projector) / 1e6 == pytest.approx(whole, abs=0.5)
        assert (stage.active - VISION - projector) / 1e6 == pytest.approx(active, abs=0.5)
        assert sum(trained(stage).values()) / 1e6 == pytest.approx(trains, abs=0.5)
    assert set(trained(d2s)) == {"projector", "language.feed_forward", "language.router"}
    assert pd.samples == 83_132 and pd.rows == {"balance": None, "preference": None}


def test_rows_of_a_preference_are_those_of_both_answers(tmp_path: Path) -> None:
    resolved = plan(write_mod_recipe(tmp_path))
    d2d, d2s, pd = resolved.stages
    assert d2d.rows == {"response": 5.0}  # 50 tokens to learn in 10 rows
    assert d2s.rows == {"text": 5.0, "response": 5.0, "balance": 33.9}
    assert pd.rows == {"balance": 58.0, "preference": 12.0}  # twice 6 tokens, and twice 29 positions
    assert (d2d.parameters, d2d.active) == (24_560, 24_560)
    assert (d2s.parameters, d2s.active) == (pd.parameters, pd.active) == (33_904, 27_760)


def test_the_table_says_where_the_student_grows_and_what_the_teacher_looks_at(tmp_path: Path) -> None:
    text = shown(plan(write_mod_recipe(tmp_path), measure=True))
    assert "upcycle even layers: 4 experts, 2 active" in text
    assert text.count("serve a token") == 1  # at the stage that changes it
    assert "33,904 parameters" in text and "27,760 serve a token" in text
    assert "preference 1 × 12" in text and "balance 0.01 × 58" in text
    (look,) = [line for line in text.splitlines() if "teacher, 10 records once" in line]
    assert re.search(r" [\d.]+ [MG]B ", look) and " s " in look and "1.34 kB" in look


def test_a_narrow_table_loses_no_number(tmp_path: Path) -> None:
    text = shown(plan(write_mod_recipe(tmp_path)), width=80)
    assert "…" not in text


def test_data_of_which_nothing_is_learned_is_told_by_its_stage(tmp_path: Path) -> None:
    told = "stage 'dpt': none of the first 200 rows of its data has anything to learn"
    with pytest.raises(DataError, match=told):
        plan(write_recipe(tmp_path), ["stages.dpt.max_length=4"])


def test_a_student_that_can_not_become_sparse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers 0 to 2"):
        plan(write_mod_recipe(tmp_path), ["stages.d2s.transform=[{do: upcycle, layers: [5]}]"])
