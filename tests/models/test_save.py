"""A saved model is a stock checkpoint that computes what ours does, and comes back as it was."""

import copy
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaForConditionalGeneration,
)

from distilvlm.data.geometry import canvas, decode
from distilvlm.data.template import export_chat_template
from distilvlm.models import forward
from distilvlm.models.files import verify
from distilvlm.models.fingerprint import fingerprint
from distilvlm.models.save import geometry_of, load, save

TOWERS = ["clip", "clip-full", "siglip", "siglip-default", "dinov2", "dinov2-registers"]
LANGUAGES = ["llama-tied", "llama", "qwen2-tied", "qwen3", "qwen3-tied"]
PROMPTS = ["a b <image> c d", "<image> e f g h"]

CHAT = (
    "{% for message in messages %}{{ message['role'][0] + ' ' + message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files of several shapes and modes, one of them transparent."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = []
    for name, shape in [("wide.png", (23, 61, 3)), ("tall.png", (57, 13, 4)), ("square.png", (31, 31, 3))]:
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
        paths.append(str(folder / name))
    return paths


def canvases(vlm, geometry, paths):
    background = tuple(int(part * 255) for part in vlm.layout.mean)
    return torch.stack([canvas(decode(path), geometry, vlm.layout.size, background) for path in paths])


def our_logits(vlm, geometry, prompts, paths, input_ids, attention_mask):
    """[samples, length, V] by our own forward, given the stock processor's ids (padded on the right)."""
    flat = input_ids.flatten()
    rows = (flat == vlm.image_id).nonzero().flatten()
    batch = type("Rows", (), {})()
    batch.input_ids = input_ids.masked_fill(input_ids == vlm.image_id, 0)
    batch.attention_mask, batch.placeholder_rows, batch.sizes = attention_mask, rows, None
    features = forward.vision_features(vlm.model, vlm.layout, canvases(vlm, geometry, paths))
    hidden = forward.hidden_states(vlm.model, vlm.layout, batch, features)
    return hidden @ forward.head_weight(vlm.model).T


def stock(directory):
    """What a stranger loads."""
    processor = AutoProcessor.from_pretrained(directory)
    assert processor.tokenizer.padding_side == "left"  # as generating in batches needs
    processor.tokenizer.padding_side = "right"
    return AutoModelForImageTextToText.from_pretrained(directory).eval(), processor


@torch.no_grad()
def assert_same_as_stock(vlm, directory, geometry, paths):
    model, processor = stock(directory)
    inputs = processor(images=[Image.open(path) for path in paths], text=PROMPTS, padding=True, return_tensors="pt")
    layout = vlm.layout
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (layout.mean, layout.std))
    seen = ((inputs["pixel_values"] * std + mean) * 255).round().to(torch.uint8)
    assert torch.equal(seen, canvases(vlm, geometry, paths))
    assert (inputs["input_ids"] == vlm.image_id).sum(dim=1).tolist() == [layout.placeholders] * 2
    theirs = model(**inputs).logits
    ours = our_logits(vlm, geometry, PROMPTS, paths, inputs["input_ids"], inputs["attention_mask"])
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(theirs[real][:, : vlm.embedding_rows], ours[real], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tower", TOWERS)
def test_the_stock_model_sees_and_computes_what_ours_does(make, tmp_path, pictures, tower):
    vlm = make(tower, "llama-tied")
    save(vlm, tmp_path / "model", "square")
    assert_same_as_stock(vlm, tmp_path / "model", "square", pictures[:2])


@pytest.mark.parametrize("geometry", ["square", "pad", "crop"])
@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_the_image_processor_reproduces_the_geometry_pixel_for_pixel(make, tmp_path, pictures, tower, geometry):
    vlm = make(tower, "qwen3")
    save(vlm, tmp_path / "model", geometry)
    for paths in (pictures[:2], pictures[1:]):
        assert_same_as_stock(vlm, tmp_path / "model", geometry, paths)
    assert geometry_of(tmp_path / "model") == geometry
    (tmp_path / "model" / "distilvlm.json").unlink()
    assert geometry_of(tmp_path / "model") == geometry  # read off the image processor, as for anybody's checkpoint


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_was_saved_comes_back(make, tmp_path, pictures, language):
    vlm = make("clip", language)
    save(vlm, tmp_path / "model", "square")
    assert verify(tmp_path / "model") == []
    assert_same_as_stock(vlm, tmp_path / "model", "square", pictures[:2])
    again = load(tmp_path / "model")
    assert fingerprint(again.model) == fingerprint(vlm.model)
    assert again.layout == vlm.layout and again.image_id == vlm.image_id
    assert again.embedding_rows == vlm.embedding_rows == again.model.config.text_config.vocab_size
    assert again.tokenizer.get_vocab() == vlm.tokenizer.get_vocab()
    tied = again.model.lm_head.weight is again.model.get_input_embeddings().weight
    assert tied == language.endswith("-tied")
    save(again, tmp_path / "again", "square")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "model" / "model.safetensors"
    ).read_bytes()


