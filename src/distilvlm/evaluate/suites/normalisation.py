"""Short answers made comparable: the rules of the official VQA evaluation and of TextVQA's answer processor.

Facts from GT-Vision-Lab/VQA (`vqaEval.py`) and from mmf's `EvalAIAnswerProcessor`, quirks included: what is compared
here is what their servers compare. `metrics.normalise` is this package's own, kinder rule.
"""

from __future__ import annotations

import re

_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS.split())}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Each contraction by its spellings that lack one apostrophe. (The table's capitals, "Im", can never be met: words
    are in lower case by then.)"""
    found: dict[str, str] = {}
    for word in _CONTRACTED.split():
        places = [place for place, letter in enumerate(word) if letter == "'"]
        found |= {word[:place] + word[place + 1 :]: word for place in places}
    return found | {"somebody'd": "somebodyd"}  # the only one that the table turns round


CONTRACTIONS = _contractions()

_THOUSANDS = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_STOPS = 32
"""Full stops that are taken off at most: their script passes a flag where `re.sub` expects a number."""


def punctuation(text: str) -> str:
    """A mark goes where it stands beside a space, or where the text has a comma between digits; else it becomes a
    space. Apostrophes and colons stay."""
    joined = _THOUSANDS.search(text) is not None
    found = text
    for mark in PUNCTUATION:
        found = found.replace(mark, "" if joined or f"{mark} " in text or f" {mark}" in text else " ")
    return _FULL_STOP.sub("", found, _STOPS)


def words(text: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes put into contractions."""
    each = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in each if word not in ARTICLES)


def processed(text: str) -> str:
    """TextVQA's answer processor: before the rules above commas and question marks go, and "'s" is set apart."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return words(punctuation(text.replace("\n", " ").replace("\t", " ").strip()))
