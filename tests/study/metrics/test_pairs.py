"""Pairs and paths of experts in records made by hand; chance values and nulls against simulated routing."""

import math
from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.study.metrics import pairs as metrics
from moe.study.metrics.pairs import (
    co_activation,
    cross_layer_information,
    cross_layer_transitions,
    distinct_paths,
    expert_paths,
    pair_counts,
)
from moe.study.record import EMPTY, Record


def copied(records: Any, n_tokens: int, n_experts: int, n_layers: int = 2, keep: float = 1.0) -> Record:
    """A first choice at random; in each next layer it is kept with probability ``keep``, else drawn anew."""
    generator = np.random.default_rng(0)
    columns = [generator.integers(0, n_experts, n_tokens)]
    for _ in range(n_layers - 1):
        drawn = generator.integers(0, n_experts, n_tokens)
        columns.append(np.where(generator.random(n_tokens) < keep, columns[-1], drawn))
    return records.of([column[:, None] for column in columns], n_experts)


# ------------------------------------------------------------------------------------------------------ within a layer


def test_co_activation_is_of_the_tokens_of_the_first_expert(records: Any) -> None:
    # Expert 0 has three tokens, two of them with 1 and one with 2; expert 1 has two tokens, both with 0.
    record = records.of([[[0, 1], [1, 0], [2, 0]]], n_experts=4)

    measured = co_activation(record)

    nan = math.nan
    expected = [[nan, 2 / 3, 1 / 3, 0], [1, nan, 0, 0], [1, 0, nan, 0], [nan, nan, nan, nan]]
    assert measured.values[0] == pytest.approx(np.array(expected), nan_ok=True)
    assert measured.chance is not None
    assert measured.chance.item() == pytest.approx(1 / 3)  # (K - 1)/(E - 1)
    assert [axis.name for axis in measured.axes] == ["layer", "expert", "other"]


def test_all_28_pairs_of_8_experts_count(records: Any) -> None:
    # Published code paired neighbouring ranks only: 7 of the 28.
    record = records.of([[list(range(8))]], n_experts=9)

    counts = pair_counts(record.layers[0])

    assert counts.sum() == 2 * 28
    assert (counts[:8, :8] == 1 - np.eye(8)).all()
    assert np.nansum(co_activation(record).values, axis=2)[0, :8] == pytest.approx(np.full(8, 7))


def test_chance_of_co_activation_is_what_routing_at_random_gives(records: Any) -> None:
    measured = co_activation(records.uniform(20000, 8, 3))

    assert measured.chance is not None
    assert measured.chance.item() == pytest.approx(2 / 7)
    assert np.nanmax(np.abs(measured.values - 2 / 7)) < 0.02
    assert np.nanmax(np.abs(measured.values - measured.null)) < 0.02


def test_chance_of_co_activation_with_varying_numbers_of_experts(records: Any) -> None:
    # Half of the tokens hold 1 expert of 6, half 3: (3 · 2)/(1 + 3) over 5 others.
    places = records.uniform(30000, 6, 3).layers[0].selected.copy()
    places[::2, 1:] = EMPTY
    places[::4] = places[::4, [1, 0, 2]]  # The empty place may be any.

    measured = co_activation(records.of([places], 6))

    assert measured.chance is not None
    assert measured.chance.item() == pytest.approx(6 / 4 / 5)
    assert np.nanmean(measured.values) == pytest.approx(0.3, abs=0.005)


def test_an_expert_used_often_goes_with_all_as_often_as_the_null_says(records: Any) -> None:
    # Pairs drawn with weights 8, 4, 2, 1, 1 for their members, and no other preference.
    weights = np.array([8, 4, 2, 1, 1])
    ordered = list(permutations(range(5), 2))
    probability = np.array([weights[one] * weights[other] for one, other in ordered], float)
    drawn = np.random.default_rng(0).choice(len(ordered), 40000, p=probability / probability.sum())

    measured = co_activation(records.of([np.array(ordered)[drawn]], 5))

    # Of the tokens of expert 4, 8/(8 + 4 + 2 + 1) go to expert 0, where chance says 1/4.
    assert measured.null is not None
    assert measured.null[0, 4, 0] == pytest.approx(8 / 15, abs=0.01)
    assert measured.values[0] == pytest.approx(measured.null[0], abs=0.03, nan_ok=True)
    assert measured.values[0, 4, 0] > 2 * np.asarray(measured.chance).item()


def test_the_null_of_co_activation_where_one_expert_is_in_every_pair(records: Any) -> None:
    measured = co_activation(records.of([[[0, 1]] * 3 + [[2, 0]] * 5], 4))

    assert measured.null is not None
    assert measured.null[0, 0, 1:] == pytest.approx([3 / 8, 5 / 8, 0], abs=0.01)
    assert measured.null[0, 1, 0] == pytest.approx(1, abs=0.01)


