"""The grouped and the fused back-end on a GPU: against the loop, repeatable to the bit, compiled, and in CUDA graphs.

test_experts_fused.py has more of the fused one, on a GPU too, with few tokens; here are the shapes and the tilings that
a GPU is given in earnest.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, ModelConfig, RouterConfig
from moe.model.experts import Experts, ExpertWeights, choose_backend, fused_experts, grouped_experts, reference_experts
from moe.model.feed_forward import activate, input_width
from moe.model.routing import Routing
from moe.model.transformer import Transformer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

N_EXPERTS, TOP_K, D_MODEL, D_FF = 8, 2, 128, 96
Backend = Callable[[Tensor, Routing, ExpertWeights], Tensor]


def make_routing(
    case: str, n_tokens: int = 500, n_experts: int = N_EXPERTS, top_k: int = TOP_K, seed: int = 0
) -> Routing:
    """A decision by hand; a third of the tokens is padding."""
    generator = torch.Generator().manual_seed(seed)
    only = {"one_empty": [0, 1, 2, 3, 4, 6, 7], "two_used": [2, 5]}.get(case, list(range(n_experts)))
    popular = 1 / torch.arange(1, len(only) + 1) if case == "skewed" else torch.ones(len(only))
    ranks = torch.rand(n_tokens, len(only), generator=generator).log() / popular
    selected = torch.tensor(only)[ranks.argsort(1, descending=True)[:, :top_k]].cuda()
    mask = (torch.rand(n_tokens, generator=generator) < 2 / 3).cuda()
    weights = torch.rand(n_tokens, top_k, generator=generator).cuda().masked_fill(~mask[:, None], 0.0)
    uniform = torch.full((n_tokens, n_experts), 1 / n_experts, device="cuda")
    return Routing(uniform.log(), uniform, selected, weights.requires_grad_(), mask)


def make_leaves(
    activation: str,
    bias: bool,
    dtype: torch.dtype,
    n_tokens: int = 500,
    d_model: int = D_MODEL,
    d_ff: int = D_FF,
    n_experts: int = N_EXPERTS,
) -> tuple[Tensor, ExpertWeights]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return drawn.to("cuda", dtype).requires_grad_()

    width_in = input_width(activation, d_ff)
    biases = (draw(n_experts, width_in), draw(n_experts, d_model)) if bias else (None, None)
    weights = ExpertWeights(draw(n_experts, width_in, d_model), draw(n_experts, d_model, d_ff), *biases, activation)
    return draw(n_tokens, d_model), weights


def output_and_gradients(backend: Backend, x: Tensor, routing: Routing, weights: ExpertWeights) -> dict[str, Tensor]:
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
    if activation == "relu" and n_tokens == 1 and dtype == torch.bfloat16:
        tolerance = 0.25  # one hidden unit of some ninety that rounding takes across the kink is a tenth of the norm

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


@pytest.mark.parametrize("backend", ["grouped", "fused"])
def test_compiled_experts_equal_eager_ones_for_every_routing(backend: str) -> None:
    experts = Experts(ExpertsConfig(n_experts=N_EXPERTS, d_ff=D_FF, backend=backend), FeedForwardConfig(), D_MODEL)
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


# ---------------------------------------------------------------------------------------------------- the fused kernels


FUSED_SHAPES = {
    "two-kernels": (700, 328, 200, 8, 2),
    "hopper": (700, 192, 512, 8, 2),
    "narrow": (700, 64, 256, 64, 8),
    "one-token": (1, 128, 256, 8, 2),
}
"""T, D, F, E, K. Hopper GPUs have a kernel of their own for SwiGLU where D is a multiple of 64 and F of 256."""
FUSED_TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


def make_fused(
    shape: str, case: str = "normal", activation: str = "swiglu", dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Routing, ExpertWeights]:
    n_tokens, d_model, d_ff, n_experts, top_k = FUSED_SHAPES[shape]
    routing = make_routing(case, n_tokens, n_experts, top_k)
    if n_tokens == 1:
        routing = replace(routing, mask=None, weights=torch.rand(1, top_k, device="cuda").requires_grad_())
    x, weights = make_leaves(activation, False, dtype, n_tokens, d_model, d_ff, n_experts)
    # Hidden units of about 1.
    return (d_model**0.5 * x).detach().requires_grad_(), routing, weights


def assert_is_the_loop(
    result: dict[str, Tensor], x: Tensor, routing: Routing, weights: ExpertWeights, dtype: torch.dtype
) -> None:
    """Equal to the loop in float64 up to rounding, relative to the norm of each tensor.

    The gradient of a combine weight, ⟨dA', A⟩, is a sum whose terms cancel, and rounding is relative to them. Of many
    tokens the norms of both are alike; but of the one token here the gradients are -1.9 and -0.8, and the roots of the
    sums of squares 5.7 and 5.4: rounding dA' and the pre-activation to bfloat16, and nothing else, is 1.5 % of the
    former and 0.4 % of the latter.
    """
    wide_x, wide_combine, w_in, w_out = (
        leaf.detach().double().requires_grad_() for leaf in (x, routing.weights, weights.w_in, weights.w_out)
    )
    wide = weights._replace(w_in=w_in, w_out=w_out)
    expected = output_and_gradients(reference_experts, wide_x, replace(routing, weights=wide_combine), wide)
    for name, value in expected.items():
        size = norm_of_terms(wide_x, routing, wide) if name == "combine" else value.norm()
        error = ((result[name].double() - value).norm() / size).item()
        assert error <= FUSED_TOLERANCE[dtype], f"{name}: {error:.1e}"


def norm_of_terms(x: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Of dA'_f A_f, over all hidden units f of all assignments that are computed."""
    seen = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)
    executed = torch.ones_like(routing.selected, dtype=torch.bool) if routing.executed is None else routing.executed
    squares = x.new_zeros(())
    for expert, (w_in, w_out) in enumerate(zip(weights.w_in, weights.w_out, strict=True)):
        token, _ = (executed & (routing.selected == expert)).nonzero(as_tuple=True)
        terms = (seen[token] @ w_out) * activate(x[token] @ w_in.T, weights.activation)
        squares = squares + terms.square().sum()
    return squares.sqrt()


