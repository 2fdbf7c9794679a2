"""A tower whose mixtures have one expert each is a stock tower with other weights: W + s B A, c + s (B a + b).

With several experts it is none, because each token has its own choice.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.initialization import no_init_weights

from .mixed_classes import mixture_of, stock_config
from .mixture import Experts, Mixture


def mergeable(model: nn.Module) -> bool:
    """Whether a model is a tower, or a Llava with a tower, of which a stock one can be made."""
    config: Any = model.config
    section = mixture_of(getattr(config, "vision_config", config))
    return section is not None and section["experts"] == 1


def merged(tower: PreTrainedModel) -> PreTrainedModel:
    """A stock tower that computes the same, up to rounding. It shares the tensors that experts did not touch.

    Raises:
        ValueError: the tower has no experts, or several in a layer; a layer without bias has experts with biases.
    """
    if not mergeable(tower):
        raise ValueError(
            "only a tower with one expert in each layer merges into stock weights: of several, every token has its own"
        )
    with no_init_weights():
        stock = AutoModel.from_config(stock_config(tower.config), dtype=tower.dtype)
    stock.load_state_dict(merged_state(tower), strict=True, assign=True)
    return stock.train(tower.training)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model without its mixtures, which are in the weights of their linear layers now.

    Raises ValueError as `merged`.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, mixture in model.named_modules():
        if not isinstance(mixture, Mixture):
            continue
        feed_forward = name.rpartition(".")[0]
        for place, base in zip(mixture.experts, mixture.bases, strict=True):
            assert isinstance(place, Experts)
            own = f"{feed_forward}.{base}"
            weight, bias = _added(place, mixture.scale)
            state[f"{own}.weight"] = (state[f"{own}.weight"].double() + weight).to(state[f"{own}.weight"].dtype)
            if f"{own}.bias" in state:
                state[f"{own}.bias"] = (state[f"{own}.bias"].double() + bias).to(state[f"{own}.bias"].dtype)
            elif bias.any():
                raise ValueError(f"{own} has no bias that its expert's could be added to: mix with bias: false")
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
    return state


def _added(experts: Experts, scale: float) -> tuple[Tensor, Tensor]:
    """What the one expert adds to weight, [out, in], and bias, [out], in float64."""
    down, up = experts.down[0].detach().double(), experts.up[0].detach().double().T  # [rank, in], [out, rank]
    bias = up.new_zeros(len(up))
    if experts.down_bias is not None and experts.up_bias is not None:
        bias = up @ experts.down_bias[0].detach().double() + experts.up_bias[0].detach().double()
    return scale * (up @ down), scale * bias
