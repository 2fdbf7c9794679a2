"""Composing a recipe: extends, stages by name, presets, overrides, environment, paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilvlm.recipe import RecipeError, load_recipe


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_scientific_notation_without_a_point_is_a_number(base: Path) -> None:
    override = "student.language={from: null, tokenizer: t, config: {rms_norm_eps: 1e-6, name: '1e-6'}}"
    config = load_recipe(base, [override]).student.language.config
    assert config == {"rms_norm_eps": 1e-6, "name": "1e-6"}
    assert load_recipe(base).stages[0].optim.lr == 1e-3


def test_extends_merges_mappings_deep(base: Path) -> None:
    child = write(base.with_name("child.yaml"), "extends: base.yaml\nname: child\nstudent: {vision: {size: 56}}\n")
    recipe = load_recipe(child)
    assert (recipe.name, recipe.student.vision.size, recipe.student.vision.source) == ("child", 56, "encoder")


def test_stages_with_known_names_change_those_and_keep_the_others(base: Path) -> None:
    child = write(base.with_name("child.yaml"), "extends: base.yaml\nstages: [{name: second, optim: {lr: 3e-5}}]\n")
    first, second = load_recipe(child).stages
    assert first.optim.lr == 1e-3
    assert (second.optim.lr, second.optim.batch, second.train) == (3e-5, 4, ["projector", "language"])


def test_stages_with_a_new_name_replace_the_list(base: Path) -> None:
    stage = "{name: third, train: [vision], data: [rows], optim: {lr: 1, batch: 1, updates: 1}}"
    child = write(base.with_name("child.yaml"), f"extends: base.yaml\nstages: [{stage}]\n")
    assert [stage.name for stage in load_recipe(child).stages] == ["third"]


def test_null_takes_back_what_was_inherited(base: Path) -> None:
    child = write(
        base.with_name("child.yaml"),
        "extends: base.yaml\nstages: [{name: second, optim: {clip: null, epochs: null, updates: 7}}]\n",
    )
    optim = load_recipe(child).stages[1].optim
    assert (optim.clip, optim.epochs, optim.updates) == (None, None, 7)


def test_null_inside_an_architecture_stays_a_value(base: Path) -> None:
    child = write(
        base.with_name("child.yaml"),
        "extends: base.yaml\nstudent: {vision: {from: null, config: {window: 3, depth: 2}}}\n",
    )
    grandchild = write(base.with_name("grand.yaml"), "extends: child.yaml\nstudent: {vision: {config: {window: null}}}")
    assert load_recipe(grandchild).student.vision.config == {"window": None, "depth": 2}
    assert load_recipe(child, ["student.vision.config.window=null"]).student.vision.config["window"] is None


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(RecipeError, match=r"circle: a\.yaml → b\.yaml → a\.yaml"):
        load_recipe(tmp_path / "a.yaml")


def test_a_preset_comes_before_overrides_and_may_be_chosen_by_one(base: Path) -> None:
    assert load_recipe(base).stages[0].optim.updates == 10
    recipe = load_recipe(base, ["stages.second.optim.lr=7", "preset=quick"])
    assert (recipe.stages[0].optim.updates, recipe.stages[1].optim.lr) == (2, 7.0)


@pytest.mark.parametrize("chosen", ["preset=quick,slow", "preset=[quick, slow]"])
def test_several_presets_apply_in_order(base: Path, chosen: str) -> None:
    recipe = load_recipe(base, [chosen])
    assert (recipe.stages[0].optim.updates, recipe.stages[1].optim.lr) == (2, 1e-6)


def test_overrides_reach_list_entries_by_index_and_by_name(base: Path) -> None:
    recipe = load_recipe(base, ["stages.0.optim.lr=1e-4", "stages.second.train.1=vision"])
    assert recipe.stages[0].optim.lr == 1e-4
    assert recipe.stages[1].train == ["projector", "vision"]


def test_an_override_makes_sections_that_are_not_there(base: Path) -> None:
    assert load_recipe(base, {"pictures.augment.flip": 0.5}).pictures.augment.flip == 0.5


def test_a_mapping_as_override_merges(base: Path) -> None:
    recipe = load_recipe(base, {"student": {"vision": {"size": 14}}})
    assert (recipe.student.vision.size, recipe.student.vision.source) == (14, "encoder")


def test_the_environment_fills_in_and_a_default_holds_without_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    override = {"data.rows.path": "${DISTILVLM_TEST:-data}/rows.json", "description": "costs $5, $${HOME}"}
    assert load_recipe(base, override).data["rows"].path == "data/rows.json"
    monkeypatch.setenv("DISTILVLM_TEST", "/elsewhere")
    assert load_recipe(base, override).data["rows"].path == "/elsewhere/rows.json"
    assert load_recipe(base, override).description == "costs $5, ${HOME}"


def test_a_variable_that_is_not_set_is_named_unless_its_value_is_replaced(base: Path) -> None:
    child = write(base.with_name("child.yaml"), "extends: base.yaml\nstudent: {language: {from: '${NOT_SET}'}}\n")
    with pytest.raises(RecipeError, match=r"child\.yaml: student\.language\.from: environment variable NOT_SET"):
        load_recipe(child)
    assert load_recipe(child, ["student.language.from=x"]).student.language.source == "x"


def test_paths_belong_to_the_file_they_are_written_in(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "recipes" / "base.yaml", base.read_text(encoding="utf-8"))
    write(tmp_path / "recipes" / "rows.json", "[]")
    child = "extends: ../recipes/base.yaml\nstudent: {vision: {from: ./encoder}, language: {from: Qwen/Qwen2.5-0.5B}}\n"
    write(tmp_path / "mine" / "child.yaml", child)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("mine/child.yaml", ["pictures.features=./kept"])
    assert recipe.data["rows"].path == str(tmp_path / "recipes" / "rows.json")  # exists beside the parent
    assert recipe.student.vision.source == str(tmp_path / "mine" / "encoder")  # './' belongs to the child
    assert recipe.student.language.source == "Qwen/Qwen2.5-0.5B"  # hub id
    assert recipe.pictures.features == str(tmp_path / "kept")  # an override belongs to the working directory
    assert load_recipe("mine/child.yaml", ["data.rows.path=runs/x"]).data["rows"].path == "runs/x"
