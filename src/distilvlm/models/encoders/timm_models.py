"""Encoders of timm: ViTs, EVA, ConvNeXt, TinyViT, ... (`pip install 'distilvlm[timm]'`).

Read from timm's own form of a directory or hub repository: `config.json` with `architecture` and `pretrained_cfg`,
`model.safetensors` beside it. Classifiers are left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..sources import drawn
from .interface import EncoderTeacher, Seen, View, flattened

HEADS = ("head", "head_dist", "head_drop", "fc_norm", "fc", "classifier", "attn_pool")
"""Modules that stand behind the features."""


class TimmEncoder(EncoderTeacher):
    """Feature maps of timm, through `forward_intermediates`.

    Args:
        layer: index of a ViT's block or of a CNN's stage; None reads a ViT's last block without the closing norm (as
            the method's EVA), and of a CNN what stands before pooling.

    Raises:
        ValueError: the layer is not there.
    """

    def __init__(self, name: str, model: nn.Module, view: View, layer: int | None, probe: nn.Module) -> None:
        """`probe` is the same model on the meta device, to learn the shapes from."""
        is_vit = hasattr(model, "num_prefix_tokens")
        self._prefix = is_vit and bool(model.num_prefix_tokens)
        self._has_cls = self._prefix and getattr(model, "cls_token", None) is not None
        self._layer = -1 if layer is None and is_vit else layer
        try:
            with torch.no_grad():
                tokens, grid, _ = self._maps(probe, torch.zeros(1, 3, view.size, view.size, device="meta"))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise ValueError(
                f"encoder '{name}' ({type(model).__name__}) gives no feature map for pictures of {view.size} px at "
                f"layer {self._layer}: {error}"
            ) from error
        super().__init__(name, model, view, tokens.shape[-1], grid, {"layer": self._layer})

    def _look(self, pixels: Tensor, importance: bool) -> Seen:
        return Seen(*self._maps(self.model, pixels))

    def _maps(self, model: Any, pixels: Tensor) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """Tokens, grid and CLS."""
        if self._layer is None:
            maps = model.forward_features(pixels)
            if getattr(model, "output_fmt", "NCHW") == "NHWC":
                maps = maps.permute(0, 3, 1, 2)
            return *flattened(maps), None
        options: dict[str, Any] = {"return_prefix_tokens": True} if self._prefix else {}
        options |= {"norm": False, "stop_early": True, "output_fmt": "NCHW", "intermediates_only": True}
        found = model.forward_intermediates(pixels, indices=[self._layer], **options)[0]
        if not self._prefix:
            return *flattened(found), None
        maps, prefix = found
        return *flattened(maps), prefix[:, 0] if self._has_cls else None


def known_settings(source: str) -> dict[str, Any] | None:
    """What a hub repository of timm's has in its `config.json`, as far as a plan needs it and timm itself knows.

    Raises ImportError where timm is not installed.
    """
    name = source.removeprefix("timm/")
    known = timm().models.get_pretrained_cfg(name)
    if known is None:
        return None
    pictures = {"input_size": known.input_size, "mean": known.mean, "std": known.std}
    return {"architecture": name.partition(".")[0], "pretrained_cfg": pictures}


def load_timm(
    directory: Path, size: int | None, dtype: torch.dtype, meta: bool, settings: dict[str, Any] | None = None
) -> tuple[nn.Module, nn.Module, View]:
    """A model in timm's form, a copy of it on the meta device, and how it sees.

    Args:
        settings: instead of the directory's, which is then not looked at if `meta`.

    Raises:
        ValueError: pickled weights, or weights that do not fit the architecture to the last tensor.
        ImportError: timm is not installed.
    """
    if settings is None:
        settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert settings is not None
    pictures = settings["pretrained_cfg"]
    own = pictures["input_size"][-1]
    view = View(size or own, tuple(pictures["mean"]), tuple(pictures["std"]))
    architecture, options = settings["architecture"], dict(settings.get("model_args") or {})
    with torch.device("meta"):
        probe = _featured(architecture, options)
        if view.size != own and hasattr(probe, "dynamic_img_size"):
            options["dynamic_img_size"] = True  # a ViT that interpolates its position embeddings
            probe = _featured(architecture, options)
    if meta:
        return probe, probe, view
    with drawn(0, architecture):
        model = _featured(architecture, options)
    load_features(model, load_file(directory / "model.safetensors"), str(directory))
    return model.to(dtype), probe, view


def load_features(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Give a model without its classifier these weights; those of a classifier are left out.

    Raises ValueError where one is missing, of another shape or one too many.
    """
    try:
        model.load_state_dict({name: value for name, value in weights.items() if name.split(".")[0] not in HEADS})
    except RuntimeError as error:
        raise ValueError(f"the weights of {source} do not fit {type(model).__name__}: {error}") from error


def _featured(architecture: str, options: dict[str, Any]) -> nn.Module:
    """A model of random weights without what stands behind its features."""
    model: nn.Module = timm().create_model(architecture, pretrained=False, **options)
    for name in HEADS:
        if isinstance(getattr(model, name, None), nn.Module):
            setattr(model, name, nn.Identity())
    return model.eval()


def timm() -> Any:
    """The package.

    Raises ImportError with the way to get it.
    """
    if not is_there():
        raise ImportError("this encoder needs timm: pip install 'distilvlm[timm]'")
    if "timm" in sys.modules:
        return sys.modules["timm"]
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # not there, or built for another torch
        with _without_torchvision():
            return importlib.import_module("timm")
    return importlib.import_module("timm")


def is_there() -> bool:
    """Whether timm is installed."""
    return importlib.util.find_spec("timm") is not None


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """Let timm be imported where torchvision cannot be.

    It is named all over timm's data sets and augmentations, at whose import its classes are subclassed, but not in the
    models. While timm is imported, every name of torchvision is an empty class.
    """
    known = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torchvision"}
    for name in known:
        del sys.modules[name]
    sys.modules.update({name: _Nothing(name) for name in _NAMED_BY_TIMM})
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules.update(known)


_NAMED_BY_TIMM = [
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
]


class _Empty(type):
    """A class of empty classes: any attribute of one is another, as of an enumeration."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {})


class _Nothing(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or _Empty(name, (), {})
