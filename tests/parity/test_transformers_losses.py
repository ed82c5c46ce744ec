"""Our auxiliary losses against those of transformers (5.x), from the same routing: value and gradient to 1e-5."""

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as pooled_loss
from transformers.models.switch_transformers.modeling_switch_transformers import (
    load_balancing_loss_func as switch_loss,
)
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from moe.config import RouterConfig
from moe.model.balance import load_balancing_loss, z_loss
from moe.model.router import Router
from moe.model.routing import Routing

BATCH, SEQUENCE, D_MODEL, N_EXPERTS = 3, 20, 24, 8


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def routers(top_k: int, seed: int = 0) -> tuple[MixtralTopKRouter, Router]:
    """Theirs and ours, one weight."""
    theirs = MixtralTopKRouter(
        MixtralConfig(hidden_size=D_MODEL, num_local_experts=N_EXPERTS, num_experts_per_tok=top_k)
    )
    ours = Router(RouterConfig(top_k=top_k, normalise=top_k > 1), D_MODEL, N_EXPERTS)
    weight = 0.5 * draw(N_EXPERTS, D_MODEL, seed=seed)
    for router in (theirs, ours):
        router.load_state_dict({"weight": weight})
    return theirs, ours


def assert_same(ours: Tensor, theirs: Tensor, our_router: Router, their_router: MixtralTopKRouter) -> None:
    """The two values, and what they send back to the two routers."""
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert their_router.weight.grad is not None
    assert their_router.weight.grad.abs().max() > 0.01
    torch.testing.assert_close(our_router.weight.grad, their_router.weight.grad, atol=1e-5, rtol=1e-5)


def collapsed(expert: int, n_experts: int) -> Routing:
    """Four tokens that all go to one expert, with a probability that rounds to 1."""
    logits = torch.zeros(4, n_experts).index_fill_(1, torch.tensor([expert]), 100.0)
    scores = logits.softmax(dim=-1)
    return Routing(logits, scores, selected=torch.full((4, 1), expert), weights=torch.ones(4, 1))


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("padding", [False, True])
def test_for_one_layer_the_loss_of_transformers_is_ours_times_k(top_k: int, padding: bool) -> None:
    their_router, our_router = routers(top_k)
    x = draw(BATCH * SEQUENCE, D_MODEL, seed=1)
    mask = torch.arange(SEQUENCE) < torch.tensor([[20], [13], [4]]) if padding else None
    logits, _, _ = their_router(x)
    theirs = pooled_loss((logits,), N_EXPERTS, top_k, mask)
    routing = our_router(x, None if mask is None else mask.flatten())

    assert_same(top_k * load_balancing_loss(routing), theirs, our_router, their_router)


def test_for_several_layers_transformers_pools_what_we_add_up() -> None:
    """Its loss is k times ours of one layer that saw the tokens of all; the mean of the layers' losses is another."""
    top_k = 2
    pairs = [routers(top_k, seed) for seed in (0, 1, 2)]
    x = draw(BATCH * SEQUENCE, D_MODEL, seed=1)
    routings = [ours(x) for _, ours in pairs]
    pooled = Routing(
        logits=torch.cat([layer.logits for layer in routings]),
        scores=torch.cat([layer.scores for layer in routings]),
        selected=torch.cat([layer.selected for layer in routings]),
        weights=torch.cat([layer.weights for layer in routings]),
    )

    theirs = pooled_loss(tuple(theirs(x)[0] for theirs, _ in pairs), N_EXPERTS, top_k)

    torch.testing.assert_close(top_k * load_balancing_loss(pooled), theirs, atol=1e-5, rtol=1e-5)
    mean = torch.stack([load_balancing_loss(layer) for layer in routings]).mean()
    assert (top_k * mean - theirs).abs() > 0.05


def test_layers_that_collapse_on_different_experts_look_balanced_to_transformers() -> None:
    """Eight layers, each with one expert alive of eight: 1 if pooled, and E / k = 8 in each layer."""
    layers = [collapsed(expert, n_experts=8) for expert in range(8)]

    theirs = pooled_loss(tuple(layer.logits for layer in layers), 8, 1)
    ours = [load_balancing_loss(layer) for layer in layers]

    assert theirs.item() == pytest.approx(1.0)
    assert torch.stack(ours).tolist() == pytest.approx([8.0] * 8)


def test_the_loss_of_switch_is_ours_over_each_sequence() -> None:
    their_router, our_router = routers(top_k=1)
    x = draw(BATCH * SEQUENCE, D_MODEL, seed=1)
    probabilities = their_router(x)[0].softmax(dim=-1).view(BATCH, SEQUENCE, N_EXPERTS)
    theirs = switch_loss(probabilities, probabilities.argmax(dim=-1))
    routing = our_router(x, n_sequences=BATCH)

    assert_same(load_balancing_loss(routing, per_sequence=True), theirs, our_router, their_router)
    assert (load_balancing_loss(routing) - theirs).abs() > 0.01, "the scope makes a difference here"


def test_the_z_loss_of_switch_is_ours() -> None:
    their_router, our_router = routers(top_k=2)
    x = draw(BATCH * SEQUENCE, D_MODEL, seed=1)
    theirs = router_z_loss_func(their_router(x)[0].view(BATCH, SEQUENCE, N_EXPERTS))

    assert_same(z_loss(our_router(x)), theirs, our_router, their_router)
