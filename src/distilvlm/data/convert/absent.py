"""Things that a picture does not show, in the order in which they are asked about."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal

from distilvlm.data.convert.boxes import Boxed

Negatives = Literal["random", "popular", "adversarial"]
"""POPE's three ways to choose them (arXiv 2305.10355)."""


def by_hash(picture: Boxed, names: Iterable[str], what: str = "") -> list[str]:
    """`names` in an order that looks random, and is a function of the picture's and their own names alone."""

    def drawn(name: str) -> bytes:
        return hashlib.sha256(f"{picture.image}:{name}{what}".encode()).digest()

    return sorted(names, key=drawn)


class Absences:
    """What is absent from each of some pictures.

    random: of the things that any of the pictures shows; popular: those that most of them show; adversarial: for every
    thing in the picture, by turns, the one that is seen with it most often. Where a way leads no further, the random
    order goes on. Classes that no picture shows come last: to say that they are absent, nobody has to look.
    """

    def __init__(self, pictures: Sequence[Boxed], names: Sequence[str], how: Negatives) -> None:
        self.names = list(names)
        self.how: Negatives = how
        self._shown: Counter[str] = Counter()  # thing -> pictures
        self._together: dict[str, Counter[str]] = {}  # thing -> others -> pictures
        for picture in pictures:
            things = set(picture.counts)
            self._shown.update(things)
            for thing in things:
                self._together.setdefault(thing, Counter()).update(things - {thing})

    def of(self, picture: Boxed, count: int) -> list[str]:
        """At most `count` things that are not in the picture."""
        return list(islice(dict.fromkeys(self._candidates(picture)), count))

    def _candidates(self, picture: Boxed) -> Iterator[str]:
        there = picture.counts
        names = [name for name in self.names if name not in there]
        if self.how == "popular":
            yield from sorted(filter(self._shown.__getitem__, names), key=lambda name: (-self._shown[name], name))
        if self.how == "adversarial":
            yield from self._by_turns(there)
        shown = [name for name in names if self._shown[name]]
        yield from by_hash(picture, shown)
        yield from by_hash(picture, [name for name in names if not self._shown[name]])

    def _by_turns(self, there: Iterable[str]) -> Iterator[str]:
        ways = {thing: self._often_with(thing) for thing in there}
        taken = set(ways)
        while ways:
            for thing, others in list(ways.items()):
                chosen = next((other for other in others if other not in taken), None)
                if chosen is None:
                    del ways[thing]
                else:
                    taken.add(chosen)
                    yield chosen

    def _often_with(self, thing: str) -> list[str]:
        """Things seen with it, those most often together first, of equals the more common."""
        together = self._together.get(thing, Counter())
        return sorted(together, key=lambda other: (-together[other], -self._shown[other], other))
