"""Who is dropped: on paper for every order and scope, against a queue in plain Python, and the laws."""

import math
from fractions import Fraction
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.config import CapacityConfig, CapacityOrder, CapacityScope
from moe.model.router.capacity import beyond_capacity, capacity_of, kept_second_choices
from moe.model.routing import Routing

ORDERS, SCOPES = get_args(CapacityOrder), get_args(CapacityScope)


def routing_of(
    selected: Tensor,
    n_experts: int,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    assigned: Tensor | None = None,
    n_sequences: int = 1,
) -> Routing:
    scores = torch.full((len(selected), n_experts), 1 / n_experts)
    weights = torch.ones(selected.shape) if weights is None else weights
    return Routing(scores.log(), scores, selected, weights, mask, assigned=assigned, n_sequences=n_sequences)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        # Expert 0 is asked by tokens 0, 1, 2 (second choice) and 3; expert 1 by 0 and 1 (second choices) and 2.
        ("position", [[False, False], [False, False], [True, True], [True, False]]),
        # First choices of expert 0: 0, 1, 3, so that 2 comes last; of expert 1: 2, then 0 and 1.
        ("choice", [[False, False], [False, True], [False, True], [True, False]]),
        # Weights at expert 0: .9 (token 1), .8 (3), .6 (0), .3 (2); at expert 1: .7 (2), .4 (0), .1 (1).
        ("score", [[True, False], [False, True], [False, True], [False, False]]),
    ],
)
def test_four_tokens_on_paper(order: CapacityOrder, expected: list[list[bool]]) -> None:
    """C = 0.75 * 2 * 4 / 3 = 2."""
    selected = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 2]])
    weights = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2]])

    beyond = beyond_capacity(routing_of(selected, 3, weights), 2, CapacityConfig(factor=0.75, order=order))

    assert beyond.tolist() == expected


@pytest.mark.parametrize(
    ("scope", "expected"), [("micro_batch", [False, False, True, True]), ("sequence", [False, True, False, True])]
)
def test_two_sequences_share_a_capacity_or_have_their_own(scope: CapacityScope, expected: list[bool]) -> None:
    """All choose expert 0 of two. Together C = 4 / 2 = 2, for each sequence of two tokens C = 1."""
    routing = routing_of(torch.zeros(4, 1, dtype=torch.int64), 2, n_sequences=2)

    beyond = beyond_capacity(routing, 1, CapacityConfig(factor=1.0, scope=scope))

    assert beyond[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        # Four real tokens: C = 2, taken by tokens 1 and 2.
        ("micro_batch", [False, False, False, True, False, False]),
        # C = ceil(2 / 2) = 1 in both sequences, for tokens 1 and 3.
        ("sequence", [False, False, True, False, False, False]),
    ],
)
def test_padding_takes_no_room_and_counts_as_no_token(scope: CapacityScope, expected: list[bool]) -> None:
    mask = torch.tensor([False, True, True, True, False, False])
    routing = routing_of(torch.zeros(6, 1, dtype=torch.int64), 2, mask=mask, n_sequences=2)

    beyond = beyond_capacity(routing, 1, CapacityConfig(factor=1.0, scope=scope))

    assert beyond[:, 0].tolist() == expected


def test_an_empty_place_takes_no_room_and_is_not_dropped() -> None:
    """Expert 0 has C = 2 * 3 / 6 = 1 place: token 0 leaves it to token 1, and token 2 comes too late."""
    selected = torch.tensor([[1, 0], [0, 2], [0, 3]])
    assigned = torch.tensor([[True, False], [True, True], [True, True]])

    beyond = beyond_capacity(routing_of(selected, 6, assigned=assigned), 2, CapacityConfig(factor=1.0))

    assert beyond.tolist() == [[False, False], [False, False], [True, False]]


def test_k_counts_and_not_the_number_of_places() -> None:
    """Top-p has E places a token: with k = 1, C = 1 * 4 / 2 = 2 of the four that ask expert 0."""
    routing = routing_of(torch.tensor([[0, 1]] * 4), 2, assigned=torch.tensor([[True, False]] * 4))

    beyond = beyond_capacity(routing, 1, CapacityConfig(factor=1.0))

    assert beyond.tolist() == [[False, False], [False, False], [True, False], [True, False]]


