"""The loss and its parts: what is reported, what is minimised, and that each coefficient enters exactly once."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.config import AttentionConfig, BalanceConfig, ExpertsConfig, ModelConfig, RouterConfig
from moe.model.balance import (
    device_loss,
    entropy_loss,
    importance_loss,
    load_balancing_loss,
    noisy_load_loss,
    orthogonality_loss,
    sparsity_loss,
    z_loss,
)
from moe.model.routing import Routing
from moe.model.transformer import Transformer
from moe.parallel.world import World
from moe.training.head_loss import BLOCK_BYTES, head_loss, token_losses
from moe.training.objective import StepCounts, compose

N_LAYERS = 3


def small_model(**router: Any) -> Transformer:
    """float64, so that differences of gradients are exact enough to compare."""
    config = ModelConfig(
        vocab_size=64,
        n_layers=N_LAYERS,
        d_model=32,
        init_std=0.2,
        attention=AttentionConfig(n_heads=4, head_dim=8),
        experts=ExpertsConfig(n_experts=8, d_ff=16),
        router=RouterConfig(top_k=2, **router),
        balance=BalanceConfig(load_balance=0.0),
    )
    return Transformer(config).double()


def text(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(seed))


def routing_of(logits: Tensor, top_k: int = 1) -> Routing:
    scores = logits.softmax(-1)
    best = scores.detach().topk(top_k)
    return Routing(logits, scores, best.indices, best.values)


def certain(*experts: int, n_experts: int = 4) -> Routing:
    """One token for each expert named, certain of it; the logits are 0 and -1000."""
    logits = torch.full((len(experts), n_experts), -1000.0)
    return routing_of(logits.index_put((torch.arange(len(experts)), torch.tensor(experts)), torch.tensor(0.0)))


def lm_and_routings(model: Transformer, tokens: Tensor) -> tuple[Tensor, list[Routing]]:
    """Mean cross-entropy of each next token, and the routing on the way to it."""
    hidden, routings = model.hidden(tokens[:, :-1])
    return head_loss(hidden, model.head.weight, tokens[:, 1:]), routings


def router_gradient(model: Transformer, loss: Tensor) -> Tensor:
    """The gradient of all routers, one vector."""
    weights = [block.feed_forward.router.weight for block in model.blocks]
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, weights)])


# ------------------------------------------------------------------------------------------------------- cross-entropy


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    losses = token_losses(torch.zeros(2, 3, 4), torch.zeros(10, 4), torch.zeros(2, 3, dtype=torch.int64))

    torch.testing.assert_close(losses, torch.full((2, 3), math.log(10)))


QUARTERS = torch.tensor([[0.0], [math.log(3)]])
"""a head that makes of the hidden state 1 the logits 0 and log 3: probabilities 1/4 and 3/4"""


def test_cross_entropy_on_paper() -> None:
    """log 4 nats for token 0, log 4/3 for token 1."""
    losses = token_losses(torch.ones(1, 3, 1), QUARTERS, torch.tensor([[0, 1, 1]]))

    assert losses[0].tolist() == pytest.approx([math.log(4), math.log(4 / 3), math.log(4 / 3)])


def test_cross_entropy_of_bfloat16_logits_is_float32() -> None:
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    head = torch.randn(10, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    targets = torch.zeros(2, 3, dtype=torch.int64)

    losses = token_losses(hidden, head, targets)

    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, -(hidden @ head.t()).float().log_softmax(-1)[..., 0])


def test_the_language_model_loss_is_a_mean_over_scored_tokens() -> None:
    targets = torch.tensor([[0, 1, 1]])

    def lm(scored: list[bool] | None) -> float:
        mask = None if scored is None else torch.tensor([scored])
        return compose(
            head_loss(torch.ones(1, 3, 1), QUARTERS, targets, mask), [], BalanceConfig(), StepCounts(World())
        ).lm.item()

    assert lm(None) == pytest.approx((math.log(4) + 2 * math.log(4 / 3)) / 3)
    assert lm([True, True, False]) == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)
    assert lm([False, False, False]) == 0.0


@pytest.mark.parametrize("block_bytes", [1, 4 * 10 * 3, 4 << 20], ids=["row by row", "three rows", "at once"])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradients_in_blocks_equal_those_of_torch(
    block_bytes: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is written by hand and made in the forward pass; a factor on the loss reaches it once."""
    monkeypatch.setitem(BLOCK_BYTES, "cpu", block_bytes)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(10, 6, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(10, (2, 4), generator=generator)
    scored = torch.tensor([[True, False, True, True], [False, True, False, True]]) if masked else None

    loss = head_loss(hidden, head, targets, scored)
    gradients = torch.autograd.grad(-2.5 * loss, (hidden, head))
    chosen = torch.ones(2, 4, dtype=torch.bool) if scored is None else scored
    expected = torch.nn.functional.cross_entropy((hidden @ head.T)[chosen], targets[chosen])
    expected_gradients = torch.autograd.grad(-2.5 * expected, (hidden, head))

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    torch.testing.assert_close(token_losses(hidden, head, targets)[chosen].mean(), expected)


def test_the_loss_under_autocast_is_float32_and_close() -> None:
    """Products in bfloat16, sums in float32: 4096 rows of about 2.3 nats add up to the third digit."""
    generator = torch.Generator().manual_seed(0)
    hidden = (0.3 * torch.randn(1, 4096, 16, generator=generator)).requires_grad_()
    head = torch.randn(10, 16, generator=generator).requires_grad_()
    targets = torch.randint(10, (1, 4096), generator=generator)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head_loss(hidden, head, targets)
    gradients = torch.autograd.grad(loss, (hidden, head))
    expected = torch.nn.functional.cross_entropy((hidden @ head.T)[0], targets[0])
    expected_gradients = torch.autograd.grad(expected, (hidden, head))

    assert {loss.dtype, *(gradient.dtype for gradient in gradients)} == {torch.float32}
    torch.testing.assert_close(loss, expected, rtol=5e-4, atol=0)
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert (gradient - exact).norm() < 0.01 * exact.norm()


# ---------------------------------------------------------------------------------------------------------- composition


def test_the_sum_on_paper() -> None:
    """Two layers of four experts, one collapsed (reads 4), one balanced (reads 1); the sum of exponentials is 1, so z
    is 0: total = log 2 + 0.1 · (4 + 1), and the mean over layers, 2.5, is reported."""
    result = compose(
        torch.tensor(math.log(2)),
        [certain(2, 2, 2, 2), certain(0, 1, 2, 3)],
        BalanceConfig(load_balance=0.1, z_loss=0.001),
        StepCounts(World()),
    )

    assert result.lm.item() == pytest.approx(math.log(2))
    assert result.auxiliary["load_balance"].item() == pytest.approx(2.5)
    assert result.auxiliary["z_loss"].item() == pytest.approx(0.0)
    assert result.total.item() == pytest.approx(math.log(2) + 0.1 * 5)


def test_the_z_losses_of_all_layers_are_added_as_well() -> None:
    """Uniform logits of 0 over 4 experts: (log 4)² a layer."""
    uniform = routing_of(torch.zeros(3, 4))

    result = compose(
        torch.tensor(math.log(2)),
        [uniform, uniform],
        BalanceConfig(load_balance=0.0, z_loss=0.001),
        StepCounts(World()),
    )

    assert result.auxiliary["z_loss"].item() == pytest.approx(math.log(4) ** 2)
    assert result.total.item() == pytest.approx(math.log(2) + 0.001 * 2 * math.log(4) ** 2)


def test_eight_collapsed_layers_read_experts_over_k() -> None:
    """Each on an expert of its own: pooled over the layers before the product it would read 1."""
    layers = [certain(*[expert] * 5, n_experts=8) for expert in range(8)]

    result = compose(torch.tensor(0.0), layers, BalanceConfig(), StepCounts(World()))

    assert result.auxiliary["load_balance"].item() == pytest.approx(8.0)


def test_a_dense_model_has_nothing_but_its_language_model_loss() -> None:
    lm = torch.tensor(2.5)

    result = compose(lm, [], BalanceConfig(), StepCounts(World()))

    assert result.auxiliary == {}
    assert result.total is result.lm is lm


def test_the_reported_language_model_loss_contains_no_auxiliary_term() -> None:
    model, tokens = small_model(), text(2, 17)
    plain = torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())

    for coefficient in (0.0, 1.0, 100.0):
        balance = BalanceConfig(load_balance=coefficient, z_loss=coefficient)
        lm, routings = lm_and_routings(model, tokens)
        result = compose(lm, routings, balance, StepCounts(World()))
        torch.testing.assert_close(result.lm, plain)
        torch.testing.assert_close(
            result.auxiliary["load_balance"], sum(load_balancing_loss(routing) for routing in routings) / N_LAYERS
        )


