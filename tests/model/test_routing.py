"""What is derived from a routing, on decisions small enough to count on one's fingers."""

from dataclasses import FrozenInstanceError
from math import log

import pytest
import torch

from moe.model.routing import LoadSummary, Routing, summarise_load

PADDING = torch.tensor([True, True, False])
DROPPED = torch.tensor([[False, True], [False, False], [True, True]])


def routing(selected: list[list[int]], n_experts: int, **optional: torch.Tensor) -> Routing:
    chosen = torch.tensor(selected)
    uniform = torch.full((len(selected), n_experts), 1 / n_experts)
    return Routing(
        logits=uniform.log(), scores=uniform, selected=chosen, weights=torch.ones_like(chosen).float(), **optional
    )


def test_sizes_come_from_the_decision_itself() -> None:
    three_tokens = routing([[0, 1], [1, 2], [3, 1]], n_experts=5)

    assert (three_tokens.n_tokens, three_tokens.n_experts, three_tokens.top_k) == (3, 5, 2)


def test_counts_are_assignments_per_expert() -> None:
    counts = routing([[0, 1], [1, 2], [3, 1]], n_experts=5).counts()

    assert counts.tolist() == [1, 3, 1, 1, 0]
    assert counts.dtype == torch.int64


def test_counts_leave_padding_out() -> None:
    assert routing([[0, 1], [1, 2], [3, 1]], 5, mask=PADDING).counts().tolist() == [1, 2, 1, 0, 0]


def test_counts_are_taken_before_anything_is_dropped() -> None:
    """After the drop they would hide the imbalance that caused it."""
    assert routing([[0, 1], [1, 2], [3, 1]], 5, dropped=DROPPED).counts().tolist() == [1, 3, 1, 1, 0]


def test_counts_pass_256() -> None:
    """256 + 1 is 256 in bfloat16."""
    assert routing([[1]] * 1000, n_experts=2).counts().tolist() == [0, 1000]


def test_no_tokens_count_as_zeros() -> None:
    nothing = Routing(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))

    assert nothing.counts().tolist() == [0, 0, 0]
    assert nothing.real_tokens() == 0


@pytest.mark.parametrize(
    ("optional", "executed"),
    [
        ({}, None),
        ({"mask": PADDING}, [[True, True], [True, True], [False, False]]),
        ({"dropped": DROPPED}, [[True, False], [True, True], [False, False]]),
        ({"mask": torch.tensor([False, True, True]), "dropped": DROPPED}, [[False] * 2, [True] * 2, [False] * 2]),
    ],
    ids=["all", "padding", "dropped", "both"],
)
def test_executed_assignments_are_real_and_kept(optional: dict[str, torch.Tensor], executed: object) -> None:
    result = routing([[0, 1], [1, 2], [3, 1]], 5, **optional).executed

    assert (None if result is None else result.tolist()) == executed


def test_real_tokens() -> None:
    assert routing([[0], [1], [2]], 3).real_tokens() == 3
    assert routing([[0], [1], [2]], 3, mask=PADDING).real_tokens() == 2


def test_dropped_assignments_of_padding_do_not_count() -> None:
    assert routing([[0, 1], [1, 2], [3, 1]], 5).dropped_count() == 0
    assert routing([[0, 1], [1, 2], [3, 1]], 5, dropped=DROPPED).dropped_count() == 3
    assert routing([[0, 1], [1, 2], [3, 1]], 5, dropped=DROPPED, mask=PADDING).dropped_count() == 1


def test_a_decision_cannot_be_changed() -> None:
    decision = routing([[0]], 2)
    with pytest.raises(FrozenInstanceError):
        decision.weights = torch.zeros(1, 1)


