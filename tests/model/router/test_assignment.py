"""Expert choice, Sinkhorn and BASE against numbers on paper, plain Python and scipy's exact assignment."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe.model.router import assignment
from moe.model.router.assignment import balanced_assignment, expert_choice, sinkhorn_plan


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def real_and_padding(n_tokens: int, seed: int) -> Tensor:
    """A mask with at least one real token, here and there padding."""
    mask = torch.rand(n_tokens, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[seed % n_tokens] = True
    return mask


# -------------------------------------------------------------------------------------------------------- expert choice


def test_each_expert_takes_the_tokens_that_score_highest_for_it() -> None:
    """k T / E = 1 * 4 / 2: two tokens each. Nobody takes the last token; both take the first."""
    scores = torch.tensor([[0.9, 0.8], [0.6, 0.4], [0.3, 0.7], [0.2, 0.1]])

    taken = expert_choice(scores, top_k=1)

    assert taken.tolist() == [[True, True], [True, False], [False, True], [False, False]]


def test_a_fraction_of_a_place_is_a_place() -> None:
    """1 * 5 / 2 = 2.5: three tokens each."""
    assert expert_choice(gaussian(5, 2), top_k=1).sum(dim=0).tolist() == [3, 3]


def test_padding_is_never_taken_and_makes_no_places() -> None:
    """Four tokens are real, so an expert takes 1 * 4 / 2 = 2, though padding scores best."""
    scores = torch.tensor([[9.0, 9.0], [0.1, 0.5], [0.2, 0.6], [0.3, 0.7], [9.0, 9.0], [0.4, 0.8]])
    mask = torch.tensor([False, True, True, True, False, True])

    taken = expert_choice(scores, 1, mask)

    assert taken.nonzero().tolist() == [[3, 0], [3, 1], [5, 0], [5, 1]]


def test_equal_scores_go_to_the_earlier_token() -> None:
    assert expert_choice(torch.ones(6, 3), top_k=1).nonzero()[:, 0].unique().tolist() == [0, 1]


def test_a_later_token_takes_the_place_of_an_earlier_one() -> None:
    """Why expert choice is not causal: the last token's score decides whether the second is taken."""
    scores = torch.tensor([[0.9], [0.5], [0.1], [0.4]]).expand(4, 2)
    edited = scores.clone()
    edited[3] = 0.6

    assert expert_choice(scores, 1)[1].all()
    assert not expert_choice(edited, 1)[1].any()


@given(st.integers(1, 12), st.integers(1, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_every_expert_takes_its_places_and_no_better_token_is_left(n: int, n_experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, n_experts))
    seed = data.draw(st.integers(0, 1000))
    scores = (2 * gaussian(n, n_experts, seed=seed)).round()  # with ties
    mask = real_and_padding(n, seed)
    real = int(mask.sum())

    taken = expert_choice(scores, top_k, mask)

    assert taken.sum(dim=0).tolist() == [math.ceil(top_k * real / n_experts)] * n_experts
    for expert in range(n_experts):
        worst_taken = scores[taken[:, expert], expert].min()
        left = scores[mask & ~taken[:, expert], expert]
        assert (left <= worst_taken).all()


# ------------------------------------------------------------------------------------------------------------- Sinkhorn


def test_two_tokens_and_two_experts_on_paper() -> None:
    """Scaling keeps the cross ratio 4 of ((4, 1), (1, 1)); with marginals 1/2 the plan is ((a, b), (b, a)).

    a + b = 1/2 and (a / b)^2 = 4 give a = 1/3, b = 1/6.
    """
    plan = sinkhorn_plan(torch.tensor([[4.0, 1.0], [1.0, 1.0]], dtype=torch.float64).log())

    torch.testing.assert_close(plan, torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64) / 6, rtol=1e-4, atol=0)


