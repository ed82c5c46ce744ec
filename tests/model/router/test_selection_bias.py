"""What moves the selection bias: steps by hand, the law that a quantile solves, and a bias that everyone sees."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.config import RouterConfig
from moe.model.router import Router
from moe.model.router.selection_bias import proportional_update, quantile_update, sign_update


def skewed_logits(n_tokens: int, n_experts: int, seed: int = 0) -> Tensor:
    """Later experts are liked better, by three deviations from first to last."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_tokens, n_experts, generator=generator) + torch.linspace(0, 3, n_experts)


def loads(logits: Tensor, bias: Tensor, top_k: int) -> list[int]:
    return torch.bincount((logits + bias).topk(top_k).indices.flatten(), minlength=logits.shape[1]).tolist()


# ------------------------------------------------------------------------------------------------ steps on the counts


def test_three_steps_of_the_sign_update_by_hand() -> None:
    """Means 4, 4 and 3: the size of the error does not matter, only its side."""
    bias = torch.zeros(4)

    sign_update(bias, torch.tensor([10, 4, 2, 0]), 0.001)
    assert bias.tolist() == pytest.approx([-0.001, 0.0, 0.001, 0.001])
    sign_update(bias, torch.tensor([5, 5, 3, 3]), 0.001)
    assert bias.tolist() == pytest.approx([-0.002, -0.001, 0.002, 0.002])
    sign_update(bias, torch.tensor([3, 3, 3, 3]), 0.001)
    assert bias.tolist() == pytest.approx([-0.002, -0.001, 0.002, 0.002])


def test_a_load_that_is_off_by_one_in_billions_still_counts() -> None:
    """Mean 2^40 + 1/2: in float32 the three would be equal."""
    bias = torch.zeros(2)

    sign_update(bias, torch.tensor([2**40, 2**40 + 1]), 0.5)

    assert bias.tolist() == [0.5, -0.5]


def test_the_proportional_update_by_hand() -> None:
    """Shares 5/8, 2/8, 1/8 and 0 of a fair 1/4."""
    bias = torch.zeros(4)

    proportional_update(bias, torch.tensor([10, 4, 2, 0]), 0.1)

    assert bias.tolist() == pytest.approx([-0.0375, 0.0, 0.0125, 0.025])


def test_special_experts_keep_their_bias_in_the_proportional_update() -> None:
    """Two MLPs and two special experts, 3/4 of the assignments to these; LongCat's target for 2 of 4 experts, K_e = 1
    MLP of N = 2 a token, is K_e / (K N) = 1/4 for each MLP."""
    bias = torch.tensor([0.0, 0.0, 0.5, -0.5])

    proportional_update(bias, torch.tensor([3, 1, 6, 6]), 1.0, n_special=2)

    assert bias.tolist() == pytest.approx([1 / 4 - 3 / 16, 1 / 4 - 1 / 16, 0.5, -0.5])


@pytest.mark.parametrize("update", [sign_update, proportional_update])
def test_no_assignment_moves_nothing(update: Callable[..., None]) -> None:
    bias = torch.tensor([0.5, -0.25])

    update(bias, torch.zeros(2, dtype=torch.int64), 1.0)

    assert bias.tolist() == [0.5, -0.25]


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=12), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_updates_do_not_depend_on_which_expert_is_which(counts: list[int], source: object) -> None:
    order = list(range(len(counts)))
    source.shuffle(order)
    for update in (sign_update, proportional_update):
        bias, shuffled = torch.zeros(len(counts)), torch.zeros(len(counts))
        update(bias, torch.tensor(counts), 0.1)
        update(shuffled, torch.tensor(counts)[order], 0.1)
        torch.testing.assert_close(shuffled, bias[order])


# --------------------------------------------------------------------------------------------------------- quantile


def test_the_quantile_of_one_choice_of_two_is_the_median() -> None:
    """Expert 0 leads by 5, 3, 1 and -2. A token's threshold is its lesser logit, so the margins of expert 0 are
    (5, 3, 1, 0), of expert 1 (0, 0, 0, 2); each is to beat two thresholds and so gets minus its third margin, (-1, 0),
    centred (-1/2, 1/2). Then only leads above 1 choose expert 0."""
    logits = torch.tensor([[5.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    bias = torch.zeros(2)

    quantile_update(bias, logits, top_k=1)

    assert bias.tolist() == [-0.5, 0.5]
    assert [(logits[t] + bias).tolist() for t in (0, 3)] == [[4.5, 0.5], [-0.5, 2.5]]


def margins(logits: Tensor, bias: Tensor, top_k: int) -> list[list[float]]:
    """Each expert's logits minus the tokens' thresholds (their (K+1)-th largest logit + bias), largest first."""
    per_expert: list[list[float]] = [[] for _ in bias]
    for row in logits.tolist():
        threshold = sorted((z + b for z, b in zip(row, bias.tolist(), strict=True)), reverse=True)[top_k]
        for expert, z in enumerate(row):
            per_expert[expert].append(z - threshold)
    return [sorted(column, reverse=True) for column in per_expert]


@given(
    n_tokens=st.integers(1, 40), n_experts=st.integers(2, 9), top_k=st.integers(1, 8), seed=st.integers(0, 2**31 - 1)
)
@settings(max_examples=60, deadline=None)
def test_every_expert_then_beats_its_fair_share_of_thresholds_and_no_more(
    n_tokens: int, n_experts: int, top_k: int, seed: int
) -> None:
    """With the new bias at most ⌊T K / E⌋ tokens prefer an expert to their old threshold, and more would with a larger
    bias. An expert that had too many has exactly that number; of one that had too few, several may be at a tie, for
    every token's threshold is some expert's own logit.

    Centring shifts all biases by one number, which is recovered from the first expert; the others must agree.
    """
    top_k = min(top_k, n_experts - 1)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_tokens, n_experts, generator=generator, dtype=torch.float64)
    old = torch.randn(n_experts, generator=generator, dtype=torch.float64)
    bias, fair = old.clone(), n_tokens * top_k // n_experts

    quantile_update(bias, logits, top_k)

    columns, tie = margins(logits, old, top_k), 1e-9
    shift = -columns[0][fair] - bias[0].item()
    for column, b, load in zip(columns, bias.tolist(), loads(logits, old, top_k), strict=True):
        above = sum(m + b + shift > tie for m in column)
        at_least = sum(m + b + shift > -tie for m in column)
        assert above <= fair < at_least
        assert above == fair or load <= fair
    assert bias.sum().item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 1), (8, 2), (16, 4)])