ROUTERS: dict[str, dict[str, Any]] = {
    "noisy_load": {"noise": "shazeer"},
    "sparsity": {"selection": "positive", "score": "relu", "normalise": False},
}
"""the router that a loss needs, where it is not the default one"""

ALONE: dict[str, Any] = {
    "load_balance": lambda routing, weight: load_balancing_loss(routing),
    "z_loss": lambda routing, weight: z_loss(routing),
    "importance": lambda routing, weight: importance_loss(routing),
    "noisy_load": lambda routing, weight: noisy_load_loss(routing),
    "device": lambda routing, weight: device_loss(routing, 4),
    "sparsity": lambda routing, weight: sparsity_loss(routing, 2),
    "entropy": lambda routing, weight: entropy_loss(routing),
    "orthogonality": lambda routing, weight: orthogonality_loss(weight),
}


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("coefficient", [0.001, 1.0])
def test_each_coefficient_enters_the_gradient_exactly_once(name: str, coefficient: float) -> None:
    """Gradient with c minus gradient with 0 = c times the gradient of the loss alone, added up over the layers."""
    model, tokens = small_model(**ROUTERS.get(name, {})), text(2, 17)
    router = model.config.router

    def gradient_of_total(c: float) -> Tensor:
        torch.manual_seed(0)
        lm, routings = lm_and_routings(model, tokens)
        coefficients = {"load_balance": 0.0, name: c} | ({"n_devices": 4} if name == "device" and c else {})
        weights = [block.feed_forward.router.weight for block in model.blocks]
        result = compose(
            lm, routings, BalanceConfig(**coefficients), StepCounts(World()), router=router, router_weights=weights
        )
        assert torch.equal(result.lm, lm)
        return router_gradient(model, result.total)

    added = gradient_of_total(coefficient) - gradient_of_total(0.0)
    torch.manual_seed(0)
    _, routings = lm_and_routings(model, tokens)
    alone = router_gradient(
        model,
        sum(
            ALONE[name](routing, block.feed_forward.router.weight)
            for routing, block in zip(routings, model.blocks, strict=True)
        ),
    )

    assert alone.norm() > 1e-3
    torch.testing.assert_close(added / coefficient, alone, rtol=1e-8, atol=1e-10)