@given(st.integers(1, 40), st.integers(1, 8), st.floats(0, 4), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_marginals_are_one_over_tokens_and_one_over_experts(n: int, n_experts: int, std: float, seed: int) -> None:
    mask = real_and_padding(n, seed)

    plan = sinkhorn_plan(std * gaussian(n, n_experts, seed=seed), mask)

    torch.testing.assert_close(plan.sum(dim=0), torch.full((n_experts,), 1 / n_experts, dtype=plan.dtype))
    torch.testing.assert_close(plan.sum(dim=1), mask / mask.sum(dtype=plan.dtype), rtol=1e-4, atol=0)


def test_only_rows_and_columns_are_scaled() -> None:
    """log plan - logits is d0_t + d1_e: every 2 x 2 difference of differences is 0."""
    logits = gaussian(20, 5)

    factors = sinkhorn_plan(logits).log() - logits

    differences = factors[1:] - factors[:-1]
    torch.testing.assert_close(differences, differences[:, :1].expand(19, 5), rtol=0, atol=1e-9)


def megatrons_plan(logits: Tensor) -> list[list[float]]:
    """The alternation as Megatron-LM stops it: once the mean absolute change of the column factors is below 1e-4."""
    cost = [[math.exp(z) for z in row] for row in logits.tolist()]
    n_tokens, n_experts = len(cost), len(cost[0])
    columns, change = [1.0] * n_experts, 1.0
    while change > 1e-4:
        rows = [1 / n_tokens / sum(c * d for c, d in zip(row, columns, strict=True)) for row in cost]
        before = columns
        columns = [1 / n_experts / sum(rows[t] * cost[t][e] for t in range(n_tokens)) for e in range(n_experts)]
        change = sum(abs(new - old) for new, old in zip(columns, before, strict=True)) / n_experts
    return [[rows[t] * cost[t][e] * columns[e] for e in range(n_experts)] for t in range(n_tokens)]


@pytest.mark.parametrize("seed", range(3))
def test_the_plan_is_megatrons(seed: int) -> None:
    logits = 2 * gaussian(24, 6, seed=seed)

    plan = sinkhorn_plan(logits)

    torch.testing.assert_close(plan, torch.tensor(megatrons_plan(logits), dtype=torch.float64), rtol=2e-3, atol=0)


def test_huge_logits_do_not_overflow() -> None:
    """Tokens alike, and all for expert 0 by 1000 nats: the plan can only be uniform, 1 / (6 * 3)."""
    logits = torch.zeros(6, 3)
    logits[:, 0] = 1000.0

    plan = sinkhorn_plan(logits + 1e4)

    torch.testing.assert_close(plan, torch.full((6, 3), 1 / 18))


def test_an_expert_that_underflows_for_every_token_still_gets_its_share() -> None:
    """exp(-300) is 0 in float32."""
    logits = gaussian(32, 4).float()
    logits[:, 2] -= 300.0

    plan = sinkhorn_plan(logits)

    torch.testing.assert_close(plan.sum(dim=0), torch.full((4,), 0.25))
    torch.testing.assert_close(plan.sum(dim=1), torch.full((32,), 1 / 32), rtol=2e-4, atol=0)


def test_a_plan_that_has_not_converged_has_balanced_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignment, "SINKHORN_ITERATIONS", 2)

    plan = sinkhorn_plan(30 * gaussian(64, 4))

    torch.testing.assert_close(plan.sum(dim=0), torch.full((4,), 0.25, dtype=torch.float64))
    assert (plan.sum(dim=1) - 1 / 64).abs().max() > 1e-4


def test_padding_has_no_part_in_the_plan() -> None:
    logits = gaussian(10, 4)
    mask = torch.tensor([True, False] * 5)
    logits[~mask] = torch.nan

    plan = sinkhorn_plan(logits, mask)

    torch.testing.assert_close(plan[mask], sinkhorn_plan(logits[mask]))
    assert (plan[~mask] == 0).all()


def test_a_batch_of_padding_alone_has_an_empty_plan() -> None:
    assert (sinkhorn_plan(gaussian(3, 4), torch.zeros(3, dtype=torch.bool)) == 0).all()


@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_plan_is_at_least_float32(given_dtype: torch.dtype, expected: torch.dtype) -> None:
    assert sinkhorn_plan(torch.zeros(3, 2, dtype=given_dtype)).dtype == expected


# ----------------------------------------------------------------------------------------------------------------- BASE


def largest_sum(affinity: Tensor) -> float:
    """The best sum under ceil(T / E) tokens an expert, by scipy: every expert as so many columns."""
    places = math.ceil(affinity.shape[0] / affinity.shape[1])
    columns = affinity.double().repeat_interleave(places, dim=1).numpy()
    return float(columns[linear_sum_assignment(columns, maximize=True)].sum())


