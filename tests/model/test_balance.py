"""Balance losses against closed forms, finite differences, and the forms that other codebases write."""

from collections.abc import Callable
from dataclasses import replace
from math import erf, log, sqrt
from statistics import mean, pvariance

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.config import RouterConfig
from moe.model.balance import (
    adapted_coefficient,
    common_scale,
    device_loss,
    entropy_loss,
    importance_loss,
    load_balancing_loss,
    noisy_load_loss,
    orthogonality_loss,
    sparsity_loss,
    z_loss,
)
from moe.model.router import Router
from moe.model.routing import LearnedNoise, Routing

Loss = Callable[[Routing], Tensor]


def routing_of(logits: Tensor, top_k: int, mask: Tensor | None = None) -> Routing:
    scores = logits.softmax(-1)
    best = scores.detach().topk(top_k)
    return Routing(logits, scores, best.indices, scores.gather(1, best.indices), mask)


def random_logits(n_tokens: int, n_experts: int, seed: int = 0) -> Tensor:
    return torch.randn(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def collapsed(experts: list[int], n_experts: int, n_tokens: int = 12) -> Routing:
    """Every token certain of the same experts."""
    logits = torch.full((n_tokens, n_experts), -1000.0)
    logits[:, experts] = 0.0
    return routing_of(logits, len(experts))


def noisy(logits: Tensor, top_k: int, mask: Tensor | None = None) -> Routing:
    """Logits that are the clean ones plus half of a fixed wave, of deviation 1/2 and more."""
    wave = torch.sin(torch.arange(logits.numel(), dtype=logits.dtype)).view_as(logits)
    noise = LearnedNoise(logits, 0.5 + 0.1 * logits.tanh())
    return replace(routing_of(logits + 0.5 * wave, top_k, mask), noise=noise)


def gated(gates: Tensor, mask: Tensor | None = None) -> Routing:
    """ReLU gates: every expert whose gate is open, in as many places as there are experts."""
    order = gates.detach().argsort(dim=-1, descending=True, stable=True)
    open_gates = gates.detach().gather(1, order) > 0
    weights = gates.gather(1, order)
    return Routing(gates, gates, order, weights, mask, assigned=open_gates, scores_are_probabilities=False)


LOSSES: dict[str, Loss] = {
    "load_balance": load_balancing_loss,
    "importance": importance_loss,
    "noisy_load": noisy_load_loss,
    "device": lambda routing: device_loss(routing, 2),
    "sparsity": lambda routing: sparsity_loss(routing, 2),
    "z_loss": z_loss,
    "entropy": entropy_loss,
}
"""every loss of tokens"""


def balanced(n_experts: int, top_k: int) -> Routing:
    """Uniform scores, and token t choosing experts t, t + 1, ..., t + K - 1 (mod E)."""
    selected = (torch.arange(n_experts)[:, None] + torch.arange(top_k)) % n_experts
    scores = torch.full((n_experts, n_experts), 1 / n_experts)
    return Routing(scores.log(), scores, selected, scores.gather(1, selected))


@pytest.mark.parametrize("n_experts", [4, 8, 16])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_perfect_balance_reads_one(n_experts: int, top_k: int) -> None:
    assert load_balancing_loss(balanced(n_experts, top_k)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_collapse_on_k_experts_reads_experts_over_k(top_k: int) -> None:
    assert load_balancing_loss(collapsed(list(range(top_k)), 8)).item() == pytest.approx(8 / top_k)


def test_layers_that_collapse_on_different_experts_do_not_hide_each_other() -> None:
    """Pooled before the product, these eight layers would read 1: perfect."""
    layers = [collapsed([expert], n_experts=8) for expert in range(8)]

    assert [load_balancing_loss(layer).item() for layer in layers] == pytest.approx([8.0] * 8)


def test_three_tokens_on_paper_and_below_one() -> None:
    """f = (2/3, 1/3) but P = (0.34, 0.66): 2 (0.68 + 0.66) / 3 = 0.8933, so 1 is no lower bound."""
    scores = torch.tensor([[0.51, 0.49], [0.51, 0.49], [0.0, 1.0]])
    routing = Routing(scores.log(), scores, torch.tensor([[0], [0], [1]]), torch.ones(3, 1))

    assert load_balancing_loss(routing).item() == pytest.approx(2 * (2 * 0.34 + 0.66) / 3)


def test_the_gradient_is_that_of_scores_with_fixed_loads() -> None:
    """d/dp_te of E Σ f_e P_e is E f_e / T; the counts carry none."""
    routing = routing_of(random_logits(10, 4), top_k=2)
    scores = routing.scores.clone().requires_grad_()

    load_balancing_loss(Routing(routing.logits, scores, routing.selected, routing.weights)).backward()

    load = routing.selected.flatten().bincount(minlength=4) / 20
    torch.testing.assert_close(scores.grad, (4 * load / 10).double().expand(10, 4))


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_agrees_with_finite_differences(name: str) -> None:
    """With the chosen experts held fixed, for the counts carry no gradient."""
    logits = random_logits(6, 4).requires_grad_()

    assert torch.autograd.gradcheck(lambda z: LOSSES[name](noisy(z, 2)), logits)


def test_the_gradient_through_normalised_scores_agrees_with_finite_differences() -> None:
    logits = random_logits(6, 4).requires_grad_()

    def of(z: Tensor, per_sequence: bool) -> Tensor:
        routing = replace(routing_of(z, 2), scores=z.sigmoid(), scores_are_probabilities=False, n_sequences=3)
        return load_balancing_loss(routing, per_sequence=per_sequence)

    assert torch.autograd.gradcheck(lambda z: of(z, False), logits)
    assert torch.autograd.gradcheck(lambda z: of(z, True), logits)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_neither_value_nor_gradient(name: str) -> None:
    """Three quarters padding, all of it alike: counted, it would read as collapse."""
    loss = LOSSES[name]
    real = random_logits(8, 4).requires_grad_()
    padded = torch.cat([real.detach(), torch.tensor([[5.0, 4.0, 0, 0]], dtype=torch.float64).expand(24, 4)])
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    padded, mask = padded[order].requires_grad_(), (torch.arange(32) < 8)[order]

    def routing(logits: Tensor, mask: Tensor | None = None) -> Routing:
        noise = LearnedNoise(logits - 0.1, torch.full_like(logits, 0.7))
        return replace(routing_of(logits, 2, mask), noise=noise)

    alone = loss(routing(real))
    among_padding = loss(routing(padded, mask))
    alone.backward()
    among_padding.backward()

    torch.testing.assert_close(among_padding, alone)
    counted = loss(routing(padded.detach()))
    assert (counted / alone - 1).abs() > 0.2
    torch.testing.assert_close(padded.grad[order.argsort()][:8], real.grad)
    assert padded.grad[~mask].eq(0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_padding_alone_reads_zero_with_a_zero_gradient(name: str) -> None:
    logits = random_logits(3, 4).requires_grad_()

    loss = LOSSES[name](noisy(logits, 2, torch.zeros(3, dtype=torch.bool)))
    loss.backward()

    assert loss == 0
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_the_precision_of_the_logits(name: str, dtype: torch.dtype) -> None:
    assert LOSSES[name](noisy(random_logits(6, 4).to(dtype), 2)).dtype == dtype


def test_counts_of_more_tokens_replace_the_load() -> None:
    """f = (3/4, 1/4) from elsewhere and P = (0.2, 0.8) from here: 2 (0.15 + 0.2) = 0.7."""
    scores = torch.tensor([[0.2, 0.8]])
    routing = Routing(scores.log(), scores, torch.tensor([[1]]), torch.ones(1, 1))

    assert load_balancing_loss(routing, counts=torch.tensor([30, 10])).item() == pytest.approx(0.7)


def test_smaller_micro_batches_read_higher() -> None:
    """The loss is not linear in the batch: 4 tokens that balance each other, taken one at a time, look collapsed."""
    logits = 20 * torch.eye(4)

    whole = load_balancing_loss(routing_of(logits, 1))
    apart = torch.stack([load_balancing_loss(routing_of(logits[t : t + 1], 1)) for t in range(4)]).mean()

    assert whole.item() == pytest.approx(1.0)
    assert apart.item() == pytest.approx(4.0)


def test_empty_places_do_not_count() -> None:
    """Expert 1 in an empty place is nobody's: f = (1, 0), P = (3/4, 1/4), so 2 · 3/4; counted, it would read 1."""
    scores = torch.tensor([[0.75, 0.25]])
    routing = Routing(
        scores.log(),
        scores,
        torch.tensor([[0, 1]]),
        torch.tensor([[0.75, 0.0]]),
        assigned=torch.tensor([[True, False]]),
    )

    assert load_balancing_loss(routing).item() == pytest.approx(1.5)
    assert load_balancing_loss(replace(routing, assigned=None)).item() == pytest.approx(1.0)


def test_an_expert_without_tokens_has_a_score_and_no_gradient() -> None:
    """f = (1/2, 1/2, 0): the third expert's column gets exactly nothing."""
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.6, 0.1]]).requires_grad_()

    load_balancing_loss(Routing(scores.log(), scores, torch.tensor([[0], [1]]), torch.ones(2, 1))).backward()

    assert scores.grad[:, 2].tolist() == [0.0, 0.0]
    assert scores.grad[:, :2].tolist() == [[0.75, 0.75]] * 2  # E f_e / T = 3 · 1/2 / 2


