"""Preferences as samples, batches, reports and counts: both sequences, and what is said of them."""

from __future__ import annotations

import itertools
import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distilvlm import cli
from distilvlm.data import DataError, Grouping, Order, Sample, StageData, batches, geometry, raise_or_quarantine, read
from distilvlm.data.batch import CHOSEN, IGNORED, MISMATCHED, REJECTED
from distilvlm.data.collate import collate
from distilvlm.data.problems import RowError
from distilvlm.data.records import PICTURE, Record
from distilvlm.data.statistics import describe
from distilvlm.evaluate import questions_of
from distilvlm.recipe.schema import Augmentation, PictureSpec, SourceSpec

from .small_data import CHATML, llava_row, make_pictures, make_tokenizer, write_json

PLACEHOLDERS, SIZE = 3, 8
VISUAL = [False, True, True]


@pytest.fixture(autouse=True)
def images(tmp_path: Path) -> list[str]:
    return make_pictures(tmp_path / "images", 4)


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    decode = geometry.decode
    monkeypatch.setattr(geometry, "decode", lambda path: seen.append(Path(path).name) or decode(path))
    return seen


def pair(number: int | None, question: str, chosen: str, rejected: str) -> dict[str, Any]:
    """About picture `number`, or none."""
    marker = "" if number is None else "<image>\n"
    row: dict[str, Any] = {} if number is None else {"image": f"{number}.png"}
    prompt = [{"from": "human", "value": marker + question}]
    answers = ([{"from": "gpt", "value": answer}] for answer in (chosen, rejected))
    return {**row, **{side: prompt + answer for side, answer in zip(("chosen", "rejected"), answers, strict=True)}}


def rated(number: int | None, question: str, answer: str, label: bool) -> dict[str, Any]:
    name = None if number is None else f"{number}.png"
    return {**llava_row(0, name, question if name is None else f"<image>\n{question}", answer), "label": label}


def stage_data(tmp_path: Path, *files: list[dict[str, Any]], **changes: Any) -> StageData:
    sources = []
    for number, rows in enumerate(files):
        path = write_json(tmp_path / f"data{number}.json", rows)
        sources.append(read(SourceSpec(path=str(path), images=str(tmp_path / "images")), f"talk{number}"))
    settings = {
        "placeholders": PLACEHOLDERS,
        "visual": VISUAL,
        "pictures": PictureSpec(),
        "size": SIZE,
        "max_length": 256,
        "seed": 11,
        **changes,
    }
    return StageData(sources, make_tokenizer(CHATML), **settings)


def learned(data: StageData, sequence: Sample) -> str:
    return data.templates["chat"].tokenizer.decode(sequence.labels[sequence.labels != IGNORED].tolist())


def told(data: StageData, sample: Sample) -> list[str]:
    return [learned(data, sequence) for sequence in sample.sequences]


PAIRS = [
    pair(0, "what colour?", "red", "blue"),
    pair(None, "is it?", "it is", "the colour"),
    pair(1, "what colour?", "green", "red red red"),
]
RATED = [
    rated(0, "what colour?", "red", True),
    rated(None, "is it?", "it is", False),
    rated(1, "what is it?", "green", True),
]


def test_a_pair_is_two_sequences_about_the_same_canvases(tmp_path, decodes):
    spec = PictureSpec(augment=Augmentation(flip=0.5, crop=0.3))
    data = stage_data(tmp_path, PAIRS, pictures=spec)
    assert (data.preferences, len(data)) == ("pairs", 3)
    sample = data[0, 0]
    assert sample.second is not None and (sample.role, sample.second.role) == (CHOSEN, REJECTED)
    assert told(data, sample) == ["red<|im_end|>", "blue<|im_end|>"]
    assert decodes == ["0.png"] and sample.pictures is sample.second.pictures
    plain = [llava_row(n, f"{n}.png", "<image>\nq", "red") for n in range(2)]
    assert sample.pictures is not None and sample.pictures.equal(
        stage_data(tmp_path, plain, pictures=spec)[0, 0].pictures
    )
    assert data[0, 1].pictures is None


