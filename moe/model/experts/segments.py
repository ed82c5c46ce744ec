"""The experts on a CPU: one autograd function over segments of rows, one segment an expert.

A CPU gains nothing from one grouped product: its matrix library wants few, large, familiar shapes and little traffic
between them. So assignments are copied into one buffer in which each expert has a segment; the products of each
segment write straight into buffers for all experts; everything elementwise runs once over the whole buffer.

Segment lengths are rounded up to :data:`ROWS` because oneDNN compiles a kernel for each new length, which never fades
while lengths keep changing. The rows in between belong to no token: their gradients are zero.

Only the gathered input and the pre-activation are kept for the backward pass. With A the activation, the gradient of a
combine weight is ⟨dy W_out, A⟩, so the experts' outputs need not be kept (as in SonicMoE, Guo et al. 2025).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moe.config import Activation
from moe.model.experts.weights import ExpertWeights, compute_dtype
from moe.model.feed_forward import activate
from moe.model.routing import Routing

ROWS = 32


def segment_experts(x: Float[Tensor, "T D"], routing: Routing, weights: ExpertWeights) -> Float[Tensor, "T D"]:
    """What :func:`~moe.model.experts.reference.reference_experts` computes, for tensors on a CPU."""
    segments = lay_out(routing)
    dtype = compute_dtype(x)
    b_in, b_out = (None if bias is None else bias.to(dtype) for bias in (weights.b_in, weights.b_out))
    y: Tensor = _SegmentExperts.apply(  # type: ignore[no-untyped-call]
        x.to(dtype),
        routing.weights,
        weights.w_in.to(dtype),
        weights.w_out.to(dtype),
        b_in,
        b_out,
        weights.activation,
        segments,
    )
    return y.to(x.dtype)


def unsupported(x: Tensor, weights: ExpertWeights) -> str | None:
    """Why segments cannot be used on this input, or None where they can."""
    if x.device.type != "cpu":
        return f"segments are for the CPU, and the input is on {x.device.type}"
    return None


class Segments(NamedTuple):
    """Where each assignment lies in the buffer of R rows."""

    spans: list[tuple[int, int]]
    """first row and end of each expert's segment, whole multiples of ROWS"""
    token_of_row: Int[Tensor, " R"]
    """the token whose input a row holds; T, a row of zeros, between segments' ends"""
    row_of_assignment: Int[Tensor, "T K"]
    """the row that holds an assignment; R, a row of zeros, for an assignment that no expert computes"""


def lay_out(routing: Routing) -> Segments:
    """Give each expert a segment and each assignment a row, in the order of the tokens."""
    n_experts, n_tokens, top_k = routing.n_mlps, routing.n_tokens, routing.top_k
    expert = routing.selected.flatten()
    executed = routing.executed
    if executed is not None:
        expert = expert.where(executed.flatten(), n_experts)
    sorted_expert, order = expert.sort(stable=True)
    counts = torch.zeros(n_experts + 1, dtype=torch.int64).scatter_add_(0, expert, torch.ones_like(expert))[:n_experts]
    lengths = (counts + ROWS - 1) // ROWS * ROWS
    ends = lengths.cumsum(0)
    n_rows = int(ends[-1])
    n_computed = int(counts.sum())
    # A row is its rank within its expert plus the start of that expert's segment.
    shift = (ends - lengths) - (counts.cumsum(0) - counts)
    rows = torch.arange(n_computed) + shift[sorted_expert[:n_computed]]
    token_of_row = torch.full((n_rows,), n_tokens)
    token_of_row[rows] = order[:n_computed] // top_k
    row_of_assignment = torch.full((n_tokens * top_k,), n_rows)
    row_of_assignment[order[:n_computed]] = rows
    last = ends.tolist()
    return Segments(
        list(zip([0, *last[:-1]], last, strict=True)), token_of_row, row_of_assignment.view(n_tokens, top_k)
    )


