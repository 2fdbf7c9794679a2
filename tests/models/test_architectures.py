"""Published architectures, as a plan without a network has them."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
)

from distilvlm.models import architectures, parts
from distilvlm.models.compose import build
from distilvlm.recipe.models import ModelSpec

PARAMETERS = {
    "Qwen/Qwen1.5-0.5B": 463_987_712,
    "Qwen/Qwen1.5-1.8B": 1_836_828_672,
    "Qwen/Qwen1.5-4B": 3_950_369_280,
    "Qwen/Qwen1.5-7B": 7_721_324_544,
    "Qwen/Qwen2-0.5B": 494_032_768,
    "Qwen/Qwen2-1.5B": 1_543_714_304,
    "Qwen/Qwen2-7B": 7_615_616_512,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "lmsys/vicuna-7b-v1.5": 6_738_415_616,
    "google/siglip-so400m-patch14-384": 428_225_600,
    "openai/clip-vit-large-patch14-336": 303_507_456,
    "facebook/dinov2-small": 22_056_576,
    "facebook/dinov2-base": 86_580_480,
    "facebook/dinov2-large": 304_368_640,
}


@pytest.mark.parametrize("source", PARAMETERS)
def test_published_architectures_have_the_published_number_of_parameters(source):
    config = architectures.published(source)
    kind = AutoModelForCausalLM if config.model_type in ("llama", "qwen2") else AutoModel
    with torch.device("meta"):
        assert sum(p.numel() for p in kind.from_config(config).parameters()) == PARAMETERS[source]


def test_the_published_pair_is_planned_without_a_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a plan of published models asked the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    which = ModelSpec.model_validate(
        {
            "vision": {"from": "google/siglip-so400m-patch14-384", "select": "default"},
            "language": {"from": "Qwen/Qwen2.5-0.5B"},
        }
    )
    plan = build(which, 0, meta=True)
    assert plan.layout.placeholders == 728 and all(plan.layout.visual)
    assert plan.layout.mean == (0.5, 0.5, 0.5)
    rows = {row.name: row.parameters for row in parts.summary(plan.model)}
    assert sum(n for name, n in rows.items() if name.startswith("language")) == 494_032_768
    assert rows["projector"] == 1152 * 896 + 896 + 896 * 896 + 896
