"""easy-VQA (public, MIT) as LLaVA files, captions drawn from its training answers, and a tokenizer of its words.

Nothing of the test split is read but its questions, its pictures and, for scoring, its answers.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import easy_vqa
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distilvlm.models.files import directory_whole, write_whole

COLOURS = frozenset({"red", "green", "blue", "black", "gray", "teal", "brown", "yellow"})
SHAPES = frozenset({"circle", "rectangle", "triangle"})

TURNS = 4
"""Questions per conversation, about. LLaVA too asks several about one picture: its tokens are then paid for once."""

DESCRIBED = 0.3
"""Share of the conversations in which one more turn asks for the picture's caption."""

SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% else %}<|assistant|> {{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Files:
    """What the quickstart's recipes read."""

    directory: Path

    @property
    def test(self) -> Path:
        return self.directory / "test.json"


def write(directory: Path) -> Files:
    """Write `captions`, `conversations`, `text` and `test` (JSON), pictures and `tokenizer/`; what is there stays."""
    files = Files(directory)
    if not files.test.exists():  # written last
        for split in ("train", "test"):
            images = Path(str(easy_vqa.__file__)).parent / "data" / split / "images"
            shutil.copytree(images, directory / split / "images", dirs_exist_ok=True)
        by_picture: defaultdict[int, list[tuple[str, str]]] = defaultdict(list)
        for question, answer, picture in zip(*easy_vqa.get_train_questions(), strict=True):
            by_picture[picture].append((question, answer))
        captions = {picture: caption(pairs) for picture, pairs in by_picture.items()}
        conversations = _conversations(by_picture, captions)
        shown = [_row(p, [("", told)]) for p, told in captions.items()]
        _write(directory / "captions.json", shown)
        _write(directory / "conversations.json", conversations)
        # The same words without a picture: what a language model knows before it sees.
        _write(directory / "text.json", [blind(row) for row in conversations])
        write_tokenizer(directory / "tokenizer", [turn for row in conversations for turn in row["conversations"]])
        test = zip(*easy_vqa.get_test_questions(), strict=True)
        _write(files.test, [_row(picture, [(q, a)], split="test") for q, a, picture in test])
    return files


def caption(pairs: list[tuple[str, str]]) -> str:
    """'a blue circle', as far as the training answers tell."""
    colour, shape = "", "shape"
    for question, answer in pairs:
        words = question.rstrip("?").split()
        denied = "not" in words or "no" in words
        named = [
            answer,
            *(words if words[0] == "what" or ((answer == "yes") != denied and answer in ("yes", "no")) else []),
        ]
        for word in named:
            colour = word if word in COLOURS else colour
            shape = word if word in SHAPES else shape
    return " ".join(f"a {colour} {shape}".split())


def _conversations(by_picture: dict[int, list[tuple[str, str]]], captions: dict[int, str]) -> list[dict[str, Any]]:
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for picture, pairs in sorted(by_picture.items()):
        pairs = draw.sample(pairs, len(pairs))
        groups = max(1, round(len(pairs) / TURNS))
        for group in range(groups):
            turns = pairs[group::groups]
            if draw.random() < DESCRIBED:
                asked = ("what is in the image?", captions[picture])
                turns = [asked, *turns] if draw.random() < 0.5 else [*turns, asked]
            rows.append(_row(picture, turns))
    return rows


def _row(picture: int, turns: list[tuple[str, str]], split: str = "train") -> dict[str, Any]:
    talk = []
    for number, (question, answer) in enumerate(turns):
        talk.append({"from": "human", "value": f"<image>\n{question}".rstrip("\n") if number == 0 else question})
        talk.append({"from": "gpt", "value": answer})
    return {"image": f"{split}/images/{picture}.png", "conversations": talk}


def blind(row: dict[str, Any]) -> dict[str, Any]:
    turns = [{**turn, "value": turn["value"].removeprefix("<image>\n")} for turn in row["conversations"]]
    return {"conversations": turns}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    write_whole(path, json.dumps([{"id": number, **row} for number, row in enumerate(rows)]).encode())


def write_tokenizer(directory: Path, turns: list[dict[str, Any]]) -> None:
    """Byte-level BPE in which every word of the training text is one token, in a question and as an answer."""
    texts = [" " * (turn["from"] == "gpt") + turn["value"].removeprefix("<image>\n") for turn in turns]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,  # more than there is to merge: the text has 60 different words
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    fast.chat_template = TEMPLATE
    with directory_whole(directory, replace=True) as partial:
        fast.save_pretrained(partial)