def snapshot(vlm):
    generation = vlm.model.generation_config
    return (
        fingerprint(vlm.model),
        vlm.model.config.to_dict(),
        generation.to_dict() if generation else None,
        vlm.tokenizer.chat_template,
        vlm.tokenizer.padding_side,
        dict(vlm.tokenizer.init_kwargs),
        [(name, id(parameter), parameter.requires_grad) for name, parameter in vlm.model.named_parameters()],
        torch.random.get_rng_state().tolist(),
    )


def test_saving_changes_nothing_in_memory_nor_the_global_generator(make, tmp_path):
    vlm = make("clip", "llama-tied")
    vlm.model.model.vision_tower.requires_grad_(False)
    before = copy.deepcopy(snapshot(vlm))
    save(vlm, tmp_path / "model", "pad", chat_template=CHAT)
    assert snapshot(vlm) == before


@pytest.mark.parametrize("language", ["llama-tied", "llama", "qwen3"])
def test_the_image_token_gets_a_row_of_zeros_only_where_it_has_none(make, tmp_path, language):
    vlm = make("siglip", language)
    save(vlm, tmp_path / "model", "square")
    model, _ = stock(tmp_path / "model")
    embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
    assert model.config.image_token_id == vlm.image_id
    rows = vlm.embedding_rows
    if language == "llama-tied":
        assert vlm.image_id == rows and embedding.shape[0] == head.shape[0] == rows + 1
        assert head is embedding and not embedding[rows].any()
        assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")  # saved once
    else:
        assert vlm.image_id < rows == embedding.shape[0]
    assert torch.equal(embedding[:rows], vlm.model.get_input_embeddings().weight)
    assert torch.equal(head[:rows], vlm.model.lm_head.weight)


def test_generation_never_gives_the_image_token_and_stops_where_the_template_ends_a_turn(make, tmp_path, pictures):
    vlm = make("clip", "llama-tied")
    vlm.tokenizer.eos_token = "z"
    vlm.model.generation_config = GenerationConfig(eos_token_id=7, pad_token_id=0)
    save(vlm, tmp_path / "model", "square", chat_template=CHAT)
    model, processor = stock(tmp_path / "model")
    ids = vlm.tokenizer.convert_tokens_to_ids(["z", "<eos>"])
    assert model.generation_config.eos_token_id == [7, *ids]
    assert model.generation_config.pad_token_id == vlm.tokenizer.pad_token_id
    torch.nn.init.zeros_(model.lm_head.weight)  # every token is as likely as any other
    inputs = processor(images=Image.open(pictures[0]), text=PROMPTS[0], return_tensors="pt")
    given = model.generate(**inputs, do_sample=True, min_new_tokens=300, max_new_tokens=300)
    assert vlm.image_id not in given[0, inputs["input_ids"].shape[1] :]
    assert load(tmp_path / "model").model.generation_config.suppress_tokens is None


def test_a_chat_template_takes_text_and_parts(make, tmp_path, pictures):
    vlm = make("clip", "llama-tied")
    vlm.tokenizer.chat_template = CHAT
    save(vlm, tmp_path / "model", "square", chat_template=export_chat_template("chat", vlm.tokenizer))
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    parts = [{"type": "image", "path": pictures[0]}, {"type": "text", "text": "x y"}]
    texts = {
        side.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        for side in (processor, tokenizer)
        for content in (parts, "<image>\nx y")
    }
    assert texts == {"u <image>\nx y <eos> "}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == vlm.image_id).sum() == vlm.layout.placeholders
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert model(**inputs).logits.isfinite().all()


