"""The three expert back-ends: the loop against experts written out token by token, the fast ones against the loop."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters

from moe.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, ModelConfig
from moe.model.experts import Experts, ExpertWeights, grouped_experts, reference_experts, segment_experts
from moe.model.experts.grouped import sort_by_expert
from moe.model.experts.segments import ROWS, lay_out, lay_out_in_torch, most_rows
from moe.model.feed_forward import input_width
from moe.model.rotation import rotation_of
from moe.model.routing import Routing
from moe.model.transformer import Batch, Block

Backend = Callable[[Tensor, Routing, ExpertWeights], Tensor]

BACKENDS = {"reference": reference_experts, "grouped": grouped_experts, "segments": segment_experts}
CASES = ["normal", "one_empty", "all_to_one", "one_token"]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-6, torch.bfloat16: 4e-2}
N_EXPERTS, TOP_K = 4, 2


def make_routing(case: str, padded: bool = False, dtype: torch.dtype = torch.float32) -> Routing:
    """A decision by hand, its weights a leaf that collects a gradient."""
    generator = torch.Generator().manual_seed(5)
    n_tokens = {"one_token": 1, "zero_tokens": 0}.get(case, 45)
    experts = torch.tensor({"one_empty": [0, 1, 3], "all_to_one": [2]}.get(case, [0, 1, 2, 3]))
    ranks = torch.rand(n_tokens, len(experts), generator=generator)
    selected = experts[ranks.argsort(1)[:, :TOP_K]]
    weights = torch.rand(selected.shape, generator=generator, dtype=torch.float64).to(dtype)
    mask = None
    if padded:
        mask = torch.rand(n_tokens, generator=generator) < 0.6
        weights = weights.masked_fill(~mask[:, None], 0.0)
    uniform = torch.full((n_tokens, N_EXPERTS), 1 / N_EXPERTS, dtype=dtype)
    return Routing(uniform.log(), uniform, selected, weights.requires_grad_(), mask)


def make_weights(
    activation: str, bias: bool, dtype: torch.dtype, d_model: int = 16, d_ff: int = 24, n_experts: int = N_EXPERTS
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(6)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(n_experts, *shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
        return drawn.to(dtype).requires_grad_()

    width_in = input_width(activation, d_ff)
    biases = (draw(width_in), draw(d_model)) if bias else (None, None)
    return ExpertWeights(draw(width_in, d_model), draw(d_model, d_ff), *biases, activation)


def make_input(n_tokens: int, d_model: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(n_tokens, d_model, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def output_and_gradients(
    backend: Backend, x: Tensor, routing: Routing, weights: ExpertWeights, plain_sum: bool = False
) -> dict[str, Tensor]:
    """The output of a back-end and the gradient of everything that has one, for a fixed gradient of the output."""
    y = backend(x, routing, weights)
    leaves = {"x": x, "combine": routing.weights}
    leaves |= {name: value for name, value in weights._asdict().items() if isinstance(value, Tensor)}
    seen = torch.randn(y.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64).to(y.dtype)
    gradients = torch.autograd.grad(y.sum() if plain_sum else (y * seen).sum(), list(leaves.values()))
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal up to ``tolerance`` of the norm, one tensor at a time (at the kink of relu, single elements may differ)."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape), name
        difference, size = (actual[name].double() - value.double()).norm().item(), value.double().norm().item()
        assert difference <= tolerance * size, name


# ---------------------------------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_reference_is_the_sum_of_expert_outputs_written_out(activation: str, bias: bool) -> None:
    """y_t = Σ_k weight_tk · expert(x_t), one token and one choice at a time."""
    weights = make_weights(activation, bias, torch.float64)
    routing = make_routing("normal", padded=True, dtype=torch.float64)
    x = make_input(routing.n_tokens, 16, torch.float64)

    expected = torch.zeros_like(x)
    for token in range(routing.n_tokens):
        for choice in range(TOP_K):
            expert = int(routing.selected[token, choice])
            hidden = weights.w_in[expert] @ x[token] + (weights.b_in[expert] if bias else 0)
            if activation == "swiglu":
                inner = hidden[:24] * torch.sigmoid(hidden[:24]) * hidden[24:]
            elif activation == "gelu":
                inner = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
            else:
                inner = hidden.clamp(min=0)
            output = weights.w_out[expert] @ inner + (weights.b_out[expert] if bias else 0)
            expected[token] = expected[token] + routing.weights[token, choice] * output

    torch.testing.assert_close(reference_experts(x, routing, weights), expected)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("grouped", torch.float32),
        ("grouped", torch.bfloat16),
        ("segments", torch.float64),
        ("segments", torch.float32),
        ("segments", torch.bfloat16),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_fast_back_ends_compute_the_loop(
    backend: str, dtype: torch.dtype, activation: str, bias: bool, case: str, padded: bool
) -> None:
    weights = make_weights(activation, bias, dtype)
    routing = make_routing(case, padded, torch.float64 if dtype == torch.float64 else torch.float32)
    x = make_input(routing.n_tokens, 16, dtype)

    expected = output_and_gradients(reference_experts, x, routing, weights)

    assert_same(output_and_gradients(BACKENDS[backend], x, routing, weights), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d_model", "d_ff"), [(5, 7), (20, 3), (1, 1)])
def test_segments_take_any_shape(dtype: torch.dtype, d_model: int, d_ff: int) -> None:
    weights = make_weights("swiglu", True, dtype, d_model, d_ff)
    routing = make_routing("normal", True, torch.float64 if dtype == torch.float64 else torch.float32)
    x = make_input(routing.n_tokens, d_model, dtype)

    expected = output_and_gradients(reference_experts, x, routing, weights)

    assert_same(output_and_gradients(segment_experts, x, routing, weights), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["reference", "grouped", "segments"])
@pytest.mark.parametrize("bias", [False, True])
def test_no_tokens_at_all(backend: str, bias: bool) -> None:
    """An empty output, and gradients of zero for every weight."""
    weights, routing = make_weights("swiglu", bias, torch.float32), make_routing("zero_tokens")

    result = output_and_gradients(BACKENDS[backend], make_input(0, 16, torch.float32), routing, weights)

    assert result["y"].shape == result["x"].shape == (0, 16)
    assert result["combine"].shape == (0, TOP_K)
    for name in ("w_in", "w_out", "b_in", "b_out")[: 4 if bias else 2]:
        assert result[name].shape == getattr(weights, name).shape
        assert result[name].eq(0).all()


def test_segments_gradient_agrees_with_finite_differences() -> None:
    weights = make_weights("swiglu", True, torch.float64, d_model=3, d_ff=2)
    routing = make_routing("one_empty", True, torch.float64)
    first = {name: getattr(routing, name)[:5] for name in ("logits", "scores", "selected", "weights", "mask")}
    routing = Routing(**first)
    x = make_input(5, 3, torch.float64)

    def of(x: Tensor, combine: Tensor, *parameters: Tensor) -> Tensor:
        return segment_experts(x, replace(routing, weights=combine), ExpertWeights(*parameters, "swiglu"))

    assert torch.autograd.gradcheck(of, (x, routing.weights.detach().requires_grad_(), *weights[:4]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plain_sum_can_be_differentiated(backend: str) -> None:
    """``sum().backward()`` sends an expanded gradient, which the backward of grouped_mm refuses."""
    weights, routing = make_weights("relu", False, torch.float32), make_routing("normal")
    x = make_input(45, 16, torch.float32)

    result = output_and_gradients(BACKENDS[backend], x, routing, weights, plain_sum=True)

    assert_same(result, output_and_gradients(reference_experts, x, routing, weights, plain_sum=True), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_padding_is_read(backend: str) -> None:
    """Padding of NaN: the output there is exactly 0, and no gradient has heard of it."""
    weights, routing = make_weights("swiglu", True, torch.float32), make_routing("normal", padded=True)
    clean = make_input(45, 16, torch.float32)
    dirty = clean.detach().masked_fill(~routing.mask[:, None], float("nan")).requires_grad_()

    result = output_and_gradients(BACKENDS[backend], dirty, routing, weights)

    assert result["y"][~routing.mask].eq(0).all()
    assert result["x"][~routing.mask].eq(0).all()
    assert_same(result, output_and_gradients(BACKENDS[backend], clean, routing, weights), 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_assignments_are_computed_by_no_expert(backend: str) -> None:
    """Expert 3 is NaN and all of its assignments are dropped: the others are as if it had weight zero."""
    weights, routing = make_weights("gelu", True, torch.float32), make_routing("normal")
    dropped = routing.selected == 3
    combine = routing.weights.detach().masked_fill(dropped, 0.0).requires_grad_()
    with_dropped = replace(routing, weights=combine, dropped=dropped)
    broken = ExpertWeights(*(t.detach().clone().requires_grad_() for t in weights[:4]), "gelu")
    with torch.no_grad():
        for parameter in broken[:4]:
            parameter[3] = float("nan")
    x = make_input(45, 16, torch.float32)

    result = output_and_gradients(BACKENDS[backend], x, with_dropped, broken)
    expected = output_and_gradients(reference_experts, x, replace(routing, weights=combine), weights)

    assert result["combine"][dropped].eq(0).all()
    expected["combine"] = expected["combine"].masked_fill(dropped, 0.0)
    assert_same(result, expected, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_whose_assignments_are_all_dropped_is_exactly_zero(backend: str) -> None:
    weights, routing = make_weights("swiglu", True, torch.float32), make_routing("normal")
    nothing = replace(routing, dropped=torch.ones_like(routing.selected, dtype=torch.bool))
    x = make_input(45, 16, torch.float32)

    result = output_and_gradients(BACKENDS[backend], x, nothing, weights)

    assert all(value.eq(0).all() for value in result.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_bias_is_weighted_like_the_rest(backend: str) -> None:
    """Zero matrices and bias b: the output is b times the sum of the token's weights."""
    weights, routing = make_weights("swiglu", True, torch.float32), make_routing("normal")
    bias = torch.arange(16.0).expand(N_EXPERTS, 16)
    only_bias = ExpertWeights(0 * weights.w_in, 0 * weights.w_out, 0 * weights.b_in, bias, "swiglu")

    y = BACKENDS[backend](make_input(45, 16, torch.float32), routing, only_bias)

    torch.testing.assert_close(y, routing.weights.sum(1, keepdim=True) * torch.arange(16.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_without_tokens_has_a_gradient_of_zero_and_not_none(backend: str) -> None:
    """None would leave it out of one rank's reduction and not out of another's."""
    weights, routing = make_weights("swiglu", True, torch.float32), make_routing("one_empty")

    result = output_and_gradients(BACKENDS[backend], make_input(45, 16, torch.float32), routing, weights)

    for name in ("w_in", "w_out", "b_in", "b_out"):
        assert result[name][2].eq(0).all()
        assert result[name][[0, 1, 3]].abs().flatten(1).sum(1).gt(0).all()


# --------------------------------------------------------------------------------------------- order and repeatability


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_tokens_choices_and_experts_does_not_matter(backend: str) -> None:
    weights, routing = make_weights("swiglu", True, torch.float32), make_routing("normal")
    x = make_input(45, 16, torch.float32)
    run = BACKENDS[backend]
    y = run(x, routing, weights)
    shuffle = torch.randperm(45, generator=torch.Generator().manual_seed(0))

    tokens = replace(routing, selected=routing.selected[shuffle], weights=routing.weights[shuffle])
    torch.testing.assert_close(run(x[shuffle], tokens, weights), y[shuffle])

    choices = replace(routing, selected=routing.selected.flip(1), weights=routing.weights.flip(1))
    torch.testing.assert_close(run(x, choices, weights), y)

    experts = replace(routing, selected=N_EXPERTS - 1 - routing.selected)
    turned = ExpertWeights(*(parameter.flip(0) for parameter in weights[:4]), "swiglu")
    torch.testing.assert_close(run(x, experts, turned), y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_repeats_are_equal_to_the_bit(backend: str, dtype: torch.dtype) -> None:
    weights, routing = make_weights("swiglu", True, dtype), make_routing("normal", padded=True)
    x = make_input(45, 16, dtype)
    first = output_and_gradients(BACKENDS[backend], x, routing, weights)

    for _ in range(20):
        again = output_and_gradients(BACKENDS[backend], x, routing, weights)
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_adds_the_same_gradient(backend: str) -> None:
    weights, routing = make_weights("swiglu", True, torch.float32), make_routing("normal", padded=True)
    y = BACKENDS[backend](make_input(45, 16, torch.float32), routing, weights)

    y.square().sum().backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in weights[:4]]
    y.square().sum().backward()

    assert all(torch.equal(parameter.grad, 2 * grad) for parameter, grad in zip(weights[:4], once, strict=True))


# ----------------------------------------------------------------------------------------------- dispatch and combine


@st.composite
def decisions(draw: st.DrawFn) -> Routing:
    """Any legal selection, with any padding and any drops."""
    n_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, n_experts))
    n_tokens = draw(st.integers(0, 80))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    popular = torch.rand(n_experts, generator=generator) ** draw(st.sampled_from([0.0, 1.0, 8.0]))
    selected = (torch.rand(n_tokens, n_experts, generator=generator) * popular).topk(top_k).indices
    mask = torch.rand(n_tokens, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    dropped = torch.rand(n_tokens, top_k, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    uniform = torch.full((n_tokens, n_experts), 1 / n_experts)
    return Routing(
        uniform.log(),
        uniform,
        selected,
        torch.ones(n_tokens, top_k),
        mask if draw(st.booleans()) else None,
        dropped if draw(st.booleans()) else None,
    )


def assignments(routing: Routing) -> Iterator[tuple[int, int, int, bool]]:
    """Every (token, choice, expert, whether it is carried out), in plain Python."""
    for token, experts in enumerate(routing.selected.tolist()):
        for choice, expert in enumerate(experts):
            padding = routing.mask is not None and not routing.mask[token]
            dropped = routing.dropped is not None and bool(routing.dropped[token, choice])
            yield token, choice, expert, not padding and not dropped


@settings(max_examples=60, deadline=None, derandomize=True)
@given(decisions())
def test_sorting_gives_every_assignment_one_row_among_those_of_its_expert(routing: Routing) -> None:
    order, ends, expert_of_row, computed = sort_by_expert(routing)

    row_of = {assignment: row for row, assignment in enumerate(order.tolist())}
    starts = [0, *ends.tolist()[:-1]]
    assert sorted(row_of) == list(range(routing.n_tokens * routing.top_k))
    assert ends.dtype == torch.int32
    for token, choice, expert, carried_out in assignments(routing):
        row = row_of[token * routing.top_k + choice]
        assert (starts[expert] <= row < ends[expert]) == carried_out
        assert carried_out == (row < int(ends[-1]))
        assert carried_out == (computed is None or bool(computed[row]))
        assert not carried_out or int(expert_of_row[row]) == expert
    assert torch.equal(torch.diff(ends, prepend=ends.new_zeros(1)).sum(), torch.tensor(carried_out_count(routing)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(decisions())
def test_segments_give_every_assignment_one_row_among_those_of_its_expert(routing: Routing) -> None:
    segments = lay_out(routing.selected, routing.executed, routing.n_mlps)
    n_rows = segments.spans[-1][1]

    assert [start for start, _ in segments.spans] == [0, *(end for _, end in segments.spans[:-1])]
    assert all((end - start) % ROWS == 0 for start, end in segments.spans)
    taken = set()
    for token, choice, expert, carried_out in assignments(routing):
        row = int(segments.row_of_assignment[token, choice])
        if carried_out:
            start, end = segments.spans[expert]
            assert start <= row < end
            assert int(segments.token_of_row[row]) == token
            assert row not in taken
            taken.add(row)
        else:
            assert row == n_rows
    between = [row for row in range(n_rows) if row not in taken]
    assert segments.token_of_row[between].eq(routing.n_tokens).all()
    for n_rows in (None, most_rows(routing.selected.numel(), routing.n_mlps)):
        decided = routing.selected, routing.executed, routing.n_mlps, n_rows
        one, other = lay_out(*decided), lay_out_in_torch(*decided)
        assert one.spans == other.spans
        assert torch.equal(one.token_of_row, other.token_of_row)
        assert torch.equal(one.row_of_assignment, other.row_of_assignment)


def carried_out_count(routing: Routing) -> int:
    return sum(carried_out for *_, carried_out in assignments(routing))


# ------------------------------------------------------------------------------------------- the choice among back-ends


def make_experts(backend: str, d_model: int = 16, d_ff: int = 24) -> Experts:
    experts = Experts(ExpertsConfig(n_experts=4, d_ff=d_ff, backend=backend), FeedForwardConfig(bias=True), d_model)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return experts


@pytest.mark.parametrize(
    ("d_model", "d_ff", "dtype", "reason"),
    [
        (20, 24, torch.bfloat16, "d_model = 20 in torch.bfloat16 is 40"),
        (16, 20, torch.bfloat16, "d_ff = 20 in torch.bfloat16 is 40"),
        (6, 24, torch.float32, "d_model = 6 in torch.float32 is 24"),
        (16, 24, torch.float64, "no torch.float64"),
    ],
)
def test_grouped_says_why_it_falls_back(d_model: int, d_ff: int, dtype: torch.dtype, reason: str) -> None:
    experts = make_experts("grouped", d_model, d_ff).to(dtype)
    routing = make_routing("normal", dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x = make_input(45, d_model, dtype)

    with pytest.warns(UserWarning, match=f"fall back from grouped to the reference loop: .*{reason}"):
        y = experts(x, routing)

    experts.backend = "reference"
    assert torch.equal(y, experts(x, routing))


@pytest.mark.parametrize(("d_model", "dtype"), [(8, torch.bfloat16), (4, torch.float32)])
def test_rows_of_exactly_sixteen_bytes_are_enough(d_model: int, dtype: torch.dtype) -> None:
    experts = make_experts("grouped", d_model, d_model).to(dtype)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experts(make_input(45, d_model, dtype), make_routing("normal"))


def test_auto_on_a_cpu_is_segments() -> None:
    experts, routing = make_experts("auto"), make_routing("normal")
    x = make_input(45, 16, torch.float32)

    automatic = experts(x, routing)
    experts.backend = "segments"

    assert torch.equal(automatic, experts(x, routing))
    assert type(automatic.grad_fn).__name__ == "_SegmentExpertsBackward"


def test_auto_takes_what_was_measured_where_it_fits() -> None:
    experts, routing = make_experts("auto"), make_routing("normal")
    experts.on_cpu = "grouped"

    assert type(experts(make_input(45, 16, torch.float32), routing).grad_fn).__name__ != "_SegmentExpertsBackward"
    y = experts.double()(make_input(45, 16, torch.float64), make_routing("normal", dtype=torch.float64))
    assert type(y.grad_fn).__name__ == "_SegmentExpertsBackward"


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_bfloat16_and_returns_what_came_in(backend: str) -> None:
    experts, routing = make_experts(backend), make_routing("normal", padded=True)
    x = make_input(45, 16, torch.float32)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts(x, routing)
    y.square().sum().backward()
    exact = make_experts("reference")
    expected = exact(x, routing)
    expected.square().sum().backward()

    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0, atol=0.02 * expected.abs().max().item())
    assert not torch.allclose(y, expected, rtol=0, atol=1e-6)
    for parameter, other in zip(experts.parameters(), exact.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=0.02 * other.grad.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_combine_is_float32_under_autocast(backend: str) -> None:
    """Experts that put out their bias, whole numbers, which bfloat16 holds: what is left is the weighted sum."""
    experts, routing = make_experts(backend), make_routing("normal")
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.zero_()
        experts.b_out.copy_(torch.arange(16.0).expand(N_EXPERTS, 16))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts(make_input(45, 16, torch.float32), routing)

    expected = routing.weights.sum(1, keepdim=True) * torch.arange(16.0)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)


# -------------------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("dtype", "most_graphs"),
    [(torch.bfloat16, 1), (torch.float32, 8)],
    ids=["bfloat16-one-graph", "float32-falls-back-to-the-loop"],
)
def test_a_compiled_block_equals_the_eager_one_and_is_not_compiled_again(
    dtype: torch.dtype, most_graphs: int, fresh_compiler: None
) -> None:
    """Four routings, one with an empty expert. The loop of float32 breaks the graph, but a bounded number of times."""
    config = ModelConfig(
        d_model=32,
        attention=AttentionConfig(n_heads=4, head_dim=8),
        experts=ExpertsConfig(n_experts=4, d_ff=16, backend="grouped"),
    )
    block = Block(config, layer=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in block.named_parameters():
        if not name.endswith("norm.weight"):
            nn.init.normal_(parameter, std=0.2, generator=generator)
    block = block.to(dtype)
    positions = torch.arange(16)[None]
    rotation = rotation_of(positions, config)
    compiled = torch.compile(block, backend="aot_eager")

    graphs, loads = [], []
    for trial in range(4):
        x = torch.randn(2, 16, 32, generator=generator)
        if trial == 3:  # equal tokens have equal experts: the others are left empty
            x = x[:1, :1].repeat(2, 16, 1)
        x = x.to(dtype).requires_grad_()
        batch = Batch(torch.zeros(x.shape[:2], dtype=torch.int64), None, positions, rotation, None, None)
        y, routing = compiled(x, batch)
        (grad,) = torch.autograd.grad(y.float().square().sum(), x)
        expected, _ = block(x, batch)
        (expected_grad,) = torch.autograd.grad(expected.float().square().sum(), x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(grad, expected_grad)
        loads.append(tuple(routing.counts().tolist()))
        graphs.append(counters["stats"]["unique_graphs"])

    assert len(set(loads)) == 4
    assert sorted(loads[3]) == [0, 0, 32, 32]
    assert 0 < graphs[0] <= graphs[-1] <= most_graphs
