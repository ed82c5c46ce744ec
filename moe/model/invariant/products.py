"""Products of rows by a weight, in which how many rows there are, and which one it is, say nothing in a row's bits."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.model.experts.weights import compute_dtype
from moe.model.router import fused as router_fused

ROWS = 32
"""of a tile: as :data:`moe.model.experts.segments.ROWS`, so that a segment is a whole number of tiles"""

Spans = Sequence[tuple[int, int]]
"""first row and end of what each weight multiplies, one after the other, whole tiles"""


class InvariantLinear(nn.Linear):
    """``nn.Linear`` over tiles of rows."""

    def forward(self, x: Float[Tensor, "*T n"]) -> Float[Tensor, "*T m"]:
        """x Wᵀ + b, in the dtype of autocast where it is on."""
        return linear(x, self.weight, self.bias)


def linear(
    x: Float[Tensor, "*T n"], weight: Float[Tensor, "m n"], bias: Float[Tensor, " m"] | None = None
) -> Float[Tensor, "*T m"]:
    """``F.linear``, a row at a time as far as anyone can tell."""
    dtype = compute_dtype(x)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    n_rows = rows.shape[0]
    rows = F.pad(rows, (0, 0, 0, -n_rows % ROWS))
    y = by_weights(rows, weight.to(dtype)[None], [(0, rows.shape[0])])[:n_rows]
    if bias is not None:
        y = y + bias.to(dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def logits(x: Float[Tensor, "T n"], weight: Float[Tensor, "m n"]) -> Float[Tensor, "T m"]:
    """:func:`moe.model.router.logits.linear_logits`: a product in at least float32, outside autocast."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(dtype), weight.to(dtype))


def by_weights(rows: Float[Tensor, "R n"], weights: Float[Tensor, "E m n"], spans: Spans) -> Float[Tensor, "R m"]:
    """Row by row the product with the weight in whose span the row lies.

    The gradients are plain products: they are the same in every repetition, but sums over the batch, like any gradient.
    """
    product: Tensor = _ByWeights.apply(rows, weights, spans)  # type: ignore[no-untyped-call]
    return product


class _ByWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, spans: Spans) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.spans = spans
        if rows.is_cuda and router_fused.HAS_TRITON and rows.dtype != torch.float64:
            from moe.model.invariant.kernels import rows_by_weights

            return rows_by_weights(rows, weights, spans)
        y = rows.new_empty(rows.shape[0], weights.shape[1])
        for weight, (start, end) in zip(weights.unbind(), spans, strict=True):
            transposed = weight.t()
            for tile in range(start, end, ROWS):
                torch.mm(rows[tile : tile + ROWS], transposed, out=y[tile : tile + ROWS])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights = ctx.saved_tensors
        grad_rows = torch.empty_like(rows)
        grad_weights = torch.empty_like(weights)
        for expert, (start, end) in enumerate(ctx.spans):
            torch.mm(grad[start:end], weights[expert], out=grad_rows[start:end])
            torch.mm(grad[start:end].t(), rows[start:end], out=grad_weights[expert])
        return grad_rows, grad_weights, None