# ------------------------------------------------------------------------------------ the variants of the balance loss


def sigmoid_routing(logits: Tensor, top_k: int, n_sequences: int = 1, mask: Tensor | None = None) -> Routing:
    scores = logits.sigmoid()
    best = scores.detach().topk(top_k)
    return Routing(
        logits, scores, best.indices, best.values, mask, n_sequences=n_sequences, scores_are_probabilities=False
    )


def test_scores_that_are_no_probabilities_count_by_their_share() -> None:
    """Scores (0.9, 0.3) and (0.1, 0.3) are shares (3/4, 1/4) and (1/4, 3/4): P = (1/2, 1/2), a loss of 1."""
    scores = torch.tensor([[0.9, 0.3], [0.1, 0.3]])
    routing = Routing(
        scores.logit(), scores, torch.tensor([[0], [0]]), torch.ones(2, 1), scores_are_probabilities=False
    )

    assert load_balancing_loss(routing).item() == pytest.approx(1.0)


def test_small_scores_weigh_as_much_as_large_ones() -> None:
    """The shares, and so the loss, do not change when all scores are 1e-20 times as large."""
    routing = sigmoid_routing(random_logits(8, 4), 2)

    small = replace(routing, scores=routing.scores * 1e-20)

    torch.testing.assert_close(load_balancing_loss(small), load_balancing_loss(routing))


