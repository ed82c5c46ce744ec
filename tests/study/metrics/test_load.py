"""Loads, drops and repetition of records made by hand; chance values against simulated routing."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.model.routing import summarise_load
from moe.study.measurement import Measurement
from moe.study.metrics import load as metrics
from moe.study.metrics.load import (
    coefficient_of_variation,
    consecutive_repetition,
    dead_experts,
    drop_rate,
    experts_per_token,
    experts_per_token_distribution,
    first_choice,
    load,
    load_entropy,
    max_violation,
    position_dependence,
    router_entropy,
)
from moe.study.record import EMPTY, Layer, Record

ALL: dict[str, Callable[[Record], Measurement]] = {
    "load": load,
    "coefficient_of_variation": coefficient_of_variation,
    "max_violation": max_violation,
    "max_violation by batch": lambda record: max_violation(record, "batch", 2),
    "max_violation by sequence": lambda record: max_violation(record, "sequence"),
    "load_entropy": load_entropy,
    "router_entropy": router_entropy,
    "dead_experts": dead_experts,
    "experts_per_token": experts_per_token,
    "experts_per_token_distribution": experts_per_token_distribution,
    "drop_rate": drop_rate,
    "drop_rate by rank": lambda record: drop_rate(record, "rank"),
    "drop_rate by position": lambda record: drop_rate(record, "position"),
    "drop_rate by domain": lambda record: drop_rate(record, "domain"),
    "consecutive_repetition": lambda record: consecutive_repetition(record, permutations=2),
    "consecutive_repetition of any": lambda record: consecutive_repetition(record, "any", permutations=2),
    "position_dependence": lambda record: position_dependence(record, permutations=2),
}


def mean_of_simulations(records: Any, measure: Callable[[Record], Measurement], *args: int, n: int = 300) -> float:
    return float(np.mean([measure(records.uniform(*args, seed=seed)).values[0] for seed in range(n)]))


# ------------------------------------------------------------------------------------------------------------- balance


def test_load_is_the_share_of_assignments(records: Any) -> None:
    # Six places of three tokens, one of them empty: five assignments, of experts 0 (twice), 1, 2 and 4.
    record = records.of([[[0, 1], [2, 0], [4, EMPTY]]], n_experts=6)

    measured = load(record)

    assert measured.values.tolist() == [[2 / 5, 1 / 5, 1 / 5, 0, 1 / 5, 0]]
    assert measured.chance is not None
    assert measured.chance.item() == 1 / 6


def test_load_of_layers_with_different_numbers_of_experts(records: Any) -> None:
    record = records.of([[[0], [1]], [[2], [2]]], n_experts=(2, 3), blocks=(1, 3))

    measured = load(record)

    assert np.array_equal(measured.values, [[0.5, 0.5, math.nan], [0, 0, 1]], equal_nan=True)
    assert measured.axes[0].labels == ("1", "3")
    assert measured.over_chance[1].tolist() == [0, 0, 3]


def test_dropped_assignments_count_as_load(records: Any) -> None:
    record = records.of([[[0], [1]]], dropped=[[[True], [False]]])

    assert load(record).values.tolist() == [[0.5, 0.5]]


def test_balance_has_no_variation_no_violation_and_full_entropy(records: Any) -> None:
    record = records.balanced(32, n_experts=8, top_k=3, n_layers=2)

    assert coefficient_of_variation(record).values == pytest.approx([0, 0])
    assert max_violation(record).values == pytest.approx([0, 0])
    assert load_entropy(record).values == pytest.approx([1, 1])
    assert dead_experts(record).values.tolist() == [0, 0]


def test_collapse(records: Any) -> None:
    # One of 4 experts has all: loads 1, 0, 0, 0 have deviation sqrt((9 + 1 + 1 + 1)/16 / 4) = sqrt(3)/4, over mean 1/4.
    record = records.one_hot(10, n_experts=4)

    assert coefficient_of_variation(record).values == pytest.approx([math.sqrt(3)])
    assert max_violation(record).values.tolist() == [3]
    assert load_entropy(record).values.tolist() == [0]
    assert dead_experts(record).values.tolist() == [3]


def test_half_of_the_experts_dead(records: Any) -> None:
    record = records.half_dead(4000, n_experts=8, top_k=2)

    # All load on 4 of 8, nearly evenly: entropy ln 4 / ln 8 = 2/3, CV 1, MaxVio 1.
    assert dead_experts(record).values.tolist() == [4]
    assert dead_experts(record).values.dtype == np.int64
    assert load_entropy(record).values == pytest.approx([2 / 3], abs=1e-3)
    assert coefficient_of_variation(record).values == pytest.approx([1], abs=1e-2)
    assert max_violation(record).values == pytest.approx([1], abs=0.1)
    assert dead_experts(record).chance == pytest.approx([0], abs=1e-9)


def test_a_dead_expert_has_less_than_a_tenth_of_its_share(records: Any) -> None:
    # 40 tokens, 2 experts: a tenth of the fair share is 2 assignments, and that is not less.
    assert dead_experts(records.of([[[0]] * 38 + [[1]] * 2])).values.tolist() == [0]
    assert dead_experts(records.of([[[0]] * 39 + [[1]] * 1])).values.tolist() == [1]


@given(st.lists(st.integers(0, 12), min_size=2, max_size=9).filter(any))
@settings(deadline=None)
def test_balance_is_what_the_reports_of_training_say(records: Any, counts: list[int]) -> None:
    import torch

    record = records.of([np.repeat(np.arange(len(counts)), counts)[:, None]], n_experts=len(counts))
    summary = summarise_load(torch.tensor(counts))

    assert max_violation(record).values[0] == pytest.approx(summary.max_over_fair - 1)
    assert load_entropy(record).values[0] == pytest.approx(summary.entropy)
    assert dead_experts(record).values[0] == summary.dead


def test_max_violation_of_sequences_and_batches_is_a_mean_of_theirs(records: Any) -> None:
    # Sequences of 4 tokens on 2 experts with loads 4:0, 0:4, 3:1: violations 1, 1, 1/2. All together 7:5.
    selected = [[0]] * 4 + [[1]] * 4 + [[0]] * 3 + [[1]]
    record = records.of([selected], sequence=np.repeat([7, 3, 9], 4))

    assert max_violation(record).values == pytest.approx([7 / 12 * 2 - 1])
    assert max_violation(record, "sequence").values == pytest.approx([2.5 / 3])
    # Batches of two: the first two sequences balance each other, the third is alone.
    assert max_violation(record, "batch", batch_sequences=2).values == pytest.approx([(0 + 0.5) / 2])


def test_max_violation_refuses_what_it_does_not_know(records: Any) -> None:
    with pytest.raises(ValueError, match="over is step"):
        max_violation(records.one_hot(2, 2), "step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 sequences"):
        max_violation(records.one_hot(2, 2), "batch", 0)


# --------------------------------------------------------------------------------------------------- chance of balance

SHAPES = ((16, 2, 32), (16, 2, 256), (8, 1, 64), (4, 2, 64), (8, 7, 64), (64, 8, 64))
"""E, K, N: from 4 assignments an expert on"""


@pytest.mark.parametrize(("n_experts", "top_k", "n_tokens"), SHAPES)
def test_chance_of_balance_is_what_simulated_routing_gives(
    records: Any, n_experts: int, top_k: int, n_tokens: int
) -> None:
    shape = (n_tokens, n_experts, top_k)
    record = records.uniform(*shape)

    # 300 simulations know the mean to about 1.5 %.
    for measure in (max_violation, coefficient_of_variation):
        expected = mean_of_simulations(records, measure, *shape)
        assert measure(record).chance == pytest.approx([expected], rel=0.045)
    assert load_entropy(record).chance == pytest.approx([mean_of_simulations(records, load_entropy, *shape)], abs=0.004)


def test_chance_of_max_violation_with_few_assignments(records: Any) -> None:
    # 1 assignment an expert: the normal approximation and its skewness are 4 % too large.
    simulated = mean_of_simulations(records, max_violation, 8, 16, 2, n=2000)

    assert max_violation(records.uniform(8, 16, 2)).chance == pytest.approx([simulated], rel=0.08)


def test_the_rule_of_thumb_for_max_violation_is_too_large(records: Any) -> None:
    # 0.147 for 2048 tokens, 2 of 16 experts (n = 256): for many tokens it is sqrt(2 ln 16) = 2.355 against the largest
    # of 16 normals, 1.766 on average, times sqrt(16/15) as their sum is fixed and sqrt(7/8) as no expert comes twice.
    rule = math.sqrt(2 * math.log(16) / 256)
    chance = max_violation(records.uniform(2048, 16, 2)).chance
    simulated = mean_of_simulations(records, max_violation, 2048, 16, 2, n=200)

    assert rule == pytest.approx(0.147, abs=1e-3)
    assert rule / chance == pytest.approx([2.355 / (1.766 * math.sqrt(16 / 15 * 7 / 8))], rel=0.02)
    assert rule / simulated == pytest.approx(1.38, rel=0.045)


def test_chance_counts_the_experts_that_tokens_have(records: Any) -> None:
    # Half of the tokens hold 1 expert of 8, half 3: variance n (1/8 · 7/8 + 3/8 · 5/8)/2 = n · 22/128, not that of 2.
    def mixed(seed: int) -> Record:
        places = records.uniform(200, 8, 3, seed=seed).layers[0].selected.copy()
        places[::2, 1:] = EMPTY
        return records.of([places], 8)

    simulated = np.mean([coefficient_of_variation(mixed(seed)).values[0] for seed in range(300)])
    # s = sqrt(200 · 22/128)/(200/4); 0.965 is sqrt(2/7) Γ(4)/Γ(3.5).
    by_hand = math.sqrt(200 * 22 / 128) / 50 * 0.96503

    assert coefficient_of_variation(mixed(0)).chance == pytest.approx([by_hand], rel=1e-4)
    assert by_hand == pytest.approx(simulated, rel=0.045)


def test_chance_of_max_violation_in_sequences_is_that_of_their_lengths(records: Any) -> None:
    lengths = [16, 16, 64]
    sequence = np.repeat(np.arange(3), lengths)
    each = [float(max_violation(records.uniform(length, 8, 2)).chance[0]) for length in lengths]

    assert max_violation(records.uniform(96, 8, 2, sequence=sequence), "sequence").chance == pytest.approx(
        [np.mean(each)]
    )


def test_chance_of_dead_experts(records: Any) -> None:
    # 20 tokens, 1 of 8 experts: less than 0.1 · 20/8 = 0.25 assignments is none at all, 8 (7/8)^20 experts.
    record = records.uniform(20, 8, 1)

    assert dead_experts(record).chance == pytest.approx([8 * (7 / 8) ** 20])
    assert mean_of_simulations(records, dead_experts, 20, 8, 1, n=1000) == pytest.approx(8 * (7 / 8) ** 20, rel=0.1)
    # At half the fair share: less than 5 of a binomial count of 40 tokens, q = 1/4, that is 0.01604 times 4.
    binomial = sum(math.comb(40, count) * 0.25**count * 0.75 ** (40 - count) for count in range(5))
    assert dead_experts(records.uniform(40, 4, 1), 0.5).chance == pytest.approx([4 * binomial])


# ---------------------------------------------------------------------------------------------------------- each token


def test_router_entropy_is_that_of_a_token_and_load_entropy_that_of_all(records: Any) -> None:
    # The router is sure of every token, and the tokens use both experts.
    record = records.of([[[0], [1]]], scores=[[[1, 0], [0, 1]]])

    assert router_entropy(record).values.tolist() == [0]
    assert load_entropy(record).values == pytest.approx([1])


def test_router_entropy_divides_scores_by_their_sum(records: Any) -> None:
    # Sigmoid scores 0.5, 0.25, 0.25, 0 are probabilities 1/2, 1/4, 1/4: 1.5 ln 2 over ln 4. The second token has none.
    record = records.of([[[0], [1]]], n_experts=4, scores=[[[0.5, 0.25, 0.25, 0], [0, 0, 0, 0]]])

    assert router_entropy(record).values == pytest.approx([0.75])
    doubled = replace(record, layers=(replace(record.layers[0], scores=2 * record.layers[0].scores),))
    assert router_entropy(doubled).values == pytest.approx([0.75])


def test_router_entropy_without_scores_says_so(records: Any) -> None:
    measured = router_entropy(records.one_hot(3, 4))

    assert np.isnan(measured.values).all()
    assert "not recorded" in measured.reading


def test_experts_per_token(records: Any) -> None:
    record = records.of([[[0, 1, 2], [1, EMPTY, EMPTY], [3, 0, EMPTY], [EMPTY, EMPTY, EMPTY]], [[0, 1]] * 4], 4)

    assert experts_per_token(record).values.tolist() == [6 / 4, 2]
    distribution = experts_per_token_distribution(record)
    assert np.array_equal(distribution.values, [[0.25, 0.25, 0.25, 0.25], [0, 0, 1, math.nan]], equal_nan=True)
    # Binomial: 4 experts, each with probability 1.5/4 = 3/8; none with (5/8)^4, and with 1/2: 6 · (1/2)^4.
    assert distribution.chance is not None
    assert distribution.chance[0, 0] == pytest.approx((5 / 8) ** 4)
    assert distribution.chance[1, 2] == pytest.approx(6 / 16)


def test_experts_that_take_tokens_at_random_reach_the_chance_distribution(records: Any) -> None:
    taken = np.random.default_rng(0).random((20000, 6)) < 0.3
    record = records.of([np.where(taken, np.arange(6), EMPTY)], 6)

    measured = experts_per_token_distribution(record)

    assert measured.values == pytest.approx(np.asarray(measured.chance), abs=0.01)


# --------------------------------------------------------------------------------------------------------------- drops


def dropping(records: Any) -> Record:
    """Two sequences of two tokens; of 7 assignments 3 are dropped: a second choice, and both choices of the last."""
    return records.of(
        [[[0, 1], [0, EMPTY], [1, 2], [0, 2]]],
        dropped=[[[False, True], [False, True], [False, False], [True, True]]],
        sequence=[0, 0, 1, 1],
        domain=[1, 1, 0, 0],
        domains=("prose", "code", "never seen"),
    )


def test_drop_rate_is_of_assignments_and_an_empty_place_is_none(records: Any) -> None:
    measured = drop_rate(dropping(records))

    assert measured.values == pytest.approx([3 / 7])
    assert measured.chance is None


def test_drop_rate_by_rank_position_and_domain(records: Any) -> None:
    record = dropping(records)

    by_rank, by_position, by_domain = (drop_rate(record, by) for by in ("rank", "position", "domain"))

    assert by_rank.values == pytest.approx(np.array([[1 / 4, 2 / 3]]))
    assert by_position.values == pytest.approx(np.array([[1 / 4, 2 / 3]]))
    assert by_domain.values == pytest.approx(np.array([[2 / 4, 1 / 3, math.nan]]), nan_ok=True)
    for measured in (by_rank, by_position, by_domain):
        assert measured.chance == pytest.approx(np.array([[3 / 7]]))


def test_drop_rate_of_layers_with_different_numbers_of_places(records: Any) -> None:
    record = records.of([[[0], [1]], [[0, 1], [1, 0]]], dropped=[[[True], [False]], [[False, True], [False, True]]])

    assert drop_rate(record, "rank").values == pytest.approx(np.array([[0.5, math.nan], [0, 1]]), nan_ok=True)


def test_position_bins_are_of_equal_width(records: Any) -> None:
    # 10 positions in 4 bins of 2.5: 0-2, 3-4, 5-7, 8-9. The last two positions are dropped.
    record = records.of([[[0]] * 10], dropped=[[[False]] * 8 + [[True]] * 2])

    measured = drop_rate(record, "position", bins=4)

    assert measured.axes[1].labels == ("0", "3", "5", "8")
    assert measured.values.tolist() == [[0, 0, 0, 1]]


def test_drop_rate_refuses_what_it_does_not_know(records: Any) -> None:
    with pytest.raises(ValueError, match="by is token"):
        drop_rate(records.one_hot(2, 2), "token")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 bins"):
        drop_rate(records.one_hot(2, 2), "position", bins=0)


# ---------------------------------------------------------------------------------------------------- along a sequence


def test_neighbours_are_of_one_sequence_and_of_consecutive_positions(records: Any) -> None:
    # Sequence 0: experts 0 0 1 | 1 (a position is missing), sequence 1 goes on at the next position: 1 1. Of the
    # neighbours 00, 01, 11 two agree.
    record = records.of([[[0], [0], [1], [1], [1], [1]]], sequence=[0, 0, 0, 0, 1, 1], position=[0, 1, 2, 9, 10, 11])

    assert consecutive_repetition(record).values == pytest.approx([2 / 3])


def test_any_is_whatever_the_ranks(records: Any) -> None:
    # First choices 0, 1, 2, 2: one of three. Sets {0,1} {1,2} {2,3} {2,0}: all three pairs meet.
    record = records.of([[[0, 1], [1, 2], [2, 3], [2, 0]]])

    assert consecutive_repetition(record).values == pytest.approx([1 / 3])
    assert consecutive_repetition(record, "any").values.tolist() == [1]


def test_experts_beyond_the_bits_of_a_word_are_told_apart(records: Any) -> None:
    # 3 and 67 = 64 + 3 have the same bit in different words.
    record = records.of([[[3, 70], [67, 69], [130, 67]]], 131)

    assert consecutive_repetition(record, "any").values.tolist() == [0.5]


def test_tokens_without_expert_have_no_neighbours(records: Any) -> None:
    record = records.of([[[0, EMPTY], [EMPTY, EMPTY], [0, 1], [EMPTY, 1], [1, 0]]])

    # Pairs with experts on both sides: (2, 3) and (3, 4); the first choice of token 3 is 1, its only one.
    assert first_choice(record.layers[0]).tolist() == [0, EMPTY, 0, 1, 1]
    assert consecutive_repetition(record).values == pytest.approx([0.5])
    assert consecutive_repetition(record, "any").values.tolist() == [1]


@pytest.mark.parametrize(("n_experts", "top_k", "published"), [(8, 2, 0.46), (16, 2, 0.242)])
def test_chance_of_sharing_an_expert_is_as_published(
    records: Any, n_experts: int, top_k: int, published: float
) -> None:
    record = records.uniform(20000, n_experts, top_k)
    # Counted over all pairs of sets: for 8 experts 13 of 28 meet a given one, for 16 29 of 120.
    sets = [set(chosen) for chosen in combinations(range(n_experts), top_k)]
    counted = np.mean([bool(sets[0] & other) for other in sets])

    measured = consecutive_repetition(record, "any", permutations=2)

    assert measured.chance == pytest.approx([published], abs=0.005)
    assert measured.chance == pytest.approx([counted])
    assert measured.values == pytest.approx([counted], abs=0.015)


def test_chance_of_the_same_first_choice_is_as_published(records: Any) -> None:
    # Mixtral, 8 experts: 12.5 % where balanced. At loads 1/2, 1/4, 1/4: 1/4 + 1/16 + 1/16 = 3/8.
    assert consecutive_repetition(records.balanced(64, 8, 2)).chance == pytest.approx([0.125])
    assert consecutive_repetition(records.of([[[0], [0], [1], [2]]])).chance == pytest.approx([3 / 8])


def test_chance_of_overlap_with_varying_numbers_of_experts(records: Any) -> None:
    # Of 4 experts, neighbours that hold 2 and 1: 1 - C(2,1)/C(4,1) = 1/2; 1 and 3: 1 - C(3,3)/C(4,3) = 3/4.
    record = records.of([[[0, 1, EMPTY], [2, EMPTY, EMPTY], [0, 1, 3]]], 4)

    assert consecutive_repetition(record, "any").chance == pytest.approx([(1 / 2 + 3 / 4) / 2])


def test_runs_are_above_the_null_and_shuffled_sequences_are_not(records: Any) -> None:
    # Runs of two tokens: half of the pairs are within a run, the others are at chance: 1/2 + 1/2 · 1/4.
    choice = np.random.default_rng(0).integers(0, 4, 2000).repeat(2)
    sequence = np.arange(4000) // 100
    runs = consecutive_repetition(records.of([choice[:, None]], sequence=sequence))
    # A text of its own expert: all pairs agree, and as much after a shuffle.
    texts = consecutive_repetition(records.of([(sequence % 4)[:, None]], sequence=sequence))

    assert runs.values == pytest.approx([1 / 2 + 1 / 8], abs=0.03)
    assert runs.null is not None
    assert runs.null == pytest.approx([1 / 4], abs=0.02)
    assert texts.values.tolist() == [1]
    assert texts.null == pytest.approx([1])
    assert texts.chance == pytest.approx([1 / 4])


def test_repetition_refuses_what_it_does_not_know(records: Any) -> None:
    with pytest.raises(ValueError, match="choice is second"):
        consecutive_repetition(records.one_hot(2, 2), "second")  # type: ignore[arg-type]


def test_position_that_decides_the_expert(records: Any) -> None:
    # Positions 0-3 go to expert 0, 4-7 to expert 1: two bins tell all, one bin nothing.
    places = [[0]] * 4 + [[1]] * 4
    record = records.of([places * 20], sequence=np.repeat(np.arange(20), 8))

    measured = position_dependence(record, bins=2)

    assert measured.values == pytest.approx([1])
    assert measured.null is not None
    assert measured.null < 0.2
    assert position_dependence(record, bins=1).values == pytest.approx([0])


def test_position_dependence_of_routing_at_random_is_its_bias(records: Any) -> None:
    # 20 sequences of 64 tokens, 2 of 8 experts: (16 - 1)(8 - 1)/(2 · 2560) · (8 - 2)/(8 - 1) / ln 8 = 0.00845.
    sequence = np.repeat(np.arange(20), 64)
    measured = [position_dependence(records.uniform(1280, 8, 2, seed=seed, sequence=sequence)) for seed in range(30)]

    mean = np.mean([one.values[0] for one in measured])
    assert measured[0].chance == pytest.approx([0.00845], rel=0.01)
    assert mean == pytest.approx(0.00845, rel=0.08)
    assert np.mean([one.null for one in measured]) == pytest.approx(mean, rel=0.08)


def test_the_null_of_position_moves_stretches_whole(records: Any) -> None:
    # Each eighth of each sequence has an expert at random: position tells nothing, but looks as if. Independent tokens
    # would give (8 - 1)(8 - 1)/(2 · 640)/ln 8 = 0.018 only.
    sequence = np.repeat(np.arange(10), 64)
    stretch = np.random.default_rng(0).integers(0, 8, 80).repeat(8)
    measured = position_dependence(records.of([stretch[:, None]], 8, sequence=sequence), bins=8)

    assert measured.null is not None
    assert measured.null_std is not None
    assert measured.chance == pytest.approx([0.0184], rel=0.05)
    assert measured.values[0] > 0.15
    assert abs(measured.values[0] - measured.null[0]) < 3 * measured.null_std[0]


# ---------------------------------------------------------------------------------------------------------------- laws


@st.composite
def tables_of_choices(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """[N, K] different experts a token, some places empty, and E."""
    n_experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, n_experts))
    rows = draw(
        st.lists(st.permutations(range(n_experts)).map(lambda order: list(order[:top_k])), min_size=1, max_size=12)
    )
    places = np.array(rows, np.int32)
    empty = np.random.default_rng(draw(st.integers(0, 9))).random(places.shape) < draw(st.sampled_from([0, 0.3]))
    return np.where(empty, EMPTY, places), n_experts


def whole(records: Any, places: np.ndarray, n_experts: int) -> Record:
    n_tokens = len(places)
    generator = np.random.default_rng(n_tokens)
    return records.of(
        [places],
        n_experts,
        sequence=np.arange(n_tokens) // 3,
        domain=np.arange(n_tokens) // 3 % 2,
        domains=("a", "b"),
        dropped=[generator.random(places.shape) < 0.3],
        scores=[generator.random((n_tokens, n_experts))],
    )


@given(tables_of_choices(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_numbering_the_experts_anew_changes_only_their_order(records: Any, drawn: Any, random: Any) -> None:
    places, n_experts = drawn
    new_number = list(range(n_experts))
    random.shuffle(new_number)
    record = whole(records, places, n_experts)
    layer = record.layers[0]
    renamed = np.where(places == EMPTY, EMPTY, np.array(new_number)[places])
    scores = np.empty_like(layer.scores)
    scores[:, new_number] = layer.scores
    other = replace(record, layers=(replace(layer, selected=renamed.astype(np.int32), scores=scores),))

    for name, measure in ALL.items():
        one, two = measure(record), measure(other)
        expected = one.values
        if name == "load":
            expected = np.empty_like(one.values)
            expected[:, new_number] = one.values
        assert two.values == pytest.approx(expected, nan_ok=True), name
        if one.chance is not None:
            assert two.chance == pytest.approx(one.chance, nan_ok=True), name


@given(tables_of_choices())
@settings(max_examples=40, deadline=None)
def test_a_record_read_twice_has_the_same_values(records: Any, drawn: Any) -> None:
    record = whole(records, *drawn)

    def twice(column: Any) -> Any:
        return np.concatenate([column, column])

    layer = record.layers[0]
    columns = {name: twice(getattr(record, name)) for name in ("token_id", "target_id", "predicted_id", "loss")}
    columns |= {name: twice(getattr(record, name)) for name in ("position", "domain")}
    doubled = Record(
        **columns,
        sequence=np.concatenate([record.sequence, record.sequence + record.sequence.max() + 1]),
        domains=record.domains,
        layers=(
            Layer(
                0,
                layer.n_experts,
                *(twice(getattr(layer, name)) for name in ("selected", "weights", "dropped", "scores")),
            ),
        ),
    )

    for name, measure in ALL.items():
        if name != "max_violation by batch":  # A batch may hold the end of one copy and the start of the other.
            assert measure(doubled).values == pytest.approx(measure(record).values, nan_ok=True), name


@given(tables_of_choices())
@settings(max_examples=40, deadline=None)
def test_loads_add_up_and_bounds_hold(records: Any, drawn: Any) -> None:
    places, n_experts = drawn
    record = whole(records, places, n_experts)
    if not record.layers[0].assigned.any():
        assert np.isnan(load(record).values).all()
        return

    assert load(record).values.sum() == pytest.approx(1)
    assert experts_per_token_distribution(record).values.sum() == pytest.approx(1)
    variation, violation = coefficient_of_variation(record).values[0], max_violation(record).values[0]
    assert 0 <= variation <= math.sqrt(n_experts - 1) + 1e-9
    assert -1e-9 <= violation <= n_experts - 1 + 1e-9
    for measure in (load_entropy, router_entropy):
        assert -1e-6 <= measure(record).values[0] <= 1 + 1e-6
    if len(places) % 3 == 0 and record.layers[0].assigned.all():
        # The largest of means is at most the mean of the largest.
        assert max_violation(record, "sequence").values[0] >= violation - 1e-9


def test_all_of_it_on_a_record_without_tokens(records: Any) -> None:
    record = records.of([np.zeros((0, 2), np.int32)], 4, scores=[np.zeros((0, 4))])

    for name, measure in ALL.items():
        if name != "dead_experts":
            assert np.isnan(measure(record).values).all(), name
    assert dead_experts(record).values.tolist() == [4]


def test_chunks_change_nothing(records: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record = whole(records, records.half_dead(50, 8, 3).layers[0].selected, 8)
    before = {name: measure(record) for name, measure in ALL.items()}
    monkeypatch.setattr(metrics, "chunks", lambda n_rows, size=0: (slice(at, at + 7) for at in range(0, n_rows, 7)))

    for name, measure in ALL.items():
        assert measure(record).values == pytest.approx(before[name].values, nan_ok=True), name
        if before[name].chance is not None:
            assert measure(record).chance == pytest.approx(before[name].chance, nan_ok=True), name