def test_one_expert_a_token_pairs_with_none(records: Any) -> None:
    measured = co_activation(records.balanced(8, 4, 1))

    assert np.nansum(measured.values) == 0
    assert np.asarray(measured.chance).item() == 0


# -------------------------------------------------------------------------------------------------- from layer to layer


def test_transitions_are_shares_of_tokens_with_the_product_of_loads_as_chance(records: Any) -> None:
    # First choices: 0 0 1 1 in block 2, 0 1 1 1 in block 5.
    record = records.of([[[0, 1], [0, 1], [1, 0], [1, 0]], [[0, 2], [1, 0], [1, 0], [1, 2]]], (2, 3), blocks=(2, 5))

    measured = cross_layer_transitions(record, 2, 5)

    assert measured.values.tolist() == [[1 / 4, 1 / 4, 0], [0, 1 / 2, 0]]
    assert measured.chance is not None
    assert measured.chance == pytest.approx(np.array([[1 / 8, 3 / 8, 0], [1 / 8, 3 / 8, 0]]))
    assert [axis.name for axis in measured.axes] == ["from", "to"]


def test_transitions_of_any_choice_pair_all_ranks(records: Any) -> None:
    # Published code paired equal ranks only, and would see 0 → 2 and 1 → 3 alone.
    record = records.of([[[0, 1]], [[2, 3]]], 4)

    shares = cross_layer_transitions(record, 0, 1, "any").values

    assert shares[:2, 2:].tolist() == [[1 / 4, 1 / 4], [1 / 4, 1 / 4]]
    assert shares.sum() == 1


def test_transitions_leave_out_tokens_without_expert(records: Any) -> None:
    record = records.of([[[EMPTY, 1], [0, 1], [EMPTY, EMPTY]], [[0, 1], [EMPTY, EMPTY], [1, 0]]], 2)

    assert cross_layer_transitions(record, 0, 1).values.tolist() == [[0, 0], [1, 0]]


def test_transitions_refuse_what_is_not_there(records: Any) -> None:
    record = records.balanced(4, 2, 1, 2)

    with pytest.raises(ValueError, match="block 7 has no experts: those that have are 0, 1"):
        cross_layer_transitions(record, 0, 7)
    with pytest.raises(ValueError, match="choice is second"):
        cross_layer_transitions(record, 0, 1, "second")  # type: ignore[arg-type]


def test_an_expert_that_decides_the_next_layers_tells_all(records: Any) -> None:
    measured = cross_layer_information(copied(records, 2000, 4, n_layers=3))

    assert measured.axes[0].labels == ("0 → 1", "1 → 2")
    assert measured.axes[1].labels == ("information", "accuracy")
    assert measured.values == pytest.approx(np.ones((2, 2)))
    assert measured.null is not None
    assert measured.null[:, 1] == pytest.approx(np.full(2, 0.28), abs=0.02)


def test_information_and_accuracy_by_hand(records: Any) -> None:
    # 8 tokens: from expert 0 three to 0 and one to 1, from expert 1 all four to 1.
    # H(to) over 3/8, 5/8 = 0.66156; H(to | from) = 1/2 · H(1/4) = 1/2 · 0.56234. Accuracy (3 + 4)/8, marginal 5/8.
    start, end = [0] * 4 + [1] * 4, [0, 0, 0, 1, 1, 1, 1, 1]
    measured = cross_layer_information(records.of([np.array(start)[:, None], np.array(end)[:, None]], 2))

    assert measured.values == pytest.approx(np.array([[(0.66156 - 0.28117) / 0.66156, 7 / 8]]), rel=1e-4)
    # (2 - 1)(2 - 1)/(2 · 8)/H(to)
    assert measured.chance == pytest.approx(np.array([[1 / 16 / 0.66156, 5 / 8]]), rel=1e-4)


def test_independent_layers_tell_what_their_chance_and_null_say(records: Any) -> None:
    # 8 experts, 500 tokens: 49/1000/ln 8 = 0.0236.
    measured = [cross_layer_information(records.uniform(500, 8, 2, 2, seed=seed)) for seed in range(40)]

    information, accuracy = np.mean([one.values[0] for one in measured], axis=0)
    chance = np.mean([one.chance[0] for one in measured], axis=0)  # type: ignore[index]
    null = np.mean([one.null[0] for one in measured], axis=0)  # type: ignore[index]
    assert chance[0] == pytest.approx(0.0236, rel=0.01)
    assert information == pytest.approx(chance[0], rel=0.1)
    assert null == pytest.approx([information, accuracy], rel=0.05)
    # The likeliest guess is chosen on the same tokens: it beats the marginal even here.
    assert accuracy > chance[1] + 0.02