def test_a_token_that_no_gate_opens_for_is_left_out() -> None:
    """Token 1 has no positive gate; alone, token 0 has f = P = (1, 0): 2."""
    gates = torch.tensor([[0.4, 0.0], [0.0, 0.0]]).requires_grad_()

    loss = load_balancing_loss(gated(gates))
    loss.backward()

    assert loss.item() == pytest.approx(2.0)
    assert torch.isfinite(gates.grad).all()


def test_the_loss_of_each_sequence_on_paper() -> None:
    """Two sequences of two tokens, each certain of one expert of its own: 2 each, though together they read 1."""
    logits = torch.tensor([[0.0, -1000.0]] * 2 + [[-1000.0, 0.0]] * 2)
    routing = replace(routing_of(logits, 1), n_sequences=2)

    assert load_balancing_loss(routing, per_sequence=True).item() == pytest.approx(2.0)
    assert load_balancing_loss(routing).item() == pytest.approx(1.0)
    assert device_loss(routing, 2, per_sequence=True).item() == pytest.approx(2.0)


def test_a_sequence_of_padding_is_no_sequence() -> None:
    """Of three sequences the second is padding; the mean is over the other two, each over its real tokens."""
    logits = random_logits(12, 4).requires_grad_()
    mask = torch.tensor([True] * 4 + [False] * 4 + [True, True, False, False])
    routing = sigmoid_routing(logits, 2, n_sequences=3, mask=mask)

    loss = load_balancing_loss(routing, per_sequence=True)
    loss.backward()

    first, third = (load_balancing_loss(sigmoid_routing(logits.detach()[rows], 2)) for rows in ([0, 1, 2, 3], [8, 9]))
    torch.testing.assert_close(loss.detach(), (first + third) / 2)
    assert logits.grad[~mask].eq(0).all()
    assert logits.grad[mask].ne(0).all()


def test_counts_of_other_tokens_do_not_go_with_sequences() -> None:
    with pytest.raises(ValueError, match="per_sequence"):
        load_balancing_loss(balanced(4, 1), torch.ones(4, dtype=torch.int64), per_sequence=True)


