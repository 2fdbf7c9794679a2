"""Where the parts of a model come from: a directory, a hub id, or an architecture to be filled with random weights."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from distilvlm.errors import readable

from .architectures import published
from .mixed_classes import make_known

log = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")

HOST = "host.json"
"""What a directory of adaptors (hosted.py) says of itself."""

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class NotHere(FileNotFoundError):  # noqa: N818 - a plan shows it as a state, not as an error
    """A local directory that a model should come from is not there (yet); a plan may show it as such."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        message = f"'{path}' is not here"
        if run := _run_of(self.path):
            message += f". It looks like another run's result: make that first (distilvlm run RECIPE --dir {run})"
        super().__init__(message)


def is_local(source: str) -> bool:
    """Is `source` a directory here, rather than a hub id?

    Raises NotHere if it reads like a path, but nothing is there.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return True
    hub_like = re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", source) and not source.startswith(".")
    beside_others = path.parent != Path() and path.parent.is_dir()  # 'runs/student' where there is 'runs/'
    if not hub_like or beside_others or _run_of(path) is not None:
        raise NotHere(source)
    return False


def host_facts(source: str | Path) -> dict[str, Any] | None:
    """What a directory of adaptors says of itself; None for anything else."""
    file = Path(source).expanduser() / HOST
    if not file.is_file():
        return None
    with readable(file):
        return dict(json.loads(file.read_text(encoding="utf-8")))


def _require_stock(source: str) -> None:
    if host_facts(source) is not None:
        raise ValueError(
            f"{source} holds adaptors and no model of its own, and a stock checkpoint is wanted here. With the base "
            "that its host.json names it can be a student's or teacher's 'from', or be asked (distilvlm evaluate)"
        )


def refuse_pickled(directory: str | Path) -> None:
    """Weights are read from safetensors only; unpickling a file can run any program.

    Raises ValueError naming the pickled file where a directory has no safetensors.
    """
    names = sorted(path.name for path in Path(directory).iterdir())
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{directory} holds its weights as a pickled file, {pickled[0]}, which is never read: "
            "convert them to safetensors"
        )


def config_of(source: str, offline_first: bool) -> PretrainedConfig:
    """A checkpoint's configuration.

    `offline_first` (a plan): what is cached, then the published architectures that we know, and only then the hub.
    """
    if is_local(source):
        _require_stock(source)
        return _had(lambda: _config(source), source)
    if offline_first:
        try:
            return _config(source, local_files_only=True)
        except OSError:
            if (known := published(source)) is not None:
                return known
    return _had(lambda: _config(source), source)


def tokenizer_of(source: str, plan: bool) -> PreTrainedTokenizerBase | None:
    """A tokenizer; for a plan, None where it is not at hand."""
    if plan:
        try:
            is_local(source)
            return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError):
            log.info("the tokenizer of %s is not at hand: planning without it", source)
            return None
    if is_local(source):
        _require_stock(source)
    return _had(lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=False), source)


def config_from(facts: dict[str, Any], field: str) -> PretrainedConfig:
    """The configuration that a recipe states, `model_type` and what differs from its defaults.

    Raises ValueError for an unknown model type or key, naming the recipe's field and the nearest known key.
    """
    rest = dict(facts)
    model_type = rest.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ValueError(f"{field} needs 'model_type' (llama, qwen2, dinov2, ...)")
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise ValueError(f"{field}.model_type '{model_type}' is unknown to transformers") from error
    known = {name for name in [*vars(default), *default.attribute_map] if not name.startswith("_")}
    for key in rest:
        if key not in known and not hasattr(default, key):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"{field}.{key} is unknown to '{model_type}'{hint}")
    return AutoConfig.for_model(model_type, **rest)


def pretrained(load: Callable[..., Any], source: str, dtype: torch.dtype, ignored: tuple[str, ...] = ()) -> Any:
    """Load with a class's `from_pretrained`, strictly.

    Args:
        load: `SomeClass.from_pretrained`.
        ignored: beginnings of the checkpoint's keys that are another tower's, and not wanted.

    Raises:
        ValueError: pickled weights; a key that is missing, left over or of another shape.
    """
    if is_local(source):
        refuse_pickled(Path(source).expanduser())
    model, report = _had(
        lambda: load(source, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False),
        source,
    )
    # Older checkpoints carry what the model computes for itself (`rotary_emb.inv_freq`, `embeddings.position_ids`).
    computed = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    left_over = [
        key
        for key in report["unexpected_keys"]
        if not key.startswith(ignored) and key.rpartition(".")[2] not in computed
    ]
    for what, keys in (
        ("lacks", sorted(report["missing_keys"])),
        ("has unknown", sorted(left_over)),
        ("has another shape for", sorted(str(key) for key in report["mismatched_keys"])),
    ):
        if keys:
            raise ValueError(f"checkpoint {source} {what} {len(keys)} tensors of {type(model).__name__}: {keys[:3]}")
    return model


def require_tensors(told: str, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], names: str) -> None:
    """Raises ValueError where `state` lacks a tensor of `wanted`, has one more, or one of another shape.

    Args:
        told: whose tensors they are; `names`: what their names are, or for what.
    """
    other = {name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape}
    for what, found in (
        ("lacks", wanted.keys() - state.keys()),
        ("has unknown", state.keys() - wanted.keys()),
        ("has another shape for", other),
    ):
        if found:
            raise ValueError(f"{told} {what} {len(found)} tensors ({names}): {sorted(found)[:3]}")


@contextmanager
def drawn(seed: int, part: str) -> Iterator[None]:
    """Inside, weights are drawn by a generator of this part's own; outside, the global generator is as it was.

    Parts are independent of each other: another projector leaves a random tower's bits as they are.
    """
    key = hashlib.sha256(f"{seed}:{part}".encode()).digest()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed, which would also seed every accelerator.
        torch.default_generator.manual_seed(int.from_bytes(key[:7], "big"))
        yield


def _config(source: str, **options: Any) -> PretrainedConfig:
    facts, _ = PretrainedConfig.get_config_dict(source, **options)
    make_known(facts)  # a tower with experts, or a Llava with one
    return AutoConfig.from_pretrained(source, trust_remote_code=False, **options)


def _had(load: Callable[[], Loaded], source: str) -> Loaded:
    try:
        if is_local(source):
            with readable(source):
                return load()
        return load()
    except OSError as error:
        if isinstance(error, NotHere) or is_local(source):
            raise
        raise OSError(
            f"'{source}' is neither a directory here nor to be had from the hub (is there a network, and does the "
            f"repository hold safetensors?): {error}"
        ) from error


def _run_of(path: Path) -> Path | None:
    """The run directory whose result `path` seems to be."""
    if path.name == "model" and path.parent.name:
        return path.parent
    return path if path.parent.name == "runs" else None