@pytest.mark.parametrize(
    ("counts", "summary"),
    [
        ([5, 5, 5, 5], LoadSummary(max_over_fair=1.0, min_over_fair=1.0, dead=0, entropy=1.0, dropped=0.0)),
        ([0, 0, 8, 0], LoadSummary(max_over_fair=4.0, min_over_fair=0.0, dead=3, entropy=0.0, dropped=0.0)),
        ([6, 0, 0, 6], LoadSummary(max_over_fair=2.0, min_over_fair=0.0, dead=2, entropy=log(2) / log(4), dropped=0.0)),
        # Loads 1/2, 1/4, 1/8, 1/8: (1/2 log 2 + 1/4 log 4 + 2/8 log 8) / log 4 = 1.75 / 2.
        ([8, 4, 2, 2], LoadSummary(max_over_fair=2.0, min_over_fair=0.5, dead=0, entropy=0.875, dropped=0.0)),
        ([0, 0, 0, 0], LoadSummary(max_over_fair=0.0, min_over_fair=0.0, dead=4, entropy=0.0, dropped=0.0)),
        ([7], LoadSummary(max_over_fair=1.0, min_over_fair=1.0, dead=0, entropy=1.0, dropped=0.0)),
    ],
    ids=["uniform", "one-hot", "half-dead", "skewed", "empty", "one-expert"],
)
def test_load_summary_of_counts_worked_out_by_hand(counts: list[int], summary: LoadSummary) -> None:
    result = summarise_load(torch.tensor(counts))

    assert vars(result) == pytest.approx(vars(summary), abs=1e-6)


def test_an_expert_is_dead_below_a_tenth_of_its_fair_share() -> None:
    # 2000 assignments over 2 experts: the fair share is 1000, a tenth of it 100.
    assert summarise_load(torch.tensor([1901, 99])).dead == 1
    assert summarise_load(torch.tensor([1900, 100])).dead == 0


def test_dropped_is_a_share_of_all_assignments() -> None:
    assert summarise_load(torch.tensor([9, 3]), dropped=3).dropped == 0.25


# ----------------------------------------------------------------------------- empty places, special experts, sequences

EMPTY = torch.tensor([[True, False], [True, True], [False, False]])
"""False where a place holds no assignment"""


def test_empty_places_are_neither_counted_nor_executed_nor_dropped() -> None:
    """Three tokens; the last is padding, the third place of the first two is empty, and one assignment is dropped."""
    three = routing([[0, 1], [1, 2], [3, 1]], 5, assigned=EMPTY, dropped=DROPPED)

    assert three.counts().tolist() == [1, 1, 1, 0, 0]
    assert three.dropped_count().item() == 0  # the dropped places are empty ones
    assert three.executed.tolist() == [[True, False], [True, True], [False, False]]


def test_an_mlp_executes_no_assignment_to_a_special_expert() -> None:
    """Experts 3 and 4 of 5 are special."""
    three = routing([[0, 3], [4, 2], [3, 1]], 5, n_special=2)

    assert three.n_mlps == 3
    assert three.counts().tolist() == [1, 1, 1, 2, 1]
    assert three.executed.tolist() == [[True, False], [False, True], [False, True]]
    assert three.carried_out is None


def test_as_rows_of_one_choice_with_padding_and_more_than_one_choice() -> None:
    """The mask of a token is that of each of its choices."""
    rows = routing([[0, 1], [1, 2], [3, 1]], 5, mask=PADDING).one_row_a_place()

    assert rows.selected.flatten().tolist() == [0, 1, 1, 2, 3, 1]
    assert rows.weights.flatten().tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert rows.counts().tolist() == [1, 2, 1, 0, 0]


def test_first_choices_are_counted_apart() -> None:
    three = routing([[0, 1], [1, 2], [3, 1]], 5, mask=PADDING)

    assert three.first_choices().counts().tolist() == [1, 1, 0, 0, 0]


def test_counts_of_each_sequence() -> None:
    """Two sequences of two tokens; the last token is padding."""
    mask = torch.tensor([True, True, True, False])
    four = routing([[0, 1], [1, 2], [0, 2], [1, 2]], 3, n_sequences=2, mask=mask)

    assert four.sequence_counts().tolist() == [[1, 2, 1], [1, 0, 1]]


def test_dropping_sets_weights_to_exactly_zero_and_leaves_the_load() -> None:
    three = routing([[0, 1], [1, 2], [3, 1]], 5)

    lighter = three.dropping(DROPPED)

    assert lighter.weights.tolist() == [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    assert lighter.counts().tolist() == three.counts().tolist()
    assert lighter.dropped_count().item() == 3


def test_every_place_as_a_token_of_its_own() -> None:
    rows = routing([[0, 1], [1, 2], [3, 1]], 5, dropped=DROPPED).one_row_a_place()

    assert rows.selected.tolist() == [[0], [1], [1], [2], [3], [1]]
    assert rows.weights.tolist() == [[1.0], [0.0], [1.0], [1.0], [0.0], [0.0]]
    assert rows.counts().tolist() == [1, 1, 1, 0, 0]
