"""Experts matched by co-routing, metrics side by side, and intervals over seeds."""

import dataclasses
import math

import numpy as np
import pytest

from moe.errors import UserError
from moe.study.compare import (
    UNMATCHED,
    Spread,
    agreement,
    co_routing,
    compare,
    loss_difference,
    match_experts,
    over_seeds,
    paired_differences,
    partner_overlap,
    renumber,
    require_same_tokens,
    side_by_side,
    table,
)
from moe.study.measurement import Axis, Measurement
from moe.study.metrics.load import load
from moe.study.record import EMPTY


def shuffled_experts(record, seed=0):
    """The same routing with its experts under other numbers: (the record, for each layer the new number of each)."""
    generator = np.random.default_rng(seed)
    numbers, layers = [], []
    for layer in record.layers:
        new = generator.permutation(layer.n_experts).astype(np.int32)
        numbers.append(new)
        scores = None if layer.scores is None else layer.scores[:, np.argsort(new)]
        layers.append(
            dataclasses.replace(
                layer,
                selected=np.where(layer.selected == EMPTY, EMPTY, new[layer.selected]).astype(np.int32),
                scores=scores,
            )
        )
    return dataclasses.replace(record, layers=tuple(layers)), numbers


def number(value, name="loss", axes=()):
    return Measurement(name, name, "", np.asarray(value, np.float64), axes, chance=np.array(0.5))


# ------------------------------------------------------------------------------------------------------------- matching


def test_co_routing_counts_the_tokens_of_each_pair_of_experts(records):
    one = records.of([[[0, 1], [0, 2], [1, EMPTY]]], 3)
    other = records.of([[[1, 0], [1, 2], [1, 2]]], 3)
    # Token 0: 0 and 1 with 1 and 0; token 1: 0 and 2 with 1 and 2; token 2: 1 alone with 1 and 2.
    expected = [[1, 2, 1], [1, 2, 1], [0, 1, 1]]
    np.testing.assert_array_equal(co_routing(one.layers[0], other.layers[0]), expected)


def test_the_same_experts_under_other_numbers_are_found(records):
    record = records.uniform(400, 8, 2, n_layers=3)
    other, numbers = shuffled_experts(record)
    matching = match_experts(record, other)
    for block, new in enumerate(numbers):
        np.testing.assert_array_equal(matching.of(block), new)
    for layer, its_other in zip(record.layers, renumber(other, matching).layers, strict=True):
        np.testing.assert_array_equal(layer.selected, its_other.selected)


def test_the_matching_is_the_best_of_all_and_not_a_greedy_one(records):
    # Pairs (0, 0) 3 times, (0, 1) 2 times, (1, 0) 2 times: greedy takes (0, 0) and (1, 1), 3 tokens; the best is 4.
    one = records.of([[[0]] * 5 + [[1]] * 2], 2)
    other = records.of([[[0]] * 3 + [[1]] * 2 + [[0]] * 2], 2)
    np.testing.assert_array_equal(match_experts(one, other).of(0), [1, 0])


def test_an_expert_without_a_partner_has_none_and_comes_last(records):
    one = records.of([[[0], [0], [1], [1]]], 2)
    other = records.of([[[2], [2], [0], [1]]], 3, scores=[[[0.1, 0.2, 0.7]] * 4])
    matching = match_experts(one, other)
    np.testing.assert_array_equal(matching.of(0), [2, 0])
    layer = renumber(other, matching).layers[0]
    np.testing.assert_array_equal(layer.selected, [[0], [0], [1], [2]])
    np.testing.assert_allclose(layer.scores[0], [0.7, 0.1, 0.2], rtol=1e-3)
    np.testing.assert_array_equal(match_experts(other, one).of(0), [1, UNMATCHED, 0])


def test_empty_places_stay_empty(records):
    one = records.of([[[0, 1], [1, EMPTY]]], 2)
    other = records.of([[[1, 0], [0, EMPTY]]], 2)
    np.testing.assert_array_equal(renumber(other, match_experts(one, other)).layers[0].selected, [[0, 1], [1, EMPTY]])


def test_only_blocks_that_are_mixtures_in_both_are_matched(records):
    one = records.of([[[0], [1]], [[0], [1]]], 2, blocks=[0, 2])
    other = records.of([[[1], [0]], [[1], [0]]], 2, blocks=[1, 2])
    assert match_experts(one, other).blocks == (2,)
    np.testing.assert_array_equal(renumber(other, match_experts(one, other)).layers[0].selected, [[1], [0]])
    with pytest.raises(KeyError):
        match_experts(one, other).of(1)
    with pytest.raises(UserError, match="no block is a mixture in both"):
        match_experts(one, dataclasses.replace(other, layers=other.layers[:1]))


# ------------------------------------------------------------------------------------------------------------ agreement


def test_agreement_before_and_after_matching_by_hand(records):
    # As numbered, of 8 assignments only the second of token 1 agrees. Matched 0 to 1 and 1 to 0, tokens 0, 2 and 3 do.
    one = records.of([[[0], [1], [0], [1]]], 2)
    other = records.of([[[1], [1], [1], [0]]], 2)
    measured = agreement(one, other)
    np.testing.assert_allclose(measured.values, [[1 / 4, 3 / 4]])
    assert measured.axes[1].labels == ("as numbered", "matched")