def test_information_about_a_layer_of_one_expert_is_unknown(records: Any) -> None:
    measured = cross_layer_information(records.of([[[0], [1]], [[0], [0]]], 2))

    assert np.isnan(measured.values[0, 0])
    assert measured.values[0, 1] == 1


def test_one_layer_has_no_next(records: Any) -> None:
    assert cross_layer_information(records.balanced(4, 2, 1)).values.shape == (0, 2)


# --------------------------------------------------------------------------------------------------------------- paths


def test_paths_are_first_choices_through_all_layers(records: Any) -> None:
    # Paths 0 2 1 (twice), 1 2 1, 1 0 1; a token without expert in the second layer is none.
    record = records.of(
        [
            [[0, 1], [0, 2], [1, 0], [1, 2], [0, 1]],
            [[2, 1], [2, 0], [2, 0], [0, 1], [EMPTY, EMPTY]],
            [[1, 0]] * 5,
        ],
        3,
    )

    measured = expert_paths(record)

    assert measured.axes[0].labels[0] == "0 → 2 → 1"
    assert sorted(measured.axes[0].labels) == ["0 → 2 → 1", "1 → 0 → 1", "1 → 2 → 1"]
    assert measured.values.tolist() == [1 / 2, 1 / 4, 1 / 4]
    assert measured.chance is not None
    # Loads 1/2 of expert 0, 3/4 of 2, 1 of 1.
    assert measured.chance[0] == pytest.approx(1 / 2 * 3 / 4)
    assert "of the 3 paths" in measured.reading
    assert distinct_paths(record).values == 3


def test_the_top_paths_only(records: Any) -> None:
    measured = expert_paths(records.uniform(3000, 8, 2, n_layers=2), top=5)

    assert measured.values.shape == (5,)
    assert (np.diff(measured.values) <= 0).all()
    assert "these 5 of the 64 paths" in measured.reading


def test_independent_layers_take_paths_by_chance(records: Any) -> None:
    measured = expert_paths(records.uniform(40000, 4, 1, n_layers=2), top=16)

    assert measured.values == pytest.approx(np.asarray(measured.chance), rel=0.08)


def test_paths_through_many_layers_of_many_experts_are_told_apart(records: Any) -> None:
    # 64^30 paths do not fit into 64 bits, and these differ in the first layer alone, or in the last.
    column = np.arange(192) % 64
    same = np.full(192, 63)
    first = records.of([layer[:, None] for layer in [column, *[same] * 29]], 64)
    last = records.of([layer[:, None] for layer in [*[same] * 29, column]], 64)

    for record in (first, last):
        assert distinct_paths(record).values == 64
        assert expert_paths(record).values == pytest.approx(np.full(20, 1 / 64))


def test_layers_that_agree_take_fewer_paths_than_the_null(records: Any) -> None:
    agree = distinct_paths(copied(records, 2000, 8, n_layers=3, keep=0.9))
    independent = distinct_paths(copied(records, 2000, 8, n_layers=3, keep=0.0))

    # 2000 tokens in 8³ = 512 paths, all alike: 512 (1 - (1 - 1/512)^2000) = 501.7 are found.
    assert independent.values == pytest.approx(501.7, abs=8)
    assert independent.null == pytest.approx(501.7, abs=8)
    assert agree.values < 300
    assert agree.null == pytest.approx(501.7, abs=8)
    with pytest.raises(ValueError, match="at least 2"):
        distinct_paths(records.balanced(4, 2, 1), permutations=1)


# ---------------------------------------------------------------------------------------------------------------- laws


@st.composite
def two_layers(draw: st.DrawFn) -> tuple[list[np.ndarray], int]:
    """Two layers of [N, K] different experts a token, some places empty, and E."""
    n_experts = draw(st.integers(2, 5))
    top_k = draw(st.integers(1, n_experts))
    n_tokens = draw(st.integers(1, 10))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    hole = draw(st.sampled_from([0, 0.3]))
    layers = []
    for _ in range(2):
        places = generator.random((n_tokens, n_experts)).argsort(axis=1)[:, :top_k]
        layers.append(np.where(generator.random(places.shape) < hole, EMPTY, places).astype(np.int32))
    return layers, n_experts


