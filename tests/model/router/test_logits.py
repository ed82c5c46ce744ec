"""From hidden states to scores: each projection and score function against numbers on paper."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moe.config import RouterConfig
from moe.model.router import Router
from moe.model.router.logits import (
    ProductInSlices,
    _slices,
    cosine_logits,
    linear_logits,
    logit_norm,
    noise_std,
    score_function,
)

F64 = torch.float64


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=F64)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("softmax", [0.25, 0.75]),  # e^0 and e^log 3 over their sum 4
        ("sigmoid", [0.5, 0.75]),  # 1 / (1 + 1) and 1 / (1 + 1/3)
        ("sqrt_softplus", [math.sqrt(math.log(2)), math.sqrt(math.log(4))]),  # log(1 + e^z), rooted
        ("relu", [0.0, math.log(3)]),
    ],
)
def test_score_functions_on_paper(score: str, expected: list[float]) -> None:
    scores = score_function(tensor([0.0, math.log(3)]), score)

    torch.testing.assert_close(scores, tensor(expected))


def test_cosine_logits_are_the_angle_over_the_temperature() -> None:
    """x along the first axis, experts at 0°, 60° and 180°, of any length: cosines 1, 1/2, -1, over 0.5."""
    experts = tensor([3.0, 0.0], [0.1, 0.1 * math.sqrt(3)], [-7.0, 0.0])

    logits = cosine_logits(tensor([5.0, 0.0]), experts, torch.tensor(0.5))

    torch.testing.assert_close(logits, tensor([2.0, 1.0, -2.0]))


@given(st.floats(1e-3, 1e3))
def test_cosine_logits_ignore_the_norm_of_the_hidden_state(length: float) -> None:
    x, experts = tensor([0.3, -1.2, 0.5]), tensor([1.0, 2.0, 0.0], [0.0, -1.0, 4.0])

    torch.testing.assert_close(
        cosine_logits(length * x, experts, torch.tensor(0.3)), cosine_logits(x, experts, torch.tensor(0.3))
    )


def test_a_temperature_that_falls_to_zero_stops_at_one_hundredth() -> None:
    logits = cosine_logits(tensor([1.0, 0.0]), tensor([1.0, 0.0]), torch.tensor(-3.0))

    assert logits.item() == pytest.approx(100.0)


def test_normalised_logits_have_mean_zero_and_the_wanted_deviation() -> None:
    """1, 2, 3, 4 have mean 2.5 and variance 5/4; the factor 2 makes -1.5 into -1.5 · 2 / √1.25."""
    logits = logit_norm(tensor([1.0, 2.0, 3.0, 4.0]), 2.0)

    torch.testing.assert_close(logits, tensor([-1.5, -0.5, 0.5, 1.5]) * 2 / math.sqrt(1.25))
    assert logit_norm(tensor([7.0, 7.0]), 1.0).tolist() == [[0.0, 0.0]]


def built(**settings: object) -> Router:
    router = Router(RouterConfig(**settings), d_model=6, n_experts=4, layer=1, first=False).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        nn.init.normal_(parameter, generator=generator) if parameter.dim() else None
    return router


def hidden(n: int = 20) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(1), dtype=F64)


def test_a_two_layer_router_has_a_tanh_between() -> None:
    router = built(projection="two_layer", projection_width=5)
    x = hidden(3)

    by_hand = torch.stack(
        [
            torch.stack(
                [
                    sum(
                        w * math.tanh(float((row @ u).detach()))
                        for w, u in zip(weight, router.inner_weight, strict=True)
                    )
                    for weight in router.weight
                ]
            )
            for row in x
        ]
    )

    torch.testing.assert_close(router(x).logits, by_hand)


def test_the_root_of_softplus_has_a_slope_where_softplus_is_zero() -> None:
    """softplus(-200) is 0 in float32, and the slope of the root there infinite."""
    logits = torch.tensor([[-200.0, 0.0]], requires_grad=True)

    scores = score_function(logits, "sqrt_softplus")
    scores.sum().backward()

    assert 0 <= scores[0, 0] < 1e-18
    # d √softplus / dz = σ(z) / (2 √softplus(z)) = 0.5 / (2 √ln 2) at 0
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0.25 / math.sqrt(math.log(2))]]))


@pytest.mark.parametrize("choice", [{"selection_bias": "sign"}, {"selection": "hash"}])
def test_experts_that_the_logits_rule_out_have_weights_of_zero_not_nan(choice: dict[str, str]) -> None:
    """Selected by their bias or their token's id, two experts with a probability of e^-300 share nothing."""
    router = Router(RouterConfig(**choice), d_model=1, n_experts=8)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[300.0]] + [[0.0]] * 7))
        if router.selection_bias is not None:
            router.selection_bias[1:3] = 5.0

    routing = router(torch.ones(40, 1), token_ids=torch.arange(40))
    (10 * routing.weights).sum().backward()

    ruled_out = (routing.selected != 0).all(dim=1)
    assert ruled_out.any()
    assert (routing.weights[ruled_out] == 0).all()
    assert torch.isfinite(router.weight.grad).all()


