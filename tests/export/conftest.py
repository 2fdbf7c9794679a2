"""Tiny random students as a run leaves them: stock directories with a byte-level tokenizer and a chat template."""

from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distilvlm.data.template import export_chat_template
from distilvlm.models.compose import build
from distilvlm.models.save import save
from distilvlm.recipe.models import ModelSpec

CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEXT = [
    "The quick brown fox doesn't jump over 1234 lazy dogs; it sleeps.",
    "Describe the picture. Name three colours and one animal: red, green, blue and a cat!",
]

VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"image_size": 24}
VISION = {
    "clip": {"config": {"model_type": "clip_vision_model", **VIT}},
    "clip-full": {"config": {"model_type": "clip_vision_model", **VIT}, "select": "full"},
    "siglip": {"config": {"model_type": "siglip_vision_model", **VIT}},
    # As SigLIP's 384 pixels of patches of 14: a rest that no patch covers.
    "siglip-rest": {"config": {"model_type": "siglip_vision_model", **VIT, "image_size": 18}},
    "dinov2": {"config": {"model_type": "dinov2", "layerscale_value": 0.5, **DINO}, "size": 16},
    "registers": {"config": {"model_type": "dinov2_with_registers", "num_register_tokens": 4, **DINO}},
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LANGUAGE = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True, **SIZES},  # no row for `<image>`
    "llama-3": {"model_type": "llama", "vocab_size": 400, "rope_parameters": LLAMA3, **SIZES},
    "qwen2": {"model_type": "qwen2", "vocab_size": 400, "tie_word_embeddings": False, **SIZES},
    "qwen3": {"model_type": "qwen3", "vocab_size": 400, "head_dim": 16, **SIZES},
}
LANGUAGE["sliding"] = LANGUAGE["qwen2"] | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(splits: str) -> Tokenizer:
    """A tokenizer that splits text as GPT-2's, SmolLM's, Qwen2's or Llama 3's does."""
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits in ("gpt-2", "smollm"))
    pattern = QWEN2 if splits == "qwen2" else QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
    steps = {
        "gpt-2": [plain],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), plain],
        "qwen2": [pre_tokenizers.Split(Regex(pattern), "isolated"), plain],
        "llama-bpe": [pre_tokenizers.Split(Regex(pattern), "isolated"), plain],
    }[splits]
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if splits == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """A tokenizer as Llama 2's: pieces with a mark for space, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=370, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    plain = Tokenizer(models.BPE(**_pieces(tokenizer), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    plain.normalizer, plain.decoder = tokenizer.normalizer, tokenizer.decoder
    plain.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", *SPECIAL)])
    return plain


def _pieces(tokenizer: Tokenizer) -> dict:
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


@pytest.fixture(scope="session")
def tokenizers_directory(tmp_path_factory):
    """tokenizers_directory(splits) → a directory with that tokenizer."""
    made: dict[str, Path] = {}

    def make(splits: str) -> Path:
        if splits not in made:
            made[splits] = tmp_path_factory.mktemp(f"tokenizer-{splits}")
            backend = sentencepiece() if splits == "sentencepiece" else byte_level(splits)
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=backend,
                eos_token="<|endoftext|>",
                pad_token="<|endoftext|>",
                unk_token="<unk>" if splits == "sentencepiece" else None,
            )
            tokenizer.chat_template = CHAT
            tokenizer.save_pretrained(made[splits])
        return made[splits]

    return make


@pytest.fixture(scope="session")
def student(tmp_path_factory, tokenizers_directory):
    """student(vision, language, splits) → directory of a finished student with random biases, norms and scales."""
    made: dict[tuple[str, str, str, str], Path] = {}

    def make(vision="siglip", language="llama", splits="gpt-2", geometry="pad") -> Path:
        key = (vision, language, splits, geometry)
        if key not in made:
            spec = ModelSpec.model_validate(
                {
                    "vision": VISION[vision],
                    "language": {"config": LANGUAGE[language], "tokenizer": str(tokenizers_directory(splits))},
                }
            )
            vlm = build(spec, 0)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in vlm.model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            made[key] = tmp_path_factory.mktemp("students") / "-".join(key)
            save(vlm, made[key], geometry, export_chat_template("chat", vlm.tokenizer))
        return made[key]

    return make
