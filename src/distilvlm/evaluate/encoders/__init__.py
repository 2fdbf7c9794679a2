"""Measuring vision encoders by themselves, without a language model: what their vectors tell of labelled pictures, and
how near they come to their teachers' features. Read `measured.py` first, then `error.py`."""

from distilvlm.evaluate.encoders.error import (
    Compared,
    feature_errors,
    feature_questions,
    predicting_the_mean,
)
from distilvlm.evaluate.encoders.features import Pooling, Vectors
from distilvlm.evaluate.encoders.labelled import labelled, pictures, taken
from distilvlm.evaluate.encoders.measured import Labels, measured, scored
from distilvlm.evaluate.encoders.measures import FEATURE_ERROR, FEATURE_READOUT, KNN, LABELS, OF_FEATURES, PROBE
from distilvlm.evaluate.encoders.nearest import NEIGHBOURS, nearest
from distilvlm.evaluate.encoders.probe import Probe, fitted
from distilvlm.evaluate.encoders.readout import Readout
from distilvlm.evaluate.encoders.subject import Subject, SubjectOfRun, subjects

__all__ = [
    "FEATURE_ERROR",
    "FEATURE_READOUT",
    "KNN",
    "LABELS",
    "NEIGHBOURS",
    "OF_FEATURES",
    "PROBE",
    "Compared",
    "Labels",
    "Pooling",
    "Probe",
    "Readout",
    "Subject",
    "SubjectOfRun",
    "Vectors",
    "feature_errors",
    "feature_questions",
    "fitted",
    "labelled",
    "measured",
    "nearest",
    "pictures",
    "predicting_the_mean",
    "scored",
    "subjects",
    "taken",
]
