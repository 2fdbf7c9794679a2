"""Messages about models that no other test meets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from distilvlm.models.adaptors import AdaptorConfig, Host
from distilvlm.models.fingerprint import fingerprint
from distilvlm.models.language import cut, head_of
from distilvlm.models.shards import FeatureError, ShardStore
from distilvlm.models.sources import config_from
from distilvlm.models.towers import blocks_of, side_of
from distilvlm.recipe.schema import OptimSpec
from distilvlm.train.optim import adamw
from tests import adaptor_hosts


def test_a_configuration_with_a_key_of_another_model() -> None:
    with pytest.raises(ValueError, match=r"config\.hiden_size is unknown to 'llama'; did you mean 'hidden_size'"):
        config_from({"model_type": "llama", "hiden_size": 3}, "language.config")


def test_towers_that_are_not_square_or_in_no_list() -> None:
    config: Any = SimpleNamespace(model_type="clip", image_size=[3, 4])
    with pytest.raises(ValueError, match=r"'clip' has image_size \[3, 4\]: only squares are supported"):
        side_of(config, "image_size")
    tower = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=4)
    )
    tower.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="CLIPVisionModel has no list of 7 blocks: its parts cannot be told apart"):
        blocks_of(tower)


def test_language_models_that_cannot_be_cut_or_have_no_head() -> None:
    model = LlamaForCausalLM(LlamaConfig(**adaptor_hosts.SIZE))
    model.model.layers = model.model.layers[:2]
    with pytest.raises(ValueError, match="LlamaForCausalLM has no plain list of 4 layers: it cannot be cut"):
        cut(model, [0])
    model.lm_head = nn.Identity()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no linear output head, which a stock Llava needs"):
        head_of(model)


def test_adaptors_stand_beside_causal_language_models() -> None:
    model = adaptor_hosts.model()
    with pytest.raises(ValueError, match="unknown parts head: decoder, layers and norm can be named"):
        Host.attach(model, parts={"head": "lm_head"})
    with pytest.raises(ValueError, match="LlamaModel has no input embedding or no output head: it is no causal LM"):
        Host.attach(LlamaModel(LlamaConfig(**adaptor_hosts.SIZE)), parts={"decoder": ""})
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(ValueError, match="the layers of LlamaForCausalLM are a Sequential, not a plain ModuleList"):
        Host.attach(model)
    with pytest.raises(ValueError, match="an adaptor's configuration lacks gate, "):
        AdaptorConfig.from_json({"positions": [1], "structure": "c"})


def test_a_hash_leaves_out_only_what_is_there() -> None:
    with pytest.raises(ValueError, match="no weight of this model is named gone"):
        fingerprint(nn.Linear(2, 2), exclude=["gone"])


def test_a_store_of_another_maker(tmp_path: Any) -> None:
    ShardStore(tmp_path, {"size": 224})
    with pytest.raises(FeatureError, match="keeps what was made otherwise:\n  size: 224 there, 336 now\nGive another"):
        ShardStore(tmp_path, {"size": 336})


def test_rates_of_parts_that_do_not_train() -> None:
    spec = OptimSpec.model_validate({"lr": 1, "batch": 1, "updates": 1, "rates": {"vision": 1}})
    with pytest.raises(ValueError, match=r"optim.rates names \['vision'\], but this stage trains \['projector'\]"):
        adamw({"projector": {"weight": nn.Parameter(torch.zeros(2))}}, spec)