def test_first_choices_alone() -> None:
    """Both tokens choose expert 0 first: f = (1, 0, 0) and P_0 = 0.5, so 3 · 0.5; with all choices f = (1/2, 1/2, 0)
    and the loss is 3 (0.25 + 0.2)."""
    scores = torch.tensor([[0.5, 0.4, 0.1]] * 2)
    routing = Routing(scores.log(), scores, torch.tensor([[0, 1], [0, 1]]), torch.ones(2, 2))

    assert load_balancing_loss(routing, choices="first").item() == pytest.approx(1.5)
    assert load_balancing_loss(routing, choices="first", per_sequence=True).item() == pytest.approx(1.5)
    assert load_balancing_loss(routing).item() == pytest.approx(1.35)


def test_special_experts_weigh_less_and_have_a_larger_fair_share() -> None:
    """η = (1, 1, 1/2): fair shares are (1/4, 1/4, 1/2), where E Σ η f P = 3 (1/16 + 1/16 + 1/8) = 3/4 and the common
    scale reads 1; all on the special expert is 4 · 1/2 = 2 there, all on an MLP 4."""

    def read(*experts: int) -> tuple[float, float]:
        scores = torch.nn.functional.one_hot(torch.tensor(experts), 3).float()
        routing = Routing(scores, scores, torch.tensor(experts)[:, None], torch.ones(len(experts), 1), n_special=1)
        loss = load_balancing_loss(routing, special_weight=0.5)
        return loss.item(), common_scale("load_balance", loss, routing, special_weight=0.5).item()

    assert read(0, 1, 2, 2) == pytest.approx((0.75, 1.0))
    assert read(2) == pytest.approx((1.5, 2.0))
    assert read(0) == pytest.approx((3.0, 4.0))


# --------------------------------------------------------------------------------------------------- groups of experts


def test_devices_on_paper() -> None:
    """Experts 0 and 1 on one device: f = (1/2, 1/4, 1/4, 0) gives f' = 4 (3/8, 1/8) = (3/2, 1/2); the scores are equal
    for all tokens, P' = (0.7, 0.3); 1.05 + 0.15."""
    scores = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).expand(4, 4)
    routing = Routing(scores.log(), scores, torch.tensor([[0], [0], [1], [2]]), torch.ones(4, 1))

    assert device_loss(routing, 2).item() == pytest.approx(1.2)
    assert device_loss(routing, 2, counts=torch.tensor([2, 2, 2, 2])).item() == pytest.approx(1.0)


def test_devices_of_no_token_have_no_loss() -> None:
    routing = sigmoid_routing(random_logits(0, 4), 2)

    assert device_loss(routing, 2).item() == 0.0
    assert device_loss(routing, 2, per_sequence=True).item() == 0.0


def test_as_many_devices_as_experts_are_experts() -> None:
    routing = sigmoid_routing(random_logits(10, 8), 3)

    torch.testing.assert_close(device_loss(routing, 8), load_balancing_loss(routing))
    assert device_loss(routing, 1).item() == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------- Shazeer's two losses


def test_importance_on_paper() -> None:
    """Weights add up to (1.5, 0.5, 1, 1): mean 1, variance (1/4 + 1/4) / 4 = 1/8."""
    selected = torch.tensor([[0, 1], [0, 2], [3, 2]])
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [1.0, 1.0]])
    routing = Routing(torch.zeros(3, 4), torch.full((3, 4), 0.25), selected, weights)

    assert importance_loss(routing).item() == pytest.approx(0.125)


def test_importance_ignores_what_stands_in_empty_places() -> None:
    routing = gated(torch.tensor([[0.5, 0.0], [0.0, 0.5]]))
    littered = replace(routing, weights=routing.weights + (~routing.assigned) * 7.0)

    assert importance_loss(littered).item() == importance_loss(routing).item() == 0.0


