"""From files to batches: reader → record → template and picture geometry → `Batch`."""

from distilvlm.data.batch import IGNORED, BadRow, Batch, SampleKey
from distilvlm.data.dataset import StageData
from distilvlm.data.grouping import Grouping
from distilvlm.data.loader import MicroBatches, batches, groups
from distilvlm.data.problems import DataError, raise_or_quarantine
from distilvlm.data.readers import Source, read
from distilvlm.data.records import Preferences, Record, Turn
from distilvlm.data.report import DataReport, SourceReport
from distilvlm.data.sample import Sample
from distilvlm.data.sampler import Order, shares, showings
from distilvlm.data.template import Encoded, Template, explain, export_chat_template

__all__ = [
    "IGNORED",
    "BadRow",
    "Batch",
    "DataError",
    "DataReport",
    "Encoded",
    "Grouping",
    "MicroBatches",
    "Order",
    "Preferences",
    "Record",
    "Sample",
    "SampleKey",
    "Source",
    "SourceReport",
    "StageData",
    "Template",
    "Turn",
    "batches",
    "explain",
    "export_chat_template",
    "groups",
    "raise_or_quarantine",
    "read",
    "shares",
    "showings",
]
