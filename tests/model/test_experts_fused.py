"""The fused experts against the loop in float64: their kernels compiled on a GPU, elsewhere in Triton's interpreter.

The interpreter takes tiles of 16 rows by 32 columns, 16 at a time of the inner dimension, and two programs: few tokens
already make several tiles, tiles that hang over the end of an expert, and programs that do more than one tile.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, library
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from moe.config import ExpertsConfig, FeedForwardConfig
from moe.model.experts import Experts, ExpertWeights, fused, fused_experts, reference_experts
from moe.model.experts.fused.sort import sort_assignments
from moe.model.feed_forward import input_width
from moe.model.routing import Routing

DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""of the norm; rounding a number to bfloat16 changes it by 1.6e-3 of it (root mean square), and that several times"""
ACTIVATIONS = ["swiglu", "swiglu_clamped", "gelu", "gelu_tanh", "relu"]


class Case(NamedTuple):
    """What an expert back-end is given; everything that can have a gradient is a leaf."""

    x: Tensor
    routing: Routing
    weights: ExpertWeights


@pytest.fixture(autouse=True)
def one_tiling_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles that fit everywhere, so that no time goes into compiling the others: test_experts_gpu.py has them."""
    if torch.cuda.is_available():
        from moe.model.experts.fused import tiles

        monkeypatch.setattr(tiles, "_chosen", {})
        monkeypatch.setattr(tiles, "candidates", lambda product, device: [tiles.Tiles(64, 64, 32, 4, 2)])


def make_case(
    device: str,
    n_tokens: int = 21,
    d_model: int = 8,
    d_ff: int = 16,
    n_experts: int = 3,
    top_k: int = 2,
    activation: str = "swiglu",
    dtype: torch.dtype | None = None,
    only: list[int] | None = None,
    seed: int = 0,
) -> Case:
    """A random case; its tokens go to the experts in ``only`` (None: all)."""
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype or DTYPE[device]

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
        return drawn.to(device, dtype).requires_grad_()

    experts = torch.tensor(only if only is not None else range(n_experts))
    selected = experts[torch.rand(n_tokens, len(experts), generator=generator).argsort(1)[:, :top_k]].to(device)
    combine = torch.rand(selected.shape, generator=generator).to(device).requires_grad_()
    uniform = torch.full((n_tokens, n_experts), 1 / n_experts, device=device)
    weights = ExpertWeights(
        draw(n_experts, input_width(activation, d_ff), d_model),
        draw(n_experts, d_model, d_ff),
        None,
        None,
        activation,
    )
    # Hidden units of about 1: none comes so near to 7, the bound of swiglu_clamped, that rounding takes it across.
    x = (d_model**0.5 * draw(n_tokens, d_model)).detach().requires_grad_()
    return Case(x, Routing(uniform.log(), uniform, selected, combine), weights)


def in_float64(case: Case) -> Case:
    """The same numbers, which float64 holds exactly."""
    x, combine, w_in, w_out = (
        leaf.detach().double().requires_grad_()
        for leaf in (case.x, case.routing.weights, case.weights.w_in, case.weights.w_out)
    )
    return Case(x, replace(case.routing, weights=combine), case.weights._replace(w_in=w_in, w_out=w_out))


def grad_of_output(case: Case) -> Tensor:
    """What the gradients are taken for."""
    return torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1)).to(case.x.device, case.x.dtype)


def output_and_gradients(backend: Callable[..., Tensor], case: Case, grad_y: Tensor | None = None) -> dict[str, Tensor]:
    """The output of a back-end, and the gradient of everything that has one."""
    y = backend(*case)
    leaves = {"x": case.x, "combine": case.routing.weights, "w_in": case.weights.w_in, "w_out": case.weights.w_out}
    grad_y = grad_of_output(case) if grad_y is None else grad_y
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_y), strict=True))


def the_loop(case: Case) -> dict[str, Tensor]:
    """What should come out, for the same gradient of the output: the loop in float64."""
    return output_and_gradients(reference_experts, in_float64(case), grad_of_output(case).double())


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], case: Case) -> None:
    """Equal up to the rounding of the dtype, relative to the norm of each tensor; in the dtypes that belong there."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert actual[name].dtype == (torch.float32 if name == "combine" else case.x.dtype), name
        error, size = (actual[name].double() - value).norm().item(), value.norm().item()
        assert error <= TOLERANCE[case.x.dtype] * size, f"{name}: {error / size:.1e}"


