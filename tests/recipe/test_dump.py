"""A dumped recipe loads to an equal one; differences are told by dotted field."""

from __future__ import annotations

from pathlib import Path

from distilvlm.recipe import differences, dump_recipe, load_recipe

AWKWARD = {
    "description": "ümlaut: ${NOT_A_VARIABLE} # no comment",
    "student.language": {"from": None, "tokenizer": "t", "config": {"eps": 1e-6, "text": "1e-6", "window": None}},
    "stages.second.transform": [{"do": "reset", "parts": ["language"]}],
    "pictures.augment.flip": 0.5,
}


def test_a_dump_loads_to_an_equal_recipe(base: Path) -> None:
    awkward = {**AWKWARD, "description": AWKWARD["description"].replace("${", "$${")}
    recipe = load_recipe(base, awkward)
    assert recipe.description == AWKWARD["description"]
    dump = base.with_name("dump.yaml")
    dump.write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(dump)
    assert again == recipe
    assert again.student.language.config == {"eps": 1e-6, "text": "1e-6", "window": None}


def test_a_dump_writes_defaults_out(base: Path) -> None:
    assert "micro_batch: 1" in dump_recipe(load_recipe(base))


def test_equal_recipes_do_not_differ(base: Path) -> None:
    assert differences(load_recipe(base), load_recipe(base)) == []


def test_differences_name_the_field_and_both_values(base: Path) -> None:
    changed = {"stages.second.optim.lr": 1.0, "student.vision.size": None, "machine.workers": 2, "data.more.path": "x"}
    assert differences(load_recipe(base), load_recipe(base, changed)) == [
        "student.vision.size: 28 → (none)",
        "data.more: (none) → {'path': 'x', 'format': 'auto', 'template': 'chat', 'weight': 1.0}",
        "stages.second.optim.lr: 2e-05 → 1.0",
        "machine.workers: 0 → 2",
    ]


def test_differing_stages_are_listed(base: Path) -> None:
    renamed = load_recipe(base, {"stages.second.name": "third"})
    assert differences(load_recipe(base), renamed) == ["stages: ['first', 'second'] → ['first', 'third']"]