def sum_of(affinity: Tensor, assigned: Tensor) -> float:
    return float(affinity.double().gather(1, assigned[:, None]).sum())


def assert_within_places(assigned: Tensor, n_experts: int) -> None:
    places = math.ceil(len(assigned) / n_experts)
    assert assigned.bincount(minlength=n_experts).tolist() == pytest.approx([places / 2] * n_experts, abs=places / 2)


def test_the_token_that_loses_less_gives_way() -> None:
    """Both tokens like expert 0 best. 5 + 1 = 6 one way, 4 + 5 = 9 the other."""
    assert balanced_assignment(torch.tensor([[5.0, 4.0], [5.0, 1.0]])).tolist() == [1, 0]


def test_a_chain_of_moves_on_paper() -> None:
    """Two places an expert, and four tokens want expert 0. Moving tokens to expert 1 costs 3 or 4, and to expert 2
    it costs 9; but a token of expert 1 moves on to expert 2 for 1. Best: 0, 0, 1, 1, 2, 2 at 10 + 10 + 7 + 6 + 9 + 9.
    """
    affinity = torch.tensor(
        [[10.0, 0.0, 0.0], [10.0, 0.0, 0.0], [10.0, 7.0, 1.0], [10.0, 6.0, 1.0], [0.0, 10.0, 9.0], [0.0, 10.0, 9.0]]
    )

    assert balanced_assignment(affinity).tolist() == [0, 0, 1, 1, 2, 2]


def test_raises_beyond_epsilon_would_go_wrong_here() -> None:
    """Best: 3 + 4 + 4 = 11, experts 0 or 3, 3 or 4, and 0; epsilon 0.5 allows 11 - 1.5. Steps of 1.5 end at 9."""
    affinity = torch.tensor([[3.0, 0.0, 0.0, 3.0, 2.0], [0.0, 0.0, 0.0, 4.0, 4.0], [4.0, 1.0, 2.0, 0.0, 2.0]])

    assert sum_of(affinity, balanced_assignment(affinity, epsilon=0.5)) >= 9.5


def test_a_bid_goes_up_to_the_second_best_at_once() -> None:
    """By steps of 0.001 alone, the price of expert 0 would reach 100 after 50 000 rounds of two bids."""
    affinity = torch.tensor([[500.0, 400.0], [500.0, 100.0]], dtype=torch.float64)

    expert, prices, rounds_left = assignment._auction(affinity, torch.zeros(2).double(), 1, 0.001, rounds_left=10)

    # Round 1: bids 100.001 and 400.001 for expert 0. Round 2: token 0 turns to expert 1, 400 against 500 - 400.001.
    assert expert.tolist() == [1, 0]
    assert prices.tolist() == pytest.approx([400.001, 300.002])
    assert rounds_left == 8


