"""What lies between the products of segments, and the operator that torch.compile is given, against the loop."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from moe.config import Activation, ExpertsConfig, FeedForwardConfig
from moe.model import native
from moe.model.experts import Experts, row_passes
from moe.model.feed_forward import activate, input_width
from moe.model.routing import Routing

with_kernels = pytest.mark.skipif(native.kernels() is None, reason="there is no compiler")
DTYPES = [torch.float32, torch.bfloat16]


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


def close(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """To the last bit or so of what was written."""
    of_dtype = 2**-8 if actual.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=relative + of_dtype, atol=5e-6, equal_nan=True)


def gradient_of(
    hidden: Tensor, grad: Tensor, weight: Tensor, kind: Activation, function: Callable[..., None]
) -> tuple[Tensor, ...]:
    """What ``function`` writes: the weighted activation, the gradient of hidden, and a dot product a row."""
    weighted, grad_hidden, dots = torch.empty_like(grad), torch.empty_like(hidden), torch.empty_like(weight)
    function(hidden, grad, weight, kind, weighted=weighted, grad_hidden=grad_hidden, dots=dots)
    return weighted, grad_hidden, dots


def activated(hidden: Tensor, kind: Activation) -> Tensor:
    gates = hidden.shape[1] // input_width(kind, 1)
    inner = hidden.new_empty(len(hidden), gates)
    row_passes.activation(hidden, kind, inner)
    return inner


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

    weighted, grad_hidden, dots = gradient_of(
        hidden.detach(), grad, weight.detach(), activation, row_passes.activation_gradient
    )

    torch.testing.assert_close(activated(hidden.detach(), activation), expected.detach())
    torch.testing.assert_close(weighted, (weight[:, None] * expected).detach())
    torch.testing.assert_close(grad_hidden, hidden.grad)
    torch.testing.assert_close(dots, weight.grad)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_rows_on_paper(dtype: torch.dtype) -> None:
    """Token 2 of two is nobody: its row is zeros. Assignments in row 3 of three count for nothing."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    rows = row_passes.gather(x, torch.tensor([1, 2, 0]), dtype)
    row_of_assignment = torch.tensor([[0, 2], [3, 0]])
    y = row_passes.sum_choices(rows, row_of_assignment, torch.tensor([[1.0, 10.0], [5.0, 2.0]]), dtype)
    unweighted = row_passes.sum_choices(rows, row_of_assignment, None, dtype)

    assert rows.tolist() == [[3, 4], [0, 0], [1, 2]]
    assert y.tolist() == [[13, 24], [6, 8]]
    assert unweighted.tolist() == [[4, 6], [3, 4]]
    assert rows.dtype == y.dtype == dtype


@with_kernels
@pytest.mark.parametrize("width", [1, 15, 16, 37])
@pytest.mark.parametrize("read", DTYPES)
@pytest.mark.parametrize("written", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_moved_and_summed_as_defined(
    width: int, read: torch.dtype, written: torch.dtype, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(width, 7, generator=generator).to(read).mT  # not contiguous
    token_of_row = torch.randint(8, (11,), generator=generator)
    rows = torch.randn(11, width, generator=generator).to(read)
    row_of_assignment = torch.randint(12, (7, 3), generator=generator)
    weights = torch.rand(3, 7, generator=generator).mT if weighted else None
    exact = None if weights is None else weights.double()

    gathered = row_passes.gather(x, token_of_row, written)
    total = row_passes.sum_choices(rows, row_of_assignment, weights, written)

    assert torch.equal(gathered, row_passes.gather_in_torch(x, token_of_row, written))
    close(total, row_passes.sum_choices_in_torch(rows.double(), row_of_assignment, exact, torch.float64))


@with_kernels
@pytest.mark.parametrize("d_ff", [1, 16, 37])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("weights", DTYPES)
def test_activations_are_as_defined(
    d_ff: int, dtype: torch.dtype, activation: Activation, weights: torch.dtype
) -> None:
    """Also with weights in bfloat16, which the kernel does not read."""
    generator = torch.Generator().manual_seed(0)
    hidden = (4 * torch.randn(9, input_width(activation, d_ff), generator=generator)).to(dtype)
    grad = torch.randn(9, d_ff, generator=generator).to(dtype)
    weight = torch.rand(9, generator=generator).to(weights)

    actual = gradient_of(hidden, grad, weight, activation, row_passes.activation_gradient)
    expected = gradient_of(
        hidden.double(), grad.double(), weight.double(), activation, row_passes.activation_gradient_in_torch
    )

    close(activated(hidden, activation), activated(hidden.double(), activation), 2e-5)
    for one, other in zip(actual, expected, strict=True):
        close(one, other, 2e-5)


@with_kernels
@pytest.mark.parametrize("activation", get_args(Activation))
def test_extremes_stay_finite_and_nan_shows(activation: Activation) -> None:
    """Every pair of a gate and a value of these sizes; the last column has no number in the gate."""
    sizes = [-1e4, -50.0, -7.0, 0.0, 7.0, 50.0, 1e4]
    gate, value = torch.cartesian_prod(torch.tensor(sizes), torch.tensor(sizes)).T
    gate = torch.cat([gate, torch.tensor([torch.nan])])
    value = torch.cat([value, torch.ones(1)])
    both = [gate, value] if input_width(activation, 1) == 2 else [gate]
    hidden, grad, weight = torch.cat(both)[None], torch.ones(1, len(gate)), torch.ones(1)

    inner = activated(hidden, activation)
    weighted, grad_hidden, dots = gradient_of(hidden, grad, weight, activation, row_passes.activation_gradient)
    expected = gradient_of(
        hidden.double(), grad.double(), weight.double(), activation, row_passes.activation_gradient_in_torch
    )

    torch.testing.assert_close(inner, weighted, rtol=0, atol=0, equal_nan=True)  # the weight is one
    close(weighted, expected[0], 2e-5)
    here = torch.ones(hidden.shape[1], dtype=torch.bool)
    here[len(gate) - 1 :: len(gate)] = False
    close(grad_hidden[:, here], expected[1][:, here], 2e-5)
    assert weighted[0, -1].isnan()
    assert dots.isnan().all()
    assert grad_hidden[:, here].isfinite().all()


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_compiler_everything_is_the_same(
    activation: Activation, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    routing, experts = routing_of("normal", padded=True), experts_of(activation, True, "segments")
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = output_and_gradients(experts, routing, list(experts.parameters()))
        monkeypatch.setattr(native, "kernels", lambda: None)
        actual = output_and_gradients(experts, routing, list(experts.parameters()))

    for one, other in zip(actual, expected, strict=True):
        assert (one - other).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * other.norm()


@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("swiglu", True), ("gelu", True)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_compiled_the_operator_computes_the_loop(activation: str, bias: bool, case: str, padded: bool) -> None:
    """In one graph."""
    torch._dynamo.reset()
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


def test_compiled_no_tokens_make_no_rows_but_gradients() -> None:
    experts = experts_of("swiglu", False, "segments")
    none = torch.empty(0, 4)
    routing = Routing(none, none, torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2).requires_grad_())

    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    y, *gradients = output_and_gradients(compiled, routing, list(experts.parameters()))

    assert y.shape == (0, 12)
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_the_operators_are_what_torch_expects_of_one() -> None:
    routing, experts = routing_of("normal"), experts_of("gelu", True, "segments")
    x = torch.randn(45, 12, requires_grad=True)

    library.opcheck(
        torch.ops.moe.segment_experts.default,
        (x, routing.weights, experts.w_in, experts.w_out, experts.b_in, experts.b_out, routing.selected, None, "gelu"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