@pytest.mark.parametrize("order", ["choice", "score"])
def test_a_later_token_evicts_an_earlier_one(order: CapacityOrder) -> None:
    """Why these orders are not causal. C = 1: token 1 chooses expert 0 first and with the larger weight."""
    weights = torch.tensor([[0.6, 0.4], [0.9, 0.1]])
    config = CapacityConfig(factor=0.75, order=order)

    alone = beyond_capacity(routing_of(torch.tensor([[1, 0], [2, 3]]), 4, weights), 2, config)
    with_rival = beyond_capacity(routing_of(torch.tensor([[1, 0], [0, 3]]), 4, weights), 2, config)

    assert alone[0].tolist() == [False, False]
    assert with_rival[0].tolist() == [False, True]


def test_equal_weights_leave_the_order_to_position() -> None:
    selected = torch.tensor([[0, 1], [1, 0], [0, 2], [1, 2], [2, 0]])
    routing = routing_of(selected, 3)

    by_score = beyond_capacity(routing, 2, CapacityConfig(factor=0.5, order="score"))
    by_position = beyond_capacity(routing, 2, CapacityConfig(factor=0.5))

    assert by_position.any()
    assert by_score.tolist() == by_position.tolist()


# ---------------------------------------------------------------------------------------------------- laws, by property