def test_only_the_answer_that_is_compared_is_learned(tmp_path):
    before = [
        {"from": "human", "value": "is it?"},
        {"from": "gpt", "value": "it is"},
        {"from": "human", "value": "what?"},
    ]
    sides = {
        side: [*before, {"from": "gpt", "value": answer}] for side, answer in (("chosen", "red"), ("rejected", "blue"))
    }
    data = stage_data(tmp_path, [sides])
    assert told(data, data[0, 0]) == ["red<|im_end|>", "blue<|im_end|>"]
    first, second = data.sequences(0)
    before_answer = int((first.labels != IGNORED).nonzero()[0])
    assert first.input_ids[:before_answer].equal(second.input_ids[:before_answer])
    plain = stage_data(tmp_path, [{"conversations": sides["chosen"]}])
    assert plain.encoded(0).input_ids.equal(first.input_ids) and plain.encoded(0).learned > first.learned
    rated_twice = stage_data(tmp_path, [{"conversations": sides["chosen"], "label": True}] * 2)
    assert told(rated_twice, rated_twice[0, 1]) == ["red<|im_end|>"] * 2


def test_a_batch_holds_both_sequences_next_to_each_other(tmp_path):
    data = stage_data(tmp_path, PAIRS)
    batch = collate([data[0, index] for index in (2, 1, 0)])
    assert batch.samples == 6 and batch.roles is not None and batch.reference is None
    assert batch.roles.tolist() == [CHOSEN, REJECTED] * 3 and batch.roles.dtype == torch.int64
    assert [key.row for key in batch.keys] == [2, 2, 1, 1, 0, 0]
    assert batch.weights.tolist() == [1.0] * 6
    assert batch.pictures is not None and batch.pictures.shape == (4, 3, SIZE, SIZE)
    assert batch.pictures[0].equal(batch.pictures[1]) and not batch.pictures[0].equal(batch.pictures[2])
    assert (batch.placeholder_rows // batch.length).tolist() == [
        row for row in (0, 1, 4, 5) for _ in range(PLACEHOLDERS)
    ]
    said = data.templates["chat"].tokenizer.decode(batch.response_targets.tolist())
    answers = ["green", "red red red", "it is", "the colour", "red", "blue"]
    assert said == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_kept_features_serve_both_sequences_and_are_read_once(tmp_path):
    reads: list[str] = []

    def reader(path: str) -> Tensor:
        reads.append(Path(path).stem)
        return torch.full((PLACEHOLDERS, 2), float(Path(path).stem))

    data = stage_data(tmp_path, PAIRS, feature_reader=reader)
    batch = collate([data[0, 2], data[0, 0]])
    assert reads == ["1", "0"] and batch.features is not None
    assert batch.features[:, 0, 0].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_a_rated_answer_comes_with_the_next_ones_answer(tmp_path):
    data = stage_data(tmp_path, RATED, [rated(2, "what is it?", "blue", False), rated(None, "it?", "the", True)])
    assert data.preferences == "rated"
    shown = [told(data, data[0, index]) for index in range(5)]
    assert [[text.removesuffix("<|im_end|>") for text in both] for both in shown] == [
        ["red", "it is"],
        ["it is", "green"],
        ["green", "red"],  # behind the last of a source comes its first
        ["blue", "the"],
        ["the", "blue"],
    ]
    batch = collate([data[0, index] for index in range(5)])
    assert batch.roles is not None
    expected = [CHOSEN, REJECTED, CHOSEN, REJECTED, CHOSEN]
    assert batch.roles.tolist() == list(itertools.chain(*((role, MISMATCHED) for role in expected)))
    own, other = data.sequences(0)
    start = int((own.labels != IGNORED).nonzero()[0])
    assert own.input_ids[:start].equal(other.input_ids[:start])  # the record's own prompt
    assert data.record(0).images and other.placeholder_positions.equal(own.placeholder_positions)


