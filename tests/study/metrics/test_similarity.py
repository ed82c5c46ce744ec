"""Experts made alike by hand, and CKA against its formula written out."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import AttentionConfig, BalanceConfig, ExpertsConfig, FeedForwardConfig, ModelConfig, RouterConfig
from moe.model.moe_layer import MoELayer
from moe.model.transformer import Transformer
from moe.study.metrics.similarity import linear_cka, output_similarity, router_similarity, weight_similarity


def model_of(activation: str = "swiglu", bias: bool = False, n_experts: int = 4, **router: object) -> Transformer:
    """Two mixture layers, behind a dense one."""
    config = ModelConfig(
        vocab_size=32,
        n_layers=3,
        d_model=16,
        max_seq=32,
        init_std=0.2,
        attention=AttentionConfig(n_heads=2, head_dim=8),
        feed_forward=FeedForwardConfig(activation=activation, bias=bias),
        experts=ExpertsConfig(n_experts=n_experts, d_ff=24, first_dense=1),
        router=RouterConfig(**router),
        balance=BalanceConfig(load_balance=0),
    )
    return Transformer(config)


def layer_of(model: Transformer, block: int) -> MoELayer:
    layer = model.blocks[block].feed_forward
    assert isinstance(layer, MoELayer)
    return layer


def some_tokens() -> torch.Tensor:
    return torch.randint(32, (16, 32), generator=torch.Generator().manual_seed(0))


def reorder_hidden_units(model: Transformer, block: int, source: int, target: int) -> None:
    """Make one expert a copy of another with its hidden units in another order (gate and value alike)."""
    experts = layer_of(model, block).experts
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    rows = torch.cat([order, order + 24])
    with torch.no_grad():
        experts.w_in[target] = experts.w_in[source][rows]
        experts.w_out[target] = experts.w_out[source][:, order]


# ------------------------------------------------------------------------------------------------------------- weights


def test_independent_experts_have_cosines_about_0() -> None:
    measured = weight_similarity(model_of())

    assert measured.axes[0].labels == ("1", "2")
    assert measured.values[:, range(4), range(4)] == pytest.approx(np.ones((2, 4)))
    assert measured.null_std is not None
    # 48 · 16 + 16 · 24 = 1152 weights an expert.
    assert measured.null_std.ravel() == pytest.approx([1152**-0.5] * 2)
    pairs = measured.values[:, *np.triu_indices(4, 1)] / measured.null_std[:, 0]
    assert np.abs(pairs).max() < 3.5
    assert 0.5 < pairs.std() < 1.6  # of 12 pairs


def test_a_copy_has_cosine_1_and_its_opposite_minus_1() -> None:
    model = model_of(bias=True, activation="gelu")
    experts = layer_of(model, 2).experts
    with torch.no_grad():
        experts.b_in.normal_()
        for stacked in (experts.w_in, experts.w_out, experts.b_in, experts.b_out):
            stacked[1] = 3 * stacked[0]
            stacked[2] = -stacked[0]

    values = weight_similarity(model).values[1]

    assert values[0, 1] == pytest.approx(1)
    assert values[0, 2] == pytest.approx(-1)
    assert values == pytest.approx(values.T)


def test_the_cosine_is_that_of_two_plain_vectors() -> None:
    model = model_of(bias=True, activation="relu")
    experts = layer_of(model, 1).experts
    with torch.no_grad():
        for stacked in (experts.w_in, experts.w_out, experts.b_in, experts.b_out):
            stacked.zero_()
        # (3, 4, 0, 0) and (3, 0, 4, 12): 9 / (5 · 13).
        experts.w_in[0, 0, 0] = experts.w_in[1, 0, 0] = 3
        experts.w_out[0, 5, 5] = 4
        experts.b_in[1, 2] = 4
        experts.b_out[1, 7] = 12

    values = weight_similarity(model).values[0]

    assert values[0, 1] == pytest.approx(9 / 65)
    assert math.isnan(values[2, 3])  # experts of zeros


def test_router_rows() -> None:
    model = model_of()
    with torch.no_grad():
        weight = layer_of(model, 1).router.weight
        weight.zero_()
        weight[:, :2] = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [-3.0, 0.0]])

    measured = router_similarity(model)

    half = 2**-0.5
    expected = [[1, 0, half, -1], [0, 1, half, 0], [half, half, 1, -half], [-1, 0, -half, 1]]
    assert measured.values[0] == pytest.approx(np.array(expected))
    assert measured.null_std is not None
    assert measured.null_std.ravel() == pytest.approx([1 / 4] * 2)  # 16 dimensions


def test_a_router_without_weights_has_no_rows() -> None:
    with pytest.raises(ValueError, match="block 1: a router with selection hash has no weights"):
        router_similarity(model_of(selection="hash", weights="equal"))


# ------------------------------------------------------------------------------------------------------------- outputs


def test_hidden_units_in_another_order_fool_the_weights_and_not_the_outputs() -> None:
    model = model_of()
    reorder_hidden_units(model, 2, source=0, target=3)

    weights = weight_similarity(model)
    outputs = output_similarity(model, some_tokens())

    # One unit of 24 stays in its place on average, so the cosine is small.
    assert abs(weights.values[1, 0, 3]) < 0.2
    assert outputs.values[1, 0, 3] == pytest.approx(1)
    others = [pair for pair in permutations(range(4), 2) if pair not in ((0, 3), (3, 0))]
    assert outputs.values[1, *zip(*others, strict=True)].max() < 0.9


def test_untrained_experts_are_at_the_chance_of_random_weights_which_is_far_above_0() -> None:
    # Weights so small that a GELU is nearly linear: weights of another size would have another chance value.
    model = model_of("gelu", n_experts=16).train()
    with torch.no_grad():
        for block in (1, 2):
            layer_of(model, block).experts.w_in.mul_(0.1)

    measured = output_similarity(model, some_tokens(), random_experts=16)

    assert measured.chance is not None
    chance = measured.chance.ravel()
    assert (chance > 0.4).all()
    means = measured.values[:, *np.triu_indices(16, 1)].mean(axis=1)
    assert means == pytest.approx(chance, abs=0.06)
    assert model.training
    assert not layer_of(model, 1)._forward_pre_hooks


def test_cka_is_the_published_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(7, width, generator=generator, dtype=torch.float64) for width in (3, 5))

    values = linear_cka([one, other])

    assert values[0, 1] == pytest.approx(hsic(one, other) / math.sqrt(hsic(one, one) * hsic(other, other)))


def hsic(one: torch.Tensor, other: torch.Tensor) -> float:
    """HSIC_1 of Song et al. 2012, eq. 5, in plain Python."""
    n = len(one)
    kernels = [[[0.0 if i == j else float(x[i] @ x[j]) for j in range(n)] for i in range(n)] for x in (one, other)]
    k, l = kernels  # noqa: E741
    trace = sum(k[i][j] * l[j][i] for i in range(n) for j in range(n))
    sums = sum(map(sum, k)) * sum(map(sum, l))
    product = sum(k[i][m] * l[m][j] for i in range(n) for j in range(n) for m in range(n))
    return (trace + sums / ((n - 1) * (n - 2)) - 2 * product / (n - 2)) / (n * (n - 3))


def test_few_tokens_of_many_dimensions_do_not_look_alike() -> None:
    # 12 tokens of 100 dimensions: the biased estimate of unrelated outputs would be near 1.
    generator = torch.Generator().manual_seed(0)
    drawn = [linear_cka([torch.randn(12, 100, generator=generator) for _ in range(2)])[0, 1] for _ in range(300)]

    assert np.mean(drawn) == pytest.approx(0, abs=4 * np.std(drawn) / math.sqrt(300))
    assert np.std(drawn) < 0.3


@given(st.integers(0, 1000), st.floats(0.01, 100), st.integers(4, 12))
@settings(max_examples=25, deadline=None)
def test_cka_ignores_rotation_scale_and_shift(seed: int, scale: float, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q

    shift = torch.randn(4, generator=generator, dtype=torch.float64)

    values = linear_cka([one, other, scale * one @ rotation + shift])

    assert values[0, 2] == pytest.approx(1)
    assert values[1, 2] == pytest.approx(values[0, 1])
    assert np.abs(values).max() <= 1 + 1e-9


def test_outputs_need_four_tokens_and_a_mixture() -> None:
    with pytest.raises(ValueError, match="3 tokens"):
        output_similarity(model_of(), some_tokens()[:1, :3])
    model = model_of()
    model.blocks = model.blocks[:1]
    with pytest.raises(ValueError, match="no mixture layers"):
        weight_similarity(model)