@given(two_layers())
@settings(max_examples=60, deadline=None)
def test_pairs_and_transitions_are_those_of_a_loop(records: Any, drawn: Any) -> None:
    layers, n_experts = drawn
    record = records.of(layers, n_experts)
    rows = [[[int(expert) for expert in row if expert != EMPTY] for row in layer] for layer in layers]
    together = Counter(pair for row in rows[0] for pair in permutations(row, 2))
    moves = Counter((one[0], other[0]) for one, other in zip(*rows, strict=True) if one and other)
    any_move = Counter((i, j) for one, other in zip(*rows, strict=True) for i in one for j in other)

    pairs = pair_counts(record.layers[0])
    transitions, of_any = (cross_layer_transitions(record, 0, 1, choice) for choice in ("first", "any"))
    for one in range(n_experts):
        for other in range(n_experts):
            assert pairs[one, other] == together[one, other]
            for measured, counted in ((transitions, moves), (of_any, any_move)):
                if counted:
                    expected = counted[one, other] / counted.total()
                    assert measured.values[one, other] == pytest.approx(expected)
                else:
                    assert np.isnan(measured.values).all()
    paths = expert_paths(record, top=100)
    assert dict(zip(paths.axes[0].labels, paths.values, strict=True)) == pytest.approx(
        {f"{one} → {other}": count / moves.total() for (one, other), count in moves.items()}
    )


@given(two_layers(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_numbering_the_experts_anew_changes_only_their_order(records: Any, drawn: Any, random: Any) -> None:
    layers, n_experts = drawn
    new_number = list(range(n_experts))
    random.shuffle(new_number)
    renamed = [np.where(layer == EMPTY, EMPTY, np.array(new_number)[layer]) for layer in layers]
    one, two = records.of(layers, n_experts), records.of(renamed, n_experts)
    where = np.ix_(new_number, new_number)

    for values in ("values", "null"):
        before, after = (getattr(co_activation(record), values)[0] for record in (one, two))
        assert after[where] == pytest.approx(before, nan_ok=True, abs=1e-6)
    assert cross_layer_transitions(two, 0, 1).values[where] == pytest.approx(
        cross_layer_transitions(one, 0, 1).values, nan_ok=True
    )
    before, after = (cross_layer_information(record, permutations=2) for record in (one, two))
    assert after.values == pytest.approx(before.values, nan_ok=True)
    assert after.chance == pytest.approx(before.chance, nan_ok=True)
    assert sorted(expert_paths(two, 100).values) == pytest.approx(sorted(expert_paths(one, 100).values))


@given(two_layers())
@settings(max_examples=40, deadline=None)
def test_a_record_read_twice_has_the_same_values(records: Any, drawn: Any) -> None:
    layers, n_experts = drawn
    one, two = (records.of([np.concatenate([layer] * times) for layer in layers], n_experts) for times in (1, 2))

    for measure in (
        co_activation,
        lambda record: cross_layer_transitions(record, 0, 1),
        lambda record: cross_layer_transitions(record, 0, 1, "any"),
        lambda record: cross_layer_information(record, permutations=2),
    ):
        assert measure(two).values == pytest.approx(measure(one).values, nan_ok=True, abs=1e-12)
    assert sorted(expert_paths(two, 100).values) == pytest.approx(sorted(expert_paths(one, 100).values))
    assert distinct_paths(two).values == distinct_paths(one).values


def test_all_of_it_on_a_record_without_tokens(records: Any) -> None:
    record = records.of([np.zeros((0, 2), np.int32)] * 2, 4)

    for measured in (co_activation(record), cross_layer_transitions(record, 0, 1), cross_layer_information(record)):
        assert np.isnan(measured.values).all()
    assert expert_paths(record).values.shape == (0,)
    assert distinct_paths(record).values == 0


def test_chunks_change_nothing(records: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record = records.uniform(50, 6, 3, 2)
    before = co_activation(record), cross_layer_transitions(record, 0, 1, "any")
    monkeypatch.setattr(metrics, "chunks", lambda n_rows: (slice(at, at + 7) for at in range(0, n_rows, 7)))

    after = co_activation(record), cross_layer_transitions(record, 0, 1, "any")
    for one, other in zip(before, after, strict=True):
        assert other.values == pytest.approx(one.values, nan_ok=True)


def test_a_single_number_is_a_frame_of_one_row(records: Any) -> None:
    # Two of four possible paths occur.
    frame = distinct_paths(records.of([[[0], [1]], [[0], [1]]], 2)).frame()
    assert frame.columns.tolist() == ["value", "null", "null_std"]
    assert frame["value"].tolist() == [2]


def test_chance_of_few_tokens_and_many_experts_is_no_more_than_all_there_is_to_know(records: Any) -> None:
    # 63 · 63 degrees of freedom over 2 · 256 tokens are 7.8 nats, and ln 64 = 4.2 are to be known: the null is for it.
    measured = cross_layer_information(records.uniform(256, 64, 1, n_layers=2))
    assert measured.chance[0, 0] == 1
    assert measured.null[0, 0] == pytest.approx(measured.values[0, 0], abs=5 * measured.null_std[0, 0])