def smooth_load(noisy_logits: Tensor, clean: Tensor, std: Tensor, top_k: int) -> list[float]:
    """Shazeer et al., eq. 8-10, one token and one expert at a time."""
    loads = [0.0] * clean.shape[1]
    for h, z, s in zip(noisy_logits.tolist(), clean.tolist(), std.tolist(), strict=True):
        for i in range(len(h)):
            kth_excluding = sorted(h[:i] + h[i + 1 :], reverse=True)[top_k - 1]
            loads[i] += 0.5 * (1 + erf((z[i] - kth_excluding) / s[i] / sqrt(2)))
    return loads


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_noisy_load_is_that_of_the_paper(top_k: int) -> None:
    routing = noisy(random_logits(9, 4), top_k)
    loads = smooth_load(routing.logits, routing.noise.clean_logits, routing.noise.std, top_k)

    assert noisy_load_loss(routing).item() == pytest.approx(pvariance(loads) / mean(loads) ** 2)


def test_every_expert_of_all_is_certain() -> None:
    assert noisy_load_loss(noisy(random_logits(5, 4), 4)).item() == 0.0


def test_the_noisy_load_of_a_router_that_has_lost_its_noise_has_a_gradient_of_zero_not_nan() -> None:
    """softplus(-200) is 0 in float32, and the load would divide by it."""
    router = Router(RouterConfig(noise="shazeer"), 1, 4)
    torch.nn.init.ones_(router.weight)
    router.weight.data[0] = 2.0
    torch.nn.init.constant_(router.noise_weight, -200.0)

    noisy_load_loss(router(torch.ones(5, 1))).backward()

    assert router.noise_weight.grad.isfinite().all()
    assert router.weight.grad.isfinite().all()


def test_the_noisy_load_needs_noise() -> None:
    with pytest.raises(ValueError, match="noise"):
        noisy_load_loss(routing_of(random_logits(5, 4), 2))


# ------------------------------------------------------------------------------------------------------------- ReMoE


def test_sparsity_on_paper() -> None:
    """k = 1 of 3 experts, two tokens: counts (2, 1, 0), f = 3/2 (2, 1, 0) = (3, 1.5, 0). The gates of an expert have
    means (0.3, 0.2, 0): 0.9 + 0.3."""
    routing = gated(torch.tensor([[0.4, 0.4, 0.0], [0.2, 0.0, 0.0]]))

    assert sparsity_loss(routing, top_k=1).item() == pytest.approx(1.2)


def test_the_coefficient_grows_while_too_many_gates_are_on() -> None:
    """Of 2 layers, 3 tokens and 4 experts with k = 1 the target is 6 gates."""
    assert adapted_coefficient(1e-8, 1.2, gates_on=7, target=6) == 1e-8 * 1.2
    assert adapted_coefficient(1e-8, 1.2, gates_on=5, target=6) == 1e-8 / 1.2
    assert adapted_coefficient(1e-8, 1.2, gates_on=6, target=6) == 1e-8


# --------------------------------------------------------------------------------------- outputs and matrix of a router


def test_entropy_on_paper() -> None:
    """Uniform over 4: log 4. Probabilities 1/4 and 3/4: log 4 - 3/4 log 3. Certain: 0, and no NaN in the gradient."""
    quarters = torch.tensor([[0.0, log(3)]])
    certain = torch.tensor([[0.0, -1000.0]]).requires_grad_()

    assert entropy_loss(routing_of(torch.zeros(3, 4), 1)).item() == pytest.approx(log(4))
    assert entropy_loss(routing_of(quarters, 1)).item() == pytest.approx(log(4) - 0.75 * log(3))
    entropy_loss(routing_of(certain, 1)).backward()
    assert certain.grad.eq(0).all()


def test_orthogonality_on_paper() -> None:
    """W Wᵀ = ((4, 2), (2, 2)): |3| + |2| + |2| + |1|. Orthonormal rows: 0. Zeros: E."""
    weight = torch.tensor([[2.0, 0.0], [1.0, 1.0]])

    assert orthogonality_loss(weight).item() == 8.0
    assert orthogonality_loss(torch.eye(3, 5)).item() == 0.0
    assert orthogonality_loss(torch.zeros(3, 5)).item() == 3.0


def test_orthogonality_of_a_bfloat16_matrix_is_float32_also_under_autocast() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = orthogonality_loss(weight)

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, orthogonality_loss(weight.double()).float())


# ---------------------------------------------------------------------------------------------------------- one scale