def test_what_is_logged_are_the_active_losses_and_two_measures() -> None:
    """Each on its own scale and the common one; a router without logits has no z-loss."""
    routing, balance = certain(0, 1, 2, 3), BalanceConfig(load_balance=0.0)

    def logged(balance: BalanceConfig, router: RouterConfig | None = None) -> set[str]:
        return set(compose(torch.tensor(0.0), [routing], balance, StepCounts(World()), router=router).auxiliary)

    measures = {"load_balance", "load_balance/common", "z_loss", "z_loss/common"}
    assert logged(balance) == measures
    assert logged(replace(balance, entropy=1e-4)) == measures | {"entropy", "entropy/common"}
    hashed = RouterConfig(selection="hash", weights="equal", normalise=False)
    assert logged(balance, hashed) == {"load_balance", "load_balance/common"}


def test_both_scales_are_means_over_the_layers_and_carry_no_extra_gradient() -> None:
    """Importance of the collapsed layer: CV² = 3 over four experts; of the balanced one 0. Means 1.5, and 1 + 1.5."""
    layers = [certain(2, 2, 2, 2), certain(0, 1, 2, 3)]

    result = compose(torch.tensor(0.0), layers, BalanceConfig(load_balance=0.0, importance=0.1), StepCounts(World()))

    assert result.auxiliary["importance"].item() == pytest.approx(1.5)
    assert result.auxiliary["importance/common"].item() == pytest.approx(2.5)
    assert result.auxiliary["load_balance/common"].item() == pytest.approx(2.5)
    assert result.total.item() == pytest.approx(0.1 * 3)
    assert not result.auxiliary["importance/common"].requires_grad


def test_the_coefficient_of_sparsity_is_what_it_has_become() -> None:
    """One token, k = 1 of 2 experts, gates 0.25 and 0: f = (2, 0), a loss of 0.5."""
    gates = torch.tensor([[0.25, 0.0]])
    routing = Routing(
        gates,
        gates,
        torch.tensor([[0, 1]]),
        gates,
        assigned=torch.tensor([[True, False]]),
        scores_are_probabilities=False,
    )
    router = RouterConfig(top_k=1, selection="positive", score="relu", normalise=False)
    balance = BalanceConfig(load_balance=0.0, sparsity=1e-8)

    def total(coefficient: float | None) -> float:
        counts = StepCounts(World())
        return compose(
            torch.tensor(0.0), [routing], balance, counts, router=router, sparsity_coefficient=coefficient
        ).total.item()

    assert total(None) == pytest.approx(0.5e-8)
    assert total(4.0) == pytest.approx(2.0)


