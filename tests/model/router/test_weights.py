"""Weights of the selected experts, and the gradient of those that were not selected."""

import pytest
import torch
from torch import Tensor, nn

from moe.config import ExpertsConfig, ModelConfig, RouterConfig
from moe.model.moe_layer import MoELayer
from moe.model.router.weights import combine_weights, equal_scores, straight_through_weights

F64 = torch.float64


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=F64)


def test_the_scale_is_applied_once_whether_or_not_weights_are_normalised() -> None:
    """A released fault of several engines: the factor inside the branch that normalises."""
    scores = tensor([0.3, 0.1])

    torch.testing.assert_close(combine_weights(scores, False, 2.5), tensor([0.75, 0.25]))
    torch.testing.assert_close(combine_weights(scores, True, 2.5), tensor([1.875, 0.625]))


def test_places_that_do_not_count_leave_their_share_to_the_others() -> None:
    weighted = torch.tensor([[True, False], [False, False]])

    weights = combine_weights(tensor([0.3, 0.1], [0.3, 0.1]), True, 1.0, weighted)

    assert weights.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_scores_that_all_vanish_give_weights_and_a_gradient_of_zero_not_nan() -> None:
    """sigmoid(-200) is 0 in float32. The gradient from above is 10: divided by the smallest number it is infinite."""
    logits = torch.full((1, 2), -200.0, requires_grad=True)

    weights = combine_weights(logits.sigmoid(), True, 1.0)
    (10 * weights[:, 0]).sum().backward()

    assert weights.tolist() == [[0.0, 0.0]]
    assert logits.grad.tolist() == [[0.0, 0.0]]


def test_unselected_experts_get_a_finite_gradient_where_the_selected_scores_vanish() -> None:
    logits = torch.tensor([[-200.0, -200.0, 1.0]], requires_grad=True)

    weights = straight_through_weights(logits.sigmoid(), torch.tensor([[0, 1]]), True, 1.0)
    (10 * weights).sum().backward()

    assert weights.tolist() == [[0.0, 0.0, 0.0]]
    # 10 σ(1) (1 - σ(1)) = 10 · 0.7310586 · 0.2689414
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0.0, 1.9661193]]))


def test_equal_scores_are_shared_among_the_chosen() -> None:
    scores = equal_scores(torch.tensor([[2, 0]]), 4, F64)

    assert scores.tolist() == [[0.5, 0.0, 0.5, 0.0]]


# ------------------------------------------------------------------------------------------------ all experts' gradient


def layer_of(**router: object) -> MoELayer:
    config = ModelConfig(d_model=6, experts=ExpertsConfig(n_experts=4, d_ff=5), router=RouterConfig(**router))
    layer = MoELayer(config).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    return layer


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_straight_through_weights_are_exact_zeros() -> None:
    scores = draw(50, 8).softmax(-1)

    assert straight_through_weights(scores, scores.topk(2).indices, True, 2.5).eq(0).all()


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("top_k", [2, 3])
def test_every_expert_teaches_the_router_by_its_own_output(normalise: bool, top_k: int) -> None:
    """With a_i = ⟨dL/dy, expert_i(x)⟩, p the scores and s the sum of the selected ones, dL/dp_i is

    - without normalisation a_i, for every expert;
    - with it, a_i / s for the unselected, and (a_i - Σ_selected (p_j / s) a_j) / s for the selected.
    """
    layer, x, upstream = (
        layer_of(top_k=top_k, normalise=normalise, gradient="all_experts", scale=1.5),
        draw(1, 7, 6),
        draw(1, 7, 6, seed=2),
    )

    y, routing = layer(x)
    (grad,) = torch.autograd.grad(y, routing.scores, upstream)

    for token in range(7):
        outputs = [layer.experts.one(expert, x[0, token : token + 1])[0] for expert in range(4)]
        a = [float((output @ upstream[0, token]).detach()) for output in outputs]
        p = routing.scores[token].tolist()
        chosen = routing.selected[token].tolist()
        total = sum(p[expert] for expert in chosen)
        centre = sum(p[expert] / total * a[expert] for expert in chosen)
        expected = [(a[e] - (centre if e in chosen else 0.0)) / total for e in range(4)] if normalise else a
        torch.testing.assert_close(grad[token], 1.5 * torch.tensor(expected, dtype=F64))


def test_the_gradient_of_all_experts_changes_no_output_and_no_other_gradient() -> None:
    sparse, dense = layer_of(), layer_of(gradient="all_experts")
    x = draw(2, 5, 6)

    y_sparse, _ = sparse(x)
    y_dense, _ = dense(x)
    y_sparse.square().sum().backward()
    y_dense.square().sum().backward()

    torch.testing.assert_close(y_dense, y_sparse)
    torch.testing.assert_close(dense.experts.w_in.grad, sparse.experts.w_in.grad)
    torch.testing.assert_close(dense.experts.w_out.grad, sparse.experts.w_out.grad)
    assert not torch.allclose(dense.router.weight.grad, sparse.router.weight.grad)


def test_nothing_is_computed_for_the_unselected_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(gradient="all_experts").eval()
    monkeypatch.setattr(layer.experts, "one", lambda *_: pytest.fail("an unselected expert was computed"))

    layer(draw(1, 4, 6))
