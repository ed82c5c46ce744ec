"""Rotary positions: what they are on paper, and what they leave as it was."""

import itertools

import pytest
import torch
from torch import Tensor

from moe.config import AttentionConfig, ModelConfig, RopeConfig
from moe.model.rotation import rotate, rotate_rows, rotation_of

THETA = 100.0


def heads_of(width: int, fraction: float = 1.0) -> ModelConfig:
    return ModelConfig(attention=AttentionConfig(head_dim=width, rope_theta=THETA, rope=RopeConfig(fraction=fraction)))


SIX = heads_of(6)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_position_zero_is_the_identity() -> None:
    x = draw(1, 2, 1, 6)

    assert torch.equal(rotate(x, rotation_of(torch.zeros(1, 1, dtype=torch.int64), SIX)), x)


def test_a_quarter_turn_on_paper() -> None:
    """With head_dim 2 the angle is the position: at π/2, (1, 0) becomes (0, 1)."""
    cos, sin = rotation_of(torch.tensor([[3]]), heads_of(2))
    assert (cos.item(), sin.item()) == pytest.approx((-0.9899925, 0.1411200))

    quarter = (torch.tensor([[0.0]]), torch.tensor([[1.0]]))
    assert rotate(torch.tensor([[[[1.0, 0.0]]]]), quarter).tolist() == [[[[0.0, 1.0]]]]


def test_frequencies_fall_from_one_to_almost_one_over_theta() -> None:
    """Position 1 turns pair i by θ^(-2i/d): 1, 100^(-1/3), 100^(-2/3)."""
    cos, sin = rotation_of(torch.tensor([[1]]), SIX)

    angles = torch.atan2(sin, cos).flatten().tolist()
    assert angles == pytest.approx([1.0, 100 ** (-1 / 3), 100 ** (-2 / 3)], rel=1e-5)


def test_scores_depend_on_the_distance_alone() -> None:
    query, key = draw(1, 1, 1, 6, seed=2), draw(1, 1, 1, 6, seed=3)

    def score(m: int, n: int) -> float:
        at_m, at_n = (rotation_of(torch.tensor([[position]]), SIX) for position in (m, n))
        return float((rotate(query, at_m) * rotate(key, at_n)).sum())

    for shift, (m, n) in itertools.product((1, 10, 500), ((3, 0), (0, 3), (7, 5))):
        assert score(m + shift, n + shift) == pytest.approx(score(m, n), abs=2e-4)
    assert score(3, 0) != pytest.approx(score(0, 3), abs=1e-2)


def test_rotation_keeps_lengths() -> None:
    x = draw(2, 3, 5, 6)

    turned = rotate(x, rotation_of(torch.arange(5)[None], SIX))

    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


def test_the_gradient_of_a_rotation_agrees_with_finite_differences() -> None:
    """Its backward is written by hand; positions differ by row, as they do with padding."""
    rotation = rotation_of(torch.tensor([[0, 1, 2], [0, 0, 7]]), SIX)

    assert torch.autograd.gradcheck(lambda x: rotate(x, rotation), draw(2, 2, 3, 6).requires_grad_())


def test_a_rotation_in_bfloat16_is_rounded_once() -> None:
    """Computed in float32 and returned in the dtype that came in."""
    x = draw(2, 2, 5, 6).bfloat16()
    rotation = rotation_of(torch.arange(5)[None], SIX)

    assert torch.equal(rotate(x, rotation), rotate(x.float(), rotation).bfloat16())


def test_rotating_rows_is_rotating_and_leaves_the_heads_of_a_token_together() -> None:
    """The layout on a GPU: neither the result nor its gradient is to be copied for the projections."""
    rows, rotation = draw(2, 5, 3 * 6), rotation_of(torch.arange(5)[None], SIX)
    grads = draw(2, 5, 3 * 6, seed=4).unflatten(2, (3, 6)).transpose(1, 2)

    results = []
    for turn in (rotate, rotate_rows):
        leaf = rows.clone().requires_grad_()
        turned = turn(leaf.unflatten(2, (3, 6)).transpose(1, 2), rotation)
        (grad,) = torch.autograd.grad(turned, leaf, grads)
        results.append((turned.detach(), grad))

    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert results[1][0].transpose(1, 2).is_contiguous()
    assert not results[0][0].transpose(1, 2).is_contiguous()


def test_with_a_fraction_the_first_dimensions_turn_as_a_head_of_their_own_and_the_rest_stay() -> None:
    """GLM-4's half: frequencies are those of 6 dimensions, not of 12."""
    x, positions = draw(2, 3, 5, 12), torch.arange(5)[None]

    turned = rotate(x, rotation_of(positions, heads_of(12, fraction=0.5)))

    assert torch.equal(turned[..., :6], rotate(x[..., :6], rotation_of(positions, SIX)))
    assert torch.equal(turned[..., 6:], x[..., 6:])