def test_the_mismatched_answer_is_of_the_rows_that_are_left(tmp_path):
    data = stage_data(tmp_path, RATED)
    (tmp_path / "images" / "0.png").write_bytes(b"x")
    report = data.check()
    assert [row.key.row for row in report.bad] == [0]
    rest = data.without(report.bad)
    assert [told(rest, rest[0, index]) for index in range(2)] == [
        ["it is<|im_end|>", "green<|im_end|>"],
        ["green<|im_end|>", "it is<|im_end|>"],
    ]
    with pytest.raises(DataError, match="one rated answer alone can't be learned from"):
        rest.without([replace(report.bad[0], key=rest.record(0).key)])


def test_references_are_asked_by_index_and_stand_in_the_batch(tmp_path):
    def reader(index: int) -> tuple[float, float]:
        return -1.0 - index, -10.0 - index

    for files in (PAIRS, RATED):
        data = stage_data(tmp_path, files, reference_reader=reader)
        later = stage_data(tmp_path, files).with_references(reader)
        for made in (data, later):
            batch = collate([made[0, 2], made[0, 0]])
            assert batch.reference is not None and batch.reference.dtype == torch.float64
            assert batch.reference.tolist() == [-3.0, -12.0, -1.0, -10.0]
        with pytest.raises(ValueError, match="before the references"):
            data.without([])
        without = stage_data(tmp_path, files)
        assert without[0, 0].reference is None
        with pytest.raises(ValueError, match=r"row 2 has a reference, and .*row 0 in the same batch does not"):
            collate([data[0, 2], without[0, 0]])
    with pytest.raises(ValueError, match="augment has no effect on a preference's kept reference"):
        stage_data(tmp_path, PAIRS, pictures=PictureSpec(augment=Augmentation(flip=1))).with_references(reader)
    with pytest.raises(ValueError, match="plain conversations have no reference"):
        stage_data(tmp_path, [llava_row(0, None, "q", "a")], reference_reader=reader)


def test_batches_and_stages_are_of_one_kind(tmp_path):
    preference = stage_data(tmp_path, PAIRS)[0, 1]
    plain = [llava_row(0, None, "q", "a"), llava_row(1, None, "q", "a")]
    other = stage_data(tmp_path, plain)[0, 1]
    with pytest.raises(
        ValueError, match=r"data0\.json, row 1 holds a preference, and .*data0\.json, row 1 in the same"
    ):
        collate([other, preference])
    with pytest.raises(DataError, match="there is 'talk0' of pairs of answers and 'talk1' of conversations"):
        stage_data(tmp_path, PAIRS, plain)
    with pytest.raises(DataError, match="'talk0' of rated answers and 'talk1' of pairs of answers"):
        stage_data(tmp_path, RATED, PAIRS)
    assert stage_data(tmp_path, plain).preferences is None


@pytest.mark.parametrize(("rows", "roles"), [(PAIRS, [CHOSEN, REJECTED]), (RATED, [CHOSEN, MISMATCHED])])
def test_a_stand_in_of_a_preference_is_two_sequences_of_weight_0(tmp_path, rows, roles):
    data = stage_data(tmp_path, rows, on_bad_row="quarantine", reference_reader=lambda index: (-1.0, -2.0))
    (tmp_path / "images" / "0.png").write_bytes(b"x")
    batch = collate([data[0, 0], data[0, 2]])
    assert batch.weights.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert batch.roles is not None and batch.roles.tolist()[:2] == roles
    assert batch.reference is not None and batch.reference.tolist() == [0.0, 0.0, -1.0, -2.0]
    assert [(bad.key.row, bad.field) for bad in batch.bad] == [(0, "image")]
    assert (batch.response_rows >= 2 * batch.length).all() and batch.pictures is not None and len(batch.pictures) == 2
    with pytest.raises(DataError, match="row 0, field 'image'"):
        stage_data(tmp_path, rows)[0, 0]


