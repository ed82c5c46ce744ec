"""Routers against numbers on paper, a plain reference, and the mistakes that others made."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import AttentionConfig, CapacityConfig, ConfigError, ExpertsConfig, ModelConfig, RouterConfig
from moe.model.router import Router
from moe.model.router.logits import linear_logits
from moe.model.router.selection import select_top_k
from moe.model.router.weights import combine_weights
from moe.model.transformer import Transformer

ACCEPTED = [(1, False), (2, False), (4, False), (2, True), (4, True)]
"""every (top_k, normalise) that the configuration accepts, for k of 1, 2 and 4"""


def route_by_hand(
    logits: Tensor, top_k: int, normalise: bool, scale: float, score: str = "softmax"
) -> tuple[list[list[int]], Tensor]:
    """The selected experts and the weights of each token, in plain Python."""
    selected, weights = [], []
    for row in logits.tolist():
        if score == "softmax":
            scores = [math.exp(z) / sum(math.exp(other) for other in row) for z in row]
        elif score == "sigmoid":
            scores = [1 / (1 + math.exp(-z)) for z in row]
        else:
            scores = [math.sqrt(math.log1p(math.exp(z))) for z in row]
        best = sorted(range(len(row)), key=lambda expert: -scores[expert])[:top_k]
        total = sum(scores[expert] for expert in best) if normalise else 1.0
        selected.append(best)
        weights.append([scale * scores[expert] / total for expert in best])
    return selected, torch.tensor(weights, dtype=torch.float64)


def router(n_experts: int = 8, d_model: int = 16, dtype: torch.dtype = torch.float64, **settings: object) -> Router:
    built = Router(RouterConfig(**settings), d_model, n_experts).to(dtype)
    nn.init.normal_(built.weight, generator=torch.Generator().manual_seed(0))
    return built


def tokens(n: int, d_model: int = 16, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def small_model(init_std: float = 0.2, **settings: object) -> Transformer:
    config = ModelConfig(
        vocab_size=64,
        n_layers=2,
        d_model=32,
        max_seq=32,
        init_std=init_std,
        attention=AttentionConfig(n_heads=4, head_dim=8),
        experts=ExpertsConfig(n_experts=8, d_ff=16),
        router=RouterConfig(**settings),
    )
    return Transformer(config)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"normalise": False}, [0.4, 0.3]),
        ({"normalise": True}, [4 / 7, 3 / 7]),
        ({"normalise": False, "scale": 2.5}, [1.0, 0.75]),
        ({"normalise": True, "scale": 2.5}, [10 / 7, 7.5 / 7]),
    ],
)
def test_a_token_on_paper(settings: dict[str, object], expected: list[float]) -> None:
    """Logits log 1, log 4, log 3, log 2 are scores 0.1, 0.4, 0.3, 0.2: experts 1 and 2, best first."""
    by_hand = router(n_experts=4, d_model=4, top_k=2, **settings)
    by_hand.weight.data = torch.eye(4, dtype=torch.float64)

    routing = by_hand(torch.tensor([[1.0, 4.0, 3.0, 2.0]], dtype=torch.float64).log())

    torch.testing.assert_close(routing.scores, torch.tensor([[0.1, 0.4, 0.3, 0.2]], dtype=torch.float64))
    assert routing.selected.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.weights, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize(("top_k", "normalise"), ACCEPTED)
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_selection_and_weights_equal_a_plain_reference(top_k: int, normalise: bool, scale: float, score: str) -> None:
    routed = router(top_k=top_k, normalise=normalise, scale=scale, score=score)
    x = tokens(50)

    routing = routed(x)
    selected, weights = route_by_hand(x @ routed.weight.T, top_k, normalise, scale, score)

    assert routing.selected.tolist() == selected
    torch.testing.assert_close(routing.weights, weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", [2, 4])
def test_normalised_weights_are_a_softmax_over_the_selected_logits(top_k: int) -> None:
    """Softmax, top-k, normalise is what Mixtral computes as top-k, softmax."""
    routing = router(top_k=top_k, normalise=True)(tokens(50))

    best = routing.logits.topk(top_k)

    assert torch.equal(routing.selected, best.indices)
    torch.testing.assert_close(routing.weights, best.values.softmax(-1))


def test_no_expert_is_chosen_twice_even_where_all_tie() -> None:
    selected = select_top_k(torch.full((5, 8), 1 / 8), 4)

    assert all(len(set(row)) == 4 for row in selected.tolist())


def test_one_normalised_expert_is_refused_because_its_router_would_learn_nothing() -> None:
    with pytest.raises(ConfigError, match="normalise: is true with top_k 1"):
        RouterConfig(top_k=1, normalise=True)

    # The reason: the only weight is score / score = 1, whatever the logits are.
    logits = tokens(20, 8).requires_grad_()
    scores = logits.softmax(-1)
    target = tokens(20, 1, seed=2)
    chosen = scores.gather(-1, select_top_k(scores, 1))
    (combine_weights(chosen, normalise=True, scale=1.0) * target).sum().backward()

    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-15


@pytest.mark.parametrize(("top_k", "normalise"), ACCEPTED)
def test_the_language_model_loss_alone_trains_every_router(top_k: int, normalise: bool) -> None:
    model = small_model(top_k=top_k, normalise=normalise)
    text = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))

    logits, _ = model(text[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()

    for block in model.blocks:
        assert block.feed_forward.router.weight.grad.norm() > 1e-3


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_logits_in_float32(input_dtype: torch.dtype) -> None:
    """A product in bfloat16 sends some tokens to other experts, and casting its result up does not bring them back."""
    routed = router(n_experts=8, d_model=64, dtype=torch.float32, top_k=2)
    x = tokens(200, 64, input_dtype)
    in_float32 = F.linear(x.float(), routed.weight)
    in_bfloat16 = F.linear(x.bfloat16(), routed.weight.bfloat16()).float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = routed(x)

    assert {routing.logits.dtype, routing.scores.dtype, routing.weights.dtype} == {torch.float32}
    assert torch.equal(routing.logits, in_float32)
    assert not torch.equal(routing.logits, in_bfloat16)


def test_a_model_cast_to_bfloat16_still_routes_in_float32() -> None:
    routed = router(dtype=torch.bfloat16, top_k=2)
    x = tokens(20, dtype=torch.bfloat16)

    routing = routed(x)

    assert torch.equal(routing.logits, x.float() @ routed.weight.float().T)


def test_float64_stays_float64_from_end_to_end() -> None:
    model = small_model(top_k=2).double()

    logits, routings = model(torch.arange(20)[None])
    logits.square().mean().backward()

    assert logits.dtype == torch.float64
    assert {t.dtype for r in routings for t in (r.logits, r.scores, r.weights)} == {torch.float64}
    assert all(p.grad is not None and p.grad.dtype == torch.float64 for p in model.parameters())


def test_logits_of_integers_in_float64_are_exact() -> None:
    """2^30 + 1 has no float32."""
    logits = linear_logits(torch.tensor([[2.0**30, 1.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))

    assert logits.item() == 2**30 + 1


def test_padding_gets_weight_zero_and_changes_no_other_token() -> None:
    routed = router(top_k=2)
    x = tokens(6)
    mask = torch.tensor([True, False, True, True, False, True])

    alone, masked = routed(x[mask]), routed(x, mask)

    assert masked.weights[~mask].eq(0).all()
    torch.testing.assert_close(masked.weights[mask], alone.weights)
    assert torch.equal(masked.selected[mask], alone.selected)
    assert torch.equal(masked.counts(), alone.counts())


def test_anomaly_detection_refuses_logits_that_are_not_finite() -> None:
    """``topk`` over NaN returns expert ids without a word."""
    routed = router(top_k=2)
    x = tokens(3)
    x[1, 0] = float("nan")

    assert routed(x).selected.shape == (3, 2)
    with torch.autograd.set_detect_anomaly(True), pytest.raises(FloatingPointError, match="not finite"):
        routed(x)


def test_a_second_choice_that_is_not_kept_is_no_load_and_takes_no_room() -> None:
    """Equal logits: weights of 1/2, and with a threshold of 1 half of the second choices are kept. All first choices go
    to one expert, all second ones to another; each has ceil(2 · 200 / 4) = 100 places."""
    router = Router(RouterConfig(second_choice=1.0, capacity=CapacityConfig(factor=1.0)), 6, 4)
    torch.nn.init.zeros_(router.weight)
    torch.manual_seed(0)

    routing = router(torch.ones(200, 6))

    assert routing.assigned is not None
    kept = routing.assigned[:, 1]
    assert routing.assigned[:, 0].all()
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.12)
    assert sorted(routing.counts().tolist()) == [0, 0, kept.sum(), 200]
    assert (routing.weights[~kept, 1] == 0).all()
    assert routing.dropped_count().item() == 100 + max(0, int(kept.sum()) - 100)