def test_all_read_one_at_perfect_balance() -> None:
    """Uniform scores from logits of 0, and every expert used as often as any."""
    selected = (torch.arange(8)[:, None] + torch.arange(2)) % 8
    scores = torch.full((8, 8), 1 / 8)
    noise = LearnedNoise(torch.zeros(8, 8), torch.ones(8, 8))
    logits = 0.01 * torch.nn.functional.one_hot(selected, 8).sum(1)
    uniform = Routing(torch.zeros(8, 8), scores, selected, scores.gather(1, selected))
    with_noise = replace(uniform, logits=logits, noise=noise)

    for name, loss in LOSSES.items():
        routing = with_noise if name == "noisy_load" else uniform
        assert common_scale(name, loss(routing), routing).item() == pytest.approx(1.0), name
    orthonormal = orthogonality_loss(torch.eye(8, 16))
    assert common_scale("orthogonality", orthonormal, uniform).item() == 1.0


def test_collapse_on_the_common_scale() -> None:
    """All tokens on expert 0 of 4, certainly."""
    routing = replace(collapsed([0], 4), noise=LearnedNoise(collapsed([0], 4).logits, torch.full((12, 4), 1.0)))
    expected = {"load_balance": 4, "importance": 4, "noisy_load": 4, "device": 2, "sparsity": 4, "entropy": 0}

    for name, value in expected.items():
        assert common_scale(name, LOSSES[name](routing), routing).item() == pytest.approx(value), name
    assert common_scale("orthogonality", orthogonality_loss(torch.zeros(4, 8)), routing).item() == 2.0


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=9))
@settings(max_examples=50, deadline=None)
def test_one_plus_the_squared_variation_is_the_load_form(importance: list[float]) -> None:
    """1 + CV² = E Σ f², whatever the weights."""
    n_experts = len(importance)
    weights = torch.tensor(importance, dtype=torch.float64)[:, None]
    table = torch.full((n_experts, n_experts), 1 / n_experts, dtype=torch.float64)
    routing = Routing(table, table, torch.arange(n_experts)[:, None], weights)

    shares = [value / sum(importance) for value in importance]
    expected = n_experts * sum(share**2 for share in shares)
    assert common_scale("importance", importance_loss(routing), routing).item() == pytest.approx(expected)


def test_the_common_scale_of_a_sparsity_loss_ignores_the_size_of_gates_and_how_many_are_on() -> None:
    """Each expert with one token of its own, gates of 0.1 or of 100: balance. Own scale: f = E/k · 1/4, mean gates."""
    for size in (0.1, 100.0):
        routing = gated(size * torch.eye(4))
        loss = sparsity_loss(routing, top_k=1)
        assert loss.item() == pytest.approx(size)
        assert common_scale("sparsity", loss, routing).item() == pytest.approx(1.0)


def test_one_expert_is_in_balance() -> None:
    routing = routing_of(torch.full((3, 1), 0.5), 1)

    for name in ("load_balance", "importance", "z_loss", "entropy"):
        assert common_scale(name, LOSSES[name](routing), routing).item() == 1.0


def test_a_weight_of_zero_frees_the_special_experts_and_measures_the_others() -> None:
    """f = (1/2, 1/2, 0) over two MLPs and a special expert: 2 (1/4 + 1/4) = 1."""
    scores = torch.eye(3)[:2]
    routing = Routing(scores, scores, torch.tensor([[0], [1]]), torch.ones(2, 1), n_special=1)

    loss = load_balancing_loss(routing, special_weight=0.0)

    assert common_scale("load_balance", loss, routing, special_weight=0.0).item() == pytest.approx(1.0)


def test_a_name_that_is_no_loss_has_no_scale() -> None:
    with pytest.raises(KeyError):
        common_scale("lm_loss", torch.tensor(1.0), balanced(4, 1))


# ------------------------------------------------------------------------------------------------------------- z-loss


def test_z_loss_on_paper() -> None:
    """Four zero logits: log 4, squared. Logits log 1, log 3: log 4, squared, too; e² alone and -∞: 2, squared."""
    assert z_loss(routing_of(torch.zeros(5, 4), 1)).item() == pytest.approx(log(4) ** 2)
    two = torch.tensor([[0.0, log(3)], [2.0, -1e9]])
    assert z_loss(routing_of(two, 1)).item() == pytest.approx((log(4) ** 2 + 4) / 2)