@pytest.fixture
def undefined_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN: whoever reads what was never written is found out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("shape", "case", "activation", "dtype"),
    [
        *((shape, "normal", "swiglu", torch.bfloat16) for shape in FUSED_SHAPES),
        *(("two-kernels", "normal", activation, torch.bfloat16) for activation in ("swiglu_clamped", "gelu", "relu")),
        *(("hopper", case, "swiglu", torch.bfloat16) for case in ("one_empty", "two_used", "skewed")),
        *((shape, "normal", "swiglu", torch.float16) for shape in ("two-kernels", "hopper")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_fused_computes_the_loop(
    shape: str, case: str, activation: str, dtype: torch.dtype, undefined_memory_is_nan: None
) -> None:
    x, routing, weights = make_fused(shape, case, activation, dtype)
    assert torch.empty(1, device="cuda").isnan()

    result = output_and_gradients(fused_experts, x, routing, weights)

    assert_is_the_loop(result, x, routing, weights, dtype)
    if routing.mask is not None:
        for name in ("y", "x", "combine"):
            assert result[name][~routing.mask].eq(0).all(), name


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("shape", ["two-kernels", "hopper"])
def test_fused_reads_nothing_of_padding(shape: str, undefined_memory_is_nan: None) -> None:
    x, routing, weights = make_fused(shape)
    dirty = x.detach().masked_fill(~routing.mask[:, None], float("nan")).requires_grad_()

    result = output_and_gradients(fused_experts, dirty, routing, weights)

    assert_is_the_loop(result, x, routing, weights, torch.bfloat16)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_no_tiling_changes_a_bit(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen by time may differ from run to run: the result must not."""
    from moe.model.experts.fused import tiles

    leaves, candidates, results = make_fused("two-kernels", activation=activation), tiles.candidates, []
    for index in range(4):

        def one(product: tiles.Product, device: torch.device, index: int = index) -> list[tiles.Tiles]:
            every = candidates(product, device)
            return [every[min(index, len(every) - 1)]]

        monkeypatch.setattr(tiles, "_chosen", {})
        monkeypatch.setattr(tiles, "candidates", one)
        try:
            results.append(output_and_gradients(fused_experts, *leaves))
        except RuntimeError as error:
            assert "no tiling" in str(error)  # does not fit this GPU

    assert len(results) >= 2
    for result in results[1:]:
        assert [name for name, value in results[0].items() if not torch.equal(result[name], value)] == []


@pytest.mark.parametrize("shape", ["two-kernels", "hopper", "narrow"])
def test_twenty_repeats_of_fused_are_equal_to_the_bit(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough tokens that every multiprocessor has several tiles."""
    monkeypatch.setitem(FUSED_SHAPES, shape, (20_000, *FUSED_SHAPES[shape][1:]))
    leaves = make_fused(shape, "skewed")
    first = output_and_gradients(fused_experts, *leaves)

    for _ in range(20):
        again = output_and_gradients(fused_experts, *leaves)
        assert [name for name, value in first.items() if not torch.equal(again[name], value)] == []


@pytest.mark.parametrize("shape", ["two-kernels", "hopper"])
def test_a_fused_token_does_not_depend_on_what_else_is_in_the_batch(shape: str) -> None:
    x, routing, weights = make_fused(shape)
    routing = replace(routing, mask=None)
    grad_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)

    def rows(chosen: Tensor) -> list[Tensor]:
        part = x.detach()[chosen].requires_grad_()
        combine = routing.weights.detach()[chosen].requires_grad_()
        picked = {name: getattr(routing, name)[chosen] for name in ("logits", "scores", "selected")}
        y = fused_experts(part, Routing(weights=combine, **picked), weights)
        return [y.detach(), *torch.autograd.grad(y, (part, combine), grad_y[chosen])]

    among_all = rows(torch.arange(700, device="cuda"))
    for chosen in (torch.tensor([333]), torch.arange(699, 0, -5)):
        alone = rows(chosen.cuda())
        assert all(torch.equal(one, value[chosen.cuda()]) for one, value in zip(alone, among_all, strict=True))


def test_rows_beyond_the_reach_of_32_bits() -> None:
    """280,000 rows of 8192 are more than 2^31 elements: the last tokens are as they are alone."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    n_tokens, last = 140_000, slice(-64, None)
    _, weights = make_leaves("swiglu", False, torch.bfloat16, 1, 8192, 256, 2)
    generator = torch.Generator("cuda").manual_seed(0)
    x, grad_y = (
        torch.randn(n_tokens, 8192, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(2)
    )
    combine = torch.rand(n_tokens, 2, device="cuda", generator=generator)
    uniform = torch.full((n_tokens, 2), 0.5, device="cuda")
    selected = torch.tensor([0, 1], device="cuda").expand(n_tokens, 2)

    def rows(part: slice) -> list[Tensor]:
        leaves = x[part].requires_grad_(), combine[part].requires_grad_()
        y = fused_experts(leaves[0], Routing(uniform[part], uniform[part], selected[part], leaves[1]), weights)
        return [tensor[last].clone() for tensor in (y.detach(), *torch.autograd.grad(y, leaves, grad_y[part]))]

    among_all, alone = rows(slice(None)), rows(last)

    assert all(torch.equal(one, other) for one, other in zip(among_all, alone, strict=True))


@pytest.mark.parametrize("shape", ["two-kernels", "hopper"])
def test_a_cuda_graph_computes_what_it_is_given_later(shape: str) -> None:
    """Other tokens and another routing, with other loads, in the same memory."""
    x, routing, weights = make_fused(shape)
    later_x, later = torch.randn_like(x), make_routing("two_used", 700, seed=1)
    routing = replace(routing, mask=routing.mask.clone())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        output_and_gradients(fused_experts, x, routing, weights)
    torch.cuda.current_stream().wait_stream(side)
    seen = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)
    leaves = [x, routing.weights, weights.w_in, weights.w_out]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused_experts(x, routing, weights)
        captured = [y, *torch.autograd.grad(y, leaves, seen)]

    with torch.no_grad():
        for ours, theirs in ((x, later_x), (routing.selected, later.selected), (routing.weights, later.weights)):
            ours.copy_(theirs)
        routing.mask.copy_(later.mask)
    graph.replay()

    y = fused_experts(x, routing, weights)
    expected = [y, *torch.autograd.grad(y, leaves, seen)]
    assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))


def test_fused_does_not_wait_for_the_device() -> None:
    """Once its tiles are chosen, which is the only thing that is timed."""
    x, routing, weights = make_fused("hopper")
    seen = torch.ones_like(x)

    def step() -> None:
        torch.autograd.grad(fused_experts(x, routing, weights), (x, routing.weights, weights.w_in, weights.w_out), seen)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("bias", "dtype", "expected"),
    [
        (False, torch.bfloat16, "fused"),
        (False, torch.float16, "fused"),
        (True, torch.bfloat16, "grouped"),
        (False, torch.float32, "grouped"),
    ],
)
def test_auto_takes_the_fused_kernels_where_they_run(
    bias: bool, dtype: torch.dtype, expected: str, recwarn: pytest.WarningsRecorder
) -> None:
    x, weights = make_leaves("gelu", bias, dtype, 5)

    assert choose_backend("auto", x, weights) == expected
    assert len(recwarn) == 0


def test_fused_on_another_stream_is_in_order() -> None:
    x, routing, weights = make_fused("hopper")
    expected = output_and_gradients(fused_experts, x, routing, weights)
    torch.cuda.synchronize()

    with torch.cuda.stream(torch.cuda.Stream()):
        result = output_and_gradients(fused_experts, x, routing, weights)
    torch.cuda.synchronize()

    assert all(torch.equal(result[name], value) for name, value in expected.items())
