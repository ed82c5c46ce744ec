"""The selection rules that look at one token at a time: on paper, and the laws that each must keep."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moe.config import RouterConfig
from moe.model.router import Router
from moe.model.router.selection import (
    as_places,
    hashed,
    sampled,
    select_top_k,
    smallest_set,
    within_best_groups,
)

F64 = torch.float64


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=F64)


def draw(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=F64)


def identity_router(n_experts: int, **settings: object) -> Router:
    """Its logits are its input."""
    router = Router(RouterConfig(**settings), n_experts, n_experts).double()
    router.weight.data = torch.eye(n_experts, dtype=F64)
    return router


# -------------------------------------------------------------------------------------------------------------- groups


def test_groups_by_their_best_expert_or_by_the_sum_of_their_best_two() -> None:
    """Groups (9, 0), (6, 5), (7, 1): the best expert is in the first, the best pair, 11, in the second."""
    scores = tensor([9.0, 0.0, 6.0, 5.0, 7.0, 1.0])
    cut = -math.inf

    by_best = within_best_groups(scores, n_groups=3, top_groups=1, group_score="max")
    by_two = within_best_groups(scores, n_groups=3, top_groups=1, group_score="top_two")

    assert by_best.tolist() == [[9.0, 0.0, cut, cut, cut, cut]]
    assert by_two.tolist() == [[cut, cut, 6.0, 5.0, cut, cut]]


@given(st.integers(0, 1000), st.sampled_from([(2, 1, 4), (4, 2, 4), (8, 4, 3), (4, 4, 2)]))
def test_a_token_stays_within_its_groups(seed: int, shape: tuple[int, int, int]) -> None:
    n_groups, top_groups, top_k = shape
    scores = draw(10, 16, seed) - 5  # below 0, where a mask of 0 would win

    limited = within_best_groups(scores, n_groups, top_groups, "top_two")
    selected = select_top_k(limited, top_k)

    for row in selected.tolist():
        assert len(set(row)) == top_k
        assert len({expert // (16 // n_groups) for expert in row}) <= top_groups


# --------------------------------------------------------------------------------------------------------------- top-p


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.4, [1]), (0.5, [1, 3]), (0.7, [1, 3]), (0.85, [1, 3, 0]), (1.0, [1, 3, 0, 2])],
)
def test_the_smallest_set_whose_probability_exceeds_the_threshold(threshold: float, expected: list[int]) -> None:
    """Probabilities 0.2, 0.45, 0.05, 0.3: sorted they add up to 0.45, 0.75, 0.95, 1."""
    selected, assigned, _ = smallest_set(tensor([0.2, 0.45, 0.05, 0.3]), threshold)

    assert selected[0, assigned[0]].tolist() == expected


@given(st.integers(0, 1000), st.floats(0.01, 1.0))
def test_top_p_gives_every_token_at_least_one_expert_and_no_more_than_it_needs(seed: int, threshold: float) -> None:
    probabilities = (3 * draw(10, 8, seed)).softmax(-1)

    selected, assigned, _ = smallest_set(probabilities, threshold)

    for token in range(10):
        taken = probabilities[token, selected[token, assigned[token]]]
        assert taken.numel() >= 1
        assert taken[:-1].sum() <= threshold + 1e-12


def test_empty_places_weigh_nothing_and_count_for_nothing() -> None:
    router = identity_router(4, selection="top_p", threshold=0.5, normalise=False)

    routing = router(tensor([0.2, 0.45, 0.05, 0.3], [0.97, 0.01, 0.01, 0.01]).log())

    torch.testing.assert_close(routing.weights, tensor([0.45, 0.3, 0.0, 0.0], [0.97, 0.0, 0.0, 0.0]))
    assert routing.counts().tolist() == [1, 1, 0, 1]


# ------------------------------------------------------------------------------------------------------ ReLU, and dense


def test_relu_takes_every_expert_above_zero_with_its_score_as_weight() -> None:
    router = identity_router(4, selection="positive", score="relu", normalise=False)

    routing = router(tensor([-1.0, 2.0, 0.0, 3.0], [-1.0, -2.0, -3.0, -4.0]))

    assert routing.selected[0, :2].tolist() == [3, 1]
    assert routing.weights.tolist() == [[3.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert routing.counts().tolist() == [0, 1, 0, 1]


def test_places_hold_the_chosen_experts_first_and_by_preference() -> None:
    chosen = torch.tensor([[True, False, True, True]])

    selected, assigned, _ = as_places(chosen, tensor([0.1, 0.9, 0.5, 0.3]))

    assert selected[0, :3].tolist() == [2, 3, 0]
    assert assigned.tolist() == [[True, True, True, False]]


def test_selection_all_weighs_every_expert_by_its_probability() -> None:
    routing = identity_router(3, selection="all")(tensor([0.2, 0.5, 0.3]).log())

    assert routing.selected.tolist() == [[1, 2, 0]]
    torch.testing.assert_close(routing.weights, tensor([0.5, 0.3, 0.2]))


# ----------------------------------------------------------------------------------------------------- hash and random


def test_a_token_id_always_has_the_same_experts_under_hash() -> None:
    """In whatever context: other hidden states, positions, batch-mates and modes."""
    router = Router(RouterConfig(selection="hash", weights="equal"), 6, 16)
    ids = torch.tensor([5, 9, 5, 700, 9])

    alone = router(torch.zeros(1, 6), token_ids=ids[:1])
    together = router.eval()(torch.randn(5, 6), token_ids=ids, positions=torch.arange(5))

    assert together.selected[0].tolist() == together.selected[2].tolist() == alone.selected[0].tolist()
    assert together.selected[1].tolist() == together.selected[4].tolist()
    assert together.weights.eq(0.5).all()  # equal, and normalised over two


def test_random_choices_depend_on_the_position_too_and_are_frozen() -> None:
    router = Router(RouterConfig(selection="random", weights="equal"), 6, 16)
    ids, positions = torch.zeros(200, dtype=torch.int64), torch.arange(200)

    first = router(torch.randn(200, 6), token_ids=ids, positions=positions).selected
    again = router(torch.randn(200, 6), token_ids=ids, positions=positions).selected

    assert torch.equal(first, again)
    assert len({tuple(row) for row in first.tolist()}) > 100


@pytest.mark.parametrize(("layer", "n_experts", "top_k"), [(0, 16, 2), (3, 16, 2), (0, 8, 1), (7, 5, 3)])
def test_hashed_experts_are_distinct_and_uniform(layer: int, n_experts: int, top_k: int) -> None:
    """Consecutive ids, as a vocabulary has them. χ² over E experts has mean E - 1 and deviation √(2(E - 1))."""
    n_ids = 20_000
    selected = hashed(torch.arange(n_ids), layer, n_experts, top_k)

    assert all(len(set(row)) == top_k for row in selected.tolist())
    fair = n_ids / n_experts
    for choice in range(top_k):
        counts = selected[:, choice].bincount(minlength=n_experts)
        chi_squared = ((counts - fair) ** 2 / fair).sum()
        assert chi_squared < (n_experts - 1) + 5 * math.sqrt(2 * (n_experts - 1))


def test_layers_hash_differently() -> None:
    """Two layers agree on the expert of one token in sixteen, by chance."""
    layers = [hashed(torch.arange(10_000), layer, 16, 1) for layer in range(4)]

    for one, other in pairwise(layers):
        assert (one == other).double().mean().item() == pytest.approx(1 / 16, abs=0.01)


def test_what_a_fixed_choice_needs_is_asked_for() -> None:
    with pytest.raises(ValueError, match="hash needs token_ids"):
        Router(RouterConfig(selection="hash", weights="equal"), 6, 4)(torch.zeros(1, 6))
    with pytest.raises(ValueError, match="random needs positions"):
        Router(RouterConfig(selection="random", weights="equal"), 6, 4)(torch.zeros(1, 6), token_ids=torch.tensor([1]))


def test_a_router_with_nothing_to_learn_has_no_parameter() -> None:
    assert list(Router(RouterConfig(selection="hash", weights="equal"), 6, 4).parameters()) == []
    assert len(list(Router(RouterConfig(selection="hash"), 6, 4).parameters())) == 1


# ------------------------------------------------------------------------------------------------------------- sampled


def test_in_evaluation_the_best_experts_are_taken_among_those_within_the_margin() -> None:
    """Margin 0.05: logits within 10 % of the best, 10, compete: 10 and 9.5, by a softmax over these two alone.

    Then 10 leaves; 9.5 and 9 are within 10 % of 9.5, and 4 never is.
    """
    selected, _, weights = sampled(tensor([9.5, 4.0, 10.0, 9.0]), 2, 0.05, training=False, heun=True)

    assert selected.tolist() == [[2, 0]]
    half = 1 / (1 + math.exp(-0.5))
    torch.testing.assert_close(weights, tensor([1 / (1 + math.exp(-0.5) + math.exp(-1.0)), half]))


def test_in_training_experts_are_drawn_by_their_masked_probability() -> None:
    """Logits 10, 9.5 and 4 with margin 0.05: the third is never first, the others are so by softmax(10, 9.5)."""
    torch.manual_seed(0)
    logits = tensor([10.0, 9.5, 4.0]).expand(20_000, 3)

    selected, _, _ = sampled(logits, 1, 0.05, training=True, heun=True)

    share = selected.flatten().bincount(minlength=3) / 20_000
    best = 1 / (1 + math.exp(-0.5))
    torch.testing.assert_close(share, torch.tensor([best, 1 - best, 0.0]), atol=0.01, rtol=0)


def test_heun_scales_the_weight_by_a_third_three_times_in_four_and_never_its_gradient() -> None:
    torch.manual_seed(0)
    logits = tensor([10.0, 9.5]).repeat(20_000, 1).requires_grad_()

    selected, _, weights = sampled(logits, 1, 0.05, training=True, heun=True)
    weights.sum().backward()

    probability = logits.detach().softmax(-1).gather(1, selected)
    scaled = (weights / probability).detach().flatten()
    was_best = selected.flatten() == 0
    assert scaled[was_best].eq(1).all()
    third = torch.isclose(scaled[~was_best], torch.tensor(1 / 3, dtype=F64), rtol=1e-14)
    assert third.double().mean().item() == pytest.approx(0.75, abs=0.02)
    assert (third | scaled[~was_best].eq(1)).all()
    # d softmax_i / d z_j = p_i (1[i = j] - p_j), with no third in it.
    p = logits.detach().softmax(-1)
    expected = probability * (nn.functional.one_hot(selected.flatten(), 2) - p)
    torch.testing.assert_close(logits.grad, expected)


# --------------------------------------------------------------------------------------------------- the selection bias


def test_a_selection_bias_changes_the_choice_and_never_the_weights() -> None:
    """Scores 0.5, 0.3, 0.2; a bias of 10 on the last brings it in, and its weight is still made of 0.5 and 0.2."""
    router = identity_router(3, selection_bias="sign")
    x = tensor([0.5, 0.3, 0.2]).log()
    router.selection_bias[2] = 10.0

    routing = router(x)

    assert routing.selected.tolist() == [[2, 0]]
    torch.testing.assert_close(routing.weights, tensor([0.2 / 0.7, 0.5 / 0.7]))
    torch.testing.assert_close(routing.scores, tensor([0.5, 0.3, 0.2]))


def test_a_quantile_bias_moves_the_logits() -> None:
    """Logits 5, 4, 0 are scores .73, .27, .005: a bias of 2 on the last brings its score in, not its logit."""
    x = tensor([5.0, 4.0, 0.0])
    by_score, by_logit = (identity_router(3, selection_bias=kind) for kind in ("sign", "quantile"))
    for router in (by_score, by_logit):
        router.selection_bias[2] = 2.0

    assert by_score(x).selected.tolist() == [[2, 0]]
    assert by_logit(x).selected.tolist() == [[0, 1]]


@pytest.mark.parametrize("convert", [Tensor.bfloat16, Tensor.double, Tensor.half])
def test_the_selection_bias_stays_in_float32(convert: object) -> None:
    """In bfloat16 0.5 + 0.001 is 0.5: the bias would stop moving."""
    router = Router(RouterConfig(selection_bias="sign"), 6, 4)
    router.selection_bias[0] = 0.501

    router.to(convert(torch.zeros(1)).dtype)

    assert router.selection_bias.dtype == torch.float32
    assert router.selection_bias[0].item() == pytest.approx(0.501)
    assert "selection_bias" in router.state_dict()


def test_a_selection_bias_that_comes_from_the_meta_device_starts_at_zero() -> None:
    with torch.device("meta"):
        router = Router(RouterConfig(selection_bias="sign"), 6, 4)

    router.to_empty(device="cpu")

    assert router.selection_bias.tolist() == [0.0] * 4