@st.composite
def routings(draw: st.DrawFn) -> tuple[Routing, int]:
    """A routing with padding, empty places and tied weights, and its k."""
    n_sequences, length, n_experts = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    n_places = draw(st.integers(1, n_experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    n_tokens = n_sequences * length
    selected = torch.rand(n_tokens, n_experts, generator=generator).argsort(dim=1)[:, :n_places]
    weights = torch.randint(1, 4, (n_tokens, n_places), generator=generator) / 4
    mask = torch.rand(n_tokens, generator=generator) < 0.8 if draw(st.booleans()) else None
    assigned = torch.rand(n_tokens, n_places, generator=generator) < 0.8 if draw(st.booleans()) else None
    return routing_of(selected, n_experts, weights, mask, assigned, n_sequences), draw(st.integers(1, n_places))


factors = st.integers(1, 300).map(lambda percent: percent / 100)


def dropped_by_queue(routing: Routing, top_k: int, config: CapacityConfig) -> Tensor:
    """The places in line, one after the other; each finds room at its expert or not."""
    n_tokens, n_places = routing.selected.shape
    length = n_tokens // (routing.n_sequences if config.scope == "sequence" else 1)
    real = [True] * n_tokens if routing.mask is None else routing.mask.tolist()
    line = [(token, place) for token in range(n_tokens) for place in range(n_places)]
    if config.order == "choice":
        line.sort(key=lambda at: (at[1], at[0]))
    if config.order == "score":
        line.sort(key=lambda at: (-float(routing.weights[at]), at))
    taken: dict[tuple[int, int], int] = {}
    dropped = torch.zeros(n_tokens, n_places, dtype=torch.bool)
    for token, place in line:
        if not real[token] or (routing.assigned is not None and not routing.assigned[token, place]):
            continue
        sequence = token // length
        expert = sequence, int(routing.selected[token, place])
        real_here = sum(real[sequence * length : (sequence + 1) * length])
        share = Fraction(str(config.factor)) * top_k * real_here / routing.n_experts
        if taken.get(expert, 0) < math.ceil(share):
            taken[expert] = taken.get(expert, 0) + 1
        else:
            dropped[token, place] = True
    return dropped


@given(routings(), factors, st.sampled_from(ORDERS), st.sampled_from(SCOPES))
@settings(max_examples=200, deadline=None)
def test_it_is_a_queue_at_every_expert(
    drawn: tuple[Routing, int], factor: float, order: CapacityOrder, scope: CapacityScope
) -> None:
    routing, top_k = drawn
    config = CapacityConfig(factor=factor, order=order, scope=scope)

    assert beyond_capacity(routing, top_k, config).tolist() == dropped_by_queue(routing, top_k, config).tolist()


@given(routings(), factors, st.sampled_from(ORDERS))
@settings(max_examples=60, deadline=None)
def test_an_expert_keeps_its_assignments_up_to_its_capacity(
    drawn: tuple[Routing, int], factor: float, order: CapacityOrder
) -> None:
    routing, top_k = drawn
    beyond = beyond_capacity(routing, top_k, CapacityConfig(factor=factor, order=order))

    kept = routing.dropping(beyond).carried_out
    kept_counts = (
        routing.selected[kept if kept is not None else slice(None)].flatten().bincount(minlength=routing.n_experts)
    )

    capacity = capacity_of(routing.real_tokens(), top_k, routing.n_experts, factor)
    assert kept_counts.tolist() == routing.counts().minimum(capacity).tolist()


@given(routings(), factors, st.sampled_from(SCOPES), st.data())
@settings(max_examples=60, deadline=None)
def test_in_the_order_of_position_nothing_depends_on_later_tokens(
    drawn: tuple[Routing, int], factor: float, scope: CapacityScope, data: st.DataObject
) -> None:
    routing, top_k = drawn
    config = CapacityConfig(factor=factor, scope=scope)
    first_edited = data.draw(st.integers(0, routing.n_tokens - 1))
    selected = routing.selected.clone()
    selected[first_edited:] = (selected[first_edited:] + data.draw(st.integers(0, 4))) % routing.n_experts
    edited = routing_of(
        selected, routing.n_experts, routing.weights, routing.mask, routing.assigned, routing.n_sequences
    )

    before, after = beyond_capacity(routing, top_k, config), beyond_capacity(edited, top_k, config)

    assert before[:first_edited].tolist() == after[:first_edited].tolist()


@given(routings(), factors, factors, st.sampled_from(ORDERS), st.sampled_from(SCOPES))
@settings(max_examples=60, deadline=None)
def test_a_larger_factor_drops_nothing_more(
    drawn: tuple[Routing, int], one: float, other: float, order: CapacityOrder, scope: CapacityScope
) -> None:
    routing, top_k = drawn
    small, large = sorted((one, other))

    with_small = beyond_capacity(routing, top_k, CapacityConfig(factor=small, order=order, scope=scope))
    with_large = beyond_capacity(routing, top_k, CapacityConfig(factor=large, order=order, scope=scope))

    assert not (with_large & ~with_small).any()


@given(routings(), st.sampled_from([1.0, 1.7, 1e6, math.inf]), st.sampled_from(ORDERS), st.sampled_from(SCOPES))
@settings(max_examples=60, deadline=None)
def test_experts_over_k_and_beyond_never_drops(
    drawn: tuple[Routing, int], more: float, order: CapacityOrder, scope: CapacityScope
) -> None:
    routing, top_k = drawn
    config = CapacityConfig(factor=more * routing.n_experts / top_k, order=order, scope=scope)

    assert not beyond_capacity(routing, top_k, config).any()


# -------------------------------------------------------------------------------------------------- the number itself


def test_a_product_that_floats_put_above_an_integer_is_that_integer() -> None:
    """1.1 * 100 is 110.00000000000001 in floats."""
    assert math.ceil(1.1 * 100) == 111

    assert capacity_of(torch.tensor([100, 101]), 4, 4, 1.1).tolist() == [110, 112]  # 111.1


@given(st.integers(1, 400), st.integers(1, 64), st.data())
@settings(max_examples=200, deadline=None)
def test_capacity_is_the_exact_ceiling(percent: int, n_experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, n_experts))
    tokens = data.draw(st.integers(1, 100_000))
    factor = min(Fraction(percent, 100), Fraction(n_experts))

    capacity = capacity_of(torch.tensor([tokens]), top_k, n_experts, float(factor))

    assert capacity.tolist() == [math.ceil(factor * top_k * tokens / n_experts)]


@pytest.mark.parametrize(("n_experts", "top_k"), [(16, 3), (2, 2), (7, 3), (64, 6)])
def test_capacity_at_experts_over_k_is_the_number_of_tokens(n_experts: int, top_k: int) -> None:
    tokens = torch.tensor([1, 2, 333, 4096])

    assert capacity_of(tokens, top_k, n_experts, n_experts / top_k).tolist() == tokens.tolist()


def test_an_expert_always_has_a_place() -> None:
    """One token of generation, a factor of a billionth: still not a capacity of 0."""
    assert capacity_of(torch.tensor([1]), 1, 8, 1e-9).tolist() == [1]


# ----------------------------------------------------------------------------------------------------- second choices


def test_first_choices_are_kept_and_others_as_often_as_weight_over_threshold() -> None:
    """0.1 / 0.4: one in four, within four standard deviations, 4 * sqrt(0.25 * 0.75 / 20000) = 0.0122."""
    torch.manual_seed(0)

    kept = kept_second_choices(torch.tensor([[0.0, 0.1, 0.3]]).repeat(20_000, 1), threshold=0.4)

    share = kept.double().mean(dim=0).tolist()
    assert share[0] == 1.0
    assert share[1] == pytest.approx(0.25, abs=0.0122)
    assert share[2] == pytest.approx(0.75, abs=0.0122)


def test_a_weight_at_the_threshold_is_always_kept_and_a_weight_of_zero_never() -> None:
    torch.manual_seed(0)

    kept = kept_second_choices(torch.tensor([[0.5, 0.2, 0.0]]).repeat(50_000, 1), threshold=0.2)

    assert kept.all(dim=0).tolist() == [True, True, False]
    assert not kept[:, 2].any()
