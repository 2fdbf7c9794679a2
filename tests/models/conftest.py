"""Tiny random models, composed from recipe sections as a user would; the tokenizer is made here."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distilvlm.models.compose import build
from distilvlm.recipe.models import ModelSpec

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]

VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"layerscale_value": 0.5}
VISION = {
    "clip": {"config": {"model_type": "clip_vision_model", **VIT}},
    "clip-full": {"config": {"model_type": "clip_vision_model", **VIT}, "select": "full"},
    "siglip": {"config": {"model_type": "siglip_vision_model", **VIT}},
    "siglip-default": {"config": {"model_type": "siglip_vision_model", **VIT}, "select": "default"},
    "dinov2": {"config": {"model_type": "dinov2", **DINO}, "size": 8},
    "dinov2-registers": {"config": {"model_type": "dinov2_with_registers", "num_register_tokens": 4, **DINO}},
}
LM = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
LANGUAGE = {
    # without spare rows: `<image>` is one past the end
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, **LM},
    "llama": {"model_type": "llama", "vocab_size": 40, **LM},
    "qwen2-tied": {
        "model_type": "qwen2",
        "vocab_size": 40,
        "tie_word_embeddings": True,
        **{key: value for key, value in LM.items() if key != "head_dim"},
    },
    "qwen3": {"model_type": "qwen3", "vocab_size": 40, "tie_word_embeddings": False, **LM},
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True, **LM},
}


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory) -> Path:
    """A tokenizer of letters with 29 ids."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def spec(tokenizer_directory):
    """spec(vision="clip", language="llama", **fields of the sections) → ModelSpec."""

    def make(vision="clip", language="llama", projector=None, layers=None, **changes) -> ModelSpec:
        facts = LANGUAGE[language] | changes.pop("language_config", {})
        return ModelSpec.model_validate(
            {
                "vision": VISION[vision] | changes,
                "language": {"config": facts, "tokenizer": str(tokenizer_directory), "layers": layers},
                "projector": projector or {},
            }
        )

    return make


@pytest.fixture(scope="session")
def make(spec):
    """make(...) → VLM; like `spec`, and with random biases and norms, so that forgetting one shows."""

    def build_one(*arguments, seed=0, **changes):
        vlm = build(spec(*arguments, **changes), seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in vlm.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return vlm

    return build_one


@pytest.fixture(scope="session")
def make_batch():
    """make_batch(vlm, rows) → a batch; a row is a string, in which '#' is a picture and a letter a token."""

    def make_one(vlm, rows, seed=0):
        generator = torch.Generator().manual_seed(seed)
        per_picture = vlm.layout.placeholders
        sequences = []
        for row in rows:
            sequence = []
            for letter in row:
                sequence += [-1] * per_picture if letter == "#" else [WORDS.index(letter)]
            sequences.append(sequence)
        length = max(map(len, sequences))
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)] = torch.tensor(sequence)
            mask[i, : len(sequence)] = 1
        placeholder_rows = (ids.flatten() == -1).nonzero().flatten()
        pictures = sum(row.count("#") for row in rows)
        size = vlm.layout.size
        return SimpleNamespace(
            input_ids=ids.clamp(min=0),
            attention_mask=mask,
            placeholder_rows=placeholder_rows,
            pictures=torch.randint(0, 256, (pictures, 3, size, size), dtype=torch.uint8, generator=generator),
            sizes=None,
        )

    return make_one


@pytest.fixture(scope="session")
def stock_logits():
    """stock_logits(vlm, batch): what the stock class computes when it is used without us."""

    def compute(vlm, batch):
        model = copy.deepcopy(vlm.model).eval()
        rows = vlm.embedding_rows
        if vlm.image_id_is_virtual:
            model.resize_token_embeddings(rows + 1, mean_resizing=False)
        ids = batch.input_ids.clone()
        ids.view(-1)[batch.placeholder_rows] = vlm.image_id
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (vlm.layout.mean, vlm.layout.std))
        pixels = (batch.pictures / 255 - mean) / std if len(batch.pictures) else None
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=batch.attention_mask, pixel_values=pixels).logits[..., :rows]

    return compute
