"""Easy-VQA's pictures (public, MIT), a coloured shape each, as a YOLO data set.

`distilvlm data convert yolo` (the comparisons' `prepare.data`) makes descriptions and boxes of it. Its `train` is of
easy-VQA's training pictures, its `test` of the test pictures.
"""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import easy_vqa
import yaml
from PIL import Image, ImageChops

from distilvlm.data.convert import convert
from distilvlm.models.files import write_whole
from distilvlm.quickstart.questions import COLOURS, SHAPES, blind, caption, write_tokenizer

COUNTS = {"train": 1500, "test": 800}
NAMES = sorted(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


def write(directory: Path, counts: dict[str, int] = COUNTS) -> None:
    """Write `config.yaml`, `images/`, `labels/`, `tokenizer/`; `pairs.jsonl`, true descriptions against false ones; and
    `text.json`, the training texts without pictures. What is there stays."""
    if (directory / "text.json").exists():  # written last
        return
    for split, count in counts.items():
        _pictures(directory, split, count)
    config = {"path": ".", "names": NAMES, **{split: f"images/{split}" for split in counts}}
    write_whole(directory / "config.yaml", yaml.safe_dump(config).encode())
    pairs = [row for row in _rows(directory, "pairs") if row["meta"]["about"] == "caption"]
    write_whole(directory / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in pairs).encode())
    rows = _rows(directory, "caption")
    write_tokenizer(directory / "tokenizer", [turn for row in rows for turn in row["conversations"]])
    write_whole(directory / "text.json", json.dumps([blind(row) for row in rows]).encode())


def _pictures(directory: Path, split: str, count: int) -> None:
    pictures = Path(str(easy_vqa.__file__)).parent / "data" / split / "images"
    for folder in ("images", "labels"):
        (directory / folder / split).mkdir(parents=True, exist_ok=True)
    for number, name in islice(sorted(_names(split).items()), count):
        picture = Image.open(pictures / f"{number}.png").convert("RGB")
        picture.save(directory / "images" / split / f"{number:04}.png")
        write_whole(directory / "labels" / split / f"{number:04}.txt", _label(name, picture).encode())


def _names(split: str) -> dict[int, str]:
    """Picture → "red circle"; those of which the answers do not tell both are left out."""
    asked = easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()
    by_picture: defaultdict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, picture in zip(*asked, strict=True):
        by_picture[picture].append((question, answer))
    names = {picture: caption(pairs).removeprefix("a ") for picture, pairs in by_picture.items()}
    return {picture: name for picture, name in names.items() if name in NAMES}


def _label(name: str, picture: Image.Image) -> str:
    """The line of a label file: what differs from the ground, which is of one colour, is the shape."""
    ground = Image.new("RGB", picture.size, picture.getpixel((0, 0)))
    box = ImageChops.difference(picture, ground).getbbox()
    assert box is not None, f"{name}: a picture without a shape"
    left, top, right, bottom = (value / side for value, side in zip(box, picture.size * 2, strict=True))
    shares = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    return " ".join([str(NAMES.index(name)), *(f"{share:.4f}" for share in shares)])


def _rows(directory: Path, task: str) -> list[dict[str, Any]]:
    made = convert("yolo", directory / "config.yaml", directory / f"all-{task}.jsonl", task=task).train
    return [json.loads(line) for line in made.read_text().splitlines()]
