"""Router, experts and shared experts put together: their sum, and what it must equal."""

import pytest
import torch
from torch import Tensor, nn

from moe.config import CapacityConfig, ExpertsConfig, FeedForwardConfig, ModelConfig, RouterConfig, SharedExpertsConfig
from moe.model.experts import Experts
from moe.model.feed_forward import FeedForward
from moe.model.moe_layer import MoELayer


def layer_of(**changes: object) -> MoELayer:
    """A float64 layer of width 12 with four experts of width 20, its weights standard normals."""
    settings: dict[str, object] = {"d_model": 12, "experts": ExpertsConfig(n_experts=4, d_ff=20)}
    layer = MoELayer(ModelConfig(**(settings | changes))).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    return layer


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ as dense layers


def copy_dense_into_experts(dense: FeedForward, experts: Experts) -> None:
    """Make every expert equal to ``dense``."""
    with torch.no_grad():
        experts.w_in.copy_(dense.w_in.weight.expand_as(experts.w_in))
        experts.w_out.copy_(dense.w_out.weight.expand_as(experts.w_out))
        if experts.b_in is not None and experts.b_out is not None:
            experts.b_in.copy_(dense.w_in.bias.expand_as(experts.b_in))
            experts.b_out.copy_(dense.w_out.bias.expand_as(experts.b_out))


