"""Things by name, in English: "a dog", "two people", "There are two dogs and a person."."""

from __future__ import annotations

import re
from collections.abc import Mapping

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
"""Larger numbers are written in digits."""

PAIRED = frozenset({"scissors", "skis", "glasses", "sunglasses", "trousers", "pants", "jeans", "shorts", "pliers"})
"""Plural already: a pair of them is one."""

IRREGULAR = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "mouse": "mice",
    "ox": "oxen",
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "craft": "craft",
    "bison": "bison",
}
"""Also of words that end so: policeman, grandchild, aircraft."""

_REGULAR = frozenset({"human", "german", "roman", "ottoman", "talisman", "caiman", "mongoose"})
_TO_VES = ("knife", "wife", "life", "leaf", "loaf", "shelf", "calf", "wolf", "thief", "scarf", "hoof", "half", "elf")
_TO_OES = ("potato", "tomato", "mango", "hero", "echo", "buffalo", "mosquito", "volcano")


def article(name: str) -> str:
    """ "a", "an" or "a pair of"; told from the first letter (so "an hour" is not known, but "a uniform" is)."""
    if name.rpartition(" ")[2].lower() in PAIRED:
        return "a pair of"
    first = name.lower()
    vowel = first[:1] in tuple("aeiou") and not re.match(r"uni|use|usu|euro|one\b", first)
    return "an" if vowel else "a"


def plural(phrase: str) -> str:
    """The plural of a phrase's last word, e.g. "wine glasses"."""
    before, space, word = phrase.rpartition(" ")
    return f"{before}{space}{_plural(word)}"


def counted(name: str, number: int) -> str:
    """So many of a thing, e.g. "an apple", "three people", "13 books", "two pairs of scissors"."""
    if number == 1:
        return f"{article(name)} {name}"
    many = NUMBERS[number] if number < len(NUMBERS) else str(number)
    return f"{many} {'pairs of ' if article(name) == 'a pair of' else ''}{plural(name)}"


def sentence(counts: Mapping[str, int]) -> str:
    """What there is (one thing at least), e.g. "There are two dogs and a person."; the verb goes with the first, as in
    English."""
    told = [counted(name, number) for name, number in counts.items()]
    things = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
    return f"There {'is' if next(iter(counts.values())) == 1 else 'are'} {things}."


def _plural(word: str) -> str:
    lower = word.lower()
    if lower in PAIRED:
        return word
    for singular, irregular in IRREGULAR.items():
        # "policeman" is a man, but neither "human" nor the "ox" in "box" is what it ends with.
        if lower == singular or (len(singular) > 2 and lower.endswith(singular) and lower not in _REGULAR):
            ended = lower.removesuffix(singular) + irregular
            return ended.capitalize() if word[:1].isupper() else ended
    if lower.endswith(_TO_VES):
        return re.sub(r"fe?$", "ves", word)
    if lower in _TO_OES or re.search(r"(s|x|z|ch|sh)$", lower):
        return word + "es"
    if re.search(r"[^aeiou]y$", lower):
        return word[:-1] + "ies"
    return word + "s"