def test_agreement_of_two_experts_a_token_is_the_share_that_both_have(records):
    one = records.of([[[0, 1], [2, 3]]], 4)
    other = records.of([[[1, 0], [3, 1]]], 4)
    # Token 0 has both in common, whatever their order, token 1 one of two.
    assert agreement(one, other).values[0, 0] == pytest.approx(3 / 4)


def test_routers_that_know_nothing_agree_by_chance_and_not_more(records):
    one, other = records.uniform(3000, 8, 2, seed=1), records.uniform(3000, 8, 2, seed=2)
    measured = agreement(one, other)
    numbered, matched = measured.values[0]
    assert measured.chance[0, 0] == pytest.approx(2 / 8)
    # The deviation of the mean of |A ∩ B|/2 is sqrt(0.0357/3000) = 0.0034 (hypergeometric with 2 of 8 and 2 draws).
    assert numbered == pytest.approx(1 / 4, abs=0.0138)
    assert measured.chance[0, 1] > 0.25
    assert matched == pytest.approx(measured.null[0, 1], abs=5 * measured.null_std[0, 1])


@pytest.mark.parametrize(("n_tokens", "n_experts", "top_k"), [(500, 8, 2), (3000, 16, 1), (200, 4, 3)])
def test_the_chance_of_matching_is_what_simulated_routers_give(records, n_tokens, n_experts, top_k):
    found = []
    for seed in range(60):
        one = records.uniform(n_tokens, n_experts, top_k, seed=2 * seed)
        other = records.uniform(n_tokens, n_experts, top_k, seed=2 * seed + 1)
        joint = co_routing(one.layers[0], other.layers[0])
        partners = match_experts(one, other).of(0)
        found.append(sum(joint[expert, partner] for expert, partner in enumerate(partners)) / (n_tokens * top_k))
    error = np.std(found) / math.sqrt(len(found))
    chance = agreement(one, other, draws=400).chance[0, 1]
    excess = np.mean(found) - top_k / n_experts
    # Counts are taken as normal: of what matching finds by luck that is 5 % too little at 12 tokens a pair of experts.
    assert chance - top_k / n_experts == pytest.approx(excess, abs=0.06 * excess + 4 * error)
    assert excess > 20 * error


def test_uneven_load_raises_the_null_and_not_the_chance(records):
    # Both send 9 of 10 tokens to expert 0, not the same ones: of 10 tokens 8 agree by their loads alone.
    generator = np.random.default_rng(0)
    one, other = (records.of([(generator.random((5000, 1)) < 0.1).astype(int)], 2) for _ in range(2))
    measured = agreement(one, other)
    assert measured.chance[0, 0] == pytest.approx(0.5)
    assert measured.null[0, 0] == pytest.approx(0.9 * 0.9 + 0.1 * 0.1, abs=0.01)
    assert measured.values[0, 1] == pytest.approx(measured.null[0, 1], abs=5 * measured.null_std[0, 1])


def test_overlap_of_partners_is_of_the_tokens_of_either(records):
    one = records.of([[[0], [0], [0], [1]]], 2)
    other = records.of([[[1], [1], [0], [0]]], 2)
    measured = partner_overlap(one, other, match_experts(one, other))
    # Expert 0 and its partner 1: 2 tokens of both, 3 of either. Expert 1 and its partner 0: 1 of both, 2 of either.
    np.testing.assert_allclose(measured.values, [[2 / 3, 1 / 2]])


@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 1), (16, 2), (16, 4)])
def test_chance_of_partners_is_what_matching_finds_in_routing_that_knows_nothing(records, n_experts, top_k):
    # Unmatched experts of a share p would share p/(2 - p): 0.067 for 2 of 16, where partners share 0.11.
    found, chance = [], []
    for seed in range(10):
        one, other = (records.uniform(400, n_experts, top_k, seed=number) for number in (seed, seed + 100))
        measured = partner_overlap(one, other, match_experts(one, other))
        found.append(measured.values.mean())
        chance.append(measured.chance.mean())
    assert np.mean(chance) == pytest.approx(np.mean(found), rel=0.05)


@pytest.mark.parametrize("column", ["token_id", "target_id", "sequence", "position"])
def test_records_of_different_tokens_are_refused_in_one_line(records, column):
    record = records.uniform(6, 4, 1, source="runs/a")
    changed = getattr(record, column).copy()
    changed[3] += 1
    other = dataclasses.replace(record, **{column: changed}, source="runs/b")
    with pytest.raises(UserError, match=r"^runs/a and runs/b: their records are of different tokens") as error:
        compare(record, other)
    assert "\n" not in str(error.value)


def test_records_of_different_domains_are_refused(records):
    record = records.uniform(4, 4, 1, domains=("a", "b"), domain=[0, 0, 1, 1])
    require_same_tokens((record, record))
    with pytest.raises(UserError, match="different tokens"):
        require_same_tokens((record, dataclasses.replace(record, domains=("a", "c"))))


