"""A byte-level tokenizer, templates, pictures and rows that are small enough to be checked by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as decoders
from transformers import PreTrainedTokenizerFast

from distilvlm.data import SampleKey, Turn
from distilvlm.data.records import PICTURE, Record

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITH_BLOCKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TRIMMING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + "
    "'<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
LIST_CONTENT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<image>"]


def make_tokenizer(
    chat_template: str | None = CHATML, bos: str | None = None, eos: str = "<|im_end|>", trim_offsets: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges across word and space; with `bos` its post-processor writes it before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    corpus = [
        "what colour is it? it is red",
        " red green blue is the colour it",
        "user assistant system USER ASSISTANT",
    ]
    tokenizer.train_from_iterator(corpus * 4, trainer)
    steps = [processors.ByteLevel(trim_offsets=True)] if trim_offsets else []
    if bos:
        steps.append(
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
        )
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, pad_token=eos)
    fast.chat_template = chat_template
    return fast


def exact_tokenizer(
    merges: Sequence[tuple[str, str]] = (),
    chat_template: str = CHATML,
    eos: str = "<|im_end|>",
    bos: str | None = None,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly these merges, which may go across words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos, pad_token=eos)
    fast.chat_template = chat_template
    return fast


def make_record(*texts: str, images: tuple[str, ...] | None = None, system: str | None = None) -> Record:
    """Turns by turns of user and assistant; `@` in a text stands for a picture's place."""
    roles = ("user", "assistant")
    turns = [Turn(roles[number % 2], text.replace("@", PICTURE)) for number, text in enumerate(texts)]  # type: ignore[arg-type]
    if system is not None:
        turns.insert(0, Turn("system", system))
    shown = sum(text.count("@") for text in texts)
    return Record(SampleKey("talk", "talk.json", 7), "7", images or ("picture.png",) * shown, tuple(turns))


def make_pictures(directory: Path, count: int, side: int = 24) -> list[str]:
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        pixels = rng.integers(0, 256, size=(side, side + 4 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / name)
    return names


def write_json(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def llava_row(number: int, image: str | None, *texts: str) -> dict:
    roles = ("human", "gpt")
    row = {
        "id": f"row-{number}",
        "conversations": [{"from": roles[turn % 2], "value": text} for turn, text in enumerate(texts)],
    }
    return row if image is None else {**row, "image": image}


def mixed_rows(names: list[str], count: int) -> list[dict]:
    """Two thirds with a picture, of growing length."""
    rows = []
    for number in range(count):
        answer = "red " * (1 + number % 5)
        if number % 3 == 2:
            rows.append(llava_row(number, None, "what is it?", answer))
        else:
            rows.append(llava_row(number, names[number % len(names)], "what colour?\n<image>", answer))
    return rows
