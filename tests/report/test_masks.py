"""Both sides of a preference are shown, with what is learned of each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from distilvlm.recipe import SourceSpec
from distilvlm.report.masks import Mask, masks
from distilvlm.report.read import Run, read


def with_data(run: Run, file: Path, row: dict[str, Any]) -> Run:
    """The run as if the first of its sources were `file`."""
    file.write_text(json.dumps([row]))
    name = next(iter(run.recipe.data))
    data = {**run.recipe.data, name: SourceSpec(path=str(file))}
    return replace(run, recipe=run.recipe.model_copy(update={"data": data}))


def learned(mask: object) -> str:
    assert isinstance(mask, Mask)
    return "".join(text for span in mask.spans if span.kind == "learned" for text in span.tokens)


def test_preferences_show_which_answer_it_is(finished: Path, tmp_path: Path) -> None:
    run = read(finished)
    assert isinstance(run, Run)
    pair = {"prompt": "what is it?", "chosen": "a picture", "rejected": "the sky"}
    chosen, rejected, *_ = masks([with_data(run, tmp_path / "pairs.json", pair)])
    assert isinstance(chosen, Mask) and isinstance(rejected, Mask)
    assert (chosen.place, rejected.place) == ("pairs.json, row 0, chosen", "pairs.json, row 0, rejected")
    assert learned(chosen).startswith("a picture") and learned(rejected).startswith("the sky")
    rated = {"prompt": "what is it?", "completion": "the sky", "label": False}
    first, *_ = masks([with_data(run, tmp_path / "rated.json", rated)])
    assert isinstance(first, Mask) and first.place == "rated.json, row 0, rated undesirable"
    assert learned(first).startswith("the sky")
