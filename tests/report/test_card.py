"""The model card of a run: metadata that hubs read, what the run tells, and what nobody told."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from distilvlm.export import export
from distilvlm.models.files import verify
from distilvlm.report import write_report
from distilvlm.report.card import MADE, card, made
from distilvlm.report.read import ReportError, Run, read, read_run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    """A finished run of its own place, that is part of no comparison."""
    shutil.copytree(finished, tmp_path / "alone" / "seed" / "run")
    return read_run(tmp_path / "alone" / "seed" / "run")


def told(run: Run, **changes: object) -> str:
    return card(replace(run, recipe=run.recipe.model_copy(update=changes)))


def answered(run: Run, name: str = "gqa", **content: object) -> None:
    about = {"suite": "gqa", "split": "testdev"}
    summary = {"n": 40, "pictures": 20, "accuracy": {"mean": 0.625, "low": 0.5, "high": 0.75}}
    (run.path / "answers").mkdir(exist_ok=True)
    (run.path / "answers" / f"{name}.json").write_text(json.dumps({"asked": about, **summary, **content}))


def test_hubs_read_its_metadata(run: Run) -> None:
    answered(run)
    source = next(iter(run.recipe.data.values())).model_copy(update={"path": "owner/captions", "licence": "cc0-1.0"})
    student = run.recipe.student
    assert student.language is not None
    language = student.language.model_copy(update={"source": "Qwen/Qwen2.5-0.5B"})
    changes = {"licence": "apache-2.0", "student": student.model_copy(update={"language": language})}
    data = ModelCard(told(run, **changes, data={"captions": source})).data
    kind = [data[field] for field in ("license", "library_name", "pipeline_tag")]
    assert kind == ["apache-2.0", "transformers", "image-text-to-text"]
    assert data.base_model == ["Qwen/Qwen2.5-0.5B"] and data.datasets == ["owner/captions"]
    assert "distilvlm" in data.tags and data.model_name == run.name
    (result,) = data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("gqa-testdev", "accuracy", 62.5)


def test_what_nobody_told_is_said_and_not_guessed(run: Run) -> None:
    text = card(run)
    data = ModelCard(text).data
    assert data.license is None and data.base_model is None and data.datasets is None and data.eval_results is None
    assert "Licence: not stated in the recipe" in text
    assert "Not stated in the recipe (`intended_use`)." in text
    assert text.count("not stated in the recipe |") == len(run.recipe.data)
    assert "Not evaluated" in text
    assert str(run.path.parent) not in text  # no place of this machine


def test_it_tells_data_stages_and_results(run: Run) -> None:
    answered(run)
    text = told(run, intended_use="Naming colours.")
    assert "Naming colours." in text
    assert "| captions (captions.json) | 10 | not stated in the recipe |" in text
    assert "| dpt | projector |" in text and "text + 0.5 relation" in text
    assert "| gqa-testdev | 40 | accuracy, % | 62.5 [50.0, 75.0] |" in text
    answered(run, "strange", asked={})
    with pytest.raises(ReportError, match=r"strange\.json does not say what was asked"):
        card(run)


def test_the_results_of_its_comparison_are_its_results(comparison: Path) -> None:
    run = read_run(comparison / "seed-0" / "distilled", "distilled")
    text = card(run)
    assert "| Seven colours | 7 | accuracy, % | 42.9 [" in text
    (result,) = ModelCard(text).data.eval_results
    assert (result.dataset_name, result.metric_value) == ("Seven colours", 42.86)


def test_the_report_writes_it_and_leaves_what_somebody_made_theirs(run: Run) -> None:
    write_report(run.path)
    file = run.path / "model" / "README.md"
    assert file.read_text() == card(run) and verify(run.path / "model") == []
    file.write_text(file.read_text().replace("# ", "# My "))
    write_report(run.path)
    assert "# My" not in file.read_text()
    file.write_text(file.read_text().replace(MADE, "").replace("# ", "# My "))
    write_report(run.path)
    assert "# My" in file.read_text()
    found = read(run.path)
    assert isinstance(found, Run)


def test_an_export_s_card_tells_what_the_run_tells(run: Run, tmp_path: Path) -> None:
    answered(run)
    assert export(str(run.path / "model"), "hf", tmp_path / "out", tokens=2).passed
    text = (tmp_path / "out" / "README.md").read_text()
    assert "from_pretrained(" in text and all(line in text for line in made(run))
    assert ModelCard(text).data.eval_results
