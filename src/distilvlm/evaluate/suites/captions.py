"""Captions against people's captions: CIDEr, BLEU-4 and ROUGE-L, computed by COCO's own scripts.

The scripts are the package `pycocoevalcap` (`pip install 'distilvlm[captions]'`), whose CIDEr, BLEU and ROUGE-L are
plain Python; words are told apart by `tokens.py` instead of its Java program. METEOR and SPICE need Java, and are left
out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from distilvlm.data.problems import DataError, RowError
from distilvlm.evaluate.measures import Answered, Figure, Measure
from distilvlm.evaluate.metrics import Combined
from distilvlm.evaluate.questions import Asked, Question
from distilvlm.evaluate.suites.suite import Sources, content, field_of, gathered
from distilvlm.evaluate.suites.tokens import tokens

PROMPT = "Provide a one-sentence caption for the provided image."
"""LLaVA-1.5's."""

ORDER = 4
"""Of n-grams."""


def judge(question: Question, prediction: str) -> Mapping[str, Any]:
    return {"references": question.meta["captions"]}


def settled(samples: Sequence[Answered]) -> list[Answered]:
    """Each caption with its CIDEr (which weighs phrases by how rare they are in all pictures' references), its ROUGE-L
    and the counts of its n-grams that BLEU sums up. Raises DataError without `pycocoevalcap`."""
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ModuleNotFoundError:
        raise DataError("captions are scored by pycocoevalcap: pip install 'distilvlm[captions]'") from None
    said = {number: [" ".join(tokens(one.prediction))] for number, one in enumerate(samples)}
    true = {
        number: [" ".join(tokens(caption)) for caption in one.details["references"]]
        for number, one in enumerate(samples)
    }
    _, cider = Cider(n=ORDER).compute_score(true, said)
    _, rouge = Rouge().compute_score(true, said)
    found: list[Answered] = []
    for number, one in enumerate(samples):
        counts = BleuScorer(said[number][0], true[number], n=ORDER).ctest[0]
        length = counts["testlen"]
        nearest = min((abs(reference - length), reference) for reference in counts["reflen"])[1]
        details = {
            **one.details,
            "cider": float(cider[number]),
            "rouge_l": float(rouge[number]),
            "bleu": [*counts["correct"], *counts["guess"], length, nearest],
            "right": bool(cider[number] > 0),  # it says something that somebody said, too
            "verdict": f"CIDEr {100 * cider[number]:.0f}, ROUGE-L {100 * rouge[number]:.0f}",
        }
        found.append(replace(one, details=details))
    return found


def bleu(order: int) -> Combined:
    """BLEU in points of sums of right n-grams, n-grams, words and words of the reference of nearest length."""

    def points(sums: np.ndarray) -> np.ndarray:
        right, all_of_them = sums[:, :order], sums[:, ORDER : ORDER + order]
        precision = (right + 1e-15) / (all_of_them + 1e-9)  # the script's, so that nothing is divided by 0
        ratio = (sums[:, -2] + 1e-15) / (sums[:, -1] + 1e-9)
        short = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
        return 100 * precision.prod(axis=1) ** (1 / order) * short

    return points


def _bleu(order: int, headline: bool) -> Figure:
    return Figure(
        f"bleu_{order}",
        f"BLEU-{order}",
        lambda one: tuple(one.details["bleu"]),
        about=f"Shares of n-grams up to {order} words that a reference has, and a penalty for saying less.",
        percent=False,
        headline=headline,
        combined=bleu(order),
    )


def _points(quotients: np.ndarray) -> np.ndarray:
    return 100 * quotients


MEASURE = Measure(
    "caption-metrics",
    (
        Figure(
            "cider",
            "CIDEr",
            lambda one: (one.details["cider"], 1),
            about="Likeness to people's captions in phrases of one to four words, rare ones weighing more (CIDEr-D). "
            "Its interval holds the weights still.",
            percent=False,
            transform=_points,
        ),
        _bleu(4, True),
        Figure(
            "rouge_l",
            "ROUGE-L",
            lambda one: (one.details["rouge_l"], 1),
            about="The longest series of words in common with a reference, as a harmonic mean that favours recall.",
            percent=False,
            transform=_points,
        ),
        *(_bleu(order, False) for order in (1, 2, 3)),
        Figure(
            "length",
            "words per caption",
            lambda one: (len(one.prediction.split()), 1),
            better="neither",
            percent=False,
            headline=False,
        ),
    ),
    judge,
    settle=settled,
)


def read(where: Sources) -> Asked:
    """COCO's captions_{split}.json, or Karpathy's dataset_coco.json and dataset_flickr30k.json (of the split {split});
    pictures below the folder that the file names, {split}/, images/ or flickr30k-images/."""
    file = where.file("captions", f"captions_{where.split}.json", "dataset_coco.json", "dataset_flickr30k.json")
    value = content(file)
    if not isinstance(value, Mapping) or not isinstance(value.get("images"), list):
        raise DataError(f"{file} has no list 'images': give COCO's captions_*.json, or Karpathy's dataset_*.json")
    given: dict[Any, list[str]] = {}
    for one in value.get("annotations", ()):
        given.setdefault(one["image_id"], []).append(one["caption"])

    def question(number: int, row: Mapping[str, Any]) -> Question | None:
        if "sentences" in row:
            if row.get("split") != where.split:
                return None
            captions, name = [one["raw"] for one in row["sentences"]], field_of(row, "filename")
        else:
            captions, name = given.get(row.get("id"), []), field_of(row, "file_name")
        if not captions:
            raise RowError("captions", f"nobody describes {name}")
        folders = (row.get("filepath", where.split), "images", "flickr30k-images")
        picture = where.picture(*(f"{folder}/{name}" for folder in folders), name)
        identity = str(row.get("cocoid", row.get("id", row.get("imgid", number))))
        return Question.of((file, number), identity, (picture,), where.asked(), captions[0], {"captions": captions})

    return gathered(file, enumerate(value["images"]), question)
