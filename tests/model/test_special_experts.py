"""Zero, copy and constant experts, by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from moe.config import ExpertsConfig, ModelConfig, RouterConfig, SpecialExpertsConfig
from moe.model.moe_layer import MoELayer

F64 = torch.float64


def layer_of(special: SpecialExpertsConfig, **router: object) -> MoELayer:
    """Two MLPs and the special experts; the router's logits are the first coordinates of its input."""
    total = 2 + special.total
    config = ModelConfig(
        d_model=6, experts=ExpertsConfig(n_experts=2, d_ff=5), special=special, router=RouterConfig(**router)
    )
    layer = MoELayer(config).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    layer.router.weight.data = torch.eye(6, dtype=F64)[:total]
    return layer


def token(*logits: float) -> Tensor:
    """One token with these logits; its other coordinates are 0.5."""
    return torch.tensor([[[*logits, *[0.5] * (6 - len(logits))]]], dtype=F64)


def test_a_copy_expert_returns_its_input_times_the_weight() -> None:
    """Logits log 1, log 1, log 2: the copy has probability 1/2, an MLP 1/4; unnormalised."""
    layer = layer_of(SpecialExpertsConfig(copy=1), normalise=False)
    x = token(0.0, -0.1, math.log(2.0))
    _, routing = layer(x)
    assert routing.selected.tolist() == [[2, 0]]

    y, _ = layer(x)

    by_hand = routing.weights[0, 0] * x[0, 0] + routing.weights[0, 1] * layer.experts.one(0, x[0])[0]
    torch.testing.assert_close(y[0, 0], by_hand)


def test_a_zero_expert_adds_nothing_and_leaves_its_share_of_the_sum_to_the_other() -> None:
    """MoE++: with weights normalised, the MLP beside a zero expert has weight 1."""
    layer = layer_of(SpecialExpertsConfig(zero=1))
    x = token(1.0, -1.0, 5.0)

    y, routing = layer(x)

    assert routing.selected.tolist() == [[2, 0]]
    assert routing.weights.tolist() == [[0.0, 1.0]]
    torch.testing.assert_close(y[0], layer.experts.one(0, x[0]))


def test_a_token_of_zero_experts_alone_has_output_zero() -> None:
    layer = layer_of(SpecialExpertsConfig(zero=2))

    y, routing = layer(token(-1.0, -1.0, 5.0, 4.0))

    assert y.eq(0).all()
    assert routing.counts().tolist() == [0, 0, 1, 1]


def test_a_constant_expert_mixes_its_input_with_a_learned_vector() -> None:
    layer = layer_of(SpecialExpertsConfig(constant=2), top_k=1, normalise=False)
    x = token(0.0, 0.0, 0.0, 3.0)

    y, routing = layer(x)

    assert routing.selected.item() == 3
    own, constant = (float(row @ x[0, 0]) for row in layer.special.mixing[1])
    share = math.exp(own) / (math.exp(own) + math.exp(constant))
    by_hand = routing.weights[0, 0] * (share * x[0, 0] + (1 - share) * layer.special.constant[1])
    torch.testing.assert_close(y[0, 0], by_hand)


def test_the_order_is_mlps_zero_copy_constant() -> None:
    """Of experts 2, 3 and 4, the first gives 0, the second its input."""
    layer = layer_of(SpecialExpertsConfig(zero=1, copy=1, constant=1), top_k=1, normalise=False)

    nothing, _ = layer(token(0.0, 0.0, 9.0, 0.0, 0.0))
    same, routing = layer(token(0.0, 0.0, 0.0, 9.0, 0.0))

    assert nothing.eq(0).all()
    torch.testing.assert_close(same, routing.weights.item() * token(0.0, 0.0, 0.0, 9.0, 0.0))


@pytest.mark.parametrize("backend", ["reference", "grouped", "segments"])
def test_back_ends_compute_the_mlps_alone(backend: str) -> None:
    config = ModelConfig(
        d_model=16,
        experts=ExpertsConfig(n_experts=4, d_ff=8, backend=backend),
        special=SpecialExpertsConfig(zero=1, copy=2, constant=1),
        router=RouterConfig(top_k=3),
    )
    layer = MoELayer(config)
    for index, parameter in enumerate(layer.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    x = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(9))

    y, routing = layer(x)

    by_hand = torch.zeros(40, 16)
    flat = x.view(40, 16)
    for t in range(40):
        for expert, weight in zip(routing.selected[t].tolist(), routing.weights[t], strict=True):
            if expert < 4:
                output = layer.experts.one(expert, flat[t : t + 1])[0]
            elif expert == 4:
                output = torch.zeros(16)
            elif expert < 7:
                output = flat[t]
            else:
                share = (layer.special.mixing[0] @ flat[t]).softmax(-1)
                output = share[0] * flat[t] + share[1] * layer.special.constant[0]
            by_hand[t] += weight * output
    torch.testing.assert_close(y.view(40, 16), by_hand, atol=1e-4, rtol=1e-4)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
