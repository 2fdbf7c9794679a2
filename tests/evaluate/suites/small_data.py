"""Tiny suites in the forms in which their authors publish them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distilvlm.evaluate import score
from distilvlm.evaluate.suites import SUITES, Opened


def picture(number: int = 0) -> bytes:
    random = np.random.default_rng(number)
    stream = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def put(path: Path, content: Any) -> Path:
    """A picture's bytes, text, or JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def figures(opened: Opened, predictions: Sequence[str]) -> dict[str, float]:
    """The defined figures of answers to a suite."""
    found = score(opened.asked.questions, predictions, measure=opened.measure, resamples=50)
    return {name: value.mean for name, value in found.figures.items() if value is not None}


def ten(**counts: int) -> list[str]:
    return [answer for answer, count in counts.items() for _ in range(count)]


def vqav2(root: Path, answers: Sequence[Sequence[str]], questions: Sequence[str] = ()) -> Opened:
    """A question for each ten answers, all about picture 42."""
    asked = [
        {"image_id": 42, "question": questions[n] if questions else f"What is {n}?", "question_id": 420 + n}
        for n in range(len(answers))
    ]
    told = [
        {
            "question_id": 420 + n,
            "image_id": 42,
            "question_type": "what is",
            "answer_type": "other",
            "multiple_choice_answer": given[0],
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": number + 1}
                for number, text in enumerate(given)
            ],
        }
        for n, given in enumerate(answers)
    ]
    common = {"info": {}, "license": {}, "data_subtype": "val2014", "data_type": "mscoco"}
    put(root / "v2_OpenEnded_mscoco_val2014_questions.json", {**common, "task_type": "Open-Ended", "questions": asked})
    put(root / "v2_mscoco_val2014_annotations.json", {**common, "annotations": told})
    put(root / "val2014" / "COCO_val2014_000000000042.jpg", picture())
    return SUITES["vqav2"].opened(root)


def mmbench(root: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A TSV; a row's `image` is bytes or text."""
    names = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]
    lines = ["\t".join(names)]
    for row in rows:
        image = row.get("image", picture())
        told = {**row, "image": base64.b64encode(image).decode() if isinstance(image, bytes) else image}
        lines.append("\t".join(str(told.get(name, "")) for name in names))
    return put(root / "mmbench_dev_20230712.tsv", "\n".join(lines) + "\n")


def mme(root: Path, tasks: dict[str, int]) -> Path:
    """So many pictures of each subtask, with a question that is answered by yes and one by no."""
    for task, count in tasks.items():
        for number in range(count):
            apart = task in ("artwork", "celebrity")
            pictures, texts = (
                (root / task / "images", root / task / "questions_answers_YN") if apart else [root / task] * 2
            )
            put(pictures / f"{number:04}.png", picture(number))
            lines = [
                f"Is {number} {what} here? Please answer yes or no.\t{answer}"
                for what, answer in (("a", "Yes"), ("b", "No"))
            ]
            put(texts / f"{number:04}.txt", "\n".join(lines) + "\n")
    return root
