"""Rounding by chance: to a neighbour, right on average, and the same wherever it is done."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.training.rounding import noise, round_by


def rounded(x: Tensor, step: int = 1, salt: int = 0) -> Tensor:
    return round_by(noise(torch.tensor(float(step)), salt, x.numel()).view(x.shape), x)


@given(st.integers(0, 2**16), st.floats(-30, 30))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_number_becomes_one_of_its_two_neighbours(seed: int, exponent: float) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 10**exponent

    result = rounded(x, salt=seed).float()

    below = (x.view(torch.int32) & -0x10000).view(torch.float32)
    above = ((x.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert ((result == below) | (result == above)).all()


def test_what_bfloat16_holds_stays() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, 1e-30, 3.0e38, float("inf"), -float("inf")]).bfloat16().float()

    for step in range(50):
        assert torch.equal(rounded(x, step).float(), x)


def test_a_number_that_is_none_stays_none() -> None:
    assert rounded(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9])
def test_it_is_rounded_up_as_often_as_it_is_near(share: float) -> None:
    """1 and 1 + 1/128 are neighbours; of 40,000 the share has a deviation of √(p (1 - p) / 40,000) ≤ 0.0025."""
    x = torch.full((40_000,), 1 + share / 128)

    ups = rounded(x).float() > 1

    assert float(ups.float().mean()) == pytest.approx(share, abs=4 * (share * (1 - share) / 40_000) ** 0.5)


def test_steps_tensors_and_elements_draw_independently() -> None:
    """Each pair of bits agrees half of the time: 32 · 10,000 bits, a deviation of 0.0009 each."""
    n = 10_000
    draws = [noise(torch.tensor(float(step)), salt, n) for step, salt in [(1, 0), (2, 0), (1, 1), (3, 7)]]
    draws.append(draws[0].roll(1))
    bits = torch.stack([(draw[:, None] >> torch.arange(32)) & 1 for draw in draws]).flatten(1).double()

    agreement = torch.stack([(a == b).double().mean() for i, a in enumerate(bits) for b in bits[:i]])

    assert (agreement - 0.5).abs().max() < 0.005
    assert (bits.mean(1) - 0.5).abs().max() < 0.005


def test_the_draw_depends_on_nothing_else() -> None:
    torch.manual_seed(0)
    first = noise(torch.tensor(5.0), 3, 100)
    torch.manual_seed(1)

    assert torch.equal(noise(torch.tensor(5.0), 3, 200)[:100], first)
    # MurmurHash3's finaliser of 1 is a published constant; salt and step give the key 0 here.
    assert int(noise(torch.tensor(0.0), 0, 2)[1]) == 0x514E28B7
