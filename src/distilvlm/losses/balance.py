"""Load balance of sparse experts: LLaVA-MoD's auxiliary loss (DeepSpeed's top-2 gate, specification §1.4).

    l = E Σ_e m_e c_e,   m_e the mean probability of expert e, c_e the share of tokens whose first choice is e

It is 1 where probabilities are uniform. c is discrete, so the gradient flows through m alone. Only first choices count,
whatever the number of experts that serve a token, and padding does not.
"""

# torch's stubs are partial; this room stays strict about its own code.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def balance(router_probabilities: Tensor, mask: Tensor) -> Tensor:
    """The balance loss of one layer over all tokens of `mask` together: a scalar with gradient.

    router_probabilities: [tokens, experts] softmax over all experts; mask: [tokens], true for real tokens.

    Raises `ValueError` where the two differ in tokens, or no token is real.
    """
    if router_probabilities.shape[0] != mask.shape[0]:
        raise ValueError(f"{router_probabilities.shape[0]} tokens have probabilities, but the mask has {mask.shape[0]}")
    if not bool(mask.any()):
        raise ValueError("the balance of no tokens is not defined: the mask is empty")
    return balance_of_samples(router_probabilities, mask.long() - 1, 1).squeeze(0)


def balance_of_samples(router_probabilities: Tensor, owners: Tensor, samples: int) -> Tensor:
    """The balance loss of one layer for each sample, [samples]; 0 for a sample without tokens.

    router_probabilities: [tokens, experts]; owners: [tokens] the sample of each, -1 for padding.
    """
    experts = router_probabilities.shape[-1]
    # Sums over samples are a product: in the same order each time, where adding by index is not on a GPU.
    own = (owners == torch.arange(samples, device=owners.device).unsqueeze(1)).to(router_probabilities.dtype)
    tokens = own.sum(1, keepdim=True).clamp_min(1)  # [samples, 1]
    first = one_hot(router_probabilities.detach().argmax(-1), experts).to(own.dtype)
    with torch.autocast(own.device.type, enabled=False):
        probability = own @ router_probabilities / tokens  # [samples, experts]
        share = own @ first / tokens  # [samples, experts]
    return experts * (probability * share).sum(-1)
