"""What a model says is there and is not: polling, captions, and published benchmarks with a judge of one's choice.

Read `polling.py` and `captions.py` first.
"""

from distilvlm.evaluate.hallucination.annotations import Annotations, annotated, read_annotations, with_things
from distilvlm.evaluate.hallucination.answers import read_answers
from distilvlm.evaluate.hallucination.benchmarks import (
    described,
    read_mmhal,
    read_objhal,
    read_polling,
    together,
    write_mmhal,
    write_objhal,
)
from distilvlm.evaluate.hallucination.captions import captions, default_synonyms
from distilvlm.evaluate.hallucination.endpoint import Endpoint, JudgeError
from distilvlm.evaluate.hallucination.judges import Case, Judge, Judgement, LocalRule, Rated
from distilvlm.evaluate.hallucination.polling import POLLING, blind_answers, said
from distilvlm.evaluate.hallucination.prompted import Prompted, judged, namer, rater
from distilvlm.evaluate.hallucination.ratings import named_by, ratings
from distilvlm.evaluate.hallucination.synonyms import Mention, Synonyms

__all__ = [
    "POLLING",
    "Annotations",
    "Case",
    "Endpoint",
    "Judge",
    "JudgeError",
    "Judgement",
    "LocalRule",
    "Mention",
    "Prompted",
    "Rated",
    "Synonyms",
    "annotated",
    "blind_answers",
    "captions",
    "default_synonyms",
    "described",
    "judged",
    "named_by",
    "namer",
    "rater",
    "ratings",
    "read_annotations",
    "read_answers",
    "read_mmhal",
    "read_objhal",
    "read_polling",
    "said",
    "together",
    "with_things",
    "write_mmhal",
    "write_objhal",
]
