"""What a model says is there and is not: polling, captions, and published benchmarks with a judge of one's choice.

Read `polling.py` and `captions.py` first.
"""

from distilvlm.evaluate.hallucination.annotations import Annotations, read_annotations, with_things
from distilvlm.evaluate.hallucination.captions import captions, default_synonyms
from distilvlm.evaluate.hallucination.polling import POLLING, blind_answers, said
from distilvlm.evaluate.hallucination.synonyms import Mention, Synonyms

__all__ = [
    "POLLING",
    "Annotations",
    "Mention",
    "Synonyms",
    "blind_answers",
    "captions",
    "default_synonyms",
    "read_annotations",
    "said",
    "with_things",
]
