"""A tiny random VLM over a tokenizer of bytes, and pictures to show it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
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
)

from distilvlm.data.batch import SampleKey
from distilvlm.data.records import PICTURE, Record, Turn
from distilvlm.models.vlm import VLM, VisionLayout

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<eos>", "<|im_start|>", "<|im_end|>"]
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 255 are bytes, 256 to 258 special tokens, 259 is `<image>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, *SPECIAL])}
    raw = Tokenizer(models.BPE(vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
    made.add_special_tokens({"additional_special_tokens": [*SPECIAL[1:], "<image>"]})
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="session")
def make_vlm(tokenizer: PreTrainedTokenizerFast) -> Callable[..., VLM]:
    """make_vlm(language, rows): blocks outweigh the embeddings, so that picture and question change the answer."""

    def make(language: str = "llama", rows: int = 262, seed: int = 0) -> VLM:
        kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[language]
        text = kind(vocab_size=rows, num_hidden_layers=2, max_position_embeddings=512, eos_token_id=256, **TEXT)
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=259, vision_feature_layer=-2)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlavaForConditionalGeneration(config)
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.6)
            torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
        with torch.no_grad():  # answers of printable characters, so that different ids are different text
            printable = [len(token) == 1 and token.isascii() for token in tokenizer.convert_ids_to_tokens(range(256))]
            model.lm_head.weight[:256][~torch.tensor(printable)] = 0
        layout = VisionLayout(28, 14, 4, (True,) * 4, (0.5,) * 3, (0.5,) * 3, "default", -2)
        return VLM(model, tokenizer, layout, image_id=259)

    return make


@pytest.fixture
def vlm(make_vlm: Callable[..., VLM]) -> VLM:
    return make_vlm()


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """Eight questions of different lengths on six pictures, two of them about nothing but text."""
    random = np.random.default_rng(0)
    paths: list[str] = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    shown = [(paths[0],), (), (paths[1], paths[2]), (paths[0],), (paths[3],), (), (paths[4],), (paths[5],)]
    return [
        Record(
            SampleKey("test", "test.json", row),
            str(row),
            images,
            (Turn("user", f"{PICTURE}\n" * len(images) + "what " * row + "is it?"), Turn("assistant", f"answer {row}")),
        )
        for row, images in enumerate(shown)
    ]


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    """MMLU as its authors publish it, of two subjects."""

    def write(split: str, subject: str, rows: list[str]) -> None:
        (tmp_path / "mmlu" / "data" / split).mkdir(parents=True, exist_ok=True)
        (tmp_path / "mmlu" / "data" / split / f"{subject}_{split}.csv").write_text("".join(row + "\n" for row in rows))

    for subject in ("abstract_algebra", "law"):
        write("dev", subject, [f"Dev {number}?,a,b,c,d,{'AB'[number % 2]}" for number in range(5)])
        write("test", subject, ['"What is 1, plus 1?",0,"2, I think",3,4,B', "Next?,a,b,c,d,D"])
    return tmp_path / "mmlu"
