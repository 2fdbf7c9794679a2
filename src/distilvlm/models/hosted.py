"""A student with adaptors on disk: the adaptors, and what their frozen base is; the base's own weights are not in it.

DIR/
  host.json               the base as a recipe describes it, the hash that it must have, the adaptors in their order
  projector.safetensors   the base's projector, which the workflow without adaptors shows pictures through
  NAME/                   an adaptor (adaptors/files.py)
  manifest.json           files.py

There is no `config.json` in it: to a stock loader it is no model, and it must not look like one.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from distilvlm.recipe.models import ModelSpec

from .adaptors import TEXT, Host, files
from .compose import build
from .files import directory_whole, verify
from .fingerprint import fingerprint
from .save import Geometry
from .sources import HOST, host_facts
from .vlm import VLM

log = logging.getLogger(__name__)

FORMAT = 1
PROJECTOR = "projector.safetensors"


def save(
    vlm: VLM,
    base: ModelSpec,
    seed: int,
    directory: str | Path,
    geometry: Geometry,
    template: str = "chat",
    replace: bool = False,
) -> None:
    """Write the adaptors of a model, and what they stand on.

    Args:
        base, seed: what the model was built of; its directories are noted as absolute paths.
        geometry, template: how its pictures became canvases and its conversations text, for whoever uses it.
        replace: take the place of an existing directory; otherwise one is refused.
    """
    host = vlm.host
    if host is None or not vlm.adaptors:
        raise ValueError("this model has no adaptors: models.save.save writes it as the stock checkpoint that it is")
    if base.source is not None and (held := host_facts(base.source)) is not None:
        spec, seed = held["student"], held["seed"]
    else:
        spec = _located(base.model_dump(mode="json", by_alias=True, exclude_none=True))
    facts = {
        "format": FORMAT,
        "student": spec,
        "seed": seed,
        "base": fingerprint(vlm.model, dtype=torch.bfloat16),
        "adaptors": list(vlm.adaptors),
        "geometry": geometry,
        "template": template,
        "versions": {name: importlib.metadata.version(name) for name in ("distilvlm", "torch", "transformers")},
    }
    with directory_whole(directory, replace=replace) as partial:
        weights = vlm.model.model.multi_modal_projector.state_dict()
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, partial / PROJECTOR)
        for name in vlm.adaptors:
            files.save(host, name, partial / name, {"geometry": geometry, "template": template})
        (partial / HOST).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    log.info("saved %s: %s", directory, ", ".join(f"{name}, {host.bytes(name):,} bytes" for name in vlm.adaptors))


def load(
    directory: str | Path, dtype: torch.dtype = torch.float32, meta: bool = False, base: ModelSpec | None = None
) -> VLM:
    """The base with its adaptors, none of which is active.

    Args:
        dtype: what all weights are held in.
        meta: without weights, for a plan.
        base: the base where it is now, if it is not where it was.

    Raises:
        NotHere: the base is not where it was.
        ValueError: a damaged directory; another base than the adaptors were trained on.
    """
    directory = Path(directory)
    if problems := verify(directory, contents=False):
        raise ValueError("the adaptors are damaged:\n  " + "\n  ".join(problems))
    facts = host_facts(directory)
    assert facts is not None  # what the caller asked first
    vlm = build(base or ModelSpec.model_validate(facts["student"]), facts["seed"], dtype, meta)
    if not meta:
        vlm.model.model.multi_modal_projector.load_state_dict(load_file(directory / PROJECTOR))
        # Once for all adaptors, the tower and its projector with it; rounded, so that any dtype will do.
        if fingerprint(vlm.model, dtype=torch.bfloat16) != facts["base"]:
            raise ValueError(
                f"the base that {directory} names has other weights than its adaptors were trained on: put the right "
                "one back, or say where it is (models.hosted.load(..., base=ModelSpec(...)))"
            )
    host = Host.attach(vlm.model)
    for name in facts["adaptors"]:
        if meta:
            host.add(name, files.config_of(directory / name))
        else:
            files.load(host, directory / name, name, accept_other_weights=True)
    host.adaptors.to(dtype)
    return vlm.use(TEXT)


def _located(spec: Any) -> Any:
    """Directories that are here as absolute paths: a checkpoint is used from anywhere."""
    if isinstance(spec, dict):
        return {
            key: str(Path(value).absolute())
            if key in ("from", "tokenizer") and isinstance(value, str) and Path(value).is_dir()
            else _located(value)
            for key, value in spec.items()
        }
    return spec
