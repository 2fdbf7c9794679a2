"""Our forward is the stock class's, for every kind of tower and language model."""

import dataclasses

import pytest
import torch

from distilvlm.models import forward, parts

ROWS = ["ab##cd", "abcdefgh", "#xyz", "a#b#c"]

TOWERS = ["clip", "clip-full", "siglip", "siglip-default", "dinov2", "dinov2-registers"]
LANGUAGES = ["llama", "llama-tied", "qwen2-tied", "qwen3", "qwen3-tied"]


def logits(vlm, batch):
    """[samples, length, V], only in tests."""
    features = forward.vision_features(vlm.model, vlm.layout, batch.pictures) if len(batch.pictures) else None
    hidden = forward.hidden_states(vlm.model, vlm.layout, batch, features)
    return hidden @ forward.head_weight(vlm.model).T


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("vision", TOWERS)
def test_equals_the_stock_class(make, make_batch, stock_logits, vision, language):
    vlm = make(vision, language)
    batch = make_batch(vlm, ROWS)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(logits(vlm, batch)[real], stock_logits(vlm, batch)[real], rtol=1e-5, atol=1e-5)


def test_a_batch_without_pictures_equals_the_stock_class_and_never_runs_the_tower(make, make_batch, stock_logits):
    vlm = make("clip", "qwen2-tied")
    batch = make_batch(vlm, ["abc", "defgh"])
    expected = stock_logits(vlm, batch)
    vlm.model.model.vision_tower = None
    vlm.model.model.multi_modal_projector = None
    torch.testing.assert_close(logits(vlm, batch), expected)


def test_padding_does_not_change_a_row(make, make_batch):
    vlm = make("siglip", "llama")
    together = logits(vlm, make_batch(vlm, ["#ab", "#abcdefg"]))
    alone = logits(vlm, make_batch(vlm, ["#ab"]))
    torch.testing.assert_close(together[:1, : alone.shape[1]], alone, rtol=1e-5, atol=1e-5)


def test_the_id_under_a_placeholder_does_not_matter(make, make_batch):
    vlm = make("clip", "llama")
    batch = make_batch(vlm, ["a#b"])
    before = logits(vlm, batch)
    batch.input_ids.view(-1)[batch.placeholder_rows] = 17
    assert torch.equal(logits(vlm, batch), before)


def test_features_are_normalised_like_the_stock_image_processor(make):
    from transformers import CLIPImageProcessorPil

    vlm = make("clip", "llama")
    pictures = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    processor = CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=list(vlm.layout.mean), image_std=list(vlm.layout.std)
    )
    stock = processor([p.permute(1, 2, 0).numpy() for p in pictures], return_tensors="pt").pixel_values
    torch.testing.assert_close(forward.pixel_values(vlm.layout, pictures), stock.float(), rtol=0, atol=1e-6)


def test_pictures_of_another_size_or_kind_are_refused(make):
    vlm = make("clip", "llama")
    with pytest.raises(ValueError, match="12, 12"):
        forward.vision_features(vlm.model, vlm.layout, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        forward.vision_features(vlm.model, vlm.layout, torch.zeros(1, 3, 12, 12))


def test_a_feature_too_few_or_too_many_is_refused(make, make_batch):
    vlm = make("clip", "llama")
    batch = make_batch(vlm, ["a#b#"])
    features = forward.vision_features(vlm.model, vlm.layout, batch.pictures)
    for wrong in (features[:1], None, torch.cat([features, features])):
        with pytest.raises(ValueError, match="18 placeholders"):
            forward.hidden_states(vlm.model, vlm.layout, batch, wrong)


def test_a_frozen_tower_has_no_graph_and_no_dropout(make):
    vlm = make("clip", "llama", language_config={})
    vlm.model.model.vision_tower.config.attention_dropout = 0.5
    for module in vlm.model.model.vision_tower.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    parts.choose(vlm.model, ["projector"])
    vlm.model.train()
    pictures = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    first, second = (forward.vision_features(vlm.model, vlm.layout, pictures) for _ in range(2))
    assert not first.requires_grad
    assert torch.equal(first, second)


def test_a_tower_that_trains_has_a_graph_unless_nobody_wants_one(make):
    vlm = make("clip", "llama")
    parts.choose(vlm.model, ["vision"])
    pictures = torch.randint(0, 256, (1, 3, 12, 12), dtype=torch.uint8)
    assert forward.vision_features(vlm.model, vlm.layout, pictures).requires_grad
    with torch.no_grad():
        assert not forward.vision_features(vlm.model, vlm.layout, pictures).requires_grad


@pytest.mark.parametrize("vision", TOWERS)
def test_everything_that_trains_gets_a_gradient_and_nothing_else(make, make_batch, vision):
    """What is 'unread' is known by name only; autograd says what is true."""
    vlm = make(vision, "qwen3")
    trains = {n for ps in parts.choose(vlm.model, ["vision", "projector", "language"]).parameters.values() for n in ps}
    unread = set(parts.parameters_of(vlm.model, "vision.unread"))
    vlm.model.requires_grad_(True)
    logits(vlm, make_batch(vlm, ROWS)).square().mean().backward()
    with_gradient = {name for name, p in vlm.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    untouched = {name for name, p in vlm.model.named_parameters() if p.grad is None}
    # A key's bias shifts all scores of a query alike: its gradient is zero by the mathematics of the softmax.
    assert {name for name in trains - with_gradient if "k_proj.bias" not in name and "key.bias" not in name} == set()
    assert untouched == unread


def test_the_idle_projector_is_zero_and_reaches_all_that_only_pictures_reach(make, make_batch):
    vlm = make("dinov2", "llama")
    chosen = parts.choose(vlm.model, ["vision", "projector"]).parameters
    zero = forward.idle_projector(vlm.model)
    assert zero.item() == 0
    zero.backward()
    for name, parameter in (chosen["vision"] | chosen["projector"]).items():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_gradient_checkpointing_gives_the_same_gradients(make, make_batch):
    def gradients(checkpointing):
        vlm = make("clip", "qwen2-tied")
        parts.choose(vlm.model, ["projector"])
        vlm.model.train()
        if checkpointing:
            forward.enable_gradient_checkpointing(vlm.model)
        logits(vlm, make_batch(vlm, ROWS)).square().mean().backward()
        return [p.grad for p in vlm.model.model.multi_modal_projector.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert plain.abs().sum() > 0
        assert torch.equal(plain, checkpointed)


def test_autocast_and_frozen_bf16_parts(make, make_batch):
    """A float32 projector between a bf16 tower and a bf16 language model, as a first stage on a GPU has it."""
    vlm = make("siglip", "llama")
    batch = make_batch(vlm, ROWS)
    exact = logits(vlm, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = logits(vlm, batch)
    scale = exact.abs().max().item()
    torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.05 * scale)
    vlm.model.to(torch.bfloat16)
    projector = parts.choose(vlm.model, ["projector"]).parameters["projector"]
    assert {p.dtype for p in projector.values()} == {torch.float32}
    rough = logits(vlm, batch)
    torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.05 * scale)
    rough.float().square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in projector.values())


def test_a_layout_that_contradicts_the_tower_is_refused(make):
    vlm = make("clip", "llama")
    wrong = dataclasses.replace(vlm.layout, select="full")
    with pytest.raises(ValueError, match="the tower gave 10 tokens per picture, its layout says 9"):
        forward.vision_features(vlm.model, wrong, torch.zeros(1, 3, 12, 12, dtype=torch.uint8))
