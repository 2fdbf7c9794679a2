"""What a model must beat: answers that never look at the picture."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable


def majority(answers: Iterable[str]) -> str:
    """The most common training answer; of several, the one that came first. Raises ValueError without answers."""
    counts = Counter(answers)
    if not counts:
        raise ValueError("no training answers, so there is no most common one")
    return counts.most_common(1)[0][0]


def question_only(training: Iterable[tuple[str, str]]) -> Callable[[str], str]:
    """question → the most common training answer to exactly that question, or the majority's for one never asked.

    `training` holds pairs of question and answer. Raises ValueError without any.
    """
    by_question: defaultdict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for question, answer in training:
        by_question[question][answer] += 1
        overall[answer] += 1
    otherwise = majority(overall.elements())
    known = {question: counts.most_common(1)[0][0] for question, counts in by_question.items()}
    return lambda question: known.get(question, otherwise)