@pytest.mark.parametrize("backend", ["reference", "segments"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("n_experts", "top_k", "normalise"), [(4, 2, True), (4, 4, True), (4, 4, False), (1, 1, False)]
)
def test_identical_experts_are_a_dense_layer(
    backend: str, activation: str, bias: bool, n_experts: int, top_k: int, normalise: bool
) -> None:
    """Wherever the weights of a token add up to one: normalised, or all experts, or the only one."""
    feed_forward = FeedForwardConfig(activation=activation, bias=bias)
    layer = layer_of(
        experts=ExpertsConfig(n_experts=n_experts, d_ff=20, backend=backend),
        feed_forward=feed_forward,
        router=RouterConfig(top_k=top_k, normalise=normalise),
    )
    dense = FeedForward(feed_forward, 12, 20).double()
    copy_dense_into_experts(dense, layer.experts)
    x, same_x = draw(30).requires_grad_(), draw(30).requires_grad_()

    y, _ = layer(x[None])
    y.square().sum().backward()
    expected = dense(same_x)
    expected.square().sum().backward()

    torch.testing.assert_close(y[0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, same_x.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.experts.w_in.grad.sum(0), dense.w_in.weight.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.experts.w_out.grad.sum(0), dense.w_out.weight.grad, rtol=0, atol=1e-10)


def test_identical_experts_with_raw_probabilities_are_not() -> None:
    """Their output is the dense one times the sum of the chosen probabilities."""
    layer = layer_of(router=RouterConfig(top_k=2, normalise=False))
    dense = FeedForward(FeedForwardConfig(), 12, 20).double()
    copy_dense_into_experts(dense, layer.experts)
    x = draw(30)

    y, routing = layer(x[None])

    total = routing.scores.topk(2).values.sum(1, keepdim=True)
    assert total.min() < 0.9
    torch.testing.assert_close(y[0], total * dense(x))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_exactly_the_chosen_experts_of_a_token_get_a_gradient(top_k: int) -> None:
    layer = layer_of(router=RouterConfig(top_k=top_k, normalise=False))

    y, routing = layer(draw(1, 1))
    y.square().sum().backward()

    touched = layer.experts.w_in.grad.flatten(1).abs().sum(1).nonzero().flatten()
    assert sorted(touched.tolist()) == sorted(routing.selected[0].tolist())
    assert len(touched) == top_k


# ------------------------------------------------------------------------------------------------------- shared experts


@pytest.mark.parametrize("gated", [False, True])
def test_shared_experts_are_added_to_the_routed_ones(gated: bool) -> None:
    """routed + gate · MLP(x), the gate sigmoid(0) = 1/2 for a zero vector; two shared experts of 8 are one of 16."""
    layer = layer_of(shared=SharedExpertsConfig(n_experts=2, d_ff=8, gated=gated))
    if gated:
        nn.init.zeros_(layer.shared.gate.weight)
    x = draw(2, 5)

    y, routing = layer(x)
    routed = layer.experts(x.flatten(0, 1), routing)
    shared = layer.shared.mlp(x.flatten(0, 1))

    assert layer.shared.mlp.w_out.in_features == 16
    torch.testing.assert_close(y.flatten(0, 1), routed + (0.5 if gated else 1.0) * shared)


def test_the_gate_of_shared_experts_is_one_number_a_token() -> None:
    shared = layer_of(shared=SharedExpertsConfig(n_experts=1, gated=True)).shared
    x = draw(6)

    gate = torch.stack([1 / (1 + torch.exp(-(row @ shared.gate.weight[0]))) for row in x])

    torch.testing.assert_close(shared(x), gate[:, None] * shared.mlp(x))


@pytest.mark.parametrize("normalise", [False, True])
def test_scale_multiplies_the_routed_output_once_and_the_shared_output_never(normalise: bool) -> None:
    """out(s) - shared = s (out(1) - shared)."""
    x = draw(1, 6)

    def output(scale: float) -> tuple[Tensor, Tensor]:
        layer = layer_of(
            shared=SharedExpertsConfig(n_experts=1), router=RouterConfig(top_k=2, normalise=normalise, scale=scale)
        )
        return layer(x)[0], layer.shared(x)

    (once, shared), (scaled, shared_too) = output(1.0), output(2.5)

    assert torch.equal(shared, shared_too)
    torch.testing.assert_close(scaled - shared, 2.5 * (once - shared))


# --------------------------------------------------------------------------------------------------------------- tokens


def test_rows_and_positions_become_tokens_in_reading_order() -> None:
    layer = layer_of()
    x = draw(3, 4)

    y, routing = layer(x)

    assert y.shape == (3, 4, 12)
    assert routing.n_tokens == 12
    for row in range(3):
        for position in range(4):
            alone, routed = layer(x[row : row + 1, position : position + 1])
            torch.testing.assert_close(alone[0, 0], y[row, position])
            assert torch.equal(routed.selected[0], routing.selected[4 * row + position])


def test_padding_gets_nothing_from_the_experts() -> None:
    layer = layer_of()
    x = draw(2, 4)
    mask = torch.tensor([[False, True, True, True], [True, True, False, False]])

    y, routing = layer(x, mask)

    assert y[~mask].eq(0).all()
    torch.testing.assert_close(y[mask], layer(x)[0][mask])
    assert routing.counts().sum() == 5 * 2


# ------------------------------------------------------------------------------------------- weights before the expert


@pytest.mark.parametrize("backend", ["reference", "segments"])
def test_a_weight_before_the_expert_is_seen_by_its_activation(backend: str) -> None:
    """Σ_k expert_k(weight_k · x), which is not Σ_k weight_k · expert_k(x)."""
    layer = layer_of(
        experts=ExpertsConfig(n_experts=4, d_ff=20, backend=backend),
        router=RouterConfig(top_k=2, apply="before", score="sigmoid", normalise=False),
    )
    x = draw(2, 5)

    y, routing = layer(x)

    tokens = x.flatten(0, 1)
    by_hand = torch.stack(
        [
            sum(
                layer.experts.one(expert, weight * token[None])[0]
                for expert, weight in zip(routing.selected[t].tolist(), routing.weights[t], strict=True)
            )
            for t, token in enumerate(tokens)
        ]
    )
    torch.testing.assert_close(y.flatten(0, 1), by_hand)
    assert not torch.allclose(y.flatten(0, 1), layer.experts(tokens, routing))


def test_a_dropped_token_gets_nothing_even_from_experts_with_biases() -> None:
    """expert(0 · x) is the expert's bias, not 0."""
    layer = layer_of(
        feed_forward=FeedForwardConfig(bias=True),
        router=RouterConfig(
            top_k=1, apply="before", score="sigmoid", normalise=False, capacity=CapacityConfig(factor=0.25)
        ),
    )

    y, routing = layer(draw(1, 16))

    dropped = routing.dropped[:, 0]
    assert 0 < dropped.sum() < 16
    assert y[0, dropped].eq(0).all()
    assert y[0, ~dropped].abs().sum(-1).gt(0).all()


def test_a_dropped_assignment_adds_exactly_zero_and_the_kept_one_is_not_renormalised() -> None:
    layer = layer_of(router=RouterConfig(top_k=2, capacity=CapacityConfig(factor=0.5)))
    x = draw(1, 16)

    y, routing = layer(x)
    dropless, everything = layer.eval()(x)

    assert everything.dropped is None
    assert torch.equal(everything.counts(), routing.counts())
    kept = ~routing.dropped
    assert torch.equal(routing.weights[kept], everything.weights[kept])
    assert routing.weights[~kept].eq(0).all()
    both = kept.all(dim=1)
    torch.testing.assert_close(y[0, both], dropless[0, both])
    assert y[0, ~kept.any(dim=1)].eq(0).all()


def test_all_experts_normalised_are_the_dense_mixture() -> None:
    """k = E: the softmax-weighted sum of every expert."""
    layer = layer_of(router=RouterConfig(top_k=4))
    x = draw(1, 7)

    y, _ = layer(x)

    probability = (x[0] @ layer.router.weight.T).softmax(-1)
    by_hand = sum(probability[:, e : e + 1] * layer.experts.one(e, x[0]) for e in range(4))
    torch.testing.assert_close(y[0], by_hand, rtol=1e-12, atol=1e-12)