def test_a_cut_on_either_side_counts_and_one_that_leaves_nothing_is_bad(tmp_path):
    rows = [
        pair(None, "is it?", "it is", "red " * 40),
        pair(None, "is it?", "red", "blue"),
        pair(None, "is it?", "red " * 40, "red " * 41),  # alike as far as the context goes
        pair(None, "what colour " * 20, "red", "blue"),
        pair(0, "is it?", " red", "red  blue" * 40),
    ]
    data = stage_data(tmp_path, rows, max_length=50)
    report = data.check()
    assert [(bad.key.row, bad.field) for bad in report.bad] == [(2, "rejected"), (3, "chosen")]
    assert report.bad[0].reason == "nothing to learn: chosen and rejected are the same in the first 50 positions"
    assert report.bad[1].reason.startswith("nothing to learn: no answer stands in the first 50 of")
    counts = report.sources["talk0"]
    assert (counts.samples, counts.pairs, counts.rated, counts.sequences, counts.cut) == (3, 3, 0, 6, 2)
    assert counts.longest == 50
    lengths = [len(encoded.input_ids) for index in (0, 1, 4) for encoded in data.sequences(index)]
    assert counts.tokens == sum(lengths) and counts.mean == sum(lengths) / 6
    assert counts.learned == sum(encoded.learned for index in (0, 1, 4) for encoded in data.sequences(index))
    assert "3 samples (3 pairs, 1 with pictures" in str(report)
    raised = stage_data(tmp_path, rows, max_length=50, on_bad_row="quarantine")
    assert len(raised.without(report.bad)) == 3 and raise_or_quarantine(report.bad, "quarantine")[0]["row"] == 2


def test_an_answer_that_cannot_be_used_is_its_own_rows_fault(tmp_path, monkeypatch):
    data = stage_data(tmp_path, RATED)
    encode = type(data.templates["chat"]).encode

    def refusing(template: Any, record: Record, *rest: int) -> Any:
        if record.turns[-1].text == "it is":
            raise RowError("conversation", "nobody says that")
        return encode(template, record, *rest)

    monkeypatch.setattr(type(data.templates["chat"]), "encode", refusing)
    report = data.check()
    assert [(bad.key.row, bad.reason) for bad in report.bad] == [(1, "nobody says that")]
    assert (report.rated, report.desirable, report.samples) == (2, 2, 2)
    with pytest.raises(DataError, match=r"row 0, field 'conversation': nobody says that \(with the answer of row 1\)"):
        data[0, 0]


def test_the_key_of_a_preference_is_its_content(tmp_path):
    data = stage_data(tmp_path, PAIRS)
    keys = [data.preference_key(index) for index in range(3)]
    assert len(set(keys)) == 3 and all(len(key) == 64 for key in keys)
    assert [stage_data(tmp_path, PAIRS[::-1]).preference_key(2 - index) for index in range(3)] == keys
    (tmp_path / "images" / "3.png").write_bytes((tmp_path / "images" / "0.png").read_bytes())
    renamed = {**PAIRS[0], "image": "3.png"}
    assert stage_data(tmp_path, [renamed]).preference_key(0) == keys[0]

    def key(row: dict[str, Any] = PAIRS[0], **changes: Any) -> str:
        return stage_data(tmp_path, [row], **changes).preference_key(0)

    others = [
        key(pair(0, "what colour?", "red", "green")),
        key(pair(0, "what colour?", "blue", "red")),
        key({**PAIRS[0], "image": "1.png"}),
        key(max_length=len(data.encoded(0).input_ids) - 1),
        key(placeholders=2, visual=[True, True]),
        key(size=16),
        key(pictures=PictureSpec(geometry="pad")),
    ]
    assert len({keys[0], *others}) == 8
    of_text = stage_data(tmp_path, PAIRS[1:2], size=16, pictures=PictureSpec(geometry="pad"))
    assert of_text.preference_key(0) == keys[1]  # no picture, no canvas
    ratings = stage_data(tmp_path, RATED), stage_data(tmp_path, [*RATED[:2], rated(1, "what is it?", "blue", True)])
    same = [one.preference_key(index) == other.preference_key(index) for one, other in [ratings] for index in range(3)]
    assert same == [True, False, False]  # the row before holds its answer, too
    with pytest.raises(ValueError, match="have no preferences"):
        stage_data(tmp_path, [llava_row(0, None, "q", "a")]).preference_key(0)


def test_a_pictures_content_is_read_once(tmp_path, monkeypatch):
    data = stage_data(tmp_path, [pair(0, "is it?", "red", "blue"), pair(0, "what?", "red", "blue")])
    read_content: Callable[[str], str] = geometry.content
    seen: list[str] = []
    monkeypatch.setattr(geometry, "content", lambda path: seen.append(path) or read_content(path))
    first = data.preference_key(0)
    assert data.preference_key(1) != first == data.without([]).preference_key(0)
    assert len(seen) == 1


