"""Words name objects: the longest phrase, singular and plural."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilvlm.data.problems import DataError
from distilvlm.evaluate.hallucination.synonyms import Synonyms

TABLE = """
# comments and empty lines do not count
person, man, woman, people

dog, puppy, dog   # the same word twice is fine
hot dog
bear
teddy bear, stuffed bear
wine glass
knife
-, bear market, dog show
"""


@pytest.fixture
def synonyms(tmp_path: Path) -> Synonyms:
    (tmp_path / "words.txt").write_text(TABLE)
    return Synonyms.read(tmp_path / "words.txt")


def named(synonyms: Synonyms, text: str) -> list[str]:
    return [mention.object for mention in synonyms.mentions(text)]


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("A hot dog.", ["hot dog"]),
        ("a hot, tired dog", ["dog"]),
        ("Teddy bears and a bear", ["teddy bear", "bear"]),
        ("a dog eats a hot-dog", ["dog", "hot dog"]),
        ("Two puppies, three MEN and the woman's knives", ["dog", "person", "person", "knife"]),
        ("wine glasses in a bear market", ["wine glass"]),
        ("dogma, bearings, manly", []),
        ("dog dog dog", ["dog"] * 3),
        ("", []),
    ],
)
def test_the_longest_phrase_counts_and_whole_words_only(synonyms: Synonyms, text: str, objects: list[str]) -> None:
    assert named(synonyms, text) == objects


def test_a_phrase_is_told_in_the_singular(synonyms: Synonyms) -> None:
    assert [mention.phrase for mention in synonyms.mentions("puppies and stuffed bears")] == ["puppy", "stuffed bear"]


def test_names_alone_make_a_table() -> None:
    table = Synonyms.of_names(["potted_plant", "bus", "person"])
    assert named(table, "People wait for buses between potted plants") == ["person", "bus", "potted plant"]
    assert table.object_of("Potted-Plant") == "potted plant"


def test_class_names_are_found_by_any_of_their_words(synonyms: Synonyms) -> None:
    assert synonyms.objects_of(["man", "dog", "person"]) == ("dog", "person")
    with pytest.raises(DataError, match=r"words\.txt: no line has 'zebra', which is in the annotations: add a line"):
        synonyms.object_of("zebra")
    with pytest.raises(DataError, match="no line has 'dog show'"):
        synonyms.object_of("dog show")


def test_what_a_table_says_comes_before_plurals_that_are_made() -> None:
    table = Synonyms([("glass", []), ("spectacles", ["glasses"])])
    assert named(table, "a glass, glasses") == ["glass", "spectacles"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("dog, hound\nwolf, hound", "'hound' stands for 'dog' and for 'wolf'"),
        ("dog,, hound", "the line of 'dog' has an entry without a word"),
        ("# nothing", "no object; write a line for each"),
    ],
)
def test_a_table_that_can_not_be_meant_is_refused_with_its_file(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "bad.txt").write_text(lines)
    with pytest.raises(DataError, match=message) as refused:
        Synonyms.read(tmp_path / "bad.txt")
    assert "bad.txt" in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt can't be read"):
        Synonyms.read(tmp_path / "none.txt")
