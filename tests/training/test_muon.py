"""Muon: what its iteration does to singular values, its steps against a plain reference in float64 and torch's own, and
what is one matrix among stacked and gated ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moe.config import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    ModelConfig,
    MuonConfig,
    OptimizerConfig,
    RouterConfig,
    SharedExpertsConfig,
)
from moe.model.transformer import Transformer
from moe.training import muon
from moe.training.mixed_optimizer import MixedOptimizer
from moe.training.muon import of_one_shape, orthogonalise, scale_of
from moe.training.optimizer import build_optimizer, set_learning_rate

# -------------------------------------------------------------------------------------------------------- the iteration


@given(st.integers(1, 4), st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_singular_vectors_stay_and_singular_values_become_about_one(
    count: int, rows: int, columns: int, seed: int
) -> None:
    """Against the decomposition itself. Values above 0.0015 of the norm end between 0.68 and 1.21."""
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(count, rows, columns, generator=generator, dtype=torch.float64)

    result = orthogonalise(matrices)

    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    inner = left.mT @ result @ right.mT
    after = inner.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inner, torch.diag_embed(after), rtol=0, atol=1e-9)
    large = values > 0.0015 * values.norm(dim=-1, keepdim=True)
    assert after[large].min() > 0.68
    assert after[large].max() < 1.21


def test_one_step_on_a_diagonal_by_hand() -> None:
    """diag(3, 4) has norm 5: 0.6 and 0.8 go through a x + b x³ + c x⁵."""
    expected = [3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5 for x in (0.6, 0.8)]

    result = orthogonalise(torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))[None], 1)

    torch.testing.assert_close(result[0], torch.diag(torch.tensor(expected, dtype=torch.float64)))
    assert expected == pytest.approx([1.19326, 0.97648], abs=1e-5)


def test_a_matrix_does_not_see_its_neighbours_nor_its_own_scale() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(5, 12, 8, dtype=torch.float64)
    scaled = matrices * torch.tensor([1.0, 1e-4, 1e4, 2.0, 1.0], dtype=torch.float64)[:, None, None]

    together = orthogonalise(scaled)

    for matrix, result in zip(matrices, together, strict=True):
        torch.testing.assert_close(result, orthogonalise(matrix[None])[0])


def test_zero_stays_zero() -> None:
    assert not orthogonalise(torch.zeros(2, 3, 4)).any()


def test_bfloat16_is_near() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 48, 32)

    result = orthogonalise(matrices.bfloat16())

    assert result.dtype == torch.bfloat16
    exact = orthogonalise(matrices.double())
    assert (result - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(
    ("scale", "rows", "columns", "expected"),
    [("adamw", 64, 16, 1.6), ("adamw", 16, 64, 1.6), ("spectral", 64, 16, 2.0), ("spectral", 16, 64, 1.0)],
)
def test_scales(scale: str, rows: int, columns: int, expected: float) -> None:
    """0.2 √64 = 1.6; √(64/16) = 2."""
    assert scale_of(scale, rows, columns) == pytest.approx(expected)


def test_adamws_scale_gives_steps_of_rms_0_2() -> None:
    """A matrix [R, C] with all singular values 1 has the norm √min, so its elements a mean square of 1 / max."""
    orthogonal = torch.linalg.qr(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))[0]

    assert float((orthogonal * scale_of("adamw", 64, 16)).square().mean().sqrt()) == pytest.approx(0.2)


# ------------------------------------------------------------------------------------------------------------- the step


def reference_step(weight: Tensor, momentum: Tensor, gradient: Tensor, lr: float, decay: float, scale: str) -> Tensor:
    """One matrix by the book (Jordan et al. 2024): returns the new weight, moves the momentum in place."""
    momentum.mul_(0.95).add_(gradient, alpha=0.05)
    x = 0.95 * momentum + 0.05 * gradient
    x = x / x.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
    rows, columns = weight.shape
    size = 0.2 * math.sqrt(max(rows, columns)) if scale == "adamw" else math.sqrt(max(1, rows / columns))
    return weight - lr * decay * weight - lr * size * x


@pytest.mark.parametrize("scale", ["adamw", "spectral"])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (3, 8, 6), (3, 6, 8)], ids=str)
@pytest.mark.parametrize("halves", [1, 2])
def test_three_steps_are_those_of_each_matrix_on_its_own(scale: str, shape: tuple[int, ...], halves: int) -> None:
    """Two parameters of one shape, which share their products; stacked experts and halves taken apart by hand."""
    generator = torch.Generator().manual_seed(0)

    def random() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def apart(tensor: Tensor) -> list[Tensor]:
        experts = tensor if tensor.dim() == 3 else tensor[None]
        return [half for expert in experts for half in expert.chunk(halves)]

    parameters = [nn.Parameter(random()) for _ in range(2)]
    optimizer = MixedOptimizer(
        [{"params": parameters, "rule": "muon", "lr": 0.1, "weight_decay": 0.3, "step_size": scale, "halves": halves}]
    )
    weights = [[matrix.detach().clone() for matrix in apart(parameter)] for parameter in parameters]
    momenta = [[torch.zeros_like(matrix) for matrix in matrices] for matrices in weights]

    for _ in range(3):
        for index, parameter in enumerate(parameters):
            parameter.grad = random()
            weights[index] = [
                reference_step(weight, momentum, gradient, 0.1, 0.3, scale)
                for weight, momentum, gradient in zip(
                    weights[index], momenta[index], apart(parameter.grad), strict=True
                )
            ]
        optimizer.step()

    for parameter, expected in zip(parameters, weights, strict=True):
        torch.testing.assert_close(apart(parameter.detach()), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("scale", "name"), [("adamw", "match_rms_adamw"), ("spectral", "original")])
def test_a_matrix_moves_as_by_torchs_muon(scale: str, name: str) -> None:
    torch.manual_seed(0)
    start = torch.randn(24, 40)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = (
        MixedOptimizer([{"params": [ours], "rule": "muon", "lr": 0.02, "weight_decay": 0.1, "step_size": scale}]),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn=name),
    )

    for _ in range(4):
        ours.grad = torch.randn(24, 40)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()

    moved = (theirs - start).norm()
    assert moved > 0.1
    assert (ours - theirs).norm() < 0.02 * moved  # both iterate in bfloat16, by products of other shapes


def test_batches_hold_one_shape_and_no_more_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "LARGEST_BATCH", 40)
    shapes = [(4, 4), (2, 8), (4, 4), (4, 4), (16, 16)]

    batches = of_one_shape([torch.zeros(shape) for shape in shapes])

    assert [[tuple(tensor.shape) for tensor in batch] for batch in batches] == [
        [(4, 4), (4, 4)],
        [(4, 4)],
        [(2, 8)],
        [(16, 16)],
    ]


def test_bfloat16_weights_move_as_float32_ones_on_average() -> None:
    """Forty steps of rms 0.2 · 1e-3 and a decay of 1e-4 each, from weights near 1, whose neighbours are 1/128 away."""
    torch.manual_seed(0)
    start = (1 + 0.5 * torch.rand(64, 64)).bfloat16()
    rounded, exact = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizer = MixedOptimizer([{"params": [rounded, exact], "rule": "muon", "lr": 1e-3, "weight_decay": 0.1}])

    for _ in range(40):
        rounded.grad = torch.randn(64, 64).bfloat16()
        exact.grad = rounded.grad.float()
        optimizer.step()

    moved = (exact - start.float()).detach()
    assert float(moved.mean()) == pytest.approx(-40 * 1e-4 * 1.25, rel=0.1)
    # A rounding has a variance of at most |move| / 128, so the mean of 4,096 weights after 40 has this deviation.
    deviation = (40 * 3e-4 / 128 / 4096) ** 0.5
    assert float((rounded.detach().float() - exact.detach()).mean()) == pytest.approx(0, abs=4 * deviation)


# -------------------------------------------------------------------------------------------------------- in the model


def every_kind(activation: str = "swiglu") -> Transformer:
    """A dense block, and a mixture with a gated shared expert; biases and norms everywhere."""
    return Transformer(
        ModelConfig(
            vocab_size=64,
            n_layers=2,
            d_model=32,
            norm="layernorm",
            tie_embeddings=False,
            attention=AttentionConfig(n_heads=4, head_dim=8, qk_norm="head", bias=True),
            feed_forward=FeedForwardConfig(bias=True, activation=activation),
            experts=ExpertsConfig(n_experts=4, d_ff=16, first_dense=1),
            shared=SharedExpertsConfig(n_experts=1, gated=True),
            router=RouterConfig(top_k=2),
        )
    )


def names_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups}


ATTENTION = {f"blocks.{n}.attention.{part}.weight" for n in (0, 1) for part in ("query", "key", "value", "output")}
MLPS = ("0.feed_forward", "1.feed_forward.shared.mlp")
W_IN = {f"blocks.{path}.w_in.weight" for path in MLPS} | {"blocks.1.feed_forward.experts.w_in"}
W_OUT = {f"blocks.{path}.w_out.weight" for path in MLPS} | {"blocks.1.feed_forward.experts.w_out"}


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_clamped", "gelu"])
def test_muon_takes_the_matrices_and_adamw_the_rest(activation: str) -> None:
    model = every_kind(activation)

    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    found = names_of(model, optimizer)

    gated = W_IN if activation.startswith("swiglu") else set()
    assert found["matrices"] == ATTENTION | W_OUT | (W_IN - gated)
    assert found.get("gated", set()) == gated
    assert found["decay"] == {"embedding.weight", "head.weight", "blocks.1.feed_forward.shared.gate.weight"}
    assert found["no_decay"] == {
        name for name, _ in model.named_parameters() if name.endswith(("bias", "norm.weight", "b_in", "b_out"))
    } | {"blocks.1.feed_forward.router.weight"}
    rules = {group["name"]: (group["rule"], group["halves"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rules["matrices"] == ("muon", 1, 0.1)
    assert rules.get("gated", ("muon", 2, 0.1)) == ("muon", 2, 0.1)
    assert rules["decay"][::2] == ("adamw", 0.1)
    assert rules["no_decay"][::2] == ("adamw", 0.0)


def test_what_muon_leaves_alone_moves_as_by_adamw() -> None:
    """To the bit: embeddings, norms, biases, router."""
    models = [every_kind(), every_kind()]
    optimizers = [
        build_optimizer(model, OptimizerConfig(name=name))
        for model, name in zip(models, ("muon", "adamw"), strict=True)
    ]
    for seed in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            set_learning_rate(optimizer, 0.01 / (seed + 1))
            optimizer.step()

    by_muon = ATTENTION | W_IN | W_OUT
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs) is (name not in by_muon), name


def test_the_schedule_moves_both_rates() -> None:
    optimizer = build_optimizer(every_kind(), OptimizerConfig(name="muon", lr=0.001, muon=MuonConfig(rate=0.02)))

    set_learning_rate(optimizer, 0.0005)

    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"matrices": 0.01, "gated": 0.01, "decay": 0.0005, "no_decay": 0.0005})


def test_a_closure_is_called() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = MixedOptimizer([{"params": [parameter]}])

    def closure() -> float:
        parameter.grad = torch.ones(2, 2)
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert not torch.equal(parameter.detach(), torch.ones(2, 2))
