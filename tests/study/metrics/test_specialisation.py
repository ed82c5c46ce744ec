"""Planted domains and vocabularies, with shares worked out by hand and nulls by simulation."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.study.measurement import Measurement
from moe.study.metrics.specialisation import (
    domain_information,
    domain_max_violation,
    domain_specialisation,
    token_dependence,
    typical_tokens,
    vocabulary_specialisation,
)
from moe.study.record import EMPTY, Record


def random_places(generator: np.random.Generator, n: int, n_experts: int, top_k: int) -> np.ndarray:
    return generator.random((n, n_experts)).argsort(axis=1)[:, :top_k]


def within_null(measurement: Measurement, deviations: float = 3) -> np.ndarray:
    assert measurement.null is not None
    assert measurement.null_std is not None
    return np.abs(measurement.values - measurement.null) <= deviations * measurement.null_std


# ------------------------------------------------------------------------------------------------------------- domains


def test_domain_specialisation_divides_by_the_tokens_of_the_domain(records: Any) -> None:
    # Domain a has three tokens: expert 0 thrice, 1 twice, 2 once; domain b one token: experts 2 and 3.
    record = records.of([[[0, 1], [1, 0], [0, 2], [3, 2]]], 4, domain=[0, 0, 0, 1])

    measured = domain_specialisation(record)

    assert measured.values[0] == pytest.approx(np.array([[1, 2 / 3, 1 / 3, 0], [0, 0, 1, 1]]))
    assert measured.chance is not None
    assert measured.chance.item() == 0.5  # K/E = 2/4
    assert [axis.name for axis in measured.axes] == ["layer", "domain", "expert"]


def test_domain_specialisation_of_layers_with_different_numbers_of_experts(records: Any) -> None:
    record = records.of([[[0], [1]], [[2], [2]]], [2, 3], blocks=[1, 4], domain=[0, 1])

    measured = domain_specialisation(record)

    assert measured.values[0, 0].tolist() == pytest.approx([1, 0, math.nan], nan_ok=True)
    assert measured.values[1, 0].tolist() == [0, 0, 1]
    assert measured.axes[0].labels == ("1", "4")
    assert measured.chance is not None
    assert measured.chance.ravel() == pytest.approx([1 / 2, 1 / 3])


def test_a_token_with_fewer_experts_than_places_lowers_chance(records: Any) -> None:
    # 3 assignments of 2 tokens: 1.5 of 4 experts on average.
    record = records.of([[[0, 1], [2, EMPTY]]], 4, domain=[0, 0])

    measured = domain_specialisation(record)

    assert measured.values[0, 0].tolist() == [0.5, 0.5, 0.5, 0]
    assert measured.chance is not None
    assert measured.chance.item() == 1.5 / 4


def test_a_domain_without_tokens_has_nothing_to_measure(records: Any) -> None:
    record = records.of([[[0], [1]]], 2, domain=[0, 2])

    assert np.isnan(domain_specialisation(record).values[0, 1]).all()
    assert np.isnan(domain_max_violation(record).values[0, 1])


def planted_domains(records: Any, purity: float = 1.0, seed: int = 0) -> Record:
    """40 sequences of 50 tokens in 4 domains; the ``purity`` part of domain d goes to experts 2d and 2d + 1."""
    return records.planted(4, 2, 2, purity=purity, n_token_ids=5, seed=seed)


def test_experts_planted_in_domains_tell_all_of_the_domain(records: Any) -> None:
    record = planted_domains(records)

    information = domain_information(record)

    # Ids are the same in all domains, so that they tell nothing: all is left once the id is known.
    # H(domain | id) of 2000 tokens is that of the domain but for the bias (4 - 1)(5 - 1)/(2 · 2000 ln 4) = 0.002.
    assert information.values[0] == pytest.approx([1, 1], abs=0.01)
    assert information.values[0, 0] == pytest.approx(1)
    assert information.null is not None
    assert information.null.max() < 0.3
    # Each domain uses 2 of 8 experts, half of its assignments each: 8 · 1/2 - 1 = 3; over all text it is balanced.
    assert domain_max_violation(record).values == pytest.approx(np.full((1, 4), 3.0))


def test_half_of_the_tokens_gone_astray_leave_what_the_formula_says(records: Any) -> None:
    record = planted_domains(records, purity=0.5)

    # An expert of the domain: 1/2 · 1/2 + 1/2 · 1/8 = 5/16 of assignments, twice; another: 1/16, six times.
    # I = H(expert) - H(expert | domain) = ln 8 - (2 · 5/16 ln(16/5) + 6/16 ln 16), over ln 4.
    expected = (math.log(8) - 10 / 16 * math.log(16 / 5) - 6 / 16 * math.log(16)) / math.log(4)

    assert domain_information(record).values[0, 0] == pytest.approx(expected, abs=0.02)


def test_routing_that_knows_nothing_of_domains_stays_within_the_null(records: Any) -> None:
    inside = []
    for seed in range(20):
        record = planted_domains(records, purity=0, seed=seed)
        inside.append(
            np.concatenate(
                [
                    within_null(domain_information(record, seed=seed)).ravel(),
                    within_null(domain_max_violation(record, seed=seed)).ravel(),
                ]
            )
        )
        assert within_null(domain_specialisation(record)).mean() > 0.9
    # Beyond 3 deviations, themselves estimated from 20 shuffles, lies about 1 % of what knows nothing.
    assert np.mean(inside) > 0.95


def test_chance_of_the_imbalance_within_a_domain_is_that_of_drawn_routing(records: Any) -> None:
    # 3 domains of 400 tokens with 8 of 16 experts each: simulated 200 times, and worked out from normal counts.
    generator = np.random.default_rng(0)
    domain = np.arange(1200) % 3
    drawn = []
    for _ in range(200):
        counts = np.bincount(random_places(generator, 400, 16, 8).ravel(), minlength=16)
        drawn.append(counts.max() / 200 - 1)
    record = records.of([random_places(generator, 1200, 16, 8)], 16, domain=domain)

    measured = domain_max_violation(record)

    assert measured.chance == pytest.approx(np.full((1, 3), np.mean(drawn)), rel=0.06)


def test_chance_of_the_imbalance_within_a_domain_with_few_assignments_an_expert(records: Any) -> None:
    # 2 domains of 40 tokens with 2 of 16 experts each, so 5 assignments an expert, whose counts are skewed.
    generator = np.random.default_rng(0)
    drawn = [np.bincount(random_places(generator, 40, 16, 2).ravel()).max() / 5 - 1 for _ in range(2000)]
    record = records.of([random_places(generator, 80, 16, 2)], 16, domain=np.arange(80) % 2)

    assert domain_max_violation(record).chance == pytest.approx(np.full((1, 2), np.mean(drawn)), rel=0.04)


def test_what_the_token_tells_is_of_the_first_place_that_holds_an_expert(records: Any) -> None:
    # By first choices id 0 goes to expert 1 and id 1 to expert 2, one of them from its second place.
    record = records.of([[[-1, 1], [1, 2], [2, 1], [2, -1]]], 3, token_id=[0, 0, 1, 1])

    assert token_dependence(record).values[0, 0] == pytest.approx(1)


def test_where_domains_differ_in_vocabulary_alone_nothing_is_left_once_the_token_is_known(records: Any) -> None:
    # Ids below 10 belong to domain a, the others to b; the expert is id mod 4 there, 4 + id mod 4 here: a rule of ids.
    generator = np.random.default_rng(1)
    domain = np.repeat(np.arange(40) % 2, 50)
    ids = generator.integers(0, 10, 2000) + 10 * domain
    record = records.of(
        [(ids % 4 + 4 * domain)[:, None]], 8, token_id=ids, domain=domain, sequence=np.repeat(np.arange(40), 50)
    )

    information = domain_information(record)

    assert information.values[0, 0] == pytest.approx(1)
    assert information.values[0, 1] == 0


def test_an_expert_for_a_domain_and_a_token_together_shows_only_once_the_token_is_known(records: Any) -> None:
    # The exclusive or of id and domain: the expert alone tells nothing of the domain, with the id it tells all.
    ids, domain = np.tile([0, 0, 1, 1], 50), np.tile([0, 1, 0, 1], 50)
    record = records.of([(ids ^ domain)[:, None]], 2, token_id=ids, domain=domain)

    assert domain_information(record).values[0] == pytest.approx([0, 1], abs=1e-12)


def test_one_domain_has_nothing_to_tell(records: Any) -> None:
    assert np.isnan(domain_information(records.of([[[0], [1]]], 2)).values).all()


def test_a_sequence_counts_once_in_the_null(records: Any) -> None:
    # Each of 12 sequences has an expert of its own and a domain: in so few, shuffled domains fit as well as the true.
    sequence = np.repeat(np.arange(12), 100)
    record = records.of([sequence[:, None]], 12, domain=sequence % 2, sequence=sequence)

    information = domain_information(record)

    assert information.values[0, 0] == pytest.approx(1)
    assert information.null is not None
    assert information.null[0, 0] == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------------- vocabulary


def test_vocabulary_specialisation_weighs_by_tokens_and_leaves_out_rare_ids(records: Any) -> None:
    # id 0: four tokens, three to expert 1. id 1: two tokens, to 0 and to 2. id 2: once, to expert 3.
    record = records.of([[[1], [1], [1], [0], [0], [2], [3]]], 4, token_id=[0, 0, 0, 0, 1, 1, 2])

    # At least 2: (3 + 1)/6. At least 3: 3/4. At least 1: (3 + 1 + 1)/7; the mean over ids would be 0.75.
    assert vocabulary_specialisation(record, minimum_count=2).values == pytest.approx([4 / 6])
    assert vocabulary_specialisation(record, minimum_count=3).values == pytest.approx([3 / 4])
    assert vocabulary_specialisation(record, minimum_count=1).values == pytest.approx([5 / 7])
    assert np.isnan(vocabulary_specialisation(record, minimum_count=5).values).all()


def test_vocabulary_specialisation_counts_every_place_of_a_token(records: Any) -> None:
    # Both tokens of id 0 have expert 1 among their two.
    record = records.of([[[0, 1], [1, 2]]], 4)

    measured = vocabulary_specialisation(record, minimum_count=1)

    assert measured.values == pytest.approx([1])
    assert measured.chance == pytest.approx([0.5])


def test_vocabulary_specialisation_by_what_follows_and_by_what_is_predicted(records: Any) -> None:
    experts = np.tile([0, 1], 20)
    other = np.tile([0, 0, 1, 1], 10)
    record = records.of([experts[:, None]], 2, token_id=other, target_id=experts, predicted_id=other)

    assert vocabulary_specialisation(record, "target", minimum_count=1).values == pytest.approx([1])
    assert vocabulary_specialisation(record, "predicted", minimum_count=1).values == pytest.approx([0.5])
    with pytest.raises(ValueError, match="by is output"):
        vocabulary_specialisation(record, "output")  # type: ignore[arg-type]


def test_the_favourite_of_few_tokens_is_above_chance_and_at_the_null(records: Any) -> None:
    # 16 tokens an id and 8 experts at random: the largest of 8 counts is far above 2, and the null knows it.
    generator = np.random.default_rng(0)
    record = records.of([generator.integers(0, 8, 3200)[:, None]], 8, token_id=np.arange(3200) % 200)

    measured = vocabulary_specialisation(record, minimum_count=10)

    assert measured.chance == pytest.approx([1 / 8])
    assert measured.values > 2 * measured.chance
    assert within_null(measured).all()


@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_a_favourite_has_between_the_average_and_all_of_its_tokens(
    records: Any, seed: int, n_ids: int, top_k: int
) -> None:
    generator = np.random.default_rng(seed)
    record = records.of([random_places(generator, 60, 6, top_k)], 6, token_id=generator.integers(0, n_ids, 60))

    value = vocabulary_specialisation(record, minimum_count=1, permutations=2).values[0]

    assert top_k / 6 - 1e-12 <= value <= 1
    assert 0 <= token_dependence(record, permutations=2).values.min() <= 1 + 1e-12


def test_typical_tokens_are_those_that_an_expert_sees_most_of(records: Any) -> None:
    # "the" thrice to expert 0 and once to 1; "of" twice to 1; "a", once, is too rare. Expert 2 is dead.
    record = records.of(
        [[[0], [0], [0], [1], [1], [1], [0]]],
        3,
        token_id=[5, 5, 5, 5, 2, 2, 1],
        vocabulary=("", "a", "of", "", "", "the"),
    )

    first, second, third = typical_tokens(record, 0, minimum_count=2)

    assert [(token.text, token.count, token.share) for token in first] == [("the", 3, 0.75)]
    # 1/4 of "the" is less than expert 1's share of all tokens, 3/7.
    assert [(token.text, token.count, token.share) for token in second] == [("of", 2, 1.0)]
    assert third == ()


def test_typical_tokens_prefer_the_frequent_among_equals_and_stop_at_the_top(records: Any) -> None:
    record = records.of([[[0], [0], [0], [0], [0], [0], [1]]], 2, blocks=[3], token_id=[1, 2, 2, 3, 3, 3, 4])

    assert [token.token_id for token in typical_tokens(record, 3, top=2, minimum_count=1)[0]] == [3, 2]
    with pytest.raises(ValueError, match="block 0 has no experts: those that have are 3"):
        typical_tokens(record, 0)


# ---------------------------------------------------------------------------------------------------- token dependence


def hashed(records: Any, top_k: int) -> Record:
    """16 ids, equally frequent, of which id t goes to the experts t, t + 1, ... of 16."""
    ids = np.arange(1600) % 16
    return records.of([(ids[:, None] + np.arange(top_k)) % 16], 16, token_id=ids)


def test_where_the_id_decides_the_first_choice_has_dependence_1(records: Any) -> None:
    assert token_dependence(hashed(records, 1)).values == pytest.approx(np.ones((1, 2)))


def test_a_set_of_two_that_the_id_decides_leaves_open_which_of_the_two(records: Any) -> None:
    # 1 - ln 2 / ln 16 = 3/4.
    assert token_dependence(hashed(records, 2)).values == pytest.approx(np.array([[1, 0.75]]))


def test_dependence_of_an_id_that_half_decides(records: Any) -> None:
    # Ids 0 and 1 equally often; id 0 to experts 0 and 1 alike, id 1 to expert 2 always.
    # H(expert) = 1/4 ln 4 · 2 + 1/2 ln 2 = 3/2 ln 2; H(expert | id) = 1/2 ln 2; U = 2/3.
    record = records.of([[[0], [1], [2], [2]]], 3, token_id=[0, 0, 1, 1])

    assert token_dependence(record).values == pytest.approx(np.full((1, 2), 2 / 3))


def test_rare_ids_seem_to_decide_and_the_null_says_so(records: Any) -> None:
    # 500 ids of 4 tokens each, experts at random: (500 - 1)(8 - 1)/(2 · 2000 ln 8) = 0.42 as a first guess.
    generator = np.random.default_rng(0)
    record = records.of([generator.integers(0, 8, 2000)[:, None]], 8, token_id=np.arange(2000) % 500)

    measured = token_dependence(record)

    assert measured.values.min() > 0.3
    assert within_null(measured).all()


def test_a_collapsed_layer_has_no_dependence_to_measure(records: Any) -> None:
    assert np.isnan(token_dependence(records.of([[[0], [0]]], 4, token_id=[0, 1])).values).all()
