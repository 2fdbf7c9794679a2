"""An adaptor on disk: what it is, its weights, and which base it was made for. Never the base's own weights.

DIR/
  adaptor_config.json    form of the adaptor; base: class, sizes, hash
  adaptor.safetensors    layers.K.…, gates.K.…, embed_tokens.weight, norm.weight, lm_head.weight, projector.…
  manifest.json          ../files.py
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distilvlm.errors import readable

from ..files import directory_whole, verify
from ..fingerprint import fingerprint
from . import adaptor as making
from .adaptor import Adaptor
from .config import AdaptorConfig
from .host import Host

FORMAT = 1
CONFIG = "adaptor_config.json"
WEIGHTS = "adaptor.safetensors"


def save(
    host: Host, name: str, directory: str | Path, extra: Mapping[str, Any] | None = None, replace: bool = False
) -> None:
    """Write an adaptor. Weights are written in the dtypes they are held in; what is tied is written once.

    Args:
        extra: facts to keep beside it, given back by `facts_of`.
        replace: take the place of an existing directory; otherwise one is refused.
    """
    adaptor = host[name]
    facts = {
        "format": FORMAT,
        "name": name,
        "adaptor": adaptor.config.to_json(),
        "base": base_facts(host, adaptor.config.projector),
        "extra": dict(extra or {}),
        "versions": {
            package: importlib.metadata.version(package) for package in ("distilvlm", "torch", "transformers")
        },
    }
    state = {key: value.detach().cpu().contiguous() for key, value in adaptor.own_state().items()}
    with directory_whole(directory, replace=replace) as partial:
        save_file(state, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def load(host: Host, directory: str | Path, name: str | None = None, accept_other_weights: bool = False) -> Adaptor:
    """Add the adaptor of a directory to a host.

    Args:
        name: of the workflow; default: the name that it was saved under.
        accept_other_weights: of a base of the same form, e.g. a quantised one. The adaptor was not trained on it, and
            nobody has measured how well it does there.

    Raises:
        ValueError: a damaged directory; another base than the adaptor was made for, with what differs.
    """
    facts = facts_of(directory)
    if problems := verify(directory):
        raise ValueError("the adaptor is damaged:\n  " + "\n  ".join(problems))
    with readable(directory):
        config = AdaptorConfig.from_json(facts["adaptor"])
        _require_base(host, facts["base"], Path(directory), config.projector, accept_other_weights)
        state = load_file(Path(directory) / WEIGHTS)
        try:
            made = making.from_state(host.base, config, state)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error
        return host.put(name or facts["name"], made)


def facts_of(directory: str | Path) -> dict[str, Any]:
    """What `adaptor_config.json` says. Raises ValueError where there is none, or one of a later format."""
    file = Path(directory) / CONFIG
    if not file.is_file():
        raise ValueError(f"{directory} is no adaptor: it has no {CONFIG}")
    with readable(file):
        facts: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
    if facts.get("format") != FORMAT:
        raise ValueError(f"{file} has format {facts.get('format')}, this version reads {FORMAT}: update distilvlm")
    return facts


def config_of(directory: str | Path) -> AdaptorConfig:
    """The form of an adaptor that was saved."""
    return AdaptorConfig.from_json(facts_of(directory)["adaptor"])


def base_facts(host: Host, sees: bool) -> dict[str, Any]:
    """What an adaptor needs its base to be; `sees`: with the vision tower, of which its projector reads.

    Hashes are of weights rounded to bf16, so that it is the same base in whichever dtype it is held.
    """
    base = host.base
    facts: dict[str, Any] = {
        "layers": base.depth,
        "width": base.width,
        "vocabulary": base.vocabulary,
        "layer_class": type(base.layers[0]).__name__,
        "name_or_path": getattr(base.config, "_name_or_path", "") or host.model.name_or_path,
        "weights": _hash(base.decoder, base.embed_tokens, *(() if base.tied else (base.lm_head,))),
    }
    if sees:
        tower: Any = base.sees
        facts["vision"] = _hash(tower.vision_tower)
    return facts


def _require_base(host: Host, wanted: Mapping[str, Any], place: Path, sees: bool, other_weights: bool) -> None:
    base = host.base
    for key, here in (
        ("layers", base.depth),
        ("width", base.width),
        ("vocabulary", base.vocabulary),
        ("layer_class", type(base.layers[0]).__name__),
    ):
        if wanted[key] != here:
            raise ValueError(
                f"{place} was made for another base: its {key} is {wanted[key]}, this one's {here}. "
                f"It was trained on {wanted['name_or_path'] or 'a model without a name'}"
            )
    if other_weights:
        return
    found = base_facts(host, sees)
    for key, what in (("weights", "language model"), ("vision", "vision tower")):
        if key in wanted and found.get(key) != wanted[key]:
            raise ValueError(
                f"{place} was trained on another base: the {what} here is of the same form and has other weights. Load "
                f"{wanted['name_or_path'] or 'the one that it was trained on'}, or say accept_other_weights=True"
            )


def _hash(*modules: nn.Module) -> str:
    return fingerprint(nn.ModuleList(modules), dtype=torch.bfloat16)
