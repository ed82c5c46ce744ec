"""What the segments do between their products, each written so that torch.compile makes one loop over memory of it.

Every function computes in at least float32, whatever it reads and writes. Uncompiled they make a dozen passes, so that
:mod:`.segments` has others there.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.config import Activation
from moe.model.feed_forward import CLAMP, CLAMPED_SLOPE, GATED


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` through torch.compile, once a process."""
    return _compiled(function)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def gather(x: Float[Tensor, "T D"], token_of_row: Int[Tensor, " R"], dtype: torch.dtype) -> Float[Tensor, "R D"]:
    """x[token], in ``dtype``; zeros for token T."""
    n_tokens = x.shape[0]
    rows = x[token_of_row.clamp(max=n_tokens - 1)].to(dtype)
    return torch.where((token_of_row < n_tokens)[:, None], rows, 0.0)


def activation(hidden: Float[Tensor, "R H"], kind: Activation) -> Float[Tensor, "R F"]:
    """:func:`moe.model.feed_forward.activate`."""
    return _activate(*_halves(hidden, kind), kind)[0].to(hidden.dtype)


def activation_gradient(
    hidden: Float[Tensor, "R H"],
    grad_inner: Float[Tensor, "R F"],
    weight_of_row: Float[Tensor, " R"],
    kind: Activation,
) -> tuple[Float[Tensor, "R F"], Float[Tensor, "R H"], Float[Tensor, " R"]]:
    """A = activation(hidden), the gradient of hidden and ⟨dA', A⟩, for the gradient dA' of an unweighted A."""
    gate, value = _halves(hidden, kind)
    inner, slope_of_gate, slope_of_value = _activate(gate, value, kind)
    grad = grad_inner.to(gate.dtype)
    dot = (grad * inner).sum(dim=-1)
    grad = grad * weight_of_row[:, None]
    slopes = [slope_of_gate] if slope_of_value is None else [slope_of_gate, slope_of_value]
    grad_hidden = torch.cat([(grad * slope).to(hidden.dtype) for slope in slopes], dim=-1)
    return inner.to(hidden.dtype), grad_hidden, dot


def weigh(rows: Float[Tensor, "R D"], weight_of_row: Float[Tensor, " R"]) -> Float[Tensor, "R D"]:
    """weight · row."""
    return (rows * weight_of_row[:, None]).to(rows.dtype)


def sum_choices(
    rows: Float[Tensor, "R D"], row_of_assignment: Int[Tensor, "T K"], weights: Float[Tensor, "T K"] | None
) -> Float[Tensor, "T D"]:
    """Σ_k weight_tk · rows[row_tk], choice by choice; row R is one of zeros. In the dtype of the sum."""
    n_rows, dtype = rows.shape[0], torch.promote_types(rows.dtype, torch.float32)
    total = None
    for choice in range(row_of_assignment.shape[1]):
        row = row_of_assignment[:, choice]
        term = torch.where((row < n_rows)[:, None], rows[row.clamp(max=n_rows - 1)].to(dtype), 0.0)
        if weights is not None:
            term = term * weights[:, choice, None]
        total = term if total is None else total + term
    assert total is not None
    return total


def _halves(hidden: Tensor, kind: Activation) -> tuple[Tensor, Tensor]:
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if kind not in GATED:
        return wide, wide
    gate, value = wide.chunk(2, dim=-1)
    return gate, value


def _activate(gate: Tensor, value: Tensor, kind: Activation) -> tuple[Tensor, Tensor, Tensor | None]:
    """The activation and its slopes in gate and value; None for a value that there is not."""
    if kind == "swiglu":
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        return silu * value, value * (sigmoid + silu * (1 - sigmoid)), silu
    if kind == "swiglu_clamped":
        low, one_more = gate.clamp(max=CLAMP), value.clamp(-CLAMP, CLAMP) + 1
        sigmoid = torch.sigmoid(CLAMPED_SLOPE * low)
        silu = low * sigmoid
        slope = one_more * (sigmoid + CLAMPED_SLOPE * silu * (1 - sigmoid))
        # As torch's clamp: at the bound itself the gradient passes.
        return silu * one_more, torch.where(gate <= CLAMP, slope, 0.0), torch.where(value.abs() <= CLAMP, silu, 0.0)
    if kind == "gelu":
        below = 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
        return gate * below, below + gate * torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi), None
    if kind == "gelu_tanh":
        root, cubic = math.sqrt(2 / math.pi), 0.044715
        tanh = torch.tanh(root * (gate + cubic * gate**3))
        slope = root * (1 + 3 * cubic * gate * gate) * (1 - tanh * tanh)
        return 0.5 * gate * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * gate * slope, None
    return gate.clamp(min=0), (gate > 0).to(gate.dtype), None