class _SegmentExperts(torch.autograd.Function):
    """Forward and backward of all experts of a layer, written out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        combine_weights: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        b_in: Tensor | None,
        b_out: Tensor | None,
        activation: Activation,
        segments: Segments,
    ) -> Tensor:
        rows = _with_zero_row(x)[segments.token_of_row]
        hidden = rows.new_empty(rows.shape[0], w_in.shape[1])
        for expert, (start, end) in enumerate(segments.spans):
            torch.mm(rows[start:end], w_in[expert].t(), out=hidden[start:end])
            if b_in is not None:
                hidden[start:end] += b_in[expert]
        inner = activate(hidden, activation)
        output = rows.new_empty(rows.shape[0] + 1, x.shape[1])
        output[-1] = 0
        for expert, (start, end) in enumerate(segments.spans):
            torch.mm(inner[start:end], w_out[expert].t(), out=output[start:end])
            if b_out is not None:
                output[start:end] += b_out[expert]
        ctx.save_for_backward(rows, hidden, combine_weights, w_in, w_out, b_in, b_out)
        ctx.activation, ctx.segments = activation, segments
        return _weighted_sum(output, segments.row_of_assignment, combine_weights)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, combine_weights, w_in, w_out, b_in, b_out = ctx.saved_tensors
        segments: Segments = ctx.segments
        row_of_assignment = segments.row_of_assignment
        n_rows = rows.shape[0]

        # The weight of each row, zero for rows between segments.
        weight_of_row = combine_weights.new_zeros(n_rows + 1)
        weight_of_row[row_of_assignment.flatten()] = combine_weights.flatten()
        weight_of_row = weight_of_row[:n_rows, None]

        grad_output = _with_zero_row(grad_y.to(rows.dtype))[segments.token_of_row]
        grad_inner = torch.empty_like(hidden[:, : w_out.shape[2]])
        for expert, (start, end) in enumerate(segments.spans):
            torch.mm(grad_output[start:end], w_out[expert], out=grad_inner[start:end])
        inner, grad_hidden, inner_dot = _activation_backward(hidden, grad_inner, weight_of_row, ctx.activation)

        if b_out is not None:
            expert_of_row = torch.repeat_interleave(torch.tensor([end - start for start, end in segments.spans]))
            inner_dot = inner_dot + (grad_output.to(inner_dot.dtype) * b_out.to(inner_dot.dtype)[expert_of_row]).sum(-1)
        grad_combine = torch.cat([inner_dot, inner_dot.new_zeros(1)])[row_of_assignment]

        grad_output *= weight_of_row.to(grad_output.dtype)
        grad_rows = rows.new_empty(n_rows + 1, rows.shape[1])
        grad_rows[-1] = 0
        grad_w_in, grad_w_out = torch.empty_like(w_in), torch.empty_like(w_out)
        for expert, (start, end) in enumerate(segments.spans):
            torch.mm(grad_output[start:end].t(), inner[start:end], out=grad_w_out[expert])
            torch.mm(grad_hidden[start:end].t(), rows[start:end], out=grad_w_in[expert])
            torch.mm(grad_hidden[start:end], w_in[expert], out=grad_rows[start:end])
        grad_x = _weighted_sum(grad_rows, row_of_assignment, None)
        grad_b_in = None if b_in is None else _segment_sums(grad_hidden, segments)
        grad_b_out = None if b_out is None else _segment_sums(grad_output, segments)
        return grad_x, grad_combine, grad_w_in, grad_w_out, grad_b_in, grad_b_out, None, None


def _with_zero_row(x: Float[Tensor, "T D"]) -> Float[Tensor, "T+1 D"]:
    return F.pad(x, (0, 0, 0, 1))


def _weighted_sum(
    rows: Float[Tensor, "R D"], row_of_assignment: Int[Tensor, "T K"], weights: Float[Tensor, "T K"] | None
) -> Float[Tensor, "T D"]:
    """Σ_k weight_tk · rows[row_tk], accumulated in float32 (float64 for float64) choice by choice."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    total = None
    for choice in range(row_of_assignment.shape[1]):
        term = rows.index_select(0, row_of_assignment[:, choice]).to(dtype)
        if weights is not None:
            term *= weights[:, choice, None]
        total = term if total is None else total.add_(term)
    assert total is not None
    return total.to(rows.dtype) if weights is None else total


def _segment_sums(rows: Float[Tensor, "R D"], segments: Segments) -> Float[Tensor, "E D"]:
    return torch.stack([rows[start:end].sum(dim=0) for start, end in segments.spans])


def _activation_backward(
    hidden: Float[Tensor, "R H"],
    grad_inner: Float[Tensor, "R F"],
    weight_of_row: Float[Tensor, "R 1"],
    activation: Activation,
) -> tuple[Float[Tensor, "R F"], Float[Tensor, "R H"], Float[Tensor, " R"]]:
    """Return A = activation(hidden), the gradient of hidden, and ⟨dA', A⟩, for the gradient dA' of an unweighted A.

    ``grad_inner`` is dA', and is overwritten. SwiGLU is written out, because autograd would split and join the halves.
    """
    if activation == "swiglu":
        gate, value = hidden.chunk(2, dim=-1)
        gated = F.silu(gate)
        inner = gated * value
        dot = _row_dot(grad_inner, inner, weight_of_row.dtype)
        grad_inner *= weight_of_row.to(grad_inner.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_gate, grad_value = grad_hidden.chunk(2, dim=-1)
        torch.mul(grad_inner, gated, out=grad_value)
        torch.ops.aten.silu_backward.grad_input(grad_inner.mul_(value), gate, grad_input=grad_gate)
        return inner, grad_hidden, dot
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        inner = activate(leaf, activation)
    dot = _row_dot(grad_inner, inner.detach(), weight_of_row.dtype)
    (grad_hidden,) = torch.autograd.grad(inner, leaf, grad_inner * weight_of_row.to(grad_inner.dtype))
    return inner.detach(), grad_hidden, dot


def _row_dot(a: Float[Tensor, "R F"], b: Float[Tensor, "R F"], dtype: torch.dtype) -> Float[Tensor, " R"]:
    dot: Tensor = torch.linalg.vecdot(a.to(dtype), b.to(dtype))
    return dot