# ---------------------------------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize(
    ("n_tokens", "d_model", "d_ff", "n_experts", "top_k", "activation"),
    [
        pytest.param(37, 24, 40, 4, 2, "swiglu", id="no-size-is-whole-tiles"),
        pytest.param(48, 32, 64, 2, 2, "swiglu_clamped", id="all-sizes-are"),
        pytest.param(19, 8, 8, 5, 3, "gelu", id="smaller-than-a-tile"),
        pytest.param(3, 1032, 8, 2, 1, "relu", id="model-wider-than-what-moves-at-a-time"),
        pytest.param(5, 8, 264, 2, 1, "swiglu", id="experts-wider-than-what-moves-at-a-time"),
        pytest.param(70, 8, 16, 1, 1, "gelu", id="one-expert"),
        pytest.param(5, 16, 8, 40, 6, "swiglu_clamped", id="more-experts-than-tokens"),
        pytest.param(3, 8, 24, 8, 8, "relu", id="every-token-to-all-of-eight-experts"),
    ],
)
def test_the_kernels_compute_the_loop(
    n_tokens: int, d_model: int, d_ff: int, n_experts: int, top_k: int, activation: str, kernel_device: str
) -> None:
    case = make_case(kernel_device, n_tokens, d_model, d_ff, n_experts, top_k, activation)

    assert_close(output_and_gradients(fused_experts, case), the_loop(case), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_byte_numbers_are_summed_in_float32(activation: str, dtype: torch.dtype, kernel_device: str) -> None:
    """The error is that of rounding what is written, and does not grow with the inner dimension."""
    case = make_case(kernel_device, 11, 136, 24, 3, 2, activation, dtype)

    assert_close(output_and_gradients(fused_experts, case), the_loop(case), case)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_agree_with_autograd_everywhere(activation: str, kernel_device: str) -> None:
    """Through bounds and kinks, and where a sigmoid is 0 or 1: experts whose hidden units are multiples of x."""
    units = torch.tensor([-60.0, -9.0, -7.0, -1.5, -0.5, 0.5, 1.5, 7.0, 9.0, 60.0])
    gate, value = (units.repeat(10), units.repeat_interleave(10)) if "swiglu" in activation else (units, units[:0])
    d_ff = 104 if "swiglu" in activation else 16
    case = make_case(kernel_device, 4, 8, d_ff, 1, 1, activation)
    with torch.no_grad():
        case.x.copy_(torch.eye(4, 8))  # only the first token meets what is set here
        for part, values in enumerate((gate, value)):
            case.weights.w_in[0, part * d_ff : part * d_ff + len(values), 0] = values.to(case.x)

    assert_close(output_and_gradients(fused_experts, case), the_loop(case), case)


@pytest.mark.parametrize(
    ("n_tokens", "only"),
    [
        pytest.param(25, [0, 3], id="two-empty"),
        pytest.param(40, [2], id="all-to-one"),
        pytest.param(1, [1, 2], id="one-token"),
        pytest.param(32, [1, 3], id="whole-tiles"),
        pytest.param(33, [1, 3], id="whole-tiles-and-one"),
    ],
)
def test_loads_of_every_kind(n_tokens: int, only: list[int], kernel_device: str) -> None:
    """An expert without tokens has a gradient of zeros."""
    case = make_case(kernel_device, n_tokens, 16, 8, n_experts=4, top_k=len(only), only=only)

    result = output_and_gradients(fused_experts, case)

    assert_close(result, the_loop(case), case)
    for name in ("w_in", "w_out"):
        busy = result[name].abs().flatten(1).sum(1) > 0
        assert busy.nonzero().flatten().tolist() == only


def test_no_tokens_at_all(kernel_device: str) -> None:
    """An empty output, and gradients of zero for every weight, whatever is in them."""
    case = make_case(kernel_device, n_tokens=0)
    with torch.no_grad():
        case.weights.w_in[0] = float("nan")

    result = output_and_gradients(fused_experts, case)

    assert result["y"].shape == result["x"].shape == (0, 8)
    assert result["combine"].shape == (0, 2)
    assert result["w_in"].shape == case.weights.w_in.shape
    assert result["w_in"].eq(0).all()
    assert result["w_out"].eq(0).all()


@st.composite
def decisions(draw: st.DrawFn) -> Routing:
    """Any legal selection, with padding, drops, empty places and special experts."""
    n_special = draw(st.integers(0, 2))
    n_experts = draw(st.integers(1, 4)) + n_special
    top_k = draw(st.integers(1, n_experts))
    n_tokens = draw(st.integers(0, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    popular = torch.rand(n_experts, generator=generator) ** draw(st.sampled_from([0.0, 1.0, 8.0]))
    selected = (torch.rand(n_tokens, n_experts, generator=generator) * popular).topk(top_k).indices

    def some(*shape: int) -> Tensor | None:
        share = draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
        return None if share is None else torch.rand(*shape, generator=generator) < share

    uniform = torch.full((n_tokens, n_experts), 1 / n_experts)
    routing = Routing(
        uniform.log(),
        uniform,
        selected,
        torch.rand(n_tokens, top_k, generator=generator),
        mask=some(n_tokens),
        dropped=some(n_tokens, top_k),
        assigned=some(n_tokens, top_k),
        n_special=n_special,
    )
    carried_out = routing.carried_out
    return routing if carried_out is None else replace(routing, weights=routing.weights * carried_out)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(routing=decisions())
def test_every_decision_is_computed_as_the_loop_does(routing: Routing, kernel_device: str) -> None:
    on_device = replace(
        routing,
        **{
            name: value.to(kernel_device)
            for name in ("logits", "scores", "selected", "weights", "mask", "dropped", "assigned")
            if (value := getattr(routing, name)) is not None
        },
    )
    on_device.weights.requires_grad_()
    drawn = make_case(kernel_device, routing.n_tokens, 8, 8, n_experts=routing.n_mlps, top_k=1)
    case = drawn._replace(routing=on_device)

    result = output_and_gradients(fused_experts, case)

    assert_close(result, the_loop(case), case)
    if routing.executed is not None:
        assert result["combine"][~on_device.executed].eq(0).all()


# ------------------------------------------------------------------------------------------- what must not be computed


@pytest.fixture
def undefined_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN: whoever reads what was never written is found out."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def test_nothing_of_padding_or_undefined_memory_is_read(kernel_device: str, undefined_memory_is_nan: None) -> None:
    """Padding is NaN, and so is the gradient of its output: the rest is as if it were not there."""
    assert torch.empty(3, device=kernel_device).isnan().all()
    case = make_case(kernel_device, 37)
    mask = (torch.arange(37) % 5 < 3).to(kernel_device)
    combine = case.routing.weights.detach().masked_fill(~mask[:, None], 0.0).requires_grad_()
    case = case._replace(routing=replace(case.routing, weights=combine, mask=mask))
    dirty = case._replace(x=case.x.detach().masked_fill(~mask[:, None], float("nan")).requires_grad_())
    grad_y = grad_of_output(case).masked_fill(~mask[:, None], float("nan"))

    result = output_and_gradients(fused_experts, dirty, grad_y)

    for name in ("y", "x", "combine"):
        assert result[name][~mask].eq(0).all(), name
    assert_close(result, the_loop(case), case)


def test_dropped_assignments_are_computed_by_no_expert(kernel_device: str) -> None:
    """Expert 2 is NaN and all of its assignments are dropped: the output is that of the others."""
    case = make_case(kernel_device, 30)
    dropped = case.routing.selected == 2
    combine = case.routing.weights.detach().masked_fill(dropped, 0.0).requires_grad_()
    case = case._replace(routing=replace(case.routing, weights=combine, dropped=dropped))
    expected = the_loop(case)
    with torch.no_grad():
        case.weights.w_in[2] = case.weights.w_out[2] = float("nan")

    result = output_and_gradients(fused_experts, case)

    assert_close(result, expected, case)
    assert result["combine"][dropped].eq(0).all()
    assert result["w_in"][2].eq(0).all()


def test_special_experts_have_no_rows(kernel_device: str) -> None:
    """Experts 3 and 4 of five have no MLP: the kernels know three, and give the others' assignments 0."""
    case = make_case(kernel_device, 20, n_experts=5, top_k=3)
    mlps = case.weights._replace(
        w_in=case.weights.w_in.detach()[:3].requires_grad_(), w_out=case.weights.w_out.detach()[:3].requires_grad_()
    )
    case = Case(case.x, replace(case.routing, n_special=2), mlps)

    result = output_and_gradients(fused_experts, case)

    assert_close(result, the_loop(case), case)
    assert result["combine"][case.routing.selected >= 3].eq(0).all()
    assert result["combine"][case.routing.selected < 3].ne(0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_token_that_is_no_number_stays_none_and_spoils_no_other(activation: str, kernel_device: str) -> None:
    """A bound is no cure: min(NaN, 7) is NaN."""
    case = make_case(kernel_device, activation=activation)
    with torch.no_grad():
        case.x[5] = float("nan")

    y = fused_experts(*case)

    assert y.isnan().all(1).nonzero().flatten().tolist() == [5]
    assert y.isnan().any(1).sum() == 1


# -------------------------------------------------------------------------------------------------- the same bits again


def test_twenty_repeats_are_equal_to_the_bit(kernel_device: str) -> None:
    case = make_case(kernel_device, 18, d_ff=8, n_experts=2)
    first = output_and_gradients(fused_experts, case)

    for _ in range(20):
        again = output_and_gradients(fused_experts, case)
        assert [name for name, value in first.items() if not torch.equal(again[name], value)] == []


def test_a_token_does_not_depend_on_what_else_is_in_the_batch(kernel_device: str) -> None:
    """To the bit, forward and backward, wherever its rows lie in a tile: alone, among some, among all."""
    case = make_case(kernel_device, 45, d_model=40, d_ff=24)
    grad_y = grad_of_output(case)
    among_all = output_and_gradients(fused_experts, case, grad_y)

    for chosen in ([7], [44, 3, 7], list(range(44, 0, -2))):
        combine = case.routing.weights.detach()[chosen].requires_grad_()
        picked = {name: getattr(case.routing, name)[chosen] for name in ("logits", "scores", "selected")}
        part = Case(case.x.detach()[chosen].requires_grad_(), Routing(weights=combine, **picked), case.weights)
        result = output_and_gradients(fused_experts, part, grad_y[chosen])
        for name in ("y", "x", "combine"):
            assert torch.equal(result[name], among_all[name][chosen]), name


# ------------------------------------------------------------------------------------------------- as autograd's guest


def test_any_strides_are_taken(kernel_device: str) -> None:
    """An expanded gradient, as a sum has it; x, weights and matrices that are views."""
    case = make_case(kernel_device, 21)
    contiguous = output_and_gradients(fused_experts, case, torch.ones_like(case.x))
    x = case.x.detach().t().contiguous().t().requires_grad_()
    combine = case.routing.weights.detach().repeat(1, 2)[:, :2].requires_grad_()
    w_in = case.weights.w_in.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    views = Case(x, replace(case.routing, weights=combine), case.weights._replace(w_in=w_in))
    assert not any(tensor.is_contiguous() for tensor in (x, combine, w_in))

    result = output_and_gradients(fused_experts, views, torch.ones((), device=kernel_device).to(x).expand(x.shape))

    assert all(torch.equal(result[name], value) for name, value in contiguous.items())


def test_only_the_input_and_the_hidden_units_are_kept(kernel_device: str) -> None:
    """21 tokens of 8, their 42 rows of 32 hidden units, and small change: no activation, no expert's output."""
    case, kept = make_case(kernel_device), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fused_experts(*case)

    parameters = {case.weights.w_in.data_ptr(), case.weights.w_out.data_ptr()}
    sizes = [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in parameters]
    # x, hidden, the combine weights, and of the sort: assignment of each row, row of each assignment, ends.
    assert sorted(sizes) == sorted([(21, 8), (42, 32), (21, 2), (42,), (42,), (3,)])


def test_a_gradient_that_nobody_has_is_none(kernel_device: str) -> None:
    """What comes after the experts may have no gradient for them."""

    class Dead(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> None:
            return None

    case = make_case(kernel_device)

    (Dead.apply(fused_experts(*case)).sum() + case.x.sum()).backward()

    assert case.weights.w_in.grad is None
    assert case.x.grad.eq(1).all()


def test_frozen_weights_and_no_grad(kernel_device: str) -> None:
    case = make_case(kernel_device)
    expected = output_and_gradients(fused_experts, case)
    frozen = case.weights._replace(w_in=case.weights.w_in.detach(), w_out=case.weights.w_out.detach())

    y = fused_experts(case.x, case.routing, frozen)
    (grad_x,) = torch.autograd.grad(y, case.x, grad_of_output(case))
    with torch.inference_mode():
        inferred = fused_experts(*case)

    assert torch.equal(grad_x, expected["x"])
    assert torch.equal(inferred, expected["y"])
    assert not inferred.requires_grad


def test_autocast_computes_in_bfloat16_and_combines_in_float32(kernel_device: str) -> None:
    """What comes out, and every gradient, has the dtype of what went in; the sum over choices was never rounded."""
    case = make_case(kernel_device, dtype=torch.float32)
    x, w_in, w_out = (leaf.detach().bfloat16() for leaf in (case.x, case.weights.w_in, case.weights.w_out))
    rounded = Case(x, case.routing, case.weights._replace(w_in=w_in, w_out=w_out))

    with torch.autocast(kernel_device, dtype=torch.bfloat16):
        result = output_and_gradients(fused_experts, case)

    for name, value in result.items():
        assert value.dtype == torch.float32, name
    assert torch.equal(result["y"].bfloat16(), fused_experts(*rounded))
    assert not torch.equal(result["y"].bfloat16().float(), result["y"])
    for name, value in the_loop(case).items():
        error = (result[name].double() - value).norm() / value.norm()
        assert 1e-4 < error < 2 * TOLERANCE[torch.bfloat16], name  # what goes in is rounded as well


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant: bool, kernel_device: str) -> None:
    case = make_case(kernel_device)
    expected = output_and_gradients(fused_experts, case)

    def experts(x: Tensor, combine: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        weights = case.weights._replace(w_in=w_in, w_out=w_out)
        return fused_experts(x, replace(case.routing, weights=combine), weights)

    leaves = (case.x, case.routing.weights, case.weights.w_in, case.weights.w_out)
    y = checkpoint(experts, *leaves, use_reentrant=reentrant)
    y.backward(grad_of_output(case))

    assert torch.equal(y, expected["y"])
    for leaf, name in zip(leaves, ("x", "combine", "w_in", "w_out"), strict=True):
        assert torch.equal(leaf.grad, expected[name]), name


# -------------------------------------------------------------------------------------------------------- torch.compile


def test_both_operators_are_what_torch_expects_of_one(kernel_device: str) -> None:
    """Schema, fake kernels, autograd and tracing with symbolic sizes."""
    case = make_case(kernel_device, 9, 8, 8)
    order = sort_assignments(case.routing.selected, None, 3)
    w_in, w_out = case.weights.w_in, case.weights.w_out
    combine = case.routing.weights

    library.opcheck(torch.ops.moe.fused_experts.default, (case.x, combine, w_in, w_out, *order, "swiglu", case.x.dtype))
    with torch.no_grad():
        hidden = torch.randn(18, 16, device=kernel_device).to(case.x.dtype)
        tensors = [tensor.detach() for tensor in (grad_of_output(case), case.x, hidden, combine, w_in, w_out)]
        library.opcheck(torch.ops.moe.fused_experts_backward.default, (*tensors, *order, "swiglu"))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_torch_compile_takes_them_whole_for_any_number_of_tokens(kernel_device: str, fresh_compiler: None) -> None:
    compiled = torch.compile(fused_experts, fullgraph=True, backend="aot_eager", dynamic=True)

    for n_tokens, only in ((21, None), (34, [0, 2]), (18, [1, 2])):
        case = make_case(kernel_device, n_tokens, only=only, seed=n_tokens)
        result = output_and_gradients(compiled, case)
        expected = output_and_gradients(fused_experts, case)
        assert all(torch.equal(result[name], value) for name, value in expected.items())

    assert counters["stats"]["unique_graphs"] == 1


# ------------------------------------------------------------------------------------------- the choice among back-ends


def fake_case(
    d_model: int = 16, d_ff: int = 8, dtype: torch.dtype = torch.bfloat16, bias: bool = False
) -> tuple[Tensor, ExpertWeights]:
    """Input and weights that are said to be on a GPU."""
    with FakeTensorMode():
        x, w_in, w_out, b_in, b_out = (
            torch.empty(shape, device="cuda", dtype=dtype)
            for shape in ((4, d_model), (2, 2 * d_ff, d_model), (2, d_model, d_ff), (2, 2 * d_ff), (2, d_model))
        )
        return x, ExpertWeights(w_in, w_out, b_in if bias else None, b_out if bias else None, "swiglu")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dtype": torch.float32}, "the fused kernels compute in bfloat16 or float16, not torch.float32"),
        ({"bias": True}, "the fused kernels have no biases"),
        ({"d_model": 20}, "the fused kernels need rows of whole 16 bytes, and d_model = 20 is no multiple of 8"),
        ({"d_ff": 4}, "the fused kernels need rows of whole 16 bytes, and d_ff = 4 is no multiple of 8"),
        ({}, None),
        ({"dtype": torch.float16}, None),
    ],
)
def test_what_the_kernels_cannot_do_is_said(
    settings: dict, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_no_triton", lambda: None)

    assert fused.unsupported(*fake_case(**settings)) == reason


def test_under_autocast_its_dtype_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_no_triton", lambda: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)

    assert fused.unsupported(*fake_case(dtype=torch.float32)) is None


def test_an_old_gpu_another_maker_and_no_triton_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = fused._why_no_triton.__wrapped__
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert reason() is None

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert reason() == "the fused kernels need a GPU of compute capability 8.0 or more"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert reason() == "the fused kernels were written for NVIDIA GPUs"
    monkeypatch.setitem(sys.modules, "triton.tools.tensor_descriptor", None)
    assert reason() == "Triton is not installed, or older than 3.4"


def test_on_a_cpu_the_loop_computes_and_says_why() -> None:
    experts = Experts(ExpertsConfig(n_experts=3, d_ff=16, backend="fused"), FeedForwardConfig(), 8)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    x, routing, _ = make_case("cpu")

    with pytest.warns(UserWarning) as warned:
        y = experts(x, routing)

    assert [str(warning.message) for warning in warned] == [
        "experts fall back from fused to the reference loop: the fused kernels are for NVIDIA GPUs, and the input is "
        "on cpu"
    ]
    assert torch.equal(y, reference_experts(x, routing, experts.weights))


def test_biases_are_refused_and_not_forgotten() -> None:
    case = make_case("cpu")

    with pytest.raises(ValueError, match="the fused kernels have no biases"):
        fused_experts(case.x, case.routing, case.weights._replace(b_in=torch.zeros(3, 32), b_out=torch.zeros(3, 8)))


def test_torch_compile_asks_for_triton_without_a_warning(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    """It warns of functions that are cached, and breaks the graph where it cannot look inside."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    fused._why_no_triton.cache_clear()

    def one_if_usable(x: Tensor) -> Tensor:
        return torch.ones_like(x) if fused._no_triton() is None else x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.compile(one_if_usable, fullgraph=True, backend="aot_eager")(torch.zeros(2)).tolist() == [1, 1]
    fused._why_no_triton.cache_clear()