def test_repeated_on_one_batch_the_load_becomes_even(n_experts: int, top_k: int) -> None:
    """One step takes away most of the excess, since thresholds move with the bias; at rest, an expert has at most a few
    assignments more than its share: those that the quantile leaves exactly at their threshold."""
    logits, bias = skewed_logits(512, n_experts), torch.zeros(n_experts)
    fair = 512 * top_k / n_experts
    excess = [max(loads(logits, bias, top_k)) - fair]
    for _ in range(60):
        quantile_update(bias, logits, top_k)
        excess.append(max(loads(logits, bias, top_k)) - fair)

    assert excess[0] > fair / 2
    assert excess[1] < 0.7 * excess[0]
    assert excess[-1] <= 0.03 * fair


def test_all_experts_or_no_token_leave_the_bias_alone() -> None:
    bias = torch.tensor([0.5, -0.25])

    quantile_update(bias, skewed_logits(8, 2), top_k=2)
    quantile_update(bias, torch.zeros(0, 2), top_k=1)

    assert bias.tolist() == [0.5, -0.25]


def test_the_order_of_the_tokens_does_not_matter_to_the_bit() -> None:
    """So it does not matter how they came to be on which rank."""
    logits = skewed_logits(64, 8)
    bias, shuffled = torch.zeros(8), torch.zeros(8)

    quantile_update(bias, logits, 2)
    quantile_update(shuffled, logits.flip(0), 2)

    assert torch.equal(bias, shuffled)


# ----------------------------------------------------------------------------------------------------- the same tensor


UPDATES: dict[str, Callable[[Tensor], None]] = {
    "sign": lambda bias: sign_update(bias, torch.tensor([9, 1, 1, 1]), 0.001),
    "proportional": lambda bias: proportional_update(bias, torch.tensor([9, 1, 1, 1]), 0.001),
    "quantile": lambda bias: quantile_update(bias, skewed_logits(32, 4), 2),
}


def router_with(rule: str) -> Router:
    router = Router(RouterConfig(top_k=2, selection_bias=rule), d_model=8, n_experts=4)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


@pytest.mark.parametrize("rule", UPDATES)
def test_a_state_dict_that_is_held_sees_the_update(rule: str) -> None:
    router = router_with(rule)
    held, buffer = router.state_dict(), router.selection_bias

    UPDATES[rule](router.selection_bias)

    assert router.selection_bias is buffer
    assert held["selection_bias"].tolist() == buffer.tolist() != [0.0] * 4
    assert not buffer.requires_grad


@pytest.mark.parametrize("rule", UPDATES)
def test_the_bias_of_a_bfloat16_router_keeps_moving(rule: str) -> None:
    """0.5 + 0.001 is 0.5 in bfloat16."""
    router = router_with(rule)
    router.selection_bias.fill_(0.5)

    router.to(torch.bfloat16)
    UPDATES[rule](router.selection_bias)

    assert router.weight.dtype == torch.bfloat16
    assert router.selection_bias.dtype == torch.float32
    assert router.selection_bias[0] != 0.5


@pytest.mark.parametrize("rule", UPDATES)
def test_the_bias_is_saved_and_loaded(rule: str) -> None:
    saved, fresh = router_with(rule), router_with(rule)
    UPDATES[rule](saved.selection_bias)

    fresh.load_state_dict(saved.state_dict())

    assert torch.equal(fresh.selection_bias, saved.selection_bias)
    assert fresh.selection_bias.ne(0).any()


@pytest.mark.parametrize("rule", UPDATES)
def test_a_bias_moves_the_load_and_no_weight(rule: str) -> None:
    """All experts that are chosen with and without the bias keep their unnormalised weight, to the bit."""
    config = RouterConfig(top_k=2, selection_bias=rule, normalise=False)
    router = Router(config, d_model=8, n_experts=4)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    before = router(x)
    router.selection_bias.copy_(torch.tensor([-10.0, 0.0, 10.0, 0.0]))

    after = router(x)

    assert after.counts()[0] == 0 and after.counts()[2] == 64
    assert not torch.equal(before.selected, after.selected)
    assert torch.equal(after.weights, before.scores.gather(1, after.selected))