def test_weights_are_kept_in_their_dtypes_and_a_mixed_model_loads_without_loss(make, tmp_path):
    vlm = make("clip", "llama-tied")
    vlm.model.model.vision_tower.bfloat16()
    save(vlm, tmp_path / "model", "square")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for name, value in saved.items() if "vision_tower" in name} == {torch.bfloat16}
    model, _ = stock(tmp_path / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = dict(vlm.model.named_parameters())
    for name, parameter in load(tmp_path / "model").model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, expected[name].float())
    vlm.model.bfloat16()
    save(vlm, tmp_path / "half", "square")
    assert AutoConfig.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert load(tmp_path / "half", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_an_existing_directory_is_refused_or_replaced_whole(make, tmp_path):
    vlm = make("clip", "llama-tied")
    save(vlm, tmp_path / "model", "square")
    with pytest.raises(FileExistsError):
        save(vlm, tmp_path / "model", "pad")
    save(vlm, tmp_path / "model", "pad", replace=True)
    assert geometry_of(tmp_path / "model") == "pad"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_it_loads_in_a_process_that_has_no_distilvlm(make, tmp_path, pictures):
    vlm = make("dinov2", "qwen2-tied")
    save(vlm, tmp_path / "model", "square")
    program = f"""
import sys
sys.modules["distilvlm"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained({str(tmp_path / "model")!r})
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "model")!r})
inputs = processor(images=Image.open({pictures[0]!r}), text={PROMPTS[0]!r}, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
torch.save((dict(inputs), logits), {str(tmp_path / "theirs.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    inputs, logits = torch.load(tmp_path / "theirs.pt", weights_only=True)
    with torch.no_grad():
        ours = our_logits(
            vlm, "square", PROMPTS[:1], pictures[:1], inputs["input_ids"].clone(), inputs["attention_mask"]
        )
    torch.testing.assert_close(logits[..., : vlm.embedding_rows], ours, atol=2e-5, rtol=1e-5)


def foreign(vlm, directory):
    """A checkpoint as others write it: its own rows for `<image>`, an image processor, nothing of ours."""
    model = copy.deepcopy(vlm.model)
    model.resize_token_embeddings(48, mean_resizing=False)
    model.save_pretrained(directory)
    vlm.tokenizer.save_pretrained(directory)
    size = vlm.layout.size
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        directory
    )


@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_a_checkpoint_in_the_stock_format_loads_with_the_layout_that_its_files_imply(make, tmp_path, tower):
    vlm = make(tower, "llama")
    foreign(vlm, tmp_path / "llava")
    again = load(tmp_path / "llava")
    clip = CLIPImageProcessorPil()
    statistics = {"mean": tuple(clip.image_mean), "std": tuple(clip.image_std)}
    assert again.layout == dataclasses.replace(vlm.layout, **statistics)
    assert again.image_id == vlm.image_id and again.embedding_rows == 48
    assert geometry_of(tmp_path / "llava") == "crop"
    for name, parameter in again.model.named_parameters():
        if "embed_tokens" not in name and "lm_head" not in name:
            assert torch.equal(parameter, dict(vlm.model.named_parameters())[name])


def test_a_plan_loads_without_weights(make, tmp_path):
    vlm = make("clip", "llama-tied")
    save(vlm, tmp_path / "model", "square")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "manifest.json").unlink()
    plan = load(tmp_path / "model", meta=True)
    assert plan.model.device.type == "meta" and plan.layout == vlm.layout
    assert [(n, p.shape) for n, p in plan.model.named_parameters()] == [
        (n, p.shape) for n, p in vlm.model.named_parameters()
    ]
    with pytest.raises(ValueError, match="built for a plan"):
        save(plan, tmp_path / "empty", "square")


def damaged(vlm, directory, change):
    save(vlm, directory, "square")
    (directory / "manifest.json").unlink()  # as if another program had written it
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(find(weights, "linear_1.bias")), r"lacks 1 .*linear_1\.bias"),
        (lambda weights: weights.update({"stray.weight": torch.ones(1)}), r"unknown 1 .*stray\.weight"),
        (
            lambda weights: weights.update({find(weights, "linear_2.bias"): torch.ones(3)}),
            r"another shape.*linear_2\.bias",
        ),
    ],
    ids=["missing", "left over", "another shape"],
)
def test_a_tensor_that_does_not_fit_is_an_error_that_names_it(make, tmp_path, change, message):
    directory = damaged(make("clip", "llama-tied"), tmp_path / "model", change)
    with pytest.raises(ValueError, match=message):
        load(directory)


def find(weights, ending):
    return next(name for name in weights if name.endswith(ending))


def test_a_directory_that_lost_something_is_refused_by_its_manifest(make, tmp_path):
    save(make("clip", "llama-tied"), tmp_path / "model", "square")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"damaged:\n.*tokenizer\.json: 2 bytes"):
        load(tmp_path / "model")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth"])
def test_pickled_weights_are_refused_by_name(make, tmp_path, name):
    directory = damaged(make("clip", "llama-tied"), tmp_path / "model", lambda weights: None)
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / name)
    with pytest.raises(ValueError, match=name):
        load(directory)


def test_what_is_no_llava_of_a_newer_format_or_reads_several_layers_is_refused(make, tmp_path, tokenizer_directory):
    vlm = make("clip", "llama-tied")
    vlm.model.model.language_model.save_pretrained(tmp_path / "language")
    with pytest.raises(ValueError, match="is a 'llama', not a 'llava'"):
        load(tmp_path / "language")
    directory = damaged(vlm, tmp_path / "model", lambda weights: None)
    ours = json.loads((directory / "distilvlm.json").read_text())
    (directory / "distilvlm.json").write_text(json.dumps(ours | {"format": 2}))
    with pytest.raises(ValueError, match=r"format 2.*update distilvlm"):
        load(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vision_feature_layer": [-3, -2]}))
    with pytest.raises(ValueError, match=r"model reads several layers of its tower \(\[-3, -2\]\), which is not sup"):
        load(directory)


def test_a_tokenizer_with_another_image_id_is_refused(make, tmp_path):
    vlm = make("clip", "llama")
    directory = damaged(vlm, tmp_path / "model", lambda weights: None)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"image_token_index": 5}))
    with pytest.raises(ValueError, match="the model takes id 5"):
        load(directory)


def test_a_published_checkpoint_loads_by_its_class(make, tmp_path):
    """`from_pretrained` of the class itself sees the same weights as `load`."""
    vlm = make("clip", "qwen3")
    save(vlm, tmp_path / "model", "square")
    assert fingerprint(LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")) == fingerprint(vlm.model)