def test_z_loss_gradient_in_closed_form() -> None:
    """d/dz_te = (2 / T) · lse_t · softmax(z_t)_e."""
    logits = random_logits(7, 4).requires_grad_()

    z_loss(routing_of(logits, 1)).backward()

    log_sum = logits.detach().exp().sum(-1, keepdim=True).log()
    torch.testing.assert_close(logits.grad, 2 / 7 * log_sum * logits.detach().exp() / log_sum.exp())


def test_z_loss_of_large_logits_does_not_overflow() -> None:
    assert z_loss(routing_of(torch.tensor([[1000.0, 0.0]]), 1)).item() == pytest.approx(1e6)


# The forms below are written from the papers' and codebases' definitions, over the logits of L layers [L, T, E].


def one_hot_counts(logits: Tensor, top_k: int) -> Tensor:
    """How often each expert of a layer is chosen: [E] from [T, E]."""
    return torch.zeros_like(logits).scatter(1, logits.topk(top_k).indices, 1.0).sum(0).detach()


def megatron(logits: Tensor, top_k: int) -> Tensor:
    """E / (K T²) Σ_e count_e Σ_t p_te, added up over the layers."""
    n_tokens, n_experts = logits.shape[1:]
    per_layer = [(one_hot_counts(layer, top_k) * layer.softmax(-1).sum(0)).sum() for layer in logits]
    return n_experts / (top_k * n_tokens**2) * sum(per_layer)


def megablocks(logits: Tensor, top_k: int) -> Tensor:
    """E / (L K T) · ⟨counts, mean probabilities⟩ of all layers laid end to end."""
    n_layers, n_tokens, n_experts = logits.shape
    counts = torch.cat([one_hot_counts(layer, top_k) for layer in logits])
    probabilities = torch.cat([layer.softmax(-1).mean(0) for layer in logits])
    return n_experts / (n_layers * top_k * n_tokens) * torch.dot(counts, probabilities)


def olmo_core(logits: Tensor, top_k: int) -> Tensor:
    """E / (K T) · ⟨counts, mean probabilities⟩ of each layer, over the number of layers."""
    n_layers, n_tokens, n_experts = logits.shape
    per_layer = [one_hot_counts(layer, top_k) @ layer.softmax(-1).mean(0) for layer in logits]
    return sum(n_experts / (top_k * n_tokens) * value for value in per_layer) / n_layers


def transformers(logits: Tensor, top_k: int) -> Tensor:
    """E Σ_k Σ_e (mean one-hot of choice k) · (mean probability), tokens of all layers pooled."""
    pooled = logits.flatten(0, 1)
    chosen = torch.nn.functional.one_hot(pooled.topk(top_k).indices, pooled.shape[1]).to(pooled.dtype)
    return pooled.shape[1] * (chosen.mean(0) * pooled.softmax(-1).mean(0)).sum()


def deepseek(logits: Tensor, top_k: int) -> Tensor:
    """Σ_e f_e P_e, f_e = E / (K T) · count_e, over the T tokens of one sequence, added up over the layers."""
    n_tokens, n_experts = logits.shape[1:]
    total = logits.new_zeros(())
    for layer in logits:
        load = n_experts / (top_k * n_tokens) * one_hot_counts(layer, top_k)
        total = total + (load * layer.softmax(-1).mean(0)).sum()
    return total


def gshard(logits: Tensor, top_k: int) -> Tensor:
    """Algorithm 1: 1/E Σ_e (c_e / S) m_e, c_e the tokens whose first choice e is."""
    n_tokens, n_experts = logits.shape[1:]
    per_layer = [one_hot_counts(layer, 1) / n_tokens @ layer.softmax(-1).mean(0) for layer in logits]
    return sum(per_layer) / n_experts


def mesh(logits: Tensor, top_k: int) -> Tensor:
    """E² times the mean over experts of first-choice density times mean gate."""
    first = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[2]).to(logits.dtype)
    density, proxy = first.mean(1), logits.softmax(-1).mean(1)
    return ((density * proxy).mean(-1) * logits.shape[2] ** 2).sum()


def moe_plus_plus(logits: Tensor, top_k: int, special_weight: float = 0.75) -> Tensor:
    """Σ_e η_e f_e P_e with f_e = tokens that choose e / T, the last two of eight experts without an MLP."""
    eta = torch.tensor([1.0] * 6 + [special_weight] * 2, dtype=logits.dtype)
    return sum((eta * one_hot_counts(z, top_k) / len(z) * z.softmax(-1).mean(0)).sum() for z in logits)


