"""What encoders are measured by, as measures like any other: intervals over pictures, paired differences, tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from distilvlm.evaluate.encoders.nearest import NEIGHBOURS
from distilvlm.evaluate.measures import Answered, Figure, Measure
from distilvlm.evaluate.questions import Question


def _words(question: Question, prediction: str) -> Mapping[str, Any]:
    return {}


def _accuracy(title: str, about: str) -> tuple[Figure]:
    return (Figure("exact_match", title, lambda one: (one.exact, 1), about=about),)


KNN = Measure(
    "knn",
    _accuracy(
        "k-NN accuracy",
        f"Right classes of all, where the {NEIGHBOURS} training pictures that look most alike to the encoder vote.",
    ),
    _words,
)

PROBE = Measure(
    "probe",
    _accuracy(
        "linear probe accuracy",
        "Right classes of all by a linear classifier on the frozen encoder's vectors.",
    ),
    _words,
)

LABELS = {measure.name: measure for measure in (KNN, PROBE)}
"""Measures of labelled pictures, by the name that files and commands have for them."""


_WRITTEN = re.compile(r"([^ ]+), predicting the mean ([^ ]+)")


def written(error: float, mean: float) -> str:
    """The answer to a question of features: the error, and that of predicting the mean."""
    return f"{error:.6g}, predicting the mean {mean:.6g}"


def _judged(question: Question, prediction: str) -> Mapping[str, Any]:
    found = _WRITTEN.fullmatch(prediction)
    if found is None:
        raise ValueError(f"{prediction!r} is no error of features: 'ERROR, predicting the mean ERROR' is expected")
    error, mean = map(float, found.groups())
    verdict = f"{error / mean:.0%} of the mean's" if mean else "the mean is exact"
    teacher = question.meta["teacher"]
    right, shown = error < mean, f"{error:.3g}"
    return {"teacher": teacher, "error": error, "mean": mean, "right": right, "verdict": verdict, "shown": shown}


def _explained(one: Answered) -> tuple[float, float]:
    return one.details["mean"] - one.details["error"], one.details["mean"]


_UNIT = (
    "as a share of what always predicting their mean over training pictures (each place of the grid its own) has. "
    "Below 100% something was learned; teachers count alike."
)


def _errors(name: str, title: str, about: str) -> Measure:
    return Measure(
        name,
        (
            Figure(name, title, lambda one: (one.details["error"], one.details["mean"]), better="lower", about=about),
            Figure("explained", "explained (R²)", _explained, about="100% minus that error.", headline=False),
        ),
        _judged,
        category="teacher",
    )


FEATURE_ERROR = _errors(
    "feature_error",
    "feature error relative to the mean's",
    "Squared distance to the teachers' features on pictures that were not trained on, through the run's own adapters, "
    + _UNIT,
)
FEATURE_READOUT = _errors(
    "feature_readout",
    "readout error relative to the mean's",
    "Squared error of a linear map from the student's features to the teachers', fitted to training pictures, on "
    "others, " + _UNIT,
)
OF_FEATURES = {measure.name: measure for measure in (FEATURE_ERROR, FEATURE_READOUT)}
"""Every question is one teacher's features of one picture, the answer an error beside that of predicting the mean; both
in units of the latter's average for that teacher, so that teachers count alike."""
