"""Cutting parameters, and putting them together again."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.parallel.split import Split


def test_gate_and_value_are_cut_apart() -> None:
    """Rows 0-3 are the gate and 4-7 the value: the second of two ranks has 2, 3 and 6, 7."""
    rows = torch.arange(8)[:, None]

    assert Split(0, "tensor", halves=2).cut(rows, 1, 2).flatten().tolist() == [2, 3, 6, 7]
    assert Split(0, "tensor").cut(rows, 1, 2).flatten().tolist() == [4, 5, 6, 7]


@given(st.integers(1, 4), st.integers(1, 2), st.integers(0, 1))
def test_parts_make_the_whole(ranks: int, halves: int, dim: int) -> None:
    whole, split = torch.randn(24, 24), Split(dim, "tensor", halves)

    assert torch.equal(split.join([split.cut(whole, rank, ranks) for rank in range(ranks)]), whole)