# --------------------------------------------------------------------------------------------------------- side by side


def test_a_metric_side_by_side_has_matched_experts_under_one_number(records):
    record = records.of([[[0], [0], [0], [1]]], 2)
    other = records.of([[[1], [1], [1], [0]]], 2)
    both = compare(record, other, ("a", "b")).side_by_side(load)
    assert [axis.name for axis in both.axes] == ["run", "layer", "expert"]
    np.testing.assert_allclose(both.values, [[[3 / 4, 1 / 4]]] * 2)
    np.testing.assert_allclose(both.chance, 1 / 2)


def test_models_of_other_shapes_go_into_a_table(records):
    one, other = records.of([[[0], [1]]], 2), records.of([[[0], [2]]], 3)
    pair = compare(one, other, ("a", "b")).measure(load)
    with pytest.raises(ValueError, match="other axes"):
        side_by_side(pair, ("a", "b"))
    frame = table(*pair, ("a", "b"))
    assert list(frame.columns) == ["metric", "layer", "expert", "a", "b", "difference", "chance"]
    np.testing.assert_allclose(frame["a"], [0.5, 0.5, np.nan])
    np.testing.assert_allclose(frame["b"], [0.5, 0.5, 0.0])


def test_a_single_number_has_a_table_of_one_row():
    frame = table(number(1.0), number(3.0), ("a", "b"))
    assert frame["difference"].tolist() == [2.0]


# ---------------------------------------------------------------------------------------------------------------- seeds


def test_the_interval_over_seeds_is_students():
    # 1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.303 (any table), half width 4.303/sqrt(3) = 2.484.
    (spread,) = over_seeds([[number([value], axes=(Axis("layer", ("0",)),))] for value in (1.0, 2.0, 3.0)])
    np.testing.assert_allclose(spread.mean.values, [2.0])
    np.testing.assert_allclose(spread.half_width, [2.484], atol=5e-4)
    assert spread.n == 3
    frame = spread.frame()
    assert list(frame.columns) == ["layer", "mean", "low", "high", "n", "chance"]
    assert frame["low"][0] == pytest.approx(-0.484, abs=1e-3)
    assert frame["chance"][0] == 0.5


def test_metrics_of_numbered_experts_are_not_averaged_over_seeds():
    of_experts = number([1.0, 2.0], "load", (Axis("expert", ("0", "1")),))
    other_axes = number([1.0], "paths", (Axis("layer", ("7",)),))
    runs = [
        [number(1.0), of_experts, number([1.0], "paths", (Axis("layer", ("0",)),))],
        [number(2.0), of_experts, other_axes],
    ]
    assert [spread.mean.name for spread in over_seeds(runs)] == ["loss"]


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="at least 2"):
        over_seeds([[number(1.0)]])


def test_what_pairs_share_cancels():
    # Seeds differ by far more than the arms: 1, 5, 9 against 1.5, 5.6, 9.4. Differences 0.5, 0.6, 0.4: mean 0.5, s 0.1.
    ones = [[number(value)] for value in (1.0, 5.0, 9.0)]
    others = [[number(value)] for value in (1.5, 5.6, 9.4)]
    (spread,) = paired_differences(ones, others)
    assert spread.mean.values == pytest.approx(0.5)
    assert spread.half_width == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert spread.differs
    assert spread.mean.chance == 0
    apart = over_seeds([*ones])[0], over_seeds([*others])[0]
    assert apart[0].high > apart[1].low


def test_a_wide_interval_shows_no_difference():
    assert not Spread(number(0.3), np.array(0.4), 3).differs


def test_pairs_need_two_sides_of_one_length():
    with pytest.raises(ValueError, match="2 and 1"):
        paired_differences([[number(1.0)]] * 2, [[number(1.0)]])


def test_loss_difference_counts_sequences_and_not_tokens(records):
    # Two sequences of 50 tokens, all tokens of one 0.1 worse and of the other 0.3: two observations, not a hundred.
    losses = np.repeat([0.1, 0.3], 50)
    one = records.uniform(100, 4, 1, sequence=np.repeat([0, 1], 50), loss=np.zeros(100))
    other = dataclasses.replace(one, loss=losses.astype(np.float32))
    spread = loss_difference(one, other)
    assert spread.mean.axes[0].labels == ("all text", "a")
    np.testing.assert_allclose(spread.mean.values, [0.2, 0.2], rtol=1e-6)
    # Standard error 0.1 (deviation 0.1414 over sqrt 2), t(0.975, 1) = 12.706.
    np.testing.assert_allclose(spread.half_width, 1.2706, rtol=1e-3)
    assert spread.n == 2


def test_a_domain_of_one_sequence_has_a_mean_and_no_interval(records):
    one = records.uniform(6, 4, 1, sequence=[0, 0, 1, 1, 2, 2], domain=[0, 0, 0, 0, 1, 1])
    spread = loss_difference(one, dataclasses.replace(one, loss=one.loss + 1))
    np.testing.assert_allclose(spread.mean.values, 1)
    assert np.isnan(spread.half_width).tolist() == [False, False, True]
