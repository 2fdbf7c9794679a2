"""What a sequence is to a teacher: the same for all that asks it the same, and for nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from distilvlm.data.batch import IGNORED
from distilvlm.data.identity import Identity, identify

IDS = torch.arange(20)
PLACES = torch.tensor([2, 3, 4, 9, 10, 11])  # of two pictures


def made(ids: Tensor = IDS, learned: tuple[int, ...] = (13, 14), contents: tuple[str, ...] = ("a", "b")) -> Identity:
    labels = torch.full_like(ids, IGNORED)
    labels[list(learned)] = ids[list(learned)]
    return identify(ids, labels, PLACES, contents)


def changed(place: int) -> Tensor:
    ids = IDS.clone()
    ids[place] += 1
    return ids


def test_a_picture_is_known_by_itself_and_what_stands_before_it() -> None:
    first, second = made().pictures
    assert made(changed(15)).pictures == (first, second)  # behind both
    assert made(changed(7)).pictures[0] == first and made(changed(7)).pictures[1] != second
    assert not {*made(changed(0)).pictures} & {first, second}
    assert made(contents=("a", "c")).pictures == (first, made(contents=("a", "c")).pictures[1])
    assert made(contents=("a", "c")).pictures[1] != second
    assert not {*made(contents=("c", "b")).pictures} & {first, second}
    assert made(learned=(13,)).pictures == (first, second)


def test_answers_are_known_by_all_tokens_by_what_is_learned_and_by_the_pictures() -> None:
    answers = made().answers
    others = [made(changed(0)), made(changed(19)), made(learned=(13,)), made(contents=("a", "c"))]
    assert len({answers, *(one.answers for one in others)}) == 5
    assert made().answers == answers and answers not in made().pictures


def test_rows_are_counted_as_a_batch_has_them() -> None:
    assert made().responses == 2
    assert made(learned=(0, 13)).responses == 1  # nothing predicts the first token