def test_an_orthogonality_loss_needs_the_matrix_of_every_layer() -> None:
    with pytest.raises(ValueError, match="zip"):
        compose(
            torch.tensor(0.0),
            [certain(0, 1)] * 2,
            BalanceConfig(orthogonality=0.1),
            StepCounts(World()),
            router_weights=[torch.eye(4)],
        )


# ------------------------------------------------------------------------------------------------------ the whole batch


def test_counts_add_up_over_micro_batches_and_keep_layers_apart() -> None:
    counts = StepCounts(World())

    counts.add([certain(0, 0, 1), certain(3, 3, 3)])
    counts.add([certain(2), certain(3)])

    assert counts.counts.tolist() == [[2, 1, 1, 0], [0, 0, 0, 4]]
    assert counts.over_ranks().tolist() == [[2, 1, 1, 0], [0, 0, 0, 4]]
    assert counts.dropped.tolist() == [0, 0]


def test_dropped_assignments_add_up_too() -> None:
    routing = certain(0, 0, 1)
    dropping = Routing(
        routing.logits,
        routing.scores,
        routing.selected,
        routing.weights,
        dropped=torch.tensor([[False], [True], [True]]),
    )
    counts = StepCounts(World())

    counts.add([dropping, routing])
    counts.add([dropping, routing])

    assert counts.dropped.tolist() == [4, 0]
    assert counts.counts.tolist() == [[4, 2, 0, 0], [4, 2, 0, 0]]


def test_scopes_on_paper() -> None:
    """Two sequences of two tokens, each on an expert of its own, after a micro-batch of four tokens on expert 2.

    Each sequence alone reads 4; the micro-batch, f = P = (1/2, 1/2, 0, 0), reads 2; against the loads of all eight
    tokens, f = (1/4, 1/4, 1/2, 0), it reads 4 (1/8 + 1/8) = 1."""

    def read(scope: str) -> tuple[float, float]:
        counts, balance = StepCounts(World()), BalanceConfig(scope=scope, device=1.0, n_devices=4)
        compose(torch.tensor(0.0), [replace(certain(2, 2, 2, 2), n_sequences=2)], balance, counts)
        routing = replace(certain(0, 0, 1, 1), n_sequences=2)
        auxiliary = compose(torch.tensor(0.0), [routing], balance, counts).auxiliary
        return auxiliary["load_balance"].item(), auxiliary["device"].item()

    assert read("sequence") == pytest.approx((4.0, 4.0))
    assert read("micro_batch") == pytest.approx((2.0, 2.0))
    assert read("global_batch") == pytest.approx((1.0, 1.0))


def test_first_choices_over_the_whole_batch() -> None:
    """First choices (0, 0) and then (1, 1), second choices always 2: f = (1/2, 1/2, 0) in the second micro-batch, where
    P = (0, 0.9, 0.1): 3 · 0.45. The counts of the step hold all choices."""

    def routing(first: int) -> Routing:
        scores = torch.zeros(2, 3)
        scores[:, first], scores[:, 2] = 0.9, 0.1
        return Routing(scores.log(), scores, torch.tensor([[first, 2]] * 2), torch.ones(2, 2))

    counts = StepCounts(World(), choices="first")
    balance = BalanceConfig(scope="global_batch", choices="first")
    compose(torch.tensor(0.0), [routing(0)], balance, counts)
    result = compose(torch.tensor(0.0), [routing(1)], balance, counts)

    assert result.auxiliary["load_balance"].item() == pytest.approx(1.35)
    assert counts.counts.tolist() == [[2, 2, 4]]


def test_logits_are_kept_where_they_are_wanted_and_only_those_of_real_tokens() -> None:
    counts = StepCounts(World(), keep_logits=True)
    first = routing_of(torch.arange(8.0).view(2, 4).requires_grad_())
    second = replace(first, mask=torch.tensor([False, True]))

    counts.add([first, second])
    counts.add([second, first])

    rows = first.logits.detach()
    assert torch.equal(counts.logits_over_ranks(0), torch.cat([rows, rows[1:]]))
    assert torch.equal(counts.logits_over_ranks(1), torch.cat([rows[1:], rows]))
    assert not counts.logits_over_ranks(0).requires_grad
    assert StepCounts(World()).logits is None


def test_tokens_are_counted_once_and_not_padding() -> None:
    counts = StepCounts(World())
    padded = replace(certain(0, 1, 2), mask=torch.tensor([True, True, False]))

    counts.add([padded, padded])
    counts.add([certain(0), certain(1)])

    assert counts.tokens_over_ranks().item() == 3


