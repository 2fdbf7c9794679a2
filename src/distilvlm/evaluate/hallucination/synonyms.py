"""Which objects a text names: words and phrases → objects, by a table that says which words mean which object.

The file has one line per object, the name first, then other words and phrases for it, separated by commas (CHAIR's list
of COCO's classes is such a file):

    # words for what the annotations call a dog and a hot dog
    dog, puppy, hound
    hot dog, frankfurter
    -, dog show

* Write the singular: regular plurals and common irregular ones are made here. Another plural is one more word.
* The longest phrase counts: "a hot dog" names a hot dog and no dog.
* The line that begins with "-" lists phrases that name no object although a word in them would.
* Case does not matter; "-" and "_" inside a word are spaces. "#" begins a comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from distilvlm.data.convert.naming import plural
from distilvlm.data.problems import DataError

NO_OBJECT = "-"

_WORDS = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True)
class Mention:
    """A place where a text names an object."""

    phrase: str  # as the table has it, in the singular
    object: str


class Synonyms:
    """Object → the words and phrases that name it.

    Args:
        lines: (the object's name, other words for it); NO_OBJECT's phrases name none.
        origin: what the table was made from, for messages.

    Raises:
        DataError: a word that names two objects, a line without words, or no object at all.
    """

    def __init__(self, lines: Iterable[tuple[str, Iterable[str]]], origin: str = "the synonyms") -> None:
        self.origin = origin
        self._named: dict[str, Mention | None] = {}
        owners: dict[str, str] = {}
        for name, others in lines:
            name = _plain(name) if name != NO_OBJECT else NO_OBJECT
            phrases = [_plain(phrase) for phrase in others] if name == NO_OBJECT else [name, *map(_plain, others)]
            if not all(phrases):
                raise DataError(f"{origin}: the line of '{name}' has an entry without a word: remove it")
            for phrase in phrases:
                if owners.setdefault(phrase, name) != name:
                    raise DataError(
                        f"{origin}: '{phrase}' stands for '{owners[phrase]}' and for '{name}': leave it in one line"
                    )
        self.objects = tuple(dict.fromkeys(name for name in owners.values() if name != NO_OBJECT))
        if not self.objects:
            raise DataError(f"{origin}: no object; write a line for each, its name first, then other words for it")
        for phrase, name in owners.items():
            self._named[phrase] = None if name == NO_OBJECT else Mention(phrase, name)
        for phrase in owners:  # what the table says itself comes before plurals that are made
            self._named.setdefault(plural(phrase), self._named[phrase])
        self._longest = max(len(phrase.split()) for phrase in self._named)

    @classmethod
    def of_names(cls, names: Iterable[str], origin: str = "the names of the objects") -> Synonyms:
        """The default: every object is named by its own name and its plural."""
        return cls(((name, ()) for name in dict.fromkeys(names)), origin)

    @classmethod
    def read(cls, path: str | Path) -> Synonyms:
        """From a file, as the head of this module says.

        Raises:
            DataError: no such file, not UTF-8, or as the constructor; names the file.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the synonyms {path} can't be read: {error}") from None
        lines = [line.split("#")[0].strip() for line in text.split("\n")]
        entries = [[entry.strip() for entry in line.split(",")] for line in lines if line]
        return cls(((entry[0], entry[1:]) for entry in entries), str(path))

    def object_of(self, name: str) -> str:
        """The object that a class name of annotations means. Raises DataError where the table has no such name."""
        found = self._named.get(_plain(name))
        if found is None:
            raise DataError(f"{self.origin}: no line has '{name}', which is in the annotations: add a line for it")
        return found.object

    def objects_of(self, things: Iterable[str]) -> tuple[str, ...]:
        """Annotated things as objects, sorted. Raises DataError as `object_of`."""
        return tuple(sorted({self.object_of(name) for name in things}))

    def mentions(self, text: str) -> list[Mention]:
        """Every mention in the text, in order, the longest phrase first at each place."""
        words = _plain(text).split()
        found: list[Mention] = []
        place = 0
        while place < len(words):
            for length in range(min(self._longest, len(words) - place), 0, -1):
                phrase = " ".join(words[place : place + length])
                if phrase in self._named:
                    if (mention := self._named[phrase]) is not None:
                        found.append(mention)
                    place += length
                    break
            else:
                place += 1
        return found


def _plain(text: str) -> str:
    """Lower case words with single spaces; a possessive 's does not count."""
    words = (re.sub(r"['’]s?$", "", word) for word in _WORDS.findall(text.lower().replace("-", " ")))
    return " ".join(word for word in words if word)
