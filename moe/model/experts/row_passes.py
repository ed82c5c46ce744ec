"""What the segments do between their products: pass by pass over rows of memory.

Each is defined in torch (``..._in_torch``), in at least float32 whatever is read and written, and that is what runs in
float64 and where there is no compiler. Otherwise it is one loop over memory in C++ (``native/rows.cpp``).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.config import Activation
from moe.model import native
from moe.model.feed_forward import CLAMP, CLAMPED_SLOPE, GATED


def gather(x: Float[Tensor, "T D"], token_of_row: Int[Tensor, " R"], dtype: torch.dtype) -> Float[Tensor, "R D"]:
    """x[token], in ``dtype``; zeros for token T."""
    rows = x.new_empty(len(token_of_row), x.shape[1], dtype=dtype)
    if not native.computes(x, rows):
        return gather_in_torch(x, token_of_row, dtype)
    x = x.contiguous()
    native.call(f"gather_{_name(x)}_{_name(rows)}", x, token_of_row, rows, len(x), *rows.shape)
    return rows


def gather_in_torch(
    x: Float[Tensor, "T D"], token_of_row: Int[Tensor, " R"], dtype: torch.dtype
) -> Float[Tensor, "R D"]:
    """:func:`gather`."""
    return torch.cat([x.to(dtype), x.new_zeros(1, x.shape[1], dtype=dtype)])[token_of_row]


def activation(hidden: Float[Tensor, "R H"], kind: Activation, out: Float[Tensor, "R F"]) -> None:
    """:func:`moe.model.feed_forward.activate`."""
    if hidden.dtype == out.dtype and native.computes(hidden):
        native.call(f"activation_{kind}_{_name(hidden)}", hidden, out, *out.shape)
    else:
        out.copy_(_activate(*_halves(hidden, kind), kind)[0])


def activation_gradient(
    hidden: Float[Tensor, "R H"],
    grad_inner: Float[Tensor, "R F"],
    weight_of_row: Float[Tensor, " R"],
    kind: Activation,
    *,
    weighted: Float[Tensor, "R F"],
    grad_hidden: Float[Tensor, "R H"],
    dots: Float[Tensor, " R"],
) -> None:
    """From the gradient g of an unweighted A = activation(hidden): w · A, the gradient of hidden for w · g, ⟨g, A⟩."""
    # The kernel has weights and dots in float32, and the rest in one dtype.
    if weight_of_row.dtype == dots.dtype == torch.float32 and native.computes(hidden):
        native.call(
            f"activation_gradient_{kind}_{_name(hidden)}",
            hidden,
            grad_inner,
            weight_of_row,
            weighted,
            grad_hidden,
            dots,
            *grad_inner.shape,
        )
    else:
        activation_gradient_in_torch(
            hidden, grad_inner, weight_of_row, kind, weighted=weighted, grad_hidden=grad_hidden, dots=dots
        )


def activation_gradient_in_torch(
    hidden: Float[Tensor, "R H"],
    grad_inner: Float[Tensor, "R F"],
    weight_of_row: Float[Tensor, " R"],
    kind: Activation,
    *,
    weighted: Float[Tensor, "R F"],
    grad_hidden: Float[Tensor, "R H"],
    dots: Float[Tensor, " R"],
) -> None:
    """:func:`activation_gradient`."""
    gate, value = _halves(hidden, kind)
    inner, slope_of_gate, slope_of_value = _activate(gate, value, kind)
    grad = grad_inner.to(gate.dtype)
    dots.copy_((grad * inner).sum(dim=-1))
    weighted.copy_(weight_of_row[:, None] * inner)
    grad = weight_of_row[:, None] * grad
    slopes = [slope_of_gate] if slope_of_value is None else [slope_of_gate, slope_of_value]
    grad_hidden.copy_(torch.cat([grad * slope for slope in slopes], dim=-1))


def sum_choices(
    rows: Float[Tensor, "R D"],
    row_of_assignment: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "T D"]:
    """Σ_k weight_tk · rows[row_tk] in ``dtype``, choice by choice; row R is one of zeros."""
    total = rows.new_empty(len(row_of_assignment), rows.shape[1], dtype=dtype)
    if not native.computes(rows, total, *([] if weights is None else [weights])):
        return sum_choices_in_torch(rows, row_of_assignment, weights, dtype)
    native.call(
        f"sum_choices_{_name(rows)}_{_name(total)}",
        rows,
        row_of_assignment,
        None if weights is None else weights.float().contiguous(),
        total,
        *row_of_assignment.shape,
        *rows.shape,
    )
    return total


def sum_choices_in_torch(
    rows: Float[Tensor, "R D"],
    row_of_assignment: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "T D"]:
    """:func:`sum_choices`."""
    rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    total = rows.new_zeros(len(row_of_assignment), rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    for choice in range(row_of_assignment.shape[1]):
        term = rows[row_of_assignment[:, choice]].to(total.dtype)
        total += term if weights is None else term * weights[:, choice, None]
    return total.to(dtype)


def _name(tensor: Tensor) -> str:
    return native.DTYPES[tensor.dtype]


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