@pytest.mark.parametrize("rows", [PAIRS, RATED])
def test_loaders_give_preferences_in_any_number_of_processes(tmp_path, rows):
    data = stage_data(tmp_path, rows, reference_reader=lambda index: (0.0, float(index)))
    order = Order(len(data), 2, 5, "pd", "grouped", data.lengths, data.picture_counts, data.mixture)
    made = [list(micro) for _, micro in batches(data, order, 0, 2, grouping=Grouping(2))]
    assert [batch.samples for micro in made for batch in micro] == [4, 2]
    rows_seen = [key.row for micro in made for batch in micro for key in batch.keys]
    assert sorted(rows_seen) == [0, 0, 1, 1, 2, 2] and rows_seen[::2] == rows_seen[1::2]
    helped = [list(micro) for _, micro in batches(data, order, 0, 2, grouping=Grouping(2), workers=2)]
    for left, right in zip(made, helped, strict=True):
        for one, other in zip(left, right, strict=True):
            assert one.input_ids.equal(other.input_ids)
            assert one.roles is not None and other.roles is not None and one.roles.equal(other.roles)
            assert one.reference is not None and other.reference is not None and one.reference.equal(other.reference)


def test_preferences_travel_to_another_process(tmp_path):
    data = stage_data(tmp_path, RATED)
    data.preference_key(0)
    copied = pickle.loads(pickle.dumps(data))
    assert told(copied, copied[1, 2]) == told(data, data[1, 2])
    assert copied.preference_key(2) == data.preference_key(2)


def test_a_question_is_asked_of_the_good_answer_only(tmp_path, caplog):
    pairs = list(questions_of(stage_data(tmp_path, PAIRS).sources[0].records))
    assert [question.answer for question in pairs] == ["red", "it is", "green"]
    assert pairs[0].text == "what colour?" and pairs[0].record.turns[0].text.startswith(PICTURE)
    rated_answers = list(questions_of(stage_data(tmp_path, RATED).sources[0].records))
    assert [question.answer for question in rated_answers] == ["red", "green"]
    assert "1 answers rated undesirable are not asked for" in caplog.text


def test_preferences_are_counted(tmp_path):
    found = describe(stage_data(tmp_path, PAIRS).sources[0])
    assert (found.rows, found.pairs, found.rated, found.answers, found.different_answers) == (3, 3, 0, 3, 3)
    assert (found.answer_words.longest, found.rejected_words.longest, found.rejected_words.mean) == (2, 3, 2)
    found = describe(stage_data(tmp_path, [*RATED, rated(2, "what?", "Red", True)]).sources[0])
    assert (found.pairs, found.rated, found.desirable, found.answers) == (0, 4, 3, 3)
    assert found.common[0] == ("red", 2) and found.rejected_words.mean == 2


def test_check_and_stats_tell_pairs_from_rated_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_configure_logging", lambda: None)

    def command(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["distilvlm", "data", *map(str, arguments)])
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().out

    images = ("--images", tmp_path / "images")
    pairs = write_json(tmp_path / "pairs.json", [*PAIRS, pair(0, "what?", "red", "red")])
    ratings = write_json(tmp_path / "rated.json", RATED)
    said = command("check", pairs, *images)
    assert "row 3, field 'rejected': is the same answer as chosen" in said
    assert "1 of 4 rows can't be used; 3 pairs" in said
    assert "0 of 3 rows can't be used; 3 rated" in command("check", ratings, *images)
    checked = json.loads(command("check", ratings, *images, "--json"))
    assert (checked["rows"], checked["pairs"], checked["rated"]) == (3, 0, 3)
    said = command("stats", pairs, *images)
    assert "pairs of answers" in said and "of a rejected or undesirable one" in said and "rated" not in said
    counted = json.loads(command("stats", ratings, *images, "--json"))["sources"]["rated"]
    assert (counted["rated"], counted["desirable"], counted["rejected_words"]["longest"]) == (3, 2, 2)
