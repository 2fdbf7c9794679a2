"""Two programs are the same when their logits are, and a difference is never taken for none."""

import math

import pytest
import torch

from distilvlm.export.parity import Case, Parity, compare

V = 6
ENDS = {5}


class Scripted:
    """Says the logits of `rows` one after the other."""

    features = None

    def __init__(self, rows, prompt=(1, 2)):
        self.prompt = prompt
        self._rows = [torch.tensor(row, dtype=torch.float32) for row in rows]
        self.asked = []

    def begin(self, case):
        self._place = 0
        return self._rows[0]

    def step(self, token):
        self.asked.append(token)
        self._place += 1
        return self._rows[self._place]


ROWS = [[0, 9, 0, 0, 0, 0], [0, 0, 9, 0, 0, 0], [0, 0, 0, 0, 0, 9]]


def asked(ours, theirs, bound=0.01, comparable=None):
    allowed = torch.ones(V, dtype=torch.bool) if comparable is None else comparable
    return compare(
        Case("a case", "?"), ours, theirs, bound, ends=ENDS, limit=8, comparable=allowed, decode=lambda ids: str(ids)
    )


def changed(step, token, value):
    rows = [list(row) for row in ROWS]
    rows[step][token] = value
    return rows


def test_the_same_program_is_the_same():
    ours, theirs = Scripted(ROWS), Scripted(ROWS)
    compared = asked(ours, theirs)
    assert compared.passed and compared.difference == 0 and compared.divergence is None
    assert compared.text == "[1, 2]" and compared.tokens == 2  # the end of the answer is none
    assert ours.asked == theirs.asked == [1, 2]


@pytest.mark.parametrize("value, passed", [(0.08, True), (0.1, False), (-0.1, False)])
def test_logits_may_differ_by_the_bound_and_no_more(value, passed):
    compared = asked(Scripted(ROWS), Scripted(changed(1, 4, value)))
    assert compared.passed is passed and compared.difference == pytest.approx(abs(value))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails(value):
    assert not asked(Scripted(ROWS), Scripted(changed(1, 4, value))).passed


def test_other_prompt_ids_fail_though_logits_are_equal():
    compared = asked(Scripted(ROWS), Scripted(ROWS, prompt=(1, 3)))
    assert not compared.passed and "token ids" in compared.failure(0.01)


def test_a_divergence_is_told_with_its_gap_and_ends_the_comparison():
    ours, theirs = Scripted(changed(1, 3, 8.95)), Scripted(changed(1, 3, 9.02))
    compared = asked(ours, theirs)
    assert compared.passed and compared.tokens == 1
    assert (compared.divergence.step, compared.divergence.ours, compared.divergence.theirs) == (1, 2, 3)
    assert compared.divergence.gap == pytest.approx(0.05, abs=1e-5)
    assert ours.asked == theirs.asked == [1]


def test_ids_that_no_answer_may_hold_are_not_compared():
    allowed = torch.ones(V, dtype=torch.bool)
    allowed[4] = False
    compared = asked(Scripted(ROWS), Scripted(changed(0, 4, 90)), comparable=allowed)
    assert compared.passed and compared.difference == 0 and compared.text == "[1, 2]"


def test_what_was_not_checked_neither_passes_nor_fails():
    parity = Parity("gguf f16", False, reason="nobody was asked")
    assert "NOT CHECKED: nobody was asked" in parity.lines()[0]
    assert parity.as_json()["passed"] is None


def test_failures_are_told_by_case_with_what_they_may_come_from():
    compared = asked(Scripted(ROWS), Scripted(changed(0, 0, 1)))
    lines = Parity("onnx", True, 0.01, (compared,), "a known reason").lines()
    assert lines[0].startswith("onnx: NO PARITY: 1 of 1 answers")
    assert "a case: max |Δlogit| 1 of logits up to 9.0" in lines[1] and "a known reason" in lines[2]
