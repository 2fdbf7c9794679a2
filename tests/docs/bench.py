"""A directory in which commands of the pages can be given as they stand: tiny data under the names that pages use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml
from PIL import Image
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.runs.tiny import write_recipe

from .pages import ROOT, blocks

COLOURS = {"shirt": (200, 30, 30), "dress": (30, 30, 200), "shoes": (30, 160, 30)}
NAMES = ["dog", "cat", "horse", "chair"]


def set_up(bench: Path) -> None:
    write_recipe(bench)
    shutil.copy(bench / "questions.json", bench / "test.json")
    (bench / "recipes").symlink_to(ROOT / "recipes")
    clothing(bench / "clothing" / "train")
    questions(bench)
    yolo(bench / "scenes" / "data.yaml", bench / "config.yaml", bench / "coco128" / "config.yaml")
    raccoons(bench / "raccoon")
    captions(bench)
    language_model(bench / "weights" / "smollm2-135m", bench / "tokenizer")
    preference = next(block for block in blocks(ROOT / "docs" / "hallucination.md") if "preference: 1" in block.text)
    (bench / "preference.yaml").write_text(preference.text.replace("path/to/teacher", "runs/mine/model"))
    (bench / "cached").mkdir()
    cached(bench / "cached", bench / "recipe.yaml")
    for number, name in enumerate(("photo.jpg", "cat.png")):
        picture(bench / name, 300 + number)
    (bench / "RUN").symlink_to(bench / "runs" / "mine")
    (bench / "MODEL").symlink_to(bench / "runs" / "mine" / "model")


def cached(directory: Path, recipe: Path) -> None:
    """The same recipe with a teacher that is asked once, for the page that says how."""
    tree = yaml.safe_load(recipe.read_text())
    del tree["pictures"]  # which change at every showing
    tree["teacher"].update(kind="cached", keep={"path": "teacher-cache"})
    (directory / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


def picture(path: Path, number: int, size: tuple[int, int] = (32, 24)) -> str:
    """A picture like no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number * 7 % 256, number * 31 % 256, number * 3 % 256)).save(path)
    return path.name


def clothing(directory: Path) -> None:
    for place, name in enumerate(COLOURS):
        for number in range(3):
            picture(directory / name / f"{number}.png", 10 * place + number)


def questions(bench: Path) -> None:
    """In the fields of VQA files; some questions are closed, some open."""
    rows = []
    for number in range(12):
        image = picture(bench / "images" / f"{number}.png", 100 + number)
        kind, question, answer = ("CLOSED", "Is it red?", "yes") if number % 3 else ("OPEN", "What is it?", "a shape")
        rows.append({"image": image, "question": question, "answer": answer, "answer_type": kind})
    (bench / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def yolo(*files: Path) -> None:
    """Data sets of two splits, whose pictures show one or two of four things."""
    for file in files:
        for split, start in (("train", 0), ("val", 20)):
            for number in range(start, start + 8):
                picture(file.parent / "images" / split / f"{number}.png", 50 + number)
                things = {number % 4, (number // 2 + 1) % 4}
                lines = [f"{thing} {0.3 + 0.1 * place} 0.5 0.2 0.3" for place, thing in enumerate(sorted(things))]
                labels = file.parent / "labels" / split / f"{number}.txt"
                labels.parent.mkdir(parents=True, exist_ok=True)
                labels.write_text("\n".join(lines))
        file.write_text(f"train: images/train\nval: images/val\nnames: {json.dumps(NAMES)}\n")


def raccoons(directory: Path) -> None:
    for number in range(8):
        name = picture(directory / "images" / f"raccoon-{number}.png", 200 + number)
        box = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>20</xmax><ymax>21</ymax></bndbox>"
        notes = directory / "annotations" / f"raccoon-{number}.xml"
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.write_text(
            f"<annotation><filename>{name}</filename><size><width>32</width><height>24</height></size>"
            f"<object><name>raccoon</name>{box}</object></annotation>"
        )


def captions(bench: Path) -> None:
    """Captions of two pictures and COCO's annotations of them."""
    notes = {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in (1, 2)],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 1}, {"image_id": 2, "category_id": 2}],
    }
    (bench / "instances_val2014.json").write_text(json.dumps(notes))
    told = [{"image_id": 1, "caption": "A dog."}, {"image_id": 2, "caption": "A dog and a cat."}]
    (bench / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))


def language_model(directory: Path, tokenizer: Path) -> None:
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    words.save_pretrained(directory)
