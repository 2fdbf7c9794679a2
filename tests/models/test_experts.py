"""Experts multiply in autocast's dtype, and what they give is what the stock ones give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlavaForConditionalGeneration
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from distilvlm.models import experts, routing
from distilvlm.models.save import load, save
from distilvlm.models.upcycling import upcycle

TOKENS, WIDTH, EXPERTS, TOP_K = 23, 24, 4, 2
Forward = Callable[[Qwen2MoeExperts, Tensor, Tensor, Tensor], Tensor]

UNDER_AUTOCAST: dict[str, Forward] = {
    "in turn": lambda *given: experts.in_turn(*given, torch.bfloat16),
    "at once": lambda *given: experts.at_once(*given, torch.bfloat16),
}


@pytest.fixture
def block() -> Qwen2MoeExperts:
    config = AutoConfig.for_model(
        "qwen2_moe", hidden_size=WIDTH, moe_intermediate_size=32, num_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = experts.IMPLEMENTATION
    made = Qwen2MoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return made


def inputs(unused: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts and weights; nobody chooses the expert `unused`."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    if unused is not None:
        logits[:, unused] = -torch.inf
    weights, chosen = logits.softmax(-1).topk(TOP_K)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    return hidden.requires_grad_(), chosen, weights.detach().requires_grad_()


def results(run: Callable[..., Tensor], block: Qwen2MoeExperts, given: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """What comes out, and the gradients of all that goes in, all of it in fp32."""
    out = run(*given)
    assert out.dtype == given[0].dtype == torch.float32
    wanted = [given[0], given[2], *block.parameters()]
    return [out, *torch.autograd.grad((out * torch.arange(WIDTH).sin()).sum(), wanted)]


@pytest.mark.parametrize("unused", [None, 0, 3])
@pytest.mark.parametrize("name", list(UNDER_AUTOCAST))
def test_under_autocast_values_and_gradients_are_the_stock_ones_but_for_rounding(
    block: Qwen2MoeExperts, name: str, unused: int | None
) -> None:
    given = inputs(unused)

    def ours(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return UNDER_AUTOCAST[name](block, *given)

    block.config._experts_implementation = "eager"
    exact = results(block, block, given)
    block.config._experts_implementation = experts.IMPLEMENTATION
    for theirs, our in zip(exact, results(ours, block, given), strict=True):
        torch.testing.assert_close(our, theirs, rtol=0, atol=0.02 * float(theirs.detach().abs().max()))
    if unused is not None:
        assert float(results(ours, block, given)[3][unused].abs().max()) == 0


def test_without_autocast_nothing_differs_from_the_stock_experts(block: Qwen2MoeExperts) -> None:
    given = inputs()
    ours = results(block, block, given)
    block.config._experts_implementation = "grouped_mm"
    assert all(torch.equal(our, theirs) for our, theirs in zip(ours, results(block, block, given), strict=True))


def products(run: Callable[[], object]) -> set[torch.dtype]:
    """In which dtypes matrices are multiplied."""
    seen: set[torch.dtype] = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten._grouped_mm, torch.ops.aten.bmm):
                seen.add(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Watch():
        run()
    return seen


def test_all_products_are_in_the_dtype_of_autocast(block: Qwen2MoeExperts) -> None:
    """The stock experts multiply in fp32 there: the reason that ours exist. Should this change, ours may go."""
    given = inputs()

    def train() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = block(*given)
        out.sum().backward()

    assert products(train) == {torch.bfloat16}
    block.config._experts_implementation = "grouped_mm"
    assert products(train) == {torch.float32}


def test_work_is_that_of_the_experts_that_serve(block: Qwen2MoeExperts) -> None:
    """Two of four experts a token: half of what all four would take."""
    given = inputs()
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        block(*given)
    assert counter.get_total_flops() == 2 * TOKENS * TOP_K * 3 * WIDTH * 32


def test_a_trained_model_dispatches_by_ours_and_its_checkpoint_does_not_mention_it(make, tmp_path) -> None:
    vlm = upcycle(make("clip", "qwen2-tied"))
    text = vlm.model.config.get_text_config()
    assert text._experts_implementation == experts.IMPLEMENTATION
    save(vlm, tmp_path / "sparse", "square")
    assert experts.IMPLEMENTATION not in (tmp_path / "sparse" / "config.json").read_text()
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "sparse")
    assert stock.config.get_text_config()._experts_implementation == "grouped_mm"
    again = load(tmp_path / "sparse")
    routing.install(again.model)
    assert again.model.config.get_text_config()._experts_implementation == experts.IMPLEMENTATION
