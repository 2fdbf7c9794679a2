"""A tiny random VLM over a tokenizer of bytes, and what to ask it: its answers differ with picture and question."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
)

from distilvlm.models.adaptors import AdaptorConfig, Host
from distilvlm.models.vlm import VLM, VisionLayout
from distilvlm.serve.interface import Message, Request
from tests.adaptor_hosts import disturb

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<eos>", "<|im_start|>", "<|im_end|>"]
EOS, TURN_END, IMAGE = 256, 258, 259
CONTEXT = 256

_TEXT: dict[str, Any] = {
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": EOS,
}
_WINDOW = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_LANGUAGE = {
    "llama": lambda: LlamaConfig(**_TEXT),
    "sliding": lambda: Qwen2Config(**_TEXT, **_WINDOW),
    "sparse": lambda: Qwen2MoeConfig(**_TEXT, **_EXPERTS),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 255 are bytes, 256 to 258 special tokens, 259 is `<image>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: number for number, token in enumerate([*alphabet, *SPECIAL])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
    made.add_special_tokens({"additional_special_tokens": [*SPECIAL[1:], "<image>"]})
    made.chat_template = CHATML
    return made


def vlm(language: str = "llama", adaptors: bool = False, ends: bool = False, seed: int = 0) -> VLM:
    """Answers are of printable characters, and come to an end if they may (`ends`); with adaptors 'seeing' and
    'grounding', of two forms."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = _LANGUAGE[language]()
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.4)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    words = tokenizer()
    printable = [len(token) == 1 and token.isascii() for token in words.convert_ids_to_tokens(range(EOS))]
    with torch.no_grad():
        model.lm_head.weight[:EOS][~torch.tensor(printable)] = 0
        model.lm_head.weight[EOS:] *= ends
    layout = VisionLayout(28, 14, 4, (True,) * 4, (0.5,) * 3, (0.5,) * 3, "default", -2)
    made = VLM(model, words, layout, image_id=IMAGE)
    if adaptors:
        host = Host.attach(model)
        disturb(host.add("seeing", AdaptorConfig(positions=(0, 2, 3))).parameters(), 5, by=0.3)
        disturb(host.add("grounding", AdaptorConfig(positions=(1, 3), structure="a")).parameters(), 6, by=0.3)
    made.train(False)
    return made


def picture(number: int) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def asked(number: int, model: str = "tiny", **fields: Any) -> Request:
    """Request `number`: of its own length, every third with a picture or two."""
    shown = (picture(number),) * (number % 3)
    text = "<image>\n" * len(shown) + "what " * (number % 7) + f"is {number}?"
    fields = {"temperature": 0.0, "max_tokens": 4 + number % 13} | fields
    return Request(model, (Message("user", text),), pictures=shown, **fields)
