"""What `--to hf` writes is read by other programs: stock, by published names, with facts where older readers look."""

import json

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from distilvlm.export import export
from distilvlm.export import exporting as room
from distilvlm.models.files import verify
from distilvlm.models.save import load, save


def names(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
def test_an_exported_student_says_what_the_student_says(student, tmp_path, vision):
    done = export(str(student(vision)), "hf", tmp_path / "out")
    assert done.passed and done.checks[0].checked and len(done.checks[0].cases) == 2
    assert verify(tmp_path / "out") == []
    told = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert told["passed"] is True and told["checks"][0]["cases"][0]["tokens"] > 0


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_tensors_have_the_names_of_published_llavas(student, tmp_path, vision):
    export(str(student(vision)), "hf", tmp_path / "out")
    written = names(tmp_path / "out")
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in written
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in written
    assert "multi_modal_projector.linear_1.weight" in written
    assert not [name for name in written if name.startswith("vision_tower.") and ".vision_model." not in name]


def test_older_readers_find_what_newer_ones_call_otherwise(student, tmp_path):
    export(str(student("siglip", "llama-3")), "hf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    text = config["text_config"]
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert text["architectures"] == ["LlamaForCausalLM"]
    assert text["rope_theta"] == 10000.0 and text["rope_scaling"]["rope_type"] == "llama3"
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_no_path_of_the_machine_is_written(student, tmp_path):
    source = student("siglip")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["_name_or_path"] = str(tmp_path)
    moved = tmp_path / "student"
    moved.mkdir()
    for file in source.iterdir():
        if file.name != "manifest.json":
            (moved / file.name).write_bytes(file.read_bytes())
    (moved / "config.json").write_text(json.dumps(config))
    done = export(str(moved), "hf", tmp_path / "out")
    for name in done.files:
        assert str(tmp_path).encode() not in (tmp_path / "out" / name).read_bytes(), name


def test_weights_keep_their_dtype(student, tmp_path):
    vlm = load(student("siglip"), torch.bfloat16)
    save(vlm, tmp_path / "bf16", "pad")
    assert export(str(tmp_path / "bf16"), "hf", tmp_path / "out").passed
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_a_student_of_captions_is_shown_pictures_and_asked_nothing(student, tmp_path):
    vlm = load(student("siglip"))
    vlm.tokenizer.chat_template = None
    save(vlm, tmp_path / "captions", "crop")
    done = export(str(tmp_path / "captions"), "hf", tmp_path / "out")
    assert done.passed and [(case.name, case.prompt) for case in done.checks[0].cases] == [("a drawing", "")]
    assert 'processor(text="<image>"' in (tmp_path / "out" / "README.md").read_text()


def test_the_card_has_metadata_that_hubs_read(student, tmp_path):
    export(str(student("dinov2")), "hf", tmp_path / "out")
    _, head, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["library_name"] == "transformers" and facts["pipeline_tag"] == "image-text-to-text"
    assert "vLLM has no 'dinov2'" in body and "greedy tokens of 2 answers equal" in body


def test_a_file_that_says_something_else_fails_and_stays(student, tmp_path, monkeypatch):
    write = room.write_stock

    def damaging(vlm, directory, *rest):
        write(vlm, directory, *rest)
        tensors = load_file(directory / "model.safetensors")
        tensors["multi_modal_projector.linear_2.bias"] += 1
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(room, "write_stock", damaging)
    done = export(str(student("siglip")), "hf", tmp_path / "out")
    assert not done.passed
    failed = {case.name: case.passed for case in done.checks[0].cases}
    assert failed == {"a drawing": False, "text alone": True}  # only what sees is damaged
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["passed"] is False
