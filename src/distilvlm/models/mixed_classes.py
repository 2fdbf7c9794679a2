"""Stock vision towers with experts as classes of their own, so that nothing takes one for the other.

A tower with experts has a configuration of a class derived from the stock one, with a `mixture` section and a model
type that plain transformers does not know. Whatever builds, copies, saves or loads a model by its configuration then
does so with experts, also inside of a Llava; plain transformers refuses the checkpoint instead of leaving the experts
out with a warning. A stock class that is named outright would still only warn of another model type, so the weights of
a tower alone lie in a file of a name that it does not find.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.initialization import no_init_weights

PREFIX = "distilvlm_mixed_"
"""Before the stock model type."""

VARIANT = "with_experts"
"""In the name of the weights' file: model.with_experts.safetensors."""


def mixture_of(config: PretrainedConfig) -> dict[str, Any] | None:
    """The `mixture` section of a tower's configuration; None for a stock one."""
    return getattr(config, "mixture", None) if config.model_type.startswith(PREFIX) else None


def become_mixed(tower: PreTrainedModel, mixture: Mapping[str, Any]) -> None:
    """A stock tower that was given experts takes the class that says so; its configuration, too, wherever that is
    shared (a Llava's `vision_config` is its tower's)."""
    config_class, model_class = classes(type(tower.config))
    tower.config.__class__ = config_class
    setattr(tower.config, "mixture", dict(mixture))  # noqa: B010 - no field of the stock class
    tower.__class__ = model_class
    with torch.device("meta"), no_init_weights():
        model_class(copy.deepcopy(tower.config))  # transformers learns which outputs a class has when one is made


def stock_config(config: PretrainedConfig) -> PretrainedConfig:
    """What a mixed tower's configuration was before."""
    found: Any = copy.deepcopy(config)
    found.__class__ = type(config).__bases__[0]
    del found.mixture
    kind: Any = MODEL_MAPPING[type(found)]
    found.architectures = [kind.__name__]
    return found


def make_known(facts: Mapping[str, Any]) -> None:
    """Register the classes that a configuration file names, of a tower alone or of a Llava's, with transformers."""
    for section in (facts, facts.get("vision_config") or {}):
        kind = section.get("model_type") or ""
        if kind.startswith(PREFIX):
            classes(CONFIG_MAPPING[kind.removeprefix(PREFIX)])


@cache
def classes(stock: type[PretrainedConfig]) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """Configuration and model of a tower with experts, made and registered once per process."""
    stock_model: Any = MODEL_MAPPING[stock]
    config_class = type(
        f"Mixed{stock.__name__}",
        (stock,),
        {
            "__module__": __name__,
            "__annotations__": {"mixture": "dict | None"},
            "model_type": PREFIX + stock.model_type,
            "mixture": None,
        },
    )

    def __init__(self: Any, config: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807
        from .mixture import MixConfig, install  # which names this module for its towers' classes

        stock_model.__init__(self, config, *arguments, **options)
        install(self, MixConfig(**config.mixture))

    def save_pretrained(self: Any, *arguments: Any, **options: Any) -> None:
        stock_model.save_pretrained(self, *arguments, **{"variant": VARIANT, **options})

    def from_pretrained(cls: Any, *arguments: Any, **options: Any) -> Any:
        return stock_model.from_pretrained.__func__(cls, *arguments, **{"variant": VARIANT, **options})

    namespace = {
        "__module__": __name__,
        "__init__": __init__,
        "save_pretrained": save_pretrained,
        "from_pretrained": classmethod(from_pretrained),
        "config_class": config_class,
    }
    model_class = type(f"Mixed{stock_model.__name__}", (stock_model,), namespace)
    # A stock checkpoint's tensors may have older names than its class: transformers renames them by class or model type
    # when it loads one, and back when it saves it. Ours go by the same names.
    for known, ours in {stock.model_type: config_class.model_type, stock_model.__name__: model_class.__name__}.items():
        if (renamed := get_checkpoint_conversion_mapping(known)) is not None:
            register_checkpoint_conversion_mapping(ours, renamed)
    AutoConfig.register(config_class.model_type, config_class)
    AutoModel.register(config_class, model_class)
    return config_class, model_class
