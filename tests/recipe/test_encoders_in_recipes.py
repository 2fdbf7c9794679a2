"""Recipes with vision encoders that teach: what they mean, and what is refused with its fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from distilvlm.recipe import Recipe, RecipeError, dump_recipe, load_recipe, read_dump

RECIPE: dict[str, Any] = {
    "name": "move",
    "student": {"vision": {"from": "vit"}},
    "encoders": {"cnn": {"from": "cnn", "pool": 7}, "anchor": {}, "sam": {"from": "sam"}},
    "data": {"pictures": {"path": "pictures"}},
    "stages": [
        {
            "name": "first",
            "transform": [{"do": "mix"}],
            "train": ["vision.experts", "adapters"],
            "data": ["pictures"],
            "loss": {"text": 0, "encoder": 1.0},
            "optim": {"lr": 1e-3, "batch": 4, "updates": 3},
        }
    ],
}


def changed(**changes: Any) -> dict[str, Any]:
    """The recipe with dotted fields set (`__` for a dot); None removes one."""
    recipe = yaml.safe_load(yaml.safe_dump(RECIPE))
    for field, value in changes.items():
        here: Any = recipe
        *path, last = field.split("__")
        for step in path:
            here = here[int(step)] if step.isdigit() else here.setdefault(step, {})
        if value is None:
            del here[last]
        else:
            here[last] = value
    return recipe


def test_what_is_left_out_is_the_methods() -> None:
    recipe = Recipe.model_validate(RECIPE)
    stage = recipe.stages[0]
    assert recipe.student.encoder_alone and stage.pictures_alone
    assert list(recipe.teachers_of(stage)) == ["anchor", "cnn", "sam"]  # the anchor first, whatever the file's order
    mix = stage.mixes
    assert mix is not None
    assert (mix.experts, mix.rank, mix.alpha, mix.dropout, mix.routing) == (3, 32, 1.0, 0.05, "top1")
    assert mix.start == "zero"  # ours; the method starts by kaiming
    assert stage.encoder.preset == "paper"
    assert read_dump(dump_recipe(recipe)) == recipe


def test_a_stage_may_compare_with_some() -> None:
    recipe = Recipe.model_validate(changed(stages__0__encoder={"teachers": ["sam", "anchor"]}))
    assert list(recipe.teachers_of(recipe.stages[0])) == ["anchor", "sam"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"encoders__cnn": {}}, r"encoders\.cnn: give 'from' .* only 'anchor' may leave both out"),
        ({"encoders__cnn": {"from": "x", "config": {}}}, "give only one of 'from' and 'config'"),
        ({"encoders__anchor": {"pool": 7}}, r"encoders\.anchor\.pool: the anchor is compared token by token"),
        ({"encoders__anchor": {"size": 224}}, "a copy of the student has its size and layer"),
        ({"encoders": {"a.b": {"from": "x"}}}, r"encoders\.a\.b: names of encoders have no '\.'"),
        ({"encoders": {}}, "has loss.encoder, but the recipe has no 'encoders'"),
        ({"stages__0__encoder": {"teachers": ["eva"]}}, "compares with 'eva', but 'encoders' has"),
        ({"encoders__anchor": None}, "weighs tokens by an encoder's attention, and there is no 'anchor'"),
        (
            {"encoders__anchor": None, "stages__0__encoder": {"importance": "sam"}},
            "weighs teachers by how they agree with the 'anchor'",
        ),
        ({"stages__0__encoder": {"importance": "cnn"}}, r"encoders\.cnn\.pool: its attention weighs tokens"),
        ({"stages__0__loss": {"encoder": 1.0}}, r"has a loss term of language.* set loss: \{text: 0\}"),
        ({"stages__0__loss": {"text": 0, "expert_balance": 1.0}}, "the stage would learn nothing"),
        ({"teacher": {"vision": {"from": "v"}}}, "a vision encoder alone gives features, not answers"),
        ({"teacher": {"from": "llava"}}, "'teacher' is a language model's: use 'encoders'"),
        ({"cache": {"path": "c"}, "pictures": {"augment": {"flip": 0.5}}}, "pictures that 'cache' keeps features of"),
        ({"stages__0__transform": [{"do": "mix"}, {"do": "mix"}]}, "mixes twice"),
        ({"stages__0__transform": [{"do": "mix", "experts": 1, "routing": "dense"}]}, "of one expert"),
        ({"encoders__cnn": {"from": "x", "lyer": 2}}, "lyer"),
    ],
)
def test_refusals_name_the_field_and_the_fix(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Recipe.model_validate(changed(**changes))


def test_a_later_stage_cannot_mix_again_or_reset_the_tower() -> None:
    second = RECIPE["stages"][0] | {"name": "second"}
    with pytest.raises(ValueError, match="'second' mixes experts into a tower that 'first' has given some already"):
        Recipe.model_validate(RECIPE | {"stages": [RECIPE["stages"][0], second]})
    second = second | {"transform": [{"do": "reset", "parts": ["vision"]}]}
    with pytest.raises(ValueError, match="'second' resets the vision tower, which has experts since 'first'"):
        Recipe.model_validate(RECIPE | {"stages": [RECIPE["stages"][0], second]})


def test_an_encoders_path_is_relative_to_the_file_and_a_typo_is_told(tmp_path: Path) -> None:
    (tmp_path / "cnn").mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert load_recipe(tmp_path / "recipe.yaml").encoders["cnn"].source == str(tmp_path / "cnn")
    with pytest.raises(RecipeError, match=r"stages\.first\.encoder\.presett: unknown key; did you mean 'preset'\?"):
        load_recipe(tmp_path / "recipe.yaml", {"stages.first.encoder.presett": "paper"})