def deepseek_v3(logits: Tensor, top_k: int, n_sequences: int = 4) -> Tensor:
    """Eq. 17-20 over each sequence of each layer, sigmoid scores; the mean over sequences, the sum over layers."""
    total = logits.new_zeros(())
    for layer in logits:
        for sequence in layer.chunk(n_sequences):
            n_tokens, n_experts = sequence.shape
            affinity = sequence.sigmoid()
            p = (affinity / affinity.sum(1, keepdim=True)).sum(0) / n_tokens
            f = n_experts / (top_k * n_tokens) * one_hot_counts(affinity, top_k)
            total = total + (f * p).sum() / n_sequences
    return total


def remoe(logits: Tensor, top_k: int) -> Tensor:
    """Eq. 10-11: 1/(L T) Σ_l Σ_t Σ_e f_le R_te, f_le = E/(k T) times the tokens for which e's gate is open."""
    n_layers, n_tokens, n_experts = logits.shape
    gates = logits.relu()
    frequency = n_experts / (top_k * n_tokens) * (gates > 0).sum(1, keepdim=True).to(logits.dtype)
    return (frequency * gates).sum() / (n_layers * n_tokens)


Form = Callable[[Tensor, int], Tensor]
VARIANTS: dict[str, tuple[Form, Form, Callable[[int, int], float]]] = {
    "GShard": (gshard, lambda z, k: load_balancing_loss(routing_of(z, k), choices="first"), lambda n_layers, k: 1 / 64),
    "Mesh": (mesh, lambda z, k: load_balancing_loss(routing_of(z, k), choices="first"), lambda n_layers, k: 1),
    "DeepSeek-V3": (
        deepseek_v3,
        lambda z, k: load_balancing_loss(sigmoid_routing(z, k, n_sequences=4), per_sequence=True),
        lambda n_layers, k: 1,
    ),
    "MoE++": (
        moe_plus_plus,
        lambda z, k: load_balancing_loss(replace(routing_of(z, k), n_special=2), special_weight=0.75),
        lambda n_layers, k: k / 8,
    ),
    "ReMoE": (remoe, lambda z, k: sparsity_loss(gated(z.relu()), k), lambda n_layers, k: 1 / n_layers),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_table_of_coefficients_for_other_routings(name: str, top_k: int) -> None:
    """As below, for losses that count other choices, tokens or scores."""
    theirs, ours, coefficient = VARIANTS[name]
    logits = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    total = coefficient(3, top_k) * torch.stack([ours(layer, top_k) for layer in mine]).sum()
    reference = theirs(other, top_k)
    total.backward()
    reference.backward()

    torch.testing.assert_close(total, reference, rtol=1e-12, atol=0)
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("theirs", "n_layers", "coefficient"),
    [
        (megatron, 3, lambda a, n_layers, top_k: a),
        (megablocks, 3, lambda a, n_layers, top_k: a / n_layers),
        (olmo_core, 3, lambda a, n_layers, top_k: a / n_layers),
        (transformers, 1, lambda a, n_layers, top_k: a * top_k),
        (deepseek, 3, lambda a, n_layers, top_k: a),
    ],
)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_table_of_coefficients(
    theirs: Callable[[Tensor, int], Tensor], n_layers: int, coefficient: Callable[..., float], top_k: int
) -> None:
    """a · theirs = c · (the sum of ours over the layers), in value and gradient, for the c that the table gives."""
    a = 0.01
    logits = torch.randn(n_layers, 20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    c = coefficient(a, n_layers, top_k)
    ours = c * torch.stack([load_balancing_loss(routing_of(layer, top_k)) for layer in mine]).sum()
    reference = a * theirs(other, top_k)
    ours.backward()
    reference.backward()

    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-9)


def test_pooled_layers_hide_what_the_sum_over_layers_shows() -> None:
    """Why the table gives no coefficient for transformers with several layers."""
    layers = torch.stack([collapsed([0, 1], 4).logits, collapsed([2, 3], 4).logits])

    assert transformers(layers, top_k=2).item() == pytest.approx(2 * 1.0)
    assert [load_balancing_loss(routing_of(layer, 2)).item() for layer in layers] == pytest.approx([2.0, 2.0])