@given(st.integers(1, 14), st.integers(1, 5), st.integers(0, 6), st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_integer_affinities_are_solved_exactly(n: int, n_experts: int, largest: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    affinity = torch.randint(-largest, largest + 1, (n, n_experts), generator=generator).float()

    assigned = balanced_assignment(affinity, epsilon=0.9 / n)

    assert_within_places(assigned, n_experts)
    assert sum_of(affinity, assigned) == largest_sum(affinity)


@given(st.integers(1, 30), st.integers(1, 6), st.sampled_from([3.0, 0.3, 0.03, 0.003]), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_the_sum_is_within_epsilon_a_token_of_the_largest(n: int, n_experts: int, epsilon: float, seed: int) -> None:
    affinity = gaussian(n, n_experts, seed=seed)

    assigned = balanced_assignment(affinity, epsilon=epsilon)

    assert_within_places(assigned, n_experts)
    assert sum_of(affinity, assigned) >= largest_sum(affinity) - n * epsilon - 1e-9


@given(st.integers(1, 40), st.integers(2, 6), st.floats(-6, 6), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_default_epsilon_follows_the_scale(n: int, n_experts: int, exponent: float, seed: int) -> None:
    affinity = 10**exponent * gaussian(n, n_experts, seed=seed)

    assigned = balanced_assignment(affinity)

    spread = float((affinity.amax(dim=1) - affinity.amin(dim=1)).max())
    assert_within_places(assigned, n_experts)
    assert sum_of(affinity, assigned) >= largest_sum(affinity) - n * 0.01 * spread * (1 + 1e-9)


def test_experts_that_every_token_likes_alike_are_shared_out_by_what_the_rest_is_worth() -> None:
    """Two pairs of twins: bids between twins rise by no more than a step, which makes this the slow case."""
    generator = torch.Generator().manual_seed(0)
    affinity = torch.randint(0, 20, (60, 2), generator=generator).repeat(1, 2).float()

    assigned = balanced_assignment(affinity, epsilon=0.9 / 60)

    assert assigned.bincount().tolist() == [15, 15, 15, 15]
    assert sum_of(affinity, assigned) == largest_sum(affinity)


@pytest.mark.parametrize("n_tokens", [1, 3, 8, 64])
def test_tokens_that_like_all_experts_alike_are_spread_evenly(n_tokens: int) -> None:
    assigned = balanced_assignment(torch.full((n_tokens, 4), 0.3))

    assert int(assigned.bincount().max()) == math.ceil(n_tokens / 4)


def test_tokens_that_like_all_experts_alike_take_a_round_an_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round fills the cheapest expert; five rounds do not come to filling up by force."""
    monkeypatch.setattr(assignment, "AUCTION_ROUNDS", 5)
    monkeypatch.setattr(assignment, "_fill", lambda expert, n_experts, places: expert)

    assert balanced_assignment(torch.full((64, 4), 0.3)).bincount().tolist() == [16] * 4


def test_one_token_gets_the_expert_it_likes_best() -> None:
    assert balanced_assignment(torch.tensor([[0.001, 0.003, 0.002]])).tolist() == [1]


def test_fewer_tokens_than_experts_get_one_each() -> None:
    """Both want expert 3; the second has the better alternative."""
    affinity = torch.tensor([[0.0, 0.0, 0.0, 9.0, 1.0], [0.0, 7.0, 0.0, 9.0, 1.0]])

    assert balanced_assignment(affinity).tolist() == [3, 1]


def test_one_expert_takes_all() -> None:
    assert balanced_assignment(gaussian(5, 1)).tolist() == [0] * 5


def test_padding_takes_no_place() -> None:
    affinity = gaussian(40, 4)
    mask = real_and_padding(40, seed=3)
    affinity[~mask] = 100.0

    assigned = balanced_assignment(affinity, mask)

    assert assigned[mask].tolist() == balanced_assignment(affinity[mask]).tolist()
    assert ((assigned >= 0) & (assigned < 4)).all()


def test_a_batch_of_padding_alone_gets_ids() -> None:
    assert balanced_assignment(gaussian(3, 4), torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("rounds", [1, 2, 5, 20])
def test_where_no_auction_ends_in_time_everyone_still_has_a_place(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignment, "AUCTION_ROUNDS", rounds)

    assigned = balanced_assignment(gaussian(101, 2).repeat(1, 2), epsilon=1e-7)

    assert_within_places(assigned, 4)


def test_where_the_last_auction_does_not_end_in_time_the_one_before_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, of steps of a hundredth of the spread, takes its rounds; one round more starts the second in vain."""
    affinity = gaussian(256, 4)
    coarse_step = 0.01 * float((affinity.amax(dim=1) - affinity.amin(dim=1)).max())
    first_auction = balanced_assignment(affinity, epsilon=coarse_step)
    needed = next(rounds for rounds in range(1, 1000) if ends_within(rounds, affinity, coarse_step))
    monkeypatch.setattr(assignment, "AUCTION_ROUNDS", needed + 1)

    assigned = balanced_assignment(affinity, epsilon=1e-9)

    assert assigned.tolist() == first_auction.tolist()


def ends_within(rounds: int, affinity: Tensor, step: float) -> bool:
    expert, _, _ = assignment._auction(affinity, affinity.mean(dim=0), len(affinity) // 4, step, rounds)
    return bool((expert < 4).all())


def test_an_epsilon_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon is 0"):
        balanced_assignment(gaussian(4, 2), epsilon=0.0)


@pytest.mark.parametrize("rule", [lambda z: sinkhorn_plan(z), lambda z: expert_choice(z, 1), balanced_assignment])
def test_no_rule_has_a_gradient(rule) -> None:  # type: ignore[no-untyped-def]
    assert not rule(gaussian(6, 3).requires_grad_()).requires_grad
