"""Captions as the words that COCO's metrics count, without Java.

The authors' scripts tokenise with Stanford's PTBTokenizer (a Java program), in lower case, and leave out punctuation.
The same rules, as far as captions need them: contractions are two words (do n't, dog 's), hyphens and full stops within
a word stay, brackets become -lrb- and -rrb- (which their list of punctuation misses, since it has them in capitals).
"""

from __future__ import annotations

import re

PUNCTUATION = frozenset(['"', "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""What is left out."""

BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "…": "...", "–": "--", "—": "--"})

_ABBREVIATED = (
    "mr|mrs|ms|dr|st|jr|sr|vs|etc|ave|blvd|rd|mt|ft|inc|co|corp|ltd|prof|gen|col|capt|lt|sgt|rev|sen|gov|"
    "jan|feb|mar|apr|jun|jul|aug|sept|oct|nov|dec|approx|dept|est|e\\.g|i\\.e"
)
_SPLIT = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(lem|gim)(me)\b")
_DASHES = re.compile("--+")
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)")
_TOKEN = re.compile(
    rf"(?:{_ABBREVIATED})\.|\bno\.(?=\s+\d)|(?<!\w)[a-z](?:(?:\.[a-z])+\b\.?|\.(?!\w))|[\w.]+@[\w.]+\w"
    r"|\.{3}|--+|[!?]{2,}"
    r"|n't(?!\w)|'n'|'(?:s|m|d|re|ve|ll|n)(?!\w)|'\d\ds?\b|o'clock\b|y'(?=all\b)|[a-z]'[a-z]{2,}"
    r"|(?<!\S)-\d+(?:\.\d+)?|\d+(?:[.,:/]\d+)+(?:-\w+)*|(?<!\w)\.\d+"
    r"|[^\W_]+(?:(?:[-/]|\.(?=[^\W\d_]{2}))[^\W_]+|_+[^\W_]+|&[^\W_](?!\w))*"
    r"|[^\w\s]|_+"
)


def tokens(text: str) -> list[str]:
    """The words of a caption."""
    text = text.translate(_QUOTES).lower()
    text = _SPLIT.sub(lambda found: " ".join(part for part in found.groups() if part), text)
    text = _CLITIC.sub(r" \1", text)
    found = (str(match[0]) for match in _TOKEN.finditer(text))
    return [BRACKETS.get(token, token) for token in found if token not in PUNCTUATION and not _DASHES.fullmatch(token)]