def test_two_layers_are_eight_times_as_wide_as_there_are_experts_unless_told() -> None:
    assert built(projection="two_layer").inner_weight.shape == (32, 6)


def test_a_residual_router_adds_the_logits_of_the_layer_before() -> None:
    router = built(residual=True)
    x, before = hidden(), hidden()[:, :4]

    with_residual = router(x, previous_logits=before).logits

    torch.testing.assert_close(with_residual, x @ router.weight.T + before @ router.residual_weight.T)
    with pytest.raises(ValueError, match="previous_logits"):
        router(x)


def test_the_first_mixture_has_no_layer_before() -> None:
    assert Router(RouterConfig(residual=True), 6, 4, first=True).residual_weight is None


def test_a_router_bias_is_added_to_every_token() -> None:
    router, x = built(bias=True), hidden()

    torch.testing.assert_close(router(x).logits, x @ router.weight.T + router.bias)


# --------------------------------------------------------------------------------------------------------------- noise


def test_noise_is_for_training_alone() -> None:
    for settings in ({"jitter": 0.1}, {"noise": "shazeer"}, {"noise": "gumbel"}):
        router = built(**settings).eval()
        first, second = router(hidden()), router(hidden())
        assert torch.equal(first.logits, second.logits)
        assert torch.equal(first.selected, second.selected)
        assert torch.equal(first.weights, second.weights)


def test_jitter_scales_each_coordinate_by_at_most_its_half_width() -> None:
    """With the identity as router, logits are the jittered input."""
    router = Router(RouterConfig(jitter=0.1), 6, 6).double()
    router.weight.data = torch.eye(6, dtype=F64)
    x = hidden(500)

    factor = router(x).logits / x

    assert 0.9 <= factor.min() < 0.91
    assert 1.09 < factor.max() <= 1.1
    assert factor.mean().item() == pytest.approx(1.0, abs=0.005)


def test_learned_noise_has_the_deviation_that_it_reports() -> None:
    """softplus(0) = log 2 for a router at its start."""
    router = Router(RouterConfig(noise="shazeer"), 6, 4).double()
    nn.init.zeros_(router.weight)
    nn.init.zeros_(router.noise_weight)
    torch.manual_seed(0)

    routing = router(hidden(20_000))

    assert routing.noise is not None
    assert routing.noise.std.unique().tolist() == pytest.approx([math.log(2)])
    assert (routing.logits - routing.noise.clean_logits).std().item() == pytest.approx(math.log(2), rel=0.01)
    assert noise_std(torch.tensor([[-50.0]])).item() > 0


