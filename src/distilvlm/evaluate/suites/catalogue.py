"""Every suite by its name, and every measure that a user's own suite may name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distilvlm.data.boxes import REFERRING
from distilvlm.data.problems import DataError
from distilvlm.evaluate.grounding import GROUNDING
from distilvlm.evaluate.hallucination import POLLING
from distilvlm.evaluate.measures import ACCURATE, EXACT, Measure
from distilvlm.evaluate.suites import annotators, captions, known, mmbench, mme, mmmu, scienceqa, short
from distilvlm.evaluate.suites.choices import by_letter_or_text, choice
from distilvlm.evaluate.suites.suite import MeasureOf, Suite
from distilvlm.evaluate.text.choices import CHOICES, Choice
from distilvlm.evaluate.text.exams import read_ceval, read_mmlu
from distilvlm.recipe.errors import nearest


def always(measure: Measure) -> MeasureOf:
    return lambda where, asked: measure


VQA, VIZWIZ, TEXTVQA = (
    annotators.people(compared, name)
    for compared, name in (
        (annotators.as_vqa, "vqa"),
        (annotators.as_vizwiz, "vizwiz"),
        (annotators.as_textvqa, "textvqa"),
    )
)
CHOICE = choice(by_letter_or_text, "choice")

_FIXED = (
    *(VQA, VIZWIZ, TEXTVQA, short.GQA, CHOICE, scienceqa.MEASURE, mmbench.MEASURE, mmmu.MEASURE, mme.MEASURE),
    *(captions.MEASURE, POLLING, GROUNDING, ACCURATE, EXACT),
)
MEASURES: dict[str, MeasureOf] = {**{one.name: always(one) for one in _FIXED}, "chair": known.chair}
"""By the name that a suite's file says."""

READ: dict[str, Measure] = {one.name: one for one in (*_FIXED, CHOICES, known.JUDGED)}
"""Measures of answers that were judged before, by the name that is kept beside them."""

_ALL = (
    Suite("vqav2", "VQAv2", annotators.read_vqav2, always(VQA), split="val2014"),
    Suite("vizwiz", "VizWiz", annotators.read_vizwiz, always(VIZWIZ), annotators.VIZWIZ_PROMPT, split="val"),
    Suite("textvqa", "TextVQA", annotators.read_textvqa, always(TEXTVQA), split="val"),
    Suite("gqa", "GQA", short.read_gqa, always(short.GQA), split="testdev_balanced"),
    Suite("scienceqa", "ScienceQA", scienceqa.read, always(scienceqa.MEASURE), scienceqa.PROMPT, split="test"),
    Suite(
        *("scienceqa-img", "ScienceQA, questions with a picture", scienceqa.read_with_pictures),
        *(always(scienceqa.MEASURE), scienceqa.PROMPT),
        split="test",
    ),
    Suite("mmbench", "MMBench", mmbench.read, always(mmbench.MEASURE), mmbench.PROMPT, split="dev"),
    Suite(
        "mmbench-cn", "MMBench, in Chinese", mmbench.read, always(mmbench.MEASURE), mmbench.PROMPT_CN, split="dev_cn"
    ),
    Suite("mmmu", "MMMU", mmmu.read, always(mmmu.MEASURE), mmmu.PROMPT, 32, split="validation"),
    Suite("mme", "MME", mme.read, always(mme.MEASURE), mme.PROMPT),
    Suite("pope", "POPE", known.read_pope, always(POLLING)),
    Suite("chair", "CHAIR", known.read_chair, known.chair, known.DESCRIBE, 512, split="val2014"),
    *(
        Suite(name, title, known.referring(name), always(GROUNDING), REFERRING, 64, split="val")
        for name, title in (("refcoco", "RefCOCO"), ("refcoco+", "RefCOCO+"), ("refcocog", "RefCOCOg"))
    ),
    Suite("coco-captions", "COCO captions", captions.read, always(captions.MEASURE), captions.PROMPT, 64, "val2014"),
    Suite("flickr30k", "Flickr30k captions", captions.read, always(captions.MEASURE), captions.PROMPT, 64, "test"),
)
SUITES: dict[str, Suite] = {suite.name: suite for suite in _ALL}


@dataclass(frozen=True)
class TextSuite:
    """A test of language alone, whose options are weighed by their likelihood instead of being asked for."""

    name: str
    title: str
    read: Callable[[str | Path, str], list[Choice]]
    split: str


TEXT_SUITES = {
    suite.name: suite
    for suite in (TextSuite("mmlu", "MMLU", read_mmlu, "test"), TextSuite("ceval", "C-Eval", read_ceval, "val"))
}


def suite_named(name: str) -> Suite | TextSuite:
    """Raises DataError for a name that is none, with the nearest one."""
    found = SUITES.get(name) or TEXT_SUITES.get(name)
    if found is None:
        raise DataError(f"no suite '{name}'; {nearest(name, [*SUITES, *TEXT_SUITES])} Or give a file (.yaml)")
    return found
