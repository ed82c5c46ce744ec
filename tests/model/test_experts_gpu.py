"""The grouped back-end on a GPU: against the loop there, repeatable to the bit, and compiled."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, ModelConfig, RouterConfig
from moe.model.experts import Experts, ExpertWeights, grouped_experts, reference_experts
from moe.model.feed_forward import input_width
from moe.model.routing import Routing
from moe.model.transformer import Transformer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

N_EXPERTS, TOP_K, D_MODEL, D_FF = 8, 2, 128, 96


def make_routing(case: str, n_tokens: int = 500) -> Routing:
    """A decision by hand; a third of the tokens is padding."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.tensor({"one_empty": [0, 1, 2, 3, 4, 6, 7], "two_used": [2, 5]}.get(case, list(range(N_EXPERTS))))
    selected = experts[torch.rand(n_tokens, len(experts), generator=generator).argsort(1)[:, :TOP_K]].cuda()
    mask = (torch.rand(n_tokens, generator=generator) < 2 / 3).cuda()
    weights = torch.rand(n_tokens, TOP_K, generator=generator).cuda().masked_fill(~mask[:, None], 0.0)
    uniform = torch.full((n_tokens, N_EXPERTS), 1 / N_EXPERTS, device="cuda")
    return Routing(uniform.log(), uniform, selected, weights.requires_grad_(), mask)


def make_leaves(activation: str, bias: bool, dtype: torch.dtype, n_tokens: int = 500) -> tuple[Tensor, ExpertWeights]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return drawn.to("cuda", dtype).requires_grad_()

    width_in = input_width(activation, D_FF)
    biases = (draw(N_EXPERTS, width_in), draw(N_EXPERTS, D_MODEL)) if bias else (None, None)
    weights = ExpertWeights(draw(N_EXPERTS, width_in, D_MODEL), draw(N_EXPERTS, D_MODEL, D_FF), *biases, activation)
    return draw(n_tokens, D_MODEL), weights


def output_and_gradients(backend: object, x: Tensor, routing: Routing, weights: ExpertWeights) -> dict[str, Tensor]:
    y = backend(x, routing, weights)
    leaves = {"x": x, "combine": routing.weights}
    leaves |= {name: value for name, value in weights._asdict().items() if isinstance(value, Tensor)}
    seen = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.device, y.dtype)
    gradients = torch.autograd.grad((y * seen).sum(), list(leaves.values()))
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", ["normal", "one_empty", "two_used", "one_token"])
def test_grouped_computes_the_loop(
    dtype: torch.dtype, tolerance: float, activation: str, bias: bool, case: str
) -> None:
    n_tokens = 1 if case == "one_token" else 500
    routing, (x, weights) = make_routing(case, n_tokens), make_leaves(activation, bias, dtype, n_tokens)

    expected = output_and_gradients(reference_experts, x, routing, weights)
    actual = output_and_gradients(grouped_experts, x, routing, weights)

    for name, value in expected.items():
        difference, size = (actual[name].double() - value.double()).norm(), value.double().norm()
        assert difference <= tolerance * size, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_repeats_are_equal_to_the_bit(dtype: torch.dtype) -> None:
    """No atomic additions: neither in the combine nor in the gradients."""
    routing, (x, weights) = make_routing("normal", 5000), make_leaves("swiglu", True, dtype, 5000)
    first = output_and_gradients(grouped_experts, x, routing, weights)

    for _ in range(20):
        again = output_and_gradients(grouped_experts, x, routing, weights)
        assert [name for name, value in first.items() if not torch.equal(again[name], value)] == []


def test_padding_of_nan_stays_where_it_is() -> None:
    """Rows beyond the last offset are left as they were in memory, forward and backward."""
    routing, (x, weights) = make_routing("normal"), make_leaves("swiglu", True, torch.bfloat16)
    dirty = x.detach().masked_fill(~routing.mask[:, None], float("nan")).requires_grad_()

    result = output_and_gradients(grouped_experts, dirty, routing, weights)

    assert all(value.isfinite().all() for value in result.values())
    assert result["y"][~routing.mask].eq(0).all()


def test_compiled_experts_equal_eager_ones_for_every_routing() -> None:
    experts = Experts(ExpertsConfig(n_experts=N_EXPERTS, d_ff=D_FF), FeedForwardConfig(), D_MODEL)
    generator = torch.Generator().manual_seed(3)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    experts = experts.to("cuda", torch.bfloat16)
    compiled = torch.compile(experts, fullgraph=True)
    x, _ = make_leaves("swiglu", False, torch.bfloat16)

    for case in ("normal", "one_empty", "two_used"):
        routing = make_routing(case)
        (grad,) = torch.autograd.grad(compiled(x, routing).float().square().sum(), x)
        (expected,) = torch.autograd.grad(experts(x, routing).float().square().sum(), x)
        torch.testing.assert_close(grad, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


def test_a_training_step_under_autocast_repeats_itself() -> None:
    config = ModelConfig(
        vocab_size=256,
        n_layers=2,
        d_model=64,
        attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=16),
        experts=ExpertsConfig(n_experts=8, d_ff=64),
        router=RouterConfig(top_k=2),
    )
    tokens = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(0)).cuda()

    def step(config: ModelConfig) -> tuple[Tensor, list[Tensor]]:
        model = Transformer(config).cuda()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits, routings = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        assert all(routing.logits.dtype == torch.float32 for routing in routings)
        return loss.detach(), [parameter.grad for parameter in model.parameters()]

    loss, gradients = step(config)
    again, gradients_again = step(config)
    loop, _ = step(replace(config, experts=replace(config.experts, backend="reference")))

    assert torch.equal(loss, again)
    # All but the embedding, whose own backward adds rows in any order.
    assert all(torch.equal(a, b) for a, b in zip(gradients[1:], gradients_again[1:], strict=True))
    torch.testing.assert_close(loss, loop, rtol=1e-3, atol=0)
