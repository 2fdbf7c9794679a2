"""Commands that make one checkpoint out of another, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoProcessor

from distilvlm.models import build
from distilvlm.models.fingerprint import fingerprint
from distilvlm.models.save import geometry_of, load, save
from distilvlm.recipe import load_recipe
from tests.runs.tiny import write_recipe
from tests.test_cli import command, keep_logging  # noqa: F401 - a fixture that every test here uses

MEASURE = ["--prompt", 8, "--new", 2]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    recipe = load_recipe(write_recipe(tmp_path))
    save(build(recipe.student, 0), tmp_path / "dense", "square")
    return tmp_path / "dense"


def test_upcycle_writes_checks_and_measures(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--layers", "0", "--experts", 3, "--top-k", 1, "--teacher", dense, *MEASURE]
    assert command(monkeypatch, "upcycle", dense, tmp_path / "sparse", *arguments, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    text = AutoConfig.from_pretrained(tmp_path / "sparse").text_config
    assert (text.num_experts, text.num_experts_per_tok) == (3, 1)
    assert text.mlp_only_layers == list(range(1, text.num_hidden_layers))
    assert 0 <= told["difference"] <= 1e-5 * told["largest_logit"]
    assert list(told["models"]) == ["dense", "sparse", "teacher"]
    sizes = {name: (one["parameters"], one["active_parameters"]) for name, one in told["models"].items()}
    assert sizes["teacher"] == sizes["dense"] and sizes["dense"][0] == sizes["dense"][1]
    assert sizes["sparse"][0] > sizes["sparse"][1] > sizes["dense"][1]  # a router, zero biases
    assert all(one["prefill"] > 0 and one["decoding"] > 0 for one in told["models"].values())


def test_upcycle_says_how_far_the_two_are_apart(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "upcycle", dense, tmp_path / "sparse", *MEASURE) == 0
    out = capsys.readouterr().out
    assert "max |Δlogit|" in out and str(tmp_path / "sparse") in out
    assert all(word in out for word in ("dense", "sparse", "prefill", "decoding", "peak"))


@pytest.mark.parametrize("layers, named", [("evn", "'evn'"), ("0,9", "[0, 9]")])
def test_upcycle_of_layers_that_are_not_there_is_one_line_and_writes_nothing(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], layers, named
) -> None:
    assert command(monkeypatch, "upcycle", dense, tmp_path / "sparse", "--layers", layers) == 1
    error = capsys.readouterr().err
    assert named in error and "Traceback" not in error
    assert not (tmp_path / "sparse").exists()


def test_upcycle_does_not_write_over_what_is_there(
    dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "upcycle", dense, dense) == 1
    error = capsys.readouterr().err
    assert "is there already" in error and "Traceback" not in error


def test_a_checkpoint_of_llava_mod_becomes_a_stock_one_with_its_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dense, of Llama, read from a pickled file; layouts and refusals are in tests/models/test_llava_mod.py."""
    recipe = load_recipe(write_recipe(tmp_path))
    ours = build(recipe.student, 0)
    text = ours.model.config.get_text_config().to_dict()
    tower = "model.image_tower.image_tower.vision_model"
    named = {"model.language_model": "model", "model.vision_tower": tower}
    projector = "model.mm_projector.image_spatial_proj"
    named |= {f"model.multi_modal_projector.linear_{n}": f"{projector}.{2 * n - 2}" for n in (1, 2)}
    tensors = ours.model.state_dict()
    for before, after in named.items():
        tensors = {name.replace(f"{before}.", f"{after}.", 1): value for name, value in tensors.items()}
    place = tmp_path / "llava-small-d2s"
    place.mkdir()
    torch.save(tensors, place / "pytorch_model.bin")
    (place / "config.json").write_text(json.dumps({**text, "model_type": "llava_llama", "image_aspect_ratio": "pad"}))
    assert ours.tokenizer is not None
    ours.tokenizer.save_pretrained(place)
    ours.model.model.vision_tower.save_pretrained(tmp_path / "tower")
    arguments = ["llava-mod", place, tmp_path / "stock", "--vision", tmp_path / "tower"]
    assert command(monkeypatch, "convert-checkpoint", *arguments) == 0
    assert "vicuna" in capsys.readouterr().out
    template = AutoProcessor.from_pretrained(tmp_path / "stock").chat_template
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    ours.tokenizer.chat_template = template
    end = ours.tokenizer.eos_token
    said = str(ours.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
    assert said.endswith(f"USER: q ASSISTANT: a{end}USER: r ASSISTANT:")
    assert geometry_of(tmp_path / "stock") == "pad"
    assert fingerprint(load(tmp_path / "stock").model) == fingerprint(ours.model)
