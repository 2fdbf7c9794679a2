"""A teacher that cannot give what a stage needs is refused before the first step, and a stage that can't be right with
what is known of a teacher as soon as its recipe is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distilvlm.losses import Objective
from distilvlm.recipe import RecipeError, load_recipe
from distilvlm.teachers import LocalTeacher, TeacherError, require
from distilvlm.teachers.remote import PromptedTeacher, RemoteTeacher
from tests.runs.tiny import write_recipe

ALL = Objective(response=1.0, visual=1.0, relation=1.0)


def of(*provides: str) -> Any:
    return SimpleNamespace(provides=frozenset(provides))


@pytest.mark.parametrize("kind", [LocalTeacher, RemoteTeacher])
def test_hidden_rows_meet_every_need(kind: Any) -> None:
    require(of(*kind.provides), ALL.needs, "dft")


def test_what_is_lacking_is_named_with_the_alternatives() -> None:
    with pytest.raises(TeacherError) as refused:
        require(of(*PromptedTeacher.provides), ALL.needs, "dft")
    told = str(refused.value)
    assert told.startswith("stage 'dft' has loss.visual and loss.relation, and its teacher gives targets of response")
    for way in ("visual: 0, relation: 0", "teacher.kind: local", "kind: cached", "distilvlm teach"):
        assert way in told
    require(of(*PromptedTeacher.provides), Objective(response=1.0).needs, "dft")
    require(of(), Objective().needs, "sft")


@pytest.mark.parametrize(
    ("keep", "loss", "message"),
    [
        ("top_k", {"temperature": 2}, "some of them, at temperature 1: leave it out"),
        ("top_k", {"schedule": {"temperature": {"from": 2, "to": 1}}}, "some of them, at temperature 1"),
        ("sampled", {"divergence": "reverse_kl"}, "forward_kl alone, not for reverse_kl"),
        ("sampled", {"divergence": "forward_kl"}, None),
        ("top_k", {"divergence": "jensen_shannon", "mix": 0.5}, None),
        ("hidden", {"divergence": "reverse_kl", "temperature": 2}, None),
    ],
)
def test_what_can_not_be_told_from_what_is_known_is_refused(
    tmp_path: Path, keep: str, loss: dict[str, Any], message: str | None
) -> None:
    path = write_recipe(tmp_path, pictures={})
    overrides: dict[str, Any] = {"teacher.kind": "cached", "teacher.keep.responses": keep}
    overrides |= {f"stages.dft.loss.{name}": value for name, value in loss.items()}
    if message is None:
        load_recipe(path, overrides)
        return
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, overrides)


def test_aligned_tokens_are_compared_by_their_own_divergence_alone(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    with pytest.raises(RecipeError, match="reverse_kl compares ids, and with tokens: aligned an id means another"):
        load_recipe(path, {"teacher.tokens": "aligned", "stages.dft.loss.divergence": "reverse_kl"})
