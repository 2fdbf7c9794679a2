"""What a model must beat: answers that never look at the picture."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from distilvlm.evaluate.metrics import normalise


def majority(answers: Iterable[str]) -> str:
    """The most common training answer; of several, the one that came first. Raises ValueError without answers."""
    counts = Counter(answers)
    if not counts:
        raise ValueError("no training answers, so there is no most common one")
    return counts.most_common(1)[0][0]


def question_only(training: Iterable[tuple[str, str]]) -> Callable[[str], str]:
    """question → the most common training answer to that question, or to the one most like it.

    Likeness is the share of words in common, each weighted by how rare it is (log of questions / questions with it),
    of all words of both; of several equally like, the answers of all count. A question without any known word gets the
    majority's answer. `training` holds pairs of question and answer. Raises ValueError without any.
    """
    by_question: defaultdict[frozenset[str], Counter[str]] = defaultdict(Counter)
    exact: defaultdict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for question, answer in training:
        exact[question][answer] += 1
        by_question[_words(question)][answer] += 1
        overall[answer] += 1
    otherwise = majority(overall.elements())
    seen_in = Counter(word for words in by_question for word in words)
    weight = {word: math.log((1 + len(by_question)) / count) for word, count in seen_in.items()}
    rarest = math.log(1 + len(by_question))  # a word that was never seen

    def likeness(words: frozenset[str], known: frozenset[str]) -> float:
        # fsum: a set has another order in every process, and equal likeness must be equal to the last bit
        together = math.fsum(weight[word] for word in words & known)
        return together and together / math.fsum(weight.get(word, rarest) for word in words | known)

    def guess(question: str) -> str:
        if question in exact:
            return exact[question].most_common(1)[0][0]
        words = _words(question)
        likest = {known: likeness(words, known) for known in by_question}
        best = max(likest.values())
        if not best:
            return otherwise
        given = (by_question[known] for known, value in likest.items() if value == best)
        return sum(given, Counter[str]()).most_common(1)[0][0]

    return guess


def _words(question: str) -> frozenset[str]:
    return frozenset(normalise(question).split())
