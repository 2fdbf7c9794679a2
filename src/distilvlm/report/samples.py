"""Which questions are shown, and in what order: those that tell the models apart come first. No chance is involved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .formats import Answer

SHARES = (3, 2, 2, 2, 1, 1)
"""Of the samples shown, by kind: the first kinds say most about a comparison."""

PER_PICTURE = 2
"""Questions of one kind about the same picture that are shown together."""


@dataclass(frozen=True)
class Given:
    """One model's answer."""

    name: str
    series: int | None
    text: str
    right: bool
    verdict: str  # in words


@dataclass(frozen=True)
class Asked:
    question: str
    answer: str
    given: list[Given]


@dataclass(frozen=True)
class Card:
    """Questions on the same pictures (none: text only)."""

    pictures: tuple[str, ...]
    asked: list[Asked]


@dataclass(frozen=True)
class Kind:
    """Questions that the models answered in the same pattern of right and wrong."""

    title: str
    count: int  # of all questions
    shown: int
    cards: list[Card]


def choose(
    answers: Mapping[str, Sequence[Answer]],
    models: Sequence[str],
    pair: tuple[str, str] | None,
    series: Mapping[str, int],
    measure: str,
    limit: int,
) -> list[Kind]:
    """Kinds of questions in order, with the `limit` questions that are shown of all.

    Args:
        answers: of every baseline and model, the same questions in the same order.
        models: whose answers sort the questions; baselines never look, so they don't.
        pair: the two models whose difference matters most: its kinds come first.
        measure: name of the figure that the differences are of.
    """
    names = [name for name in models if name in answers]
    if not names:
        return []
    pair = pair if pair is not None and all(name in names for name in pair) else None
    members: dict[str, list[int]] = {title: [] for title in _titles(names, pair)}
    for place in range(len(answers[names[0]])):
        members[_kind(place, answers, names, pair, measure)].append(place)
    quotas = shared_out([len(places) for places in members.values()], limit)
    kinds: list[Kind] = []
    for (title, places), quota in zip(members.items(), quotas, strict=True):
        cards = _cards(places, quota, answers, series, measure)
        kinds.append(Kind(title, len(places), sum(len(card.asked) for card in cards), cards))
    return [kind for kind in kinds if kind.count]


def shared_out(counts: Sequence[int], limit: int, shares: Sequence[int] = SHARES) -> list[int]:
    """`limit` places over kinds by their shares; what a kind does not have goes to the others."""
    quotas = [0] * len(counts)
    left = min(limit, sum(counts))
    while left:
        for kind, share in zip(range(len(counts)), shares, strict=False):
            given = min(share, counts[kind] - quotas[kind], left)
            quotas[kind] += given
            left -= given
    return quotas


def _titles(names: Sequence[str], pair: tuple[str, str] | None) -> list[str]:
    first = [] if pair is None else [_title(pair[0], pair[1]), _title(pair[1], pair[0])]
    if len(names) == 1:
        return [*first, f"{names[0]} wrong", f"{names[0]} right"]
    others = "some models right, others wrong" if pair is None else f"{pair[0]} and {pair[1]} alike, another model not"
    return [
        *first,
        others,
        "all models wrong, in different words",
        "all models wrong, in the same words",
        "all models right",
    ]


def _title(right: str, wrong: str) -> str:
    return f"{right} right, {wrong} wrong"


def _kind(
    place: int,
    answers: Mapping[str, Sequence[Answer]],
    names: Sequence[str],
    pair: tuple[str, str] | None,
    measure: str,
) -> str:
    titles = _titles(names, pair)
    right = {name: is_right(answers[name][place], measure) for name in names}
    if len(names) == 1:
        return titles[1] if right[names[0]] else titles[0]
    if pair is not None and right[pair[0]] != right[pair[1]]:
        return titles[0] if right[pair[0]] else titles[1]
    if len({*right.values()}) == 2:
        return titles[-4]
    if all(right.values()):
        return titles[-1]
    words = {answers[name][place].prediction.strip().lower() for name in names}
    return titles[-3] if len(words) > 1 else titles[-2]


def is_right(answer: Answer, measure: str) -> bool:
    """As the measure found it; where it leaves that to the words, by the figure `measure`."""
    words = answer.exact if measure == "exact_match" else answer.accurate
    return bool(answer.details.get("right", words))


def _given(name: str, series: int | None, answer: Answer, measure: str) -> Given:
    right = is_right(answer, measure)
    verdict = str(answer.details.get("verdict") or ("right" if right else "wrong"))
    return Given(name, series, str(answer.details.get("shown", answer.prediction)), right, verdict)


def _cards(
    places: Sequence[int],
    quota: int,
    answers: Mapping[str, Sequence[Answer]],
    series: Mapping[str, int],
    measure: str,
) -> list[Card]:
    """Cards with `quota` questions, their pictures spread evenly over the kind's."""
    first = next(iter(answers.values()))
    groups: dict[object, list[int]] = {}
    for place in places:
        groups.setdefault(first[place].pictures or place, []).append(place)
    pictures = list(groups.values())
    # Some pictures with several questions, as many pictures as the quota needs at least.
    picked: list[list[int]] = []
    left = quota
    for number in _spread(len(pictures)):
        if left <= 0:
            break
        picked.append(pictures[number][: min(PER_PICTURE, left)])
        left -= len(picked[-1])
    picked.sort()
    cards: list[Card] = []
    for group in picked:
        asked = [
            Asked(
                first[place].question,
                first[place].answer,
                [_given(name, series.get(name), given[place], measure) for name, given in answers.items()],
            )
            for place in group
        ]
        cards.append(Card(first[group[0]].pictures, asked))
    return cards


def _spread(count: int) -> list[int]:
    """0 to count - 1 in an order whose every beginning is spread over the whole: halves, quarters, eighths, ..."""
    order: dict[int, None] = {}
    parts = 1
    while len(order) < count:
        order.update(dict.fromkeys(part * count // parts for part in range(parts)))
        parts *= 2
    return list(order)
