"""The MLP against its formula on paper."""

import math

import pytest
import torch
from torch import Tensor

from moe.config import FeedForwardConfig
from moe.model.feed_forward import FeedForward, activate, input_width


def silu(z: float) -> float:
    return z / (1 + math.exp(-z))


@pytest.mark.parametrize(
    ("activation", "hidden", "expected"),
    [
        ("relu", [-1.0, 0.0, 2.0], [0.0, 0.0, 2.0]),
        # z · Φ(z), with Φ(1) = 0.8413447461.
        ("gelu", [-1.0, 0.0, 1.0], [-0.1586552539, 0.0, 0.8413447461]),
        # The gate comes first: silu(1) · 3 and silu(-2) · 5.
        ("swiglu", [1.0, -2.0, 3.0, 5.0], [3 * silu(1.0), 5 * silu(-2.0)]),
    ],
)
def test_activations_on_paper(activation: str, hidden: list[float], expected: list[float]) -> None:
    result = activate(torch.tensor(hidden, dtype=torch.float64), activation)

    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("activation", "width"), [("swiglu", 20), ("swiglu_clamped", 20), ("gelu", 10), ("relu", 10)])
def test_a_gated_activation_needs_two_rows_a_hidden_unit(activation: str, width: int) -> None:
    assert input_width(activation, 10) == width
    assert FeedForward(FeedForwardConfig(activation=activation), 4, 10).w_in.weight.shape == (width, 4)


@pytest.mark.parametrize(("bias", "expected"), [(False, 2 * 3.0), (True, 2 * (3.0 + 0.5) + 0.25)])
def test_one_unit_on_paper(bias: bool, expected: float) -> None:
    """w_out · relu(w_in x + b_in) + b_out with w_in = 1, w_out = 2, x = 3, b_in = 1/2, b_out = 1/4."""
    layer = FeedForward(FeedForwardConfig(activation="relu", bias=bias), 1, 1)
    values = {"w_in.weight": 1.0, "w_out.weight": 2.0, "w_in.bias": 0.5, "w_out.bias": 0.25}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(values[name])

    assert layer(torch.tensor([[3.0]])).item() == expected


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_clamped", "gelu", "relu"])
def test_every_token_is_mapped_on_its_own(activation: str) -> None:
    layer = FeedForward(FeedForwardConfig(activation=activation, bias=True), 6, 8).double()
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def alone(token: Tensor) -> Tensor:
        return layer(token[None])[0]

    one_by_one = torch.stack([torch.stack([alone(token) for token in row]) for row in x])
    torch.testing.assert_close(layer(x), one_by_one)


def test_the_clamped_activation_on_paper() -> None:
    """Gate 10 counts as 7, a gate far below 0 as itself; values stay within 7, and have 1 added."""

    def clamped(gate: float, value: float) -> float:
        return activate(torch.tensor([[gate, value]], dtype=torch.float64), "swiglu_clamped").item()

    assert clamped(10.0, 2.0) == pytest.approx(7 / (1 + math.exp(-1.702 * 7)) * 3)
    assert clamped(1.0, 20.0) == pytest.approx(1 / (1 + math.exp(-1.702)) * 8)
    assert clamped(-30.0, -20.0) == pytest.approx(-30 / (1 + math.exp(1.702 * 30)) * -6)
    assert clamped(1.0, -1.0) == 0.0
