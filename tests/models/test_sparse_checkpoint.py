"""A dense checkpoint becomes a sparse one that strangers load; one that is another function does not stay."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from distilvlm.models.files import verify
from distilvlm.models.save import geometry_of, save
from distilvlm.models.sparse_checkpoint import Probe, random_text, require_same, stock, upcycle_checkpoint

CHAT = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
FACTS = {
    "vocab_size": 29,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "eos_token_id": 1,
}
ALONE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**FACTS, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**FACTS, num_key_value_heads=2)),
}


@pytest.fixture(params=["llama", "qwen2"])
def language_model(request, tmp_path, tokenizer_directory) -> Path:
    """A directory of bf16 weights, tokenizer and generation settings."""
    torch.manual_seed(0)
    model = ALONE[request.param]().to(torch.bfloat16)
    model.generation_config.repetition_penalty = 1.25
    model.save_pretrained(tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_a_language_model_alone_keeps_function_dtype_tokenizer_and_settings(language_model: Path, tmp_path) -> None:
    out = tmp_path / "sparse"
    upcycle_checkpoint(str(language_model), out, layers=[0, 2])
    assert verify(out) == []
    sparse = AutoModelForCausalLM.from_pretrained(out)
    assert sparse.dtype == torch.bfloat16 and sparse.config.mlp_only_layers == [1]
    dense = AutoModelForCausalLM.from_pretrained(language_model)
    ids = random_text(dense, 2, 20)
    with torch.no_grad():
        torch.testing.assert_close(sparse.float()(ids).logits, dense.float()(ids).logits, atol=1e-6, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(language_model).get_vocab()
    assert tokenizer.chat_template == CHAT
    assert sparse.generation_config.repetition_penalty == 1.25


def test_a_vlm_keeps_geometry_template_and_what_it_sees(make, tmp_path) -> None:
    vlm = make("dinov2-registers", "llama-tied")
    save(vlm, tmp_path / "dense", "pad", CHAT)
    upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "sparse", experts=3, top_k=1)
    assert geometry_of(tmp_path / "sparse") == "pad"
    assert AutoProcessor.from_pretrained(tmp_path / "sparse").chat_template == CHAT
    before, after = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name).eval() for name in ("dense", "sparse")
    )
    placeholders, size = vlm.layout.placeholders, vlm.layout.size
    ids = torch.cat([torch.full((1, placeholders), vlm.image_id), random_text(before, 1, 9)], dim=1)
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [model(input_ids=ids, pixel_values=pixels).logits for model in (before, after)]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)
    assert after.config.text_config.num_experts == 3
    difference = require_same(Probe.of(before), Probe.of(after), tmp_path / "sparse")
    assert 0 <= difference < 1e-5


def test_random_text_shows_no_picture(make, tmp_path) -> None:
    vlm = make("clip", "qwen2-tied")
    vlm.model.config.image_token_index = int(random_text(vlm.model, 1, 1))
    assert vlm.model.config.image_token_index not in random_text(vlm.model, 4, 64)


def test_a_written_checkpoint_of_another_function_is_removed_and_named(language_model: Path, tmp_path) -> None:
    out = tmp_path / "sparse"
    upcycle_checkpoint(str(language_model), out)
    dense, sparse = stock(str(language_model)), stock(str(out))
    with torch.no_grad():
        sparse.model.layers[0].mlp.experts.down_proj[2].add_(0.01)
    with pytest.raises(ValueError, match=r"max \|Δlogit\|"):
        require_same(Probe.of(dense), Probe.of(sparse), out)
    assert not out.exists()


def test_other_eyes_are_another_function(make) -> None:
    probe = Probe.of(make("clip", "llama").model)
    blind = make("clip", "llama")
    with torch.no_grad():
        blind.model.model.multi_modal_projector.linear_1.bias.add_(1)
    with pytest.raises(ValueError, match="projector"):
        probe.difference(Probe.of(blind.model))
    assert dataclasses.replace(probe).difference(Probe.of(make("clip", "llama").model)) == 0


def test_nothing_is_written_for_a_model_that_cannot_become_sparse(make, tmp_path) -> None:
    save(make("clip", "qwen3"), tmp_path / "dense", "square")
    with pytest.raises(ValueError, match="qwen3"):
        upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "sparse")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
