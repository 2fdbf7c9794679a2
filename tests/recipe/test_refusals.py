"""Every refusal names the file, the dotted field and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilvlm.recipe import RecipeError, load_recipe


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def edit(base: Path, old: str, new: str) -> None:
    text = base.read_text(encoding="utf-8")
    assert old in text
    base.write_text(text.replace(old, new), encoding="utf-8")


def message(path: Path, overrides: object = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("studnt: {}", "studnt: unknown key; did you mean 'student'?"),
        ("student: {vision: {form: x}}", "student.vision.form: unknown key; did you mean 'from'?"),
        ("machine: {microbatch: 1}", "machine.microbatch: unknown key; did you mean 'micro_batch'?"),
        ("stages: [{name: second, optim: {larning: 1}}]", "stages.second.optim.larning: unknown key; known: batch"),
        ("data: {rows: {tmplate: vicuna}}", "data.rows.tmplate: unknown key; did you mean 'template'?"),
        ("stages: [{name: second, transform: [{do: reset, part: [x]}]}]", "stages.second.transform.0.part: unknown"),
        ("stages: [{name: second, transform: [{do: reset}]}]", "stages.second.transform.0.parts: missing"),
        ("student: {vision: {config: {}}}", "vision: give exactly one of 'from' (pretrained) and 'config' (random"),
        ("student: {language: {config: {}}}", "language: give exactly one of 'from' (pretrained) and 'config' (random"),
        ("student: {from: llava}", "student: give either 'from' (a whole checkpoint) or both 'vision' and 'language'"),
        ("seed: -1", "seed: input should be greater than or equal to 0 (here: -1)"),
        ("machine: {precision: fp16}", "machine.precision: input should be 'fp32' or 'bf16' (here: 'fp16')"),
        ("stages: [{name: second, data: [rosw]}]", "stage 'second' uses data 'rosw', but 'data' has only ['rows']"),
        ("stages: [{name: second, optim: {updates: 3}}]", "stages.second.optim: give exactly one of 'epochs'"),
        ("preset: qick", "preset: no preset 'qick'; did you mean 'quick'?"),
    ],
)
def test_the_file_that_wrote_the_field_is_named(base: Path, change: str, expected: str) -> None:
    child = write(base.with_name("child.yaml"), f"extends: base.yaml\n{change}\n")
    assert message(child).startswith(f"{child}: ")
    assert expected in message(child)


def test_an_error_in_the_parent_names_the_parent(base: Path) -> None:
    edit(base, "size: 28", "sise: 28")
    child = write(base.parent / "child.yaml", "extends: base.yaml\nstudent: {vision: {layer: -1}}\n")
    assert message(child) == f"{base}: student.vision.sise: unknown key; did you mean 'size'?"


def test_every_problem_is_told_at_once(base: Path) -> None:
    told = message(base, {"seed": -1, "machine": {"wokers": 1}}).splitlines()
    assert told == [
        f"{base} (overridden): seed: input should be greater than or equal to 0 (here: -1)",
        f"{base} (overridden): machine.wokers: unknown key; did you mean 'workers'?",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.frist.optim.lr=1", "stages.frist: no entry of that name; did you mean 'first'?"),
        ("stages.2.optim.lr=1", "stages.2: the list has 2 entries, counted from 0"),
        ("name.x=1", "name.x: name is a value, not a section"),
        ("stages..lr=1", "has an empty step"),
        ("seed", "write FIELD=VALUE"),
        ("seed=[1", "not valid YAML"),
        ("presets.quick.seed=1", "cannot be overridden"),
        ("preset=fast", "no preset 'fast'; known: quick, slow"),
        ("student.language.from=${A:-${B}}", "write ${NAME} or ${NAME:-default} (not nested"),
    ],
)
def test_a_wrong_override_says_what_would_be_right(base: Path, override: str, expected: str) -> None:
    told = message(base, [override])
    assert told.startswith(str(base))
    assert expected in told


def test_a_wrong_field_in_a_preset_names_the_preset(base: Path) -> None:
    edit(base, "stages.second.optim.lr: 1e-6", "stages.second.optim.l: 1")
    assert message(base, ["preset=slow"]).startswith(f"{base} (preset 'slow'): stages.second.optim.l: unknown key")


def test_a_key_that_stands_twice_is_refused(base: Path) -> None:
    edit(base, "name: base", "name: base\nname: again")
    assert "'name' stands twice" in message(base)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "llava-kd.yaml", "")
    assert "no such recipe file; did you mean 'llava-kd.yaml'?" in message(tmp_path / "llava_kd.yaml")


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    assert "must be a mapping" in message(write(tmp_path / "list.yaml", "- 1\n"))
