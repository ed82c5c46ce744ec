"""What lies between the products of segments, and the operator that torch.compile is given, against the loop."""

from collections.abc import Iterator
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from moe.config import Activation, ExpertsConfig, FeedForwardConfig
from moe.model.experts import Experts, row_passes, segments
from moe.model.feed_forward import activate, input_width
from moe.model.routing import Routing


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    row_passes._compiled.cache_clear()
    yield
    torch._dynamo.reset()


CASES = {"normal": (45, range(4)), "one_empty": (45, (0, 1, 3)), "all_to_one": (40, (2,)), "one_token": (1, range(4))}


def routing_of(case: str, *, padded: bool = False) -> Routing:
    n_tokens, experts = CASES[case]
    generator = torch.Generator().manual_seed(1)
    ranks = torch.rand(n_tokens, len(experts), generator=generator)
    selected = torch.tensor(list(experts))[ranks.argsort(1)[:, :2]]
    mask = torch.rand(n_tokens, generator=generator) < 0.6 if padded else None
    weights = torch.rand(selected.shape, generator=generator)
    weights = weights if mask is None else weights.masked_fill(~mask[:, None], 0.0)
    uniform = torch.full((n_tokens, 4), 0.25)
    return Routing(uniform.log(), uniform, selected, weights.requires_grad_(), mask)


def experts_of(activation: str, bias: bool, backend: str) -> Experts:
    experts = Experts(
        ExpertsConfig(n_experts=4, d_ff=20, backend=backend), FeedForwardConfig(activation=activation, bias=bias), 12
    )
    generator = torch.Generator().manual_seed(2)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return experts


def output_and_gradients(experts: nn.Module, routing: Routing, parameters: list[Tensor]) -> list[Tensor]:
    x = torch.randn(routing.n_tokens, 12, generator=torch.Generator().manual_seed(3)).requires_grad_()
    y = experts(x, routing)
    seen = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    return [y.detach(), *torch.autograd.grad((y * seen).sum(), [x, routing.weights, *parameters])]


@pytest.mark.parametrize("activation", get_args(Activation))
def test_the_slopes_are_those_of_autograd(activation: Activation) -> None:
    """⟨dA', A⟩ is the gradient of the weight that multiplies A."""
    generator = torch.Generator().manual_seed(0)
    hidden = 6 * torch.randn(9, input_width(activation, 5), generator=generator, dtype=torch.float64)
    grad = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    weight = torch.rand(9, generator=generator, dtype=torch.float64).requires_grad_()
    hidden.requires_grad_()
    tanh = activation == "gelu_tanh"
    expected = F.gelu(hidden, approximate="tanh") if tanh else activate(hidden, activation)
    (weight[:, None] * expected * grad).sum().backward()

    inner, grad_hidden, dot = row_passes.activation_gradient(hidden.detach(), grad, weight.detach(), activation)

    torch.testing.assert_close(inner, expected.detach())
    torch.testing.assert_close(row_passes.activation(hidden.detach(), activation), expected.detach())
    torch.testing.assert_close(grad_hidden, hidden.grad)
    torch.testing.assert_close(dot, weight.grad)


def test_rows_on_paper() -> None:
    """Token 2 of two is nobody: its row is zeros. Assignments in row 3 of three count for nothing."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    rows = row_passes.gather(x, torch.tensor([1, 2, 0]), torch.float32)
    y = row_passes.sum_choices(rows, torch.tensor([[0, 2], [3, 0]]), torch.tensor([[1.0, 10.0], [5.0, 2.0]]))

    assert rows.tolist() == [[3, 4], [0, 0], [1, 2]]
    assert y.tolist() == [[13, 24], [6, 8]]
    assert row_passes.weigh(rows, torch.tensor([2.0, 1.0, 0.0])).tolist() == [[6, 8], [0, 0], [0, 0]]


@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("swiglu", True), ("gelu", True)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_the_operator_computes_the_loop(
    activation: str, bias: bool, case: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one graph; what lies between the products is left uncompiled, which takes seconds each."""
    monkeypatch.setattr(segments, "compiled", lambda function: function)
    routing, experts = routing_of(case, padded=padded), experts_of(activation, bias, "segments")
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    reference = experts_of(activation, bias, "reference")

    actual = output_and_gradients(compiled, routing, list(experts.parameters()))
    expected = output_and_gradients(reference, routing, list(reference.parameters()))

    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_what_it_is_uncompiled_and_repeats_itself(dtype: torch.dtype) -> None:
    """Through the compiler in earnest, under autocast; twenty times the same bits."""
    routing, experts = routing_of("normal", padded=True), experts_of("swiglu", False, "segments")
    compiled, parameters = torch.compile(experts, fullgraph=True), list(experts.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = output_and_gradients(experts, routing, parameters)
        actual = output_and_gradients(compiled, routing, parameters)
        again = [output_and_gradients(compiled, routing, parameters) for _ in range(20)]

    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-6) * other.norm()
        assert all(torch.equal(repeat[index], one) for repeat in again)


def test_no_tokens_make_no_rows_but_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "compiled", lambda function: function)
    experts = experts_of("swiglu", False, "segments")
    none = torch.empty(0, 4)
    routing = Routing(none, none, torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2).requires_grad_())

    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    y, *gradients = output_and_gradients(compiled, routing, list(experts.parameters()))

    assert y.shape == (0, 12)
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_the_operators_are_what_torch_expects_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "compiled", lambda function: function)
    routing, experts = routing_of("normal"), experts_of("gelu", True, "segments")
    x = torch.randn(45, 12, requires_grad=True)

    library.opcheck(
        torch.ops.moe.segment_experts.default,
        (x, routing.weights, experts.w_in, experts.w_out, experts.b_in, experts.b_out, routing.selected, None, "gelu"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