def test_a_router_of_learned_noise_starts_by_spreading_the_tokens_evenly() -> None:
    """All logits are 0 but for the noise: 20,000 tokens, 2 choices, 4 experts, so 10,000 each; √n is about 87."""
    router = Router(RouterConfig(noise="shazeer"), 6, 4).double()
    nn.init.zeros_(router.weight)
    nn.init.zeros_(router.noise_weight)
    torch.manual_seed(0)

    counts = router(hidden(20_000)).counts()

    assert (counts - 10_000).abs().max() < 400


def test_gumbel_noise_draws_experts_by_their_probabilities_and_weighs_them_without_noise() -> None:
    """Scores 0.1, 0.2, 0.3, 0.4: the first choice falls on each as often as that."""
    router = Router(RouterConfig(noise="gumbel"), 4, 4).double()
    router.weight.data = torch.eye(4, dtype=F64)
    torch.manual_seed(0)

    routing = router(tensor([0.1, 0.2, 0.3, 0.4]).log().expand(40_000, 4))

    share = routing.first_choices().counts() / 40_000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.01, rtol=0)
    torch.testing.assert_close(routing.scores[0], tensor([0.1, 0.2, 0.3, 0.4])[0])


# ------------------------------------------------------------------------------------------------------------ in slices


def test_three_slices_are_a_float32() -> None:
    """8 bits each: 1 + 2^-8 + 2^-16 + 2^-23 has its last bit in the third. (Subnormal remains apart.)"""
    by_hand = torch.tensor([[1 + 2**-8 + 2**-16 + 2**-23]])
    random = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 40)

    for x in (by_hand, random):
        slices = _slices(x, 3)
        assert {part.dtype for part in slices} == {torch.bfloat16}
        assert torch.equal(sum(part.double() for part in slices), x.double())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_product_in_slices_is_a_float32_product_with_its_gradients(compiled: bool) -> None:
    """Hidden states and their gradient in bfloat16; logits and the router's gradient as near to float64 as float32.
    Compiled, too: a compiler that drops casts would leave slices without what they are for."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(64, 96).bfloat16(), torch.randn(8, 96) * 0.02, torch.randn(64, 8)
    x.requires_grad_()
    weight.requires_grad_()

    multiply = torch.compile(ProductInSlices.apply) if compiled else ProductInSlices.apply
    logits = multiply(x, weight)
    actual = torch.autograd.grad(logits, (x, weight), grad)
    exact = x.double() @ weight.double().t()
    expected = torch.autograd.grad(exact, (x, weight), grad.double())

    assert logits.dtype == actual[1].dtype == torch.float32
    assert actual[0].dtype == torch.bfloat16
    assert (logits - exact).norm() < 3e-7 * exact.norm()
    assert (actual[1] - expected[1]).norm() < 3e-7 * expected[1].norm()
    unrounded = grad.double() @ weight.double()
    assert ((actual[0] - unrounded).abs() <= unrounded.abs() / 256 + 1e-5).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_bfloat16_states_are_routed_as_in_float32() -> None:
    """Against float64, and against what truly rounded weights would do, which is wrong by a hundred times more.

    The units that multiply bfloat16 cut their sums off where float32 units round them.
    """
    torch.manual_seed(0)
    x, weight = torch.randn(512, 2048, device="cuda").bfloat16(), torch.randn(16, 2048, device="cuda") * 0.02
    x.requires_grad_()
    weight.requires_grad_()
    grad = torch.randn(512, 16, device="cuda")

    logits = linear_logits(x, weight)
    actual = torch.autograd.grad(logits, (x, weight), grad)
    exact = x.double() @ weight.double().t()
    expected = torch.autograd.grad(exact, (x, weight), grad.double())

    error = float((logits - exact).norm() / exact.norm())
    assert error < 1e-5 < 1e-2 * float((x @ weight.bfloat16().t() - exact).norm() / exact.norm())
    assert (actual[0] - expected[0]).norm() < 3e-3 * expected[0].norm()
    assert (actual[1] - expected[1]).norm() < 1e-5 * expected[1].norm()
