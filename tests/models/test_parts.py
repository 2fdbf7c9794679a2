"""Parts: every parameter has one place, and choosing says exactly what trains."""

import logging

import pytest
import torch

from distilvlm.models import parts


@pytest.mark.parametrize("language", ["llama", "llama-tied", "qwen2-tied", "qwen3"])
@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2-registers"])
def test_the_parts_are_a_partition(make, vision, language):
    model = make(vision, language).model
    rows = parts.summary(model)
    names = [row.name for row in rows]
    assert "language.other" not in names
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    members = [set(parts.parameters_of(model, name)) for name in names if name != "vision"]
    members.append(set(parts.parameters_of(model, "vision")) - set(parts.parameters_of(model, "vision.unread")))
    assert sum(map(len, members)) == len(set().union(*members)) == len(list(model.named_parameters()))


def test_sub_parts_hold_what_their_names_say(make):
    model = make("clip", "qwen3").model
    layer = "model.language_model.layers.0"
    assert f"{layer}.self_attn.q_norm.weight" in parts.parameters_of(model, "language.attention")
    assert f"{layer}.mlp.up_proj.weight" in parts.parameters_of(model, "language.feed_forward")
    assert set(parts.parameters_of(model, "language.norm")) == {
        "model.language_model.norm.weight",
        *(f"model.language_model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")),
    }
    assert set(parts.parameters_of(model, "language.head")) == {"lm_head.weight"}
    assert set(parts.parameters_of(model, "language.embedding")) == {"model.language_model.embed_tokens.weight"}


def test_a_tied_head_is_part_of_the_embedding_and_says_so(make):
    model = make("clip", "llama-tied").model
    assert parts.parameters_of(model, "language.embedding")["model.language_model.embed_tokens.weight"] is (
        model.lm_head.weight
    )
    for ask in (lambda: parts.choose(model, ["language.head"]), lambda: parts.parameters_of(model, "language.head")):
        with pytest.raises(ValueError, match=r"tied.*language\.embedding"):
            ask()


def test_an_unknown_part_names_the_nearest(make):
    model = make("clip", "llama").model
    with pytest.raises(
        ValueError, match=r"unknown part 'projecter'; did you mean 'projector'\? Known parts: vision, pro"
    ):
        parts.choose(model, ["projecter"])
    with pytest.raises(ValueError, match=r"unknown part 'x'\. Known parts: vision, projector"):
        parts.choose(model, ["x"])
    with pytest.raises(
        ValueError, match=r"part 'adapters' has no parameters in this model: a stage with loss\.encoder"
    ):
        parts.choose(model, ["adapters"])
    with pytest.raises(ValueError, match="cannot train"):
        parts.choose(model, ["vision.unread"])


def test_only_what_is_chosen_trains_and_is_float32(make):
    model = make("siglip", "llama-tied").model.to(torch.bfloat16)
    chosen = parts.choose(model, ["projector", "language.attention"]).parameters
    assert set(chosen) == {"projector", "language.attention"}
    trains = {name for members in chosen.values() for name in members}
    assert trains == {
        name
        for name, _ in model.named_parameters()
        if name.startswith("model.multi_modal_projector.") or (".language_model." in name and ".self_attn." in name)
    }
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in trains)
        assert parameter.dtype == (torch.float32 if name in trains else torch.bfloat16)
    parts.choose(model, ["language"])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.dtype == torch.float32 and model.lm_head.weight.requires_grad
    assert not any(p.requires_grad for p in parts.parameters_of(model, "projector").values())


def test_choosing_changes_no_value(make):
    model = make("dinov2", "qwen3").model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parts.choose(model, ["vision", "language"])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_parameter_that_two_names_cover_belongs_to_the_closer_one(make):
    """So that `rates: {language.head: ...}` beside `language` means something, and nothing is stepped twice."""
    model = make("clip", "llama").model
    for names in (["language", "language.head"], ["language.head", "language"]):
        chosen = parts.choose(model, names).parameters
        assert list(chosen["language.head"]) == ["lm_head.weight"]
        assert set(chosen["language"]) == set(parts.parameters_of(model, "language")) - {"lm_head.weight"}


def test_what_lies_behind_the_read_layer_is_reported_and_never_trains(make):
    model = make("siglip", "llama", layer=1).model  # 1 of 3 blocks read
    unread = parts.parameters_of(model, "vision.unread")
    assert {name.removeprefix("model.vision_tower.").split(".")[0] for name in unread} == {
        "encoder",
        "post_layernorm",
        "head",
    }
    assert {int(name.split(".")[4]) for name in unread if ".encoder." in name} == {1, 2}
    table = {row.name: row for row in parts.choose(model, ["vision"]).table}
    assert table["vision.unread"].trainable == 0 < table["vision.unread"].parameters
    assert table["vision"].trainable == table["vision"].parameters


def test_the_choice_is_logged_with_counts(make, caplog):
    model = make("clip", "llama-tied").model
    with caplog.at_level(logging.INFO):
        parts.choose(model, ["projector"])
    lines = [line for line in caplog.messages if line.startswith("part ")]
    assert sum("frozen" in line for line in lines) == len(lines) - 1
    number = sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    assert f"{number:,} train" in next(line for line in lines if "projector" in line)
