"""What a format has no place for is refused before any weight is read, with the reason and what is possible."""

import json
import shutil

import pytest

from distilvlm import cli
from distilvlm.export import export, exporting, require_possible
from distilvlm.models import save as saving
from distilvlm.models.mixture import MixConfig, mix
from distilvlm.models.save import load, save
from distilvlm.models.upcycling import upcycle
from tests.test_cli import command


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Refusing must need none."""
    original = saving.load

    def planned(path, *arguments, meta=False, **options):
        assert meta, "weights were loaded before the refusal"
        return original(path, *arguments, meta=meta, **options)

    monkeypatch.setattr("distilvlm.export.possible.load", planned)
    monkeypatch.setattr("distilvlm.export.exporting.load", planned)


def refused(source, to, tmp_path):
    with pytest.raises(ValueError) as caught:
        export(str(source), to, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    "vision, language, reason",
    [
        ("siglip", "qwen3", "its language model is a 'qwen3'"),
        ("registers", "llama", "its vision tower is a 'dinov2_with_registers'"),
        ("clip-full", "llama", "it hands over 17 features of 16 patches"),
    ],
)
def test_gguf_names_what_llama_cpp_has_not_and_offers_onnx(student, tmp_path, vision, language, reason):
    message = refused(student(vision, language), "gguf", tmp_path)
    assert reason in message and "Possible: --to onnx, or --to hf" in message


def copied(source, place, file, change):
    """A student of which one JSON file says something else; its weights are never looked at."""
    shutil.copytree(source, place, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    facts = json.loads((place / file).read_text())
    change(facts)
    (place / file).write_text(json.dumps(facts))
    return place


@pytest.mark.parametrize(
    "vision, part, facts, reason",
    [
        ("siglip", "text_config", {"hidden_act": "gelu"}, "feed-forwards use 'gelu', and llama.cpp's 'llama' has silu"),
        (
            "siglip",
            "text_config",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "it rotates a part of each head only (partial_rotary_factor)",
        ),
        ("siglip", "vision_config", {"hidden_act": "relu"}, "its tower uses 'relu': llama.cpp has quick_gelu, gelu,"),
        (
            "siglip",
            "vision_config",
            {"intermediate_size": 32},
            "its tower's feed-forwards are as wide as the tower: llama.cpp takes up for down then",
        ),
        (
            "dinov2",
            "vision_config",
            {"use_swiglu_ffn": True},
            "its DINOv2 tower has gated feed-forwards (use_swiglu_ffn)",
        ),
        (
            "dinov2",
            "vision_config",
            {"qkv_bias": False},
            "its DINOv2 tower projects queries, keys and values without bias (qkv_bias)",
        ),
    ],
)
def test_gguf_names_the_field_of_a_configuration_that_llama_cpp_does_not_compute(
    student, tmp_path, vision, part, facts, reason
):
    source = copied(student(vision), tmp_path / "other", "config.json", lambda config: config[part].update(facts))
    assert reason in refused(source, "gguf", tmp_path)


def unigram(tokenizer):
    tokenizer["model"] = {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [[token, 0.0] for token in tokenizer["model"]["vocab"]],
    }


@pytest.mark.parametrize(
    "splits, change, reason",
    [
        ("gpt-2", unigram, "its tokenizer is a Unigram, and llama.cpp is given byte-pair encodings: "),
        (
            "gpt-2",
            lambda tokenizer: tokenizer.update(normalizer={"type": "Lowercase"}),
            "its tokenizer changes text first (Lowercase), which llama.cpp would not: ",
        ),
        (
            "gpt-2",
            lambda tokenizer: tokenizer.update(pre_tokenizer={"type": "Whitespace"}),
            "its tokenizer splits text by Whitespace in a way that llama.cpp has no rules for: it knows ",
        ),
        (
            "sentencepiece",
            lambda tokenizer: tokenizer.update(normalizer={"type": "NFKC"}),
            "its tokenizer is SentencePiece with other steps (NFKC): llama.cpp knows ",
        ),
    ],
)
def test_gguf_names_what_a_tokenizer_does_that_llama_cpp_has_no_rules_for(student, tmp_path, splits, change, reason):
    source = copied(student("siglip", "qwen2", splits), tmp_path / "other", "tokenizer.json", change)
    assert reason in refused(source, "gguf", tmp_path)


@pytest.mark.parametrize("to", ["hf", "gguf", "onnx"])
def test_adaptors_go_nowhere_and_their_base_is_named(tmp_path, to):
    source = tmp_path / "adaptors"
    source.mkdir()
    facts = {"format": 1, "student": {"from": "some/base"}, "adaptors": ["seeing"]}
    (source / "host.json").write_text(json.dumps(facts))
    message = refused(source, to, tmp_path)
    assert "holds adaptors (seeing)" in message and "export the base they stand on (some/base)" in message


@pytest.mark.parametrize("to", ["hf", "gguf", "onnx"])
@pytest.mark.parametrize("experts", [1, 2])
def test_several_experts_in_a_tower_go_nowhere_and_one_is_merged(student, tmp_path, to, experts):
    vlm = load(student("siglip"))
    mix(vlm.model.model.vision_tower, MixConfig(experts=experts, rank=2), vlm.layout.layer)
    save(vlm, tmp_path / "mixed", "pad")
    if experts == 1:
        require_possible(str(tmp_path / "mixed"), "hf")  # a finished one is stock already
    else:
        assert "has 2 experts in its vision tower" in refused(tmp_path / "mixed", to, tmp_path)


@pytest.mark.parametrize("to", ["gguf", "onnx"])
def test_attention_that_slides_goes_to_hf(student, tmp_path, to):
    assert "its attention slides" in refused(student("siglip", "sliding"), to, tmp_path)


@pytest.mark.parametrize("to", ["gguf", "onnx"])
def test_a_sparse_language_model_goes_to_hf_only(student, tmp_path, to):
    save(upcycle(load(student("siglip", "qwen2")), 2, 1, "even", 0), tmp_path / "sparse", "pad")
    message = refused(tmp_path / "sparse", to, tmp_path)
    assert "its language model has experts" in message and message.endswith("Possible: --to hf")
    require_possible(str(tmp_path / "sparse"), "hf")


def test_a_missing_package_is_named_with_the_extra_that_has_it(student, tmp_path, monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert "--to onnx needs onnxscript: pip install 'distilvlm[onnx]'" in refused(student("siglip"), "onnx", tmp_path)


def test_a_directory_that_is_there_is_left_alone(student, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        export(str(student("siglip")), "hf", tmp_path / "out")


@pytest.mark.parametrize("bound, status, said", [(1e-5, 0, "hf: parity:"), (-1.0, 1, "hf: NO PARITY: 2 of 2 answers")])
def test_a_failed_check_is_the_exit_status(student, tmp_path, monkeypatch, capsys, bound, status, said):
    monkeypatch.undo()
    monkeypatch.setattr(cli, "_configure_logging", lambda: None)
    monkeypatch.setitem(exporting.BOUNDS, "hf", bound)  # −1: one that nothing meets
    assert command(monkeypatch, "export", student("siglip"), tmp_path / "out", "--to", "hf") == status
    assert said in capsys.readouterr().out and (tmp_path / "out" / "parity.json").exists()


@pytest.mark.parametrize(
    "options", [("--to", "gguf", "--type", "q5"), ("--to", "hf", "--type", "f16"), ("--to", "tar")]
)
def test_options_that_are_none_are_refused(student, tmp_path, monkeypatch, options):
    assert command(monkeypatch, "export", student("siglip"), tmp_path / "out", *options) == 2
    assert not (tmp_path / "out").exists()
