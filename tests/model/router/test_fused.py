"""The fused router: a token on paper, and everywhere what the axes compute, which are tested in the files beside this.

The kernels run compiled where there is a GPU, else in Triton's interpreter.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, library

from moe.config import CapacityConfig, RouterConfig
from moe.model.balance import load_balancing_loss
from moe.model.router import Router, fused
from moe.model.routing import Routing

# Padded columns divide by 0, extreme logits overflow; the interpreter's numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DEEPSEEK_V3 = {"score": "sigmoid", "selection": "group_limited", "selection_bias": "sign", "scale": 2.5}
ROUTERS = [
    pytest.param(8, {"top_k": 2}, id="mixtral"),
    pytest.param(5, {"top_k": 1, "normalise": False}, id="switch"),
    pytest.param(128, {"top_k": 8}, id="qwen3"),
    pytest.param(60, {"top_k": 4, "normalise": False, "scale": 1.5}, id="odd"),
    pytest.param(300, {"top_k": 16}, id="many"),
    pytest.param(3, {"top_k": 3}, id="all"),
    pytest.param(12, {"top_k": 3, "score": "sigmoid", "selection_bias": "sign"}, id="sigmoid"),
    pytest.param(12, {"top_k": 3, "score": "sqrt_softplus", "selection_bias": "proportional"}, id="sqrt_softplus"),
    pytest.param(12, {"top_k": 2, "score": "relu", "normalise": False}, id="relu"),
    pytest.param(12, {"top_k": 3, "selection_bias": "quantile"}, id="quantile"),
    pytest.param(32, {"top_k": 4, "n_groups": 4, "top_groups": 2} | DEEPSEEK_V3, id="deepseek_v3"),
    pytest.param(
        15,
        {"top_k": 4, "selection": "group_limited", "n_groups": 3, "top_groups": 2, "group_score": "max"},
        id="odd_groups",
    ),
]


def draw(n_tokens: int, n_experts: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, a selection bias that leaves all below 0, and a mask by which a third of the tokens is padding."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n_tokens, n_experts, generator=generator)
    bias = 0.2 * torch.randn(n_experts, generator=generator) - 2
    return logits, bias, torch.rand(n_tokens, generator=generator) < 2 / 3


def by_axes(
    settings: dict[str, object], logits: Tensor, bias: Tensor, mask: Tensor | None, n_special: int = 0, n_zero: int = 0
) -> Routing:
    """The routing of these logits by the functions of each axis: x is the logits, and the router's matrix the identity.

    In float64, whose products with 1 and 0 are exact.
    """
    n_experts = logits.shape[1]
    router = Router(RouterConfig(**settings), n_experts, n_experts, n_special=n_special, n_zero=n_zero).double().eval()
    router.weight.data = torch.eye(n_experts, dtype=torch.float64)
    if router.selection_bias is not None:
        router.selection_bias.copy_(bias)
    return router(logits.double().cpu(), None if mask is None else mask.cpu())


def by_kernel(
    settings: dict[str, object], logits: Tensor, bias: Tensor, mask: Tensor | None, device: str, **zero: int
) -> Routing:
    config = RouterConfig(**settings)
    bias = None if config.selection_bias == "none" else bias.to(device)
    mask = None if mask is None else mask.to(device)
    logits = logits.to(device)
    routed = fused.route(config, logits, bias, mask, **zero)
    return Routing(
        logits,
        routed.scores,
        routed.selected,
        routed.weights,
        mask,
        scores_are_probabilities=config.score == "softmax",
        tally=routed.tally,
    )


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 3e-6) -> None:
    """To float32 rounding, of the largest in the row for gradients, which are differences."""
    torch.testing.assert_close(
        actual.cpu().double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().clamp(1e-30, 1).item()
    )


def test_a_token_on_paper(kernel_device: str) -> None:
    """Logits log 1, log 4, log 3, log 2 are scores 0.1, 0.4, 0.3, 0.2: experts 1 and 2, of weights 4/7 and 3/7."""
    logits = torch.tensor([[1.0, 4.0, 3.0, 2.0]]).log()

    routing = by_kernel({"top_k": 2}, logits, torch.zeros(4), None, kernel_device)

    torch.testing.assert_close(routing.scores.cpu(), torch.tensor([[0.1, 0.4, 0.3, 0.2]]))
    assert routing.selected.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.weights.cpu(), torch.tensor([[4 / 7, 3 / 7]]))
    assert routing.tally.counts.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n_experts", "settings"), ROUTERS)
def test_routing_is_that_of_the_axes(
    kernel_device: str, n_experts: int, settings: dict[str, object], masked: bool
) -> None:
    logits, bias, mask = draw(37, n_experts)
    mask = mask if masked else None

    actual = by_kernel(settings, logits, bias, mask, kernel_device)
    expected = by_axes(settings, logits, bias, mask)

    if settings.get("score") == "relu":  # scores of 0 tie, and of those any will do
        assert_close(actual.scores.gather(1, actual.selected), expected.scores.gather(1, expected.selected))
    else:
        assert actual.selected.tolist() == expected.selected.tolist()
        assert actual.counts().tolist() == expected.counts().tolist()
    assert actual.selected.dtype == actual.counts().dtype == torch.int64
    assert actual.weights.dtype == actual.scores.dtype == torch.float32
    assert_close(actual.scores, expected.scores)
    assert_close(actual.weights, expected.weights)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n_experts", "settings"), ROUTERS)
def test_gradients_are_those_of_the_axes(
    kernel_device: str, n_experts: int, settings: dict[str, object], masked: bool
) -> None:
    """Each of the three ways to the logits alone, and all together: from weights, from scores, and from their sums."""
    logits, bias, mask = draw(21, n_experts, seed=1)
    mask = mask if masked else None
    generator = torch.Generator().manual_seed(2)
    seen = [torch.randn(21, size, generator=generator) for size in (n_experts, settings["top_k"])]
    seen_shares = torch.randn(n_experts, generator=generator)

    def gradients(routing: Routing, leaf: Tensor) -> list[Tensor]:
        device, dtype = leaf.device, routing.scores.dtype
        if routing.tally is None:
            shares = routing.scores / routing.scores.sum(dim=1, keepdim=True)
            share_sums = (shares if mask is None else shares * mask[:, None]).sum(dim=0)
        else:
            share_sums = routing.tally.share_sums
        parts = [
            (value * weight.to(device, dtype)).sum()
            for value, weight in zip((routing.scores, routing.weights, share_sums), (*seen, seen_shares), strict=True)
        ]
        return [torch.autograd.grad(part, leaf, retain_graph=True)[0] for part in (*parts, sum(parts))]

    leaf = logits.to(kernel_device).requires_grad_()
    actual = gradients(by_kernel(settings, leaf, bias, mask, kernel_device), leaf)
    exact = logits.double().requires_grad_()
    expected = gradients(by_axes(settings, exact, bias, mask), exact)

    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_k": 2, "score": "sigmoid"}])
def test_the_balance_loss_takes_the_sums_and_is_the_same(kernel_device: str, settings: dict[str, object]) -> None:
    logits, bias, mask = draw(50, 8)
    logits[mask.nonzero()[0]] = -200  # a token whose sigmoids are all 0 has no shares
    leaf = logits.to(kernel_device).requires_grad_()
    routing = by_kernel(settings, leaf, bias, mask, kernel_device)
    assert routing.own_tally is not None

    loss, expected = load_balancing_loss(routing), load_balancing_loss(replace(routing, tally=None))

    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (gradient,), (expected_gradient,) = (
        torch.autograd.grad(value, leaf, retain_graph=True) for value in (loss, expected)
    )
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


def test_a_tally_does_not_count_for_a_routing_made_from_its_own(kernel_device: str) -> None:
    """All tokens prefer expert 0. Sent to expert 3 instead, its count is theirs; and first choices are half of all."""
    routing = by_kernel({"top_k": 2}, torch.eye(4)[[0, 0, 0]] * 5, torch.zeros(4), None, kernel_device)
    assert routing.counts().tolist() == [3, 3, 0, 0]

    moved = replace(routing, selected=torch.full_like(routing.selected, 3))

    assert moved.counts().tolist() == [0, 0, 0, 6]
    assert routing.first_choices().counts().tolist() == [3, 0, 0, 0]
    assert replace(routing, mask=torch.tensor([True, False, False], device=kernel_device)).counts().sum() == 2
    assert replace(routing, assigned=routing.selected == 0).counts().tolist() == [3, 0, 0, 0]
    with_uniform = replace(routing, scores=torch.full_like(routing.scores, 1 / 4))
    assert load_balancing_loss(with_uniform).item() == pytest.approx(1.0)


def test_among_equal_scores_the_lowest_index_wins(kernel_device: str) -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 1.0, 2.0, 1.0]])

    routing = by_kernel({"top_k": 3}, logits, torch.zeros(5), None, kernel_device)

    assert routing.selected.tolist() == [[0, 1, 2], [1, 3, 0]]


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 3}, {"top_k": 3, "score": "sigmoid"}, {"top_k": 3, "n_groups": 2, "top_groups": 1} | DEEPSEEK_V3],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_still_choose_distinct_experts(
    kernel_device: str, settings: dict[str, object], value: float
) -> None:
    """An id out of range would be read and written with."""
    logits, bias, _ = draw(9, 6)
    logits[1::3, 2], logits[2::3] = value, value

    selected = by_kernel(settings, logits, bias, None, kernel_device).selected

    assert ((selected >= 0) & (selected < 6)).all()
    assert all(len(set(row)) == 3 for row in selected.tolist())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_an_expert_of_logit_minus_infinity_has_score_zero(kernel_device: str, score: str) -> None:
    logits = torch.tensor([[0.0, float("-inf"), 0.0]])

    routing = by_kernel({"top_k": 2, "score": score}, logits, torch.zeros(3), None, kernel_device)

    assert routing.scores.tolist() == [[0.5, 0.0, 0.5]]
    assert routing.selected.tolist() == [[0, 2]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_extreme_logits_give_what_the_axes_give(kernel_device: str, score: str) -> None:
    """Scores that underflow, and sums of weights too small to divide by; forward and backward. In float32 here."""
    rows = [
        [0.0, 80.0, 60.0],
        [-90.0, -100.0, -95.0],
        [-70.0, -72.0, -71.0],
        [-200.0, -300.0, -250.0],
        [30.0, 25.0, 19.0],
    ]
    logits = torch.tensor(rows)
    settings = {"top_k": 2, "score": score}
    router = Router(RouterConfig(**settings), 3, 3).eval()
    router.weight.data = torch.eye(3)
    seen = torch.tensor([1.0, -2.0])

    leaf = logits.to(kernel_device).requires_grad_()
    routing = by_kernel(settings, leaf, torch.zeros(3), None, kernel_device)
    (gradient,) = torch.autograd.grad((routing.weights * seen.to(kernel_device)).sum(), leaf)
    plain = logits.clone().requires_grad_()
    expected = router(plain)
    (expected_gradient,) = torch.autograd.grad((expected.weights * seen).sum(), plain)

    torch.testing.assert_close(routing.weights.cpu(), expected.weights, rtol=1e-5, atol=1e-37)
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(routing.scores.cpu(), expected.scores, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("normalise", [False, True])
def test_zero_experts_take_no_weight(kernel_device: str, normalise: bool) -> None:
    """Of 8 experts the last 3 are special, the first 2 of those zero experts: 5 and 6."""
    logits, bias, mask = draw(40, 8)
    logits[:, 5:7] += 3
    settings = {"top_k": 3, "normalise": normalise}

    leaf = logits.to(kernel_device).requires_grad_()
    actual = by_kernel(settings, leaf, bias, mask, kernel_device, first_zero=5, n_zero=2)
    exact = logits.double().requires_grad_()
    expected = by_axes(settings, exact, bias, mask, n_special=3, n_zero=2)

    assert_close(actual.weights, expected.weights)
    seen = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((actual.weights * seen.to(kernel_device)).sum(), leaf)
    (expected_gradient,) = torch.autograd.grad((expected.weights * seen).sum(), exact)
    assert_close(gradient, expected_gradient, 1e-5)


def test_a_program_sums_over_several_tiles(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 tokens are 7 tiles of 64: with 2 programs, 4 tiles and 3."""
    monkeypatch.setattr(fused, "MOST_PROGRAMS", 2)
    logits, bias, mask = draw(400, 8)

    tally = by_kernel({"top_k": 2}, logits, bias, mask, kernel_device).tally
    expected = by_axes({"top_k": 2}, logits, bias, mask)

    assert tally.counts.tolist() == expected.counts().tolist()
    assert tally.n_scored.item() == mask.sum().item()
    assert_close(tally.share_sums, expected.scores[mask].sum(dim=0))


