"""The picture of all claims: every claim once, a mark a seed, and the verdict in colour, shape and words."""

from __future__ import annotations

from xml.etree import ElementTree

from distilvlm.evaluate import Interval
from evidence.picture import COLOURS, SHAPES, Judged, draw
from evidence.verdicts import DOES_NOT_HOLD, HOLDS, NOT_DECIDED

SVG = "{http://www.w3.org/2000/svg}"
GAIN = Interval(0.1, 0.05, 0.15)
LOSS = Interval(-0.3, -0.4, -0.2)


def drawn() -> ElementTree.Element:
    long = (
        "One thing < another, said in a sentence that is longer than what fits beside the picture in one line of text"
    )
    first = [Judged(long, [GAIN, GAIN, GAIN], HOLDS), Judged("Two", [LOSS, LOSS], DOES_NOT_HOLD)]
    return ElementTree.fromstring(draw({"First": first, "Second": [Judged("Three", [GAIN], NOT_DECIDED)]}))


def marks(root: ElementTree.Element, verdict: str) -> list[ElementTree.Element]:
    return [one for one in root.iter(f"{SVG}path") if one.get("d") == SHAPES[verdict]]


def test_every_seed_has_a_mark_of_its_verdict_beside_the_key() -> None:
    root = drawn()
    for verdict, seeds in ((HOLDS, 3), (DOES_NOT_HOLD, 2), (NOT_DECIDED, 1)):
        found = marks(root, verdict)
        assert len(found) == 1 + seeds
        assert {one.get("fill") for one in found} == {COLOURS[verdict]}


def test_what_is_for_a_claim_stands_right_of_zero_and_what_is_against_it_left() -> None:
    root = drawn()
    (zero,) = {one.get("d", "")[1:].split(",")[0] for one in root.iter(f"{SVG}path") if one.get("class") == "zero"}

    def places(verdict: str) -> list[float]:
        return [float(one.get("transform", "")[len("translate(") :].split()[0]) for one in marks(root, verdict)[1:]]

    assert min(places(HOLDS)) > float(zero) > max(places(DOES_NOT_HOLD))


def test_claims_are_whole_and_the_picture_is_told_in_words() -> None:
    root = drawn()
    text = " ".join(one.text or "" for one in root.iter(f"{SVG}text"))
    assert (
        "One thing < another, said in a sentence that is longer than what fits beside the picture in one line" in text
    )
    assert "First: 1 holds, 1 does not hold, 0 not decided here; Second: 0 holds" in root.get("aria-label", "")
