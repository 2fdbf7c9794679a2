"""A recipe small enough to run in a second: random towers and language models, drawn pictures, a word tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

COLOURS = ["red", "green", "blue", "white", "black"]
WORDS = "a what colour is this an picture of the sky full"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 16,
}


def language(hidden: int, layers: int = 2) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        # Dropout, so that a continued run must put the random state back to end with the same weights.
        "attention_dropout": 0.1,
    }


def write_tokenizer(directory: Path, extra: str = "") -> None:
    words = sorted({*COLOURS, *extra.split(), *WORDS.split(), "user", "assistant", "system"})
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<|im_end|>", "<|im_start|>", *letters])}
    merges: list[tuple[str, str]] = []
    for word in words:
        for text in (word, "Ġ" + word):
            left = text[0]
            for letter in text[1:]:
                merged = left + letter
                if merged not in vocabulary:
                    vocabulary[merged] = len(vocabulary)
                    merges.append((left, letter))
                left = merged
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHATML
    fast.save_pretrained(directory)


def write_data(directory: Path, rows: int, seed: int = 0) -> None:
    """Pictures of one colour with noise; every fourth row is text only, some have two turns."""
    (directory / "pictures").mkdir(parents=True)
    draw = np.random.default_rng(seed)
    values = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "white": (250,) * 3, "black": (9,) * 3}
    captions, questions = [], []
    for row in range(rows):
        colour = COLOURS[row % len(COLOURS)]
        name = f"{row}.png"
        noise = draw.integers(0, 40, (20, 28, 3))
        pixels = np.clip(np.array(values[colour]) - noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(directory / "pictures" / name)
        caption = [{"from": "human", "value": "<image>\nwhat is this"}, {"from": "gpt", "value": f"a {colour} picture"}]
        captions.append({"id": row, "image": name, "conversations": caption})
        turns = [{"from": "human", "value": "<image>\nwhat colour is this"}, {"from": "gpt", "value": colour}]
        if row % 3 == 0:
            turns += [{"from": "human", "value": "is this the sky"}, {"from": "gpt", "value": "a picture of the sky"}]
        if row % 4 == 3:
            text_only = [{"from": "human", "value": "what colour is the sky"}, {"from": "gpt", "value": "blue"}]
            questions.append({"id": row, "conversations": text_only})
        else:
            questions.append({"id": row, "image": name, "conversations": turns})
    (directory / "captions.json").write_text(json.dumps(captions))
    (directory / "questions.json").write_text(json.dumps(questions))


def write_recipe(directory: Path, rows: int = 10, **changes: Any) -> Path:
    """A three-stage LLaVA-KD recipe over random models; `changes` replace top-level sections."""
    write_tokenizer(directory / "tokenizer")
    write_data(directory, rows)
    tokenizer = str(directory / "tokenizer")
    kd = {"text": 1.0, "response": 1.0, "visual": 1.0, "relation": 0.5}
    optim = {"lr": 0.01, "batch": 4, "epochs": 2, "clip": 1.0}
    recipe: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "student": {"vision": {"config": VISION}, "language": {"config": language(16), "tokenizer": tokenizer}},
        "teacher": {
            "vision": {"config": VISION},
            "language": {"config": language(24, layers=3), "tokenizer": tokenizer},
        },
        "pictures": {"augment": {"flip": 0.5, "crop": 0.6, "brightness": 0.2}},
        "data": {
            "captions": {
                "path": str(directory / "captions.json"),
                "images": str(directory / "pictures"),
                "template": "plain",
            },
            "questions": {"path": str(directory / "questions.json"), "images": str(directory / "pictures")},
        },
        "stages": [
            {"name": "dpt", "train": ["projector"], "data": ["captions"], "loss": kd, "optim": optim},
            {
                "name": "sft",
                "transform": [{"do": "reset", "parts": ["language"]}],
                "train": ["projector", "language"],
                "data": ["questions"],
                "optim": optim,
            },
            {"name": "dft", "train": ["projector", "language"], "data": ["questions"], "loss": kd, "optim": optim},
        ],
        "machine": {"micro_batch": 2, "checkpoint_every": 2},
    }
    recipe.update(changes)
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