def test_no_tokens_are_routed_to_nothing(kernel_device: str) -> None:
    leaf = torch.zeros(0, 4, device=kernel_device, requires_grad=True)

    routing = by_kernel({"top_k": 2}, leaf, torch.zeros(4), None, kernel_device)
    (routing.weights.sum() + load_balancing_loss(routing)).backward()

    assert routing.selected.shape == (0, 2)
    assert routing.counts().tolist() == [0, 0, 0, 0]
    assert leaf.grad.shape == (0, 4)


def test_the_operator_is_whole_to_torch_compile(kernel_device: str) -> None:
    config = RouterConfig(top_k=2)

    def loss_of(logits: Tensor, mask: Tensor) -> Tensor:
        routed = fused.route(config, logits, None, mask)
        routing = Routing(logits, routed.scores, routed.selected, routed.weights, mask, tally=routed.tally)
        assert routing.own_tally is not None
        return load_balancing_loss(routing) + routed.weights[:, 0].sum()

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=True)

    for n_tokens in (30, 41):
        logits, bias, mask = draw(n_tokens, 8)
        leaf, mask = logits.to(kernel_device).requires_grad_(), mask.to(kernel_device)
        loss, expected = compiled(leaf, mask), loss_of(leaf, mask)
        assert torch.equal(loss, expected)
        assert torch.equal(*(torch.autograd.grad(value, leaf)[0] for value in (loss, expected)))
    arguments = (leaf, bias.to(kernel_device), mask, "sigmoid", False, 2, True, 1.0, 1, 1, True, 0, 0)
    library.opcheck(torch.ops.moe.route.default, arguments)


