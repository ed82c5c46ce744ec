"""Balance losses against closed forms, finite differences, and the forms that other codebases write."""

from collections.abc import Callable
from math import log

import pytest
import torch
from torch import Tensor

from moe.model.balance import load_balancing_loss, z_loss
from moe.model.routing import Routing


def routing_of(logits: Tensor, top_k: int, mask: Tensor | None = None) -> Routing:
    scores = logits.softmax(-1)
    best = scores.detach().topk(top_k)
    return Routing(logits, scores, best.indices, best.values, mask)


def random_logits(n_tokens: int, n_experts: int, seed: int = 0) -> Tensor:
    return torch.randn(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def collapsed(experts: list[int], n_experts: int, n_tokens: int = 12) -> Routing:
    """Every token certain of the same experts."""
    logits = torch.full((n_tokens, n_experts), -1000.0)
    logits[:, experts] = 0.0
    return routing_of(logits, len(experts))


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


@pytest.mark.parametrize("loss", [load_balancing_loss, z_loss])
def test_the_gradient_agrees_with_finite_differences(loss: Callable[[Routing], Tensor]) -> None:
    logits = random_logits(6, 4).requires_grad_()
    selected = logits.detach().topk(2).indices

    def of(z: Tensor) -> Tensor:
        return loss(Routing(z, z.softmax(-1), selected, torch.ones(6, 2)))

    assert torch.autograd.gradcheck(of, logits)


@pytest.mark.parametrize("loss", [load_balancing_loss, z_loss])
def test_padding_changes_neither_value_nor_gradient(loss: Callable[[Routing], Tensor]) -> None:
    """Three quarters padding, all of it alike: counted, it would read as collapse."""
    real = random_logits(8, 4).requires_grad_()
    padded = torch.cat([real.detach(), torch.tensor([[5.0, 0, 0, 0]], dtype=torch.float64).expand(24, 4)])
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    padded, mask = padded[order].requires_grad_(), (torch.arange(32) < 8)[order]

    alone = loss(routing_of(real, 2))
    among_padding = loss(routing_of(padded, 2, mask))
    alone.backward()
    among_padding.backward()

    torch.testing.assert_close(among_padding, alone)
    assert loss(routing_of(padded.detach(), 2)) > 1.3 * alone
    torch.testing.assert_close(padded.grad[order.argsort()][:8], real.grad)
    assert padded.grad[~mask].eq(0).all()


@pytest.mark.parametrize("loss", [load_balancing_loss, z_loss])
def test_padding_alone_reads_zero(loss: Callable[[Routing], Tensor]) -> None:
    assert loss(routing_of(random_logits(3, 4), 2, torch.zeros(3, dtype=torch.bool))) == 0


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
