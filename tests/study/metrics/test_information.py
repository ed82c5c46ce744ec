"""Entropies with known answers, laws of information, and the bias formulas against simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moe.study.metrics.information import (
    Counts,
    conditional_mutual_information,
    conditional_mutual_information_bias,
    entropy,
    entropy_bias,
    mutual_information,
    mutual_information_bias,
    per_assignment,
    permutation_null,
)
from moe.study.record import EMPTY

LN2 = math.log(2)


# ------------------------------------------------------------------------------------------------------------- numbers


def test_entropy_of_a_quarter_a_quarter_and_a_half() -> None:
    # 1/4 ln 4 + 1/4 ln 4 + 1/2 ln 2 = 3/2 ln 2; an empty cell adds nothing.
    assert entropy(np.array([1, 1, 2, 0])) == pytest.approx(1.5 * LN2)


def test_entropy_of_one_cell_is_0_and_of_none_is_unknown() -> None:
    assert entropy(np.array([7])) == 0
    assert math.isnan(entropy(np.array([0, 0])))
    assert math.isnan(mutual_information(np.zeros((2, 2))))


def test_counts_whose_rows_are_proportional_hold_no_information() -> None:
    assert mutual_information(np.array([[1, 2, 3], [10, 20, 30]])) == pytest.approx(0, abs=1e-12)


def test_a_label_that_decides_the_other_tells_all_of_its_entropy() -> None:
    # Four equal rows, two to each column: the row decides the column, and H(column) = ln 2.
    table = np.array([[5, 0], [5, 0], [0, 5], [0, 5]])

    assert mutual_information(table) == pytest.approx(LN2)


def test_of_the_exclusive_or_one_input_tells_nothing_alone_and_all_beside_the_other() -> None:
    table = np.zeros((2, 2, 2))
    for one in (0, 1):
        for other in (0, 1):
            table[one, one ^ other, other] = 3  # [input, output, other input]

    assert mutual_information(table.sum(axis=2)) == pytest.approx(0, abs=1e-12)
    assert conditional_mutual_information(table) == pytest.approx(LN2)


def test_what_a_third_label_explains_is_gone_once_it_is_known() -> None:
    # Both labels copy the third: they agree fully, and add nothing to it.
    table = np.zeros((2, 2, 2))
    table[0, 0, 0] = table[1, 1, 1] = 8

    assert mutual_information(table.sum(axis=2)) == pytest.approx(LN2)
    assert conditional_mutual_information(table) == pytest.approx(0, abs=1e-12)


def test_counts_are_those_of_a_loop() -> None:
    ids, experts = np.array([3, 0, 3, 3, 1]), np.array([1, 0, 1, 0, 1])

    counts = Counts.of(ids, experts)

    seen = {(token, expert): n for token, expert, n in zip(*counts.labels, counts.counts, strict=True)}
    assert seen == {(3, 1): 2, (0, 0): 1, (3, 0): 1, (1, 1): 1}
    assert counts.total == 5
    assert counts.margin(0).counts.tolist() == [1, 1, 3]  # ids 0, 1, 3


def test_a_table_too_large_to_hold_is_counted_by_sorting() -> None:
    # Two labels of a billion values: 10^18 cells, of which three are seen.
    ids = np.array([0, 10**9, 10**9, 5])
    counts = Counts.of(ids, ids)

    assert counts.counts.tolist() == [1, 1, 2]
    # H = 2 · 1/4 ln 4 + 1/2 ln 2 = 1.5 ln 2, all of it shared.
    assert mutual_information(counts) == pytest.approx(1.5 * LN2)


def test_every_place_that_holds_an_expert_is_an_assignment_of_its_token() -> None:
    selected = np.array([[2, 0], [1, EMPTY], [EMPTY, EMPTY]], dtype=np.int32)

    expert, domain = per_assignment(selected, np.array([7, 8, 9]))

    assert expert.tolist() == [2, 0, 1]
    assert domain.tolist() == [7, 7, 8]


def test_an_empty_place_is_not_counted_as_an_expert() -> None:
    with pytest.raises(ValueError, match="negative"):
        Counts.of(np.array([0, EMPTY]))


def test_information_refuses_counts_of_the_wrong_number_of_labels() -> None:
    with pytest.raises(ValueError, match="3 labels, where 2"):
        mutual_information(np.ones((2, 2, 2)))


# ---------------------------------------------------------------------------------------------------------------- laws

tables = arrays.arrays(np.int64, st.tuples(*[st.integers(1, 4)] * 3), elements=st.integers(0, 9)).filter(np.any)


@given(tables)
@settings(max_examples=60, deadline=None)
def test_laws_of_information(table: np.ndarray) -> None:
    pair = table.sum(axis=2)
    information = mutual_information(pair)

    assert information == pytest.approx(mutual_information(pair.T))
    assert 0 <= information <= min(entropy(pair.sum(axis=0)), entropy(pair.sum(axis=1))) + 1e-9
    # The chain rule: I(X; (Y, Z)) = I(X; Z) + I(X; Y | Z).
    both = mutual_information(table.reshape(len(table), -1))
    assert both == pytest.approx(mutual_information(table.sum(axis=1)) + conditional_mutual_information(table))
    # Merging two columns cannot add information (data processing).
    merged = np.concatenate([pair[:, :1], pair[:, 1:].sum(axis=1, keepdims=True)], axis=1)
    assert mutual_information(merged) <= information + 1e-9


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_the_bias_is_that_of_the_textbook_where_all_cells_are_seen(rows: int, columns: int, groups: int) -> None:
    table = np.full((rows, columns, groups), 6)
    degrees = (rows - 1) * (columns - 1)

    assert mutual_information_bias(table[..., 0]) == pytest.approx(degrees / (2 * 6 * rows * columns))
    assert conditional_mutual_information_bias(table) == pytest.approx(groups * degrees / (2 * table.sum()))


# ---------------------------------------------------------------------------------------------------------- simulation


def test_the_bias_of_entropy_is_what_draws_show() -> None:
    # 8 equal cells, 200 draws: -(8 - 1)/(2 · 200) = -0.0175, and 2000 repetitions give it to about 0.0003.
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(200, [1 / 8] * 8, size=2000)

    error = np.mean([entropy(counts) for counts in drawn]) - math.log(8)

    assert error == pytest.approx(-0.0175, abs=0.0012)
    assert np.mean([entropy_bias(counts) for counts in drawn]) == pytest.approx(-0.0175, abs=1e-4)


def test_the_bias_of_information_is_what_independent_draws_show() -> None:
    # 3 x 4 cells, 300 draws: (3 - 1)(4 - 1)/(2 · 300) = 0.01.
    generator = np.random.default_rng(0)
    cells = np.outer([0.5, 0.3, 0.2], [0.4, 0.3, 0.2, 0.1]).ravel()
    drawn = generator.multinomial(300, cells, size=2000).reshape(-1, 3, 4)

    estimates = [mutual_information(table) for table in drawn]

    assert np.mean(estimates) == pytest.approx(0.01, abs=0.0006)
    assert np.mean([mutual_information_bias(table) for table in drawn]) == pytest.approx(0.01, abs=2e-4)


def test_the_bias_of_conditional_information_is_what_independent_draws_show() -> None:
    # Within each of 2 groups 2 x 3 cells; 400 draws: 2 · (2 - 1)(3 - 1)/(2 · 400) = 0.005.
    generator = np.random.default_rng(0)
    cells = np.stack([np.outer([0.5, 0.5], [0.4, 0.3, 0.3]), np.outer([0.8, 0.2], [0.2, 0.2, 0.6])], axis=-1) / 2
    drawn = generator.multinomial(400, cells.ravel(), size=2000).reshape(-1, 2, 3, 2)

    estimates = [conditional_mutual_information(table) for table in drawn]

    assert np.mean(estimates) == pytest.approx(0.005, abs=0.0004)
    assert np.mean([conditional_mutual_information_bias(table) for table in drawn]) == pytest.approx(0.005, abs=2e-4)


def test_the_null_matches_the_bias_where_the_formula_holds() -> None:
    generator = np.random.default_rng(1)
    one, other = generator.integers(0, 4, 3000), generator.integers(0, 5, 3000)

    null = permutation_null(lambda shuffled: mutual_information(Counts.of(shuffled, other)), one, permutations=200)

    # (4 - 1)(5 - 1)/(2 · 3000) = 0.002; 2 n I is chi-squared with 12 degrees, whose deviation is √24.
    assert null.mean == pytest.approx(0.002, rel=0.08)
    assert null.std == pytest.approx(math.sqrt(24) / 6000, rel=0.2)


def test_experts_of_one_token_are_not_independent_draws() -> None:
    # 4 of 6 distinct experts a token: the bias is (E - K)/(E - 1) = 2/5 of (2 - 1)(6 - 1)/(2 · 8000).
    generator = np.random.default_rng(2)
    selected = generator.random((2000, 6)).argsort(axis=1)[:, :4].astype(np.int32)
    domain = generator.integers(0, 2, 2000)

    def information(labels: np.ndarray) -> float:
        return mutual_information(Counts.of(*per_assignment(selected, labels)))

    null = permutation_null(information, domain, permutations=300)
    formula = mutual_information_bias(Counts.of(*per_assignment(selected, domain)))

    assert formula == pytest.approx(5 / 16000)
    assert null.mean == pytest.approx(0.4 * formula, rel=0.15)


# ----------------------------------------------------------------------------------------------------------- shuffling


def test_shuffles_keep_labels_and_come_back_with_their_seed() -> None:
    labels = np.array([0, 0, 1, 2, 2, 2])
    seen: list[np.ndarray] = []

    def watch(shuffled: np.ndarray) -> float:
        seen.append(shuffled)
        return float(shuffled[0])

    first = permutation_null(watch, labels, permutations=8, seed=3)

    assert all(sorted(shuffled) == sorted(labels) for shuffled in seen)
    assert len({tuple(shuffled) for shuffled in seen}) > 1
    assert permutation_null(watch, labels, permutations=8, seed=3) == first
    assert permutation_null(watch, labels, permutations=8, seed=4) != first


def test_a_shuffle_within_groups_keeps_each_group_and_moves_its_labels() -> None:
    group = np.array([7, 2, 7, 2, 7, 2])
    labels = np.array([0, 10, 1, 11, 2, 12])  # units belong to group 7, tens to group 2
    seen: set[tuple[int, ...]] = set()

    def watch(shuffled: np.ndarray) -> float:
        seen.add(tuple(shuffled.tolist()))
        return 0.0

    permutation_null(watch, labels, within=group, permutations=300)

    assert all(sorted(shuffled[::2]) == [0, 1, 2] and sorted(shuffled[1::2]) == [10, 11, 12] for shuffled in seen)
    assert len(seen) == 36  # 3! orders of one group by 3! of the other


def test_a_shuffle_by_blocks_keeps_the_rows_of_a_block_alike() -> None:
    blocks = np.array([0, 0, 1, 1, 2, 2])
    labels = np.array([5, 5, 6, 6, 6, 6])
    seen: set[tuple[int, ...]] = set()

    def watch(shuffled: np.ndarray) -> float:
        seen.add(tuple(shuffled.tolist()))
        return 0.0

    permutation_null(watch, labels, blocks=blocks, permutations=100)

    assert seen == {(5, 5, 6, 6, 6, 6), (6, 6, 5, 5, 6, 6), (6, 6, 6, 6, 5, 5)}


def test_blocks_within_groups_are_shuffled_among_those_of_their_group() -> None:
    # Group 0 has the blocks 0 (twice) and 1; group 1 has the blocks 0 and 1, though these are numbered alike.
    group, blocks = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 0, 1])
    labels = np.array([5, 5, 6, 7, 8])
    seen: set[tuple[int, ...]] = set()

    def watch(shuffled: np.ndarray) -> float:
        seen.add(tuple(shuffled.tolist()))
        return 0.0

    permutation_null(watch, labels, within=group, blocks=blocks, permutations=100)

    assert seen == {(*first, *second) for first in ((5, 5, 6), (6, 6, 5)) for second in ((7, 8), (8, 7))}


def test_blocks_drawn_together_promise_less_than_their_rows() -> None:
    # 20 sequences of 100 tokens, each with one expert throughout, and no tie between domain and expert: information
    # over single tokens is far above a null of single tokens, and within that of whole sequences.
    generator = np.random.default_rng(4)
    sequence = np.repeat(np.arange(20), 100)
    expert = generator.permutation(np.arange(20) % 4)[sequence]
    domain = (np.arange(20) % 2)[sequence]

    def information(labels: np.ndarray) -> float:
        return mutual_information(Counts.of(labels, expert))

    value = information(domain)
    by_token = permutation_null(information, domain)
    by_sequence = permutation_null(information, domain, blocks=sequence)

    assert value > by_token.mean + 10 * by_token.std
    assert value < by_sequence.mean + 2 * by_sequence.std


def test_a_null_refuses_what_it_cannot_do() -> None:
    labels = np.array([0, 1])

    with pytest.raises(ValueError, match="at least 2"):
        permutation_null(np.mean, labels, permutations=1)
    with pytest.raises(ValueError, match="several labels"):
        permutation_null(np.mean, labels, blocks=np.array([0, 0]))