@pytest.mark.parametrize(
    ("settings", "in_training", "in_evaluation"),
    [
        ({}, True, True),
        ({"noise": "shazeer"}, True, True),
        ({"noise": "gumbel"}, False, True),
        ({"second_choice": 0.5}, False, True),
        ({"top_k": 17}, False, False),
        ({"selection": "sinkhorn"}, False, False),
        ({"selection": "hash", "weights": "equal"}, False, False),
    ],
)
def test_what_the_kernel_supports(settings: dict[str, object], in_training: bool, in_evaluation: bool) -> None:
    config = RouterConfig(**settings)

    assert fused.supports(config, training=True) == in_training
    assert fused.supports(config, training=False) == in_evaluation
    assert not fused.usable(config, torch.zeros(3, 4), training=False), "a CPU has no use for it"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGPU:
    """What an interpreter does not show."""

    @pytest.mark.parametrize("n_sequences", [1, 4])
    @pytest.mark.parametrize("score", ["softmax", "sigmoid"])
    def test_a_router_there_routes_as_on_a_cpu(self, score: str, n_sequences: int) -> None:
        config = RouterConfig(top_k=4, score=score, capacity=CapacityConfig(factor=1.25))
        router = Router(config, 64, 32)
        # Logits of about 1: where they reach 17, several sigmoids are 1 and the choice among them is that of rounding.
        torch.nn.init.normal_(router.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        x = torch.randn(512, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        _, _, mask = draw(512, 1)

        expected = router(x, mask, n_sequences=n_sequences)
        actual = router.cuda()(x.cuda(), mask.cuda(), n_sequences=n_sequences)

        assert actual.own_tally is not None
        same = (actual.selected.cpu() == expected.selected).all(dim=1)
        assert same.float().mean() > 0.99  # but for near ties: products are rounded in another order
        assert actual.dropped is not None
        torch.testing.assert_close(actual.scores.cpu(), expected.scores, rtol=1e-4, atol=1e-6)
        assert (actual.counts().cpu() - expected.counts()).abs().max() <= 4

    def test_twenty_repeats_are_equal_to_the_bit(self) -> None:
        logits, bias, mask = (value.cuda() for value in draw(20_000, 128))
        leaf = logits.requires_grad_()

        def everything() -> list[Tensor]:
            routing = by_kernel({"top_k": 8}, leaf, bias, mask, "cuda")
            (gradient,) = torch.autograd.grad(load_balancing_loss(routing) + routing.weights.square().sum(), leaf)
            return [routing.scores, routing.selected, routing.weights, routing.tally.share_sums, gradient]

        first = everything()
        for _ in range(20):
            assert all(torch.equal(one, other) for one, other in zip(everything(), first, strict=True))

    def test_large_batches_are_routed_as_by_topk(self) -> None:
        logits, bias, mask = (value.cuda() for value in draw(32_768, 128))

        routing = by_kernel({"top_k": 8}, logits, bias, mask, "cuda")

        assert torch.equal(routing.scores.gather(1, routing.selected), routing.scores.topk(8).values)
        assert torch.equal(routing.counts(), replace(routing, tally=None).counts())

    def test_a_cuda_graph_routes_what_it_is_given_later(self) -> None:
        first, later = (draw(2000, 64, seed)[0].cuda() for seed in (0, 1))
        logits = first.clone()
        config = RouterConfig(top_k=8)
        fused.route(config, logits, None, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            routed = fused.route(config, logits, None, None)

        logits.copy_(later)
        graph.replay()

        assert torch.equal(routed.selected, fused.route(config, later, None, None).selected)

    def test_a_compiled_router_has_no_breaks(self) -> None:
        router = Router(RouterConfig(top_k=2), 64, 16).cuda()
        torch.nn.init.normal_(router.weight)
        x = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16)

        def loss_of(x: Tensor) -> Tensor:
            routing = router(x)
            return load_balancing_loss(routing) + routing.weights.square().sum()

        torch.testing.assert_close(torch.compile(loss_of, fullgraph=True)(x), loss_of(x))
