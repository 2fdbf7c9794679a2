from __future__ import annotations

import pytest

from distilvlm.models import build
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, load_recipe
from tests.runs.tiny import write_recipe


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The three tiny stages of LLaVA-KD; each test may take a copy with changes."""
    return load_recipe(write_recipe(tmp_path_factory.mktemp("recipe"), rows=40))


@pytest.fixture(scope="session")
def models(recipe: Recipe) -> tuple[VLM, VLM]:
    """Student and teacher without weights."""
    assert recipe.teacher is not None
    return build(recipe.student, 0, meta=True), build(recipe.teacher, 0, meta=True)