@pytest.mark.parametrize("name", sorted(ALONE))
def test_which_losses_are_the_same_in_micro_batches_of_one_sequence(name: str) -> None:
    """Four micro-batches of one sequence against one of four, by the mean of what they read.

    Equal, to rounding: means over tokens (z_loss, entropy), the loss of each sequence, and what sees no token
    (orthogonality). Not equal: whatever multiplies a load by a score or squares one, since a part is less even than the
    whole. Counts are equal to the bit in any case.
    """
    model, tokens = small_model(**ROUTERS.get(name, {})), text(4, 17)
    scope = "sequence" if name == "load_balance" else "micro_batch"
    coefficients = {"load_balance": 0.0, "scope": scope, name: 1.0} | ({"n_devices": 4} if name == "device" else {})
    balance, weights = BalanceConfig(**coefficients), [block.feed_forward.router.weight for block in model.blocks]

    def read(rows: Tensor, counts: StepCounts) -> float:
        lm, routings = lm_and_routings(model, rows)
        parts = compose(lm, routings, balance, counts, router=model.config.router, router_weights=weights).auxiliary
        return parts[name].item()

    torch.manual_seed(0)
    whole_counts, part_counts = StepCounts(World()), StepCounts(World())
    whole = read(tokens, whole_counts)
    parts = sum(read(rows, part_counts) for rows in tokens.split(1)) / 4

    if name in ("z_loss", "entropy", "orthogonality", "load_balance"):
        assert parts == pytest.approx(whole, rel=1e-12)
    else:
        assert parts > whole * 1.01
    if name != "noisy_load":  # the noise of four parts is not that of the whole
        assert torch.equal(part_counts.counts, whole_counts.counts)


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_one_micro_batch_is_the_global_batch(scope: str) -> None:
    model, tokens = small_model(), text(4, 17)
    lm, routings = lm_and_routings(model, tokens)
    balance = BalanceConfig(load_balance=1.0, scope=scope)

    result = compose(lm, routings, balance, StepCounts(World()))

    expected = sum(load_balancing_loss(routing) for routing in routings)
    torch.testing.assert_close(result.total - result.lm, expected)


@pytest.mark.parametrize(("scope", "second"), [("micro_batch", 4.0), ("global_batch", 2.0)])
def test_a_later_micro_batch_sees_the_loads_of_the_earlier_ones(scope: str, second: float) -> None:
    """Two tokens for expert 0, then two for expert 1. The second micro-batch alone is collapsed and reads 4; with the
    first, f = (1/2, 1/2, 0, 0) while P stays local, (0, 1, 0, 0): 4 · 1/2 = 2."""
    counts = StepCounts(World())
    balance = BalanceConfig(scope=scope)

    read = [
        compose(torch.tensor(0.0), [routing], balance, counts).auxiliary for routing in (certain(0, 0), certain(1, 1))
    ]

    assert [part["load_balance"].item() for part in read] == pytest.approx([4.0, second])


def test_gradients_of_micro_batches_average() -> None:
    """Accumulating total / M over M micro-batches gives the mean of their gradients: coefficients do not grow with M.
    The loss itself depends on the size of a micro-batch, so this is not the gradient of the whole batch."""
    model, tokens = small_model(), text(4, 17)
    balance = BalanceConfig(load_balance=0.5, z_loss=0.1)

    def total(rows: Tensor, counts: StepCounts) -> Tensor:
        return compose(*lm_and_routings(model, rows), balance, counts).total

    step = StepCounts(World())
    accumulated = sum(router_gradient(model, total(rows, step) / 4) for rows in tokens.split(1))
    separate = torch.stack([router_gradient(model, total(rows, StepCounts(World()))) for rows in tokens.split(1)])
    whole = router_gradient(model, total(tokens, StepCounts(World())))

    torch.testing.assert_close(accumulated, separate.mean(0))
    assert (accumulated - whole).norm() > 1e-3 * whole.norm()


def test_a_loss_that_is_off_cannot_spoil_the_total() -> None:
    """Logits of 1e20 have an infinite z-loss in float32; 0 times it would be NaN."""
    logits = torch.full((2, 4), 1e20)
    scores = torch.full((2, 4), 0.25)
    routing = Routing(logits, scores, torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.5))

    result = compose(torch.tensor(1.0), [routing], BalanceConfig(load_balance=1.0, z_loss=0.0), StepCounts(World()))

    assert result.auxiliary["z_loss"].item() == math.inf
    assert result.total.item() == pytest.approx(2.0)
