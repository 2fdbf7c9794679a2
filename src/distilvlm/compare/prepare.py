"""What a comparison needs before its first run: weights, converted data, kept vision features."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import torch

from distilvlm.data import read
from distilvlm.data.convert import convert
from distilvlm.data.geometry import canvas, decode
from distilvlm.data.stage import background
from distilvlm.models import build
from distilvlm.models.features import FeatureStore
from distilvlm.models.files import sha256, write_whole
from distilvlm.models.fingerprint import fingerprint
from distilvlm.recipe import Recipe

from .schema import Conversion, QuestionSpec

logger = logging.getLogger(__name__)


def converted(name: str, spec: Conversion, directory: Path) -> None:
    """Make `directory/NAME.jsonl` (and `-train`, `-test`), unless it was made from the same file by the same options.

    Raises:
        DataError: as the converter.
    """
    stamp = directory / f"{name}.made.json"
    source = Path(spec.source)
    wanted = json.loads(spec.model_dump_json(by_alias=True))
    wanted["content"] = content(source)
    if stamp.exists():
        made = json.loads(stamp.read_text())
        files = [directory / file for file in made["files"]]
        if made["from"] == wanted and all(file.exists() for file in files):
            return
    result = convert(spec.format, source, directory / f"{name}.jsonl", images=spec.images, **spec.options)
    files = [file for file in (result.train, result.test) if file is not None]
    for reason, count in result.left_out.items():
        logger.info("data '%s': %d left out: %s", name, count, reason)
    logger.info("data '%s': %d rows, %d pictures", name, result.rows, result.pictures)
    made = {"from": wanted, "files": [file.name for file in files]}
    write_whole(stamp, (json.dumps(made, indent=1) + "\n").encode())


def content(source: Path) -> str:
    """A hash that changes with the file, or with the names and sizes of what a directory holds."""
    if source.is_file():
        return sha256(source)
    listing = [f"{path.relative_to(source)} {path.stat().st_size}" for path in sorted(source.rglob("*"))]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()


def keep_features(recipe: Recipe, recipes: Iterable[Recipe], questions: Iterable[QuestionSpec]) -> None:
    """Run the frozen encoder of `recipe` over every picture that runs with the same store see or are asked about."""
    store = recipe.pictures.features
    assert store is not None
    sources = [spec for one in recipes if one.pictures.features == store for spec in one.data.values()]
    sources += [one.source for one in questions if not one.of_text]
    pictures = {path for spec in sources for record in read(spec, "pictures").records for path in record.images}
    vlm = build(recipe.student, recipe.seed)
    if torch.cuda.is_available():
        vlm.to("cuda")
    geometry, size, padding = recipe.pictures.geometry, vlm.layout.size, background(vlm.layout)
    features = FeatureStore(store, vlm.layout, fingerprint(vlm.model.model.vision_tower), geometry)
    features.fill(sorted(pictures), vlm, lambda path: canvas(decode(path), geometry, size, padding), batch=32)
