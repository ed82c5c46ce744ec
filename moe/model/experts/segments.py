"""The experts on a CPU: one autograd function over segments of rows, one segment an expert.

A CPU gains nothing from one grouped product: its matrix library wants few, large, familiar shapes and little traffic
between them. So assignments are copied into one buffer in which each expert has a segment; the products of each
segment write straight into buffers for all experts; everything elementwise runs once over the whole buffer.

Segment lengths are rounded up to :data:`ROWS` because oneDNN compiles a kernel for each new length, which never fades
while lengths keep changing. The rows in between belong to no token: their gradients are zero.

Only the gathered input and the pre-activation are kept for the backward pass. With A the activation, the gradient of a
combine weight is ⟨dy W_out, A⟩, so the experts' outputs need not be kept (as in SonicMoE, Guo et al. 2025).

Lengths are read on the host, which torch.compile cannot trace. It is given one operator for each direction, in which
what lies between the products is compiled on its own (:mod:`.row_passes`).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, library

from moe.config import Activation
from moe.model.experts import row_passes
from moe.model.experts.row_passes import compiled
from moe.model.experts.weights import ExpertWeights, compute_dtype
from moe.model.feed_forward import activate
from moe.model.routing import Routing

ROWS = 32


def segment_experts(x: Float[Tensor, "T D"], routing: Routing, weights: ExpertWeights) -> Float[Tensor, "T D"]:
    """What :func:`~moe.model.experts.reference.reference_experts` computes, for tensors on a CPU."""
    dtype = compute_dtype(x)
    w_in, w_out = weights.w_in.to(dtype), weights.w_out.to(dtype)
    b_in, b_out = (None if bias is None else bias.to(dtype) for bias in (weights.b_in, weights.b_out))
    y: Tensor
    if torch.compiler.is_compiling():
        if x.shape[0] == 0:  # nothing to compute, but every gradient is there
            parameters = [tensor for tensor in (w_in, w_out, b_in, b_out, routing.weights) if tensor is not None]
            return x + 0 * torch.stack([tensor.sum().to(x.dtype) for tensor in parameters]).sum()
        y, *_ = _operator(
            x, routing.weights, w_in, w_out, b_in, b_out, routing.selected, routing.executed, weights.activation
        )
        return y.to(x.dtype)
    segments = lay_out(routing.selected, routing.executed, routing.n_mlps)
    y = _SegmentExperts.apply(  # type: ignore[no-untyped-call]
        x.to(dtype), routing.weights, w_in, w_out, b_in, b_out, weights.activation, segments
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


def most_rows(n_assignments: int, n_experts: int) -> int:
    """The rows that can be needed: each expert's last ROWS may hold a single assignment."""
    return (n_assignments + n_experts * (ROWS - 1)) // ROWS * ROWS


def lay_out(
    selected: Int[Tensor, "T K"], executed: Bool[Tensor, "T K"] | None, n_experts: int, n_rows: int | None = None
) -> Segments:
    """Give each expert a segment and each assignment a row, in the order of the tokens.

    ``executed``: which assignments an expert computes; None: all. ``n_rows``: R, where it is to be larger than needed.
    """
    n_tokens, top_k = selected.shape
    expert, device = selected.flatten(), selected.device
    if executed is not None:
        expert = expert.where(executed.flatten(), n_experts)
    sorted_expert, order = expert.sort(stable=True)
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=device)
    counts = counts.scatter_add_(0, expert, torch.ones_like(expert))[:n_experts]
    lengths = (counts + ROWS - 1) // ROWS * ROWS
    ends = lengths.cumsum(0)
    n_rows = int(ends[-1]) if n_rows is None else n_rows
    n_computed = int(counts.sum())
    # A row is its rank within its expert plus the start of that expert's segment.
    shift = (ends - lengths) - (counts.cumsum(0) - counts)
    rows = torch.arange(n_computed, device=device) + shift[sorted_expert[:n_computed]]
    token_of_row = torch.full((n_rows,), n_tokens, device=device)
    token_of_row[rows] = order[:n_computed] // top_k
    row_of_assignment = torch.full((n_tokens * top_k,), n_rows, device=device)
    row_of_assignment[order[:n_computed]] = rows
    return Segments(_spans(ends), token_of_row, row_of_assignment.view(n_tokens, top_k))


def _spans(ends: Int[Tensor, " E"]) -> list[tuple[int, int]]:
    last = ends.tolist()
    return list(zip([0, *last[:-1]], last, strict=True))


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
        _multiply(rows, w_in, b_in, segments.spans, out=hidden)
        inner = activate(hidden, activation)
        output = rows.new_empty(rows.shape[0] + 1, x.shape[1])
        output[-1] = 0
        _multiply(inner, w_out, b_out, segments.spans, out=output)
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
        grad_w_in, grad_w_out = _weight_gradients(w_in, w_out, segments.spans, rows, inner, grad_hidden, grad_output)
        for expert, (start, end) in enumerate(segments.spans):
            torch.mm(grad_hidden[start:end], w_in[expert], out=grad_rows[start:end])
        grad_x = _weighted_sum(grad_rows, row_of_assignment, None)
        grad_b_in = None if b_in is None else _segment_sums(grad_hidden, segments)
        grad_b_out = None if b_out is None else _segment_sums(grad_output, segments)
        return grad_x, grad_combine, grad_w_in, grad_w_out, grad_b_in, grad_b_out, None, None


def _multiply(
    rows: Float[Tensor, "R n"],
    weights: Float[Tensor, "E m n"],
    biases: Float[Tensor, "E m"] | None,
    spans: list[tuple[int, int]],
    *,
    out: Float[Tensor, "S m"],
) -> None:
    """W x + b of each row by its segment's expert, into the same row of ``out``."""
    for expert, (start, end) in enumerate(spans):
        torch.mm(rows[start:end], weights[expert].t(), out=out[start:end])
        if biases is not None:
            out[start:end] += biases[expert]


def _weight_gradients(
    w_in: Float[Tensor, "E H D"],
    w_out: Float[Tensor, "E D F"],
    spans: list[tuple[int, int]],
    rows: Float[Tensor, "R D"],
    inner: Float[Tensor, "R F"],
    grad_hidden: Float[Tensor, "R H"],
    grad_output: Float[Tensor, "R D"],
) -> tuple[Float[Tensor, "E H D"], Float[Tensor, "E D F"]]:
    """Of both matrices, each written once into the place of its expert."""
    grad_w_in, grad_w_out = torch.empty_like(w_in), torch.empty_like(w_out)
    for expert, (start, end) in enumerate(spans):
        torch.mm(grad_hidden[start:end].t(), rows[start:end], out=grad_w_in[expert])
        torch.mm(grad_output[start:end].t(), inner[start:end], out=grad_w_out[expert])
    return grad_w_in, grad_w_out


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
    """:func:`.row_passes.activation_gradient`, SwiGLU in torch's own passes; ``grad_inner`` is overwritten then."""
    if activation != "swiglu":
        return row_passes.activation_gradient(hidden, grad_inner, weight_of_row[:, 0], activation)
    gate, value = hidden.chunk(2, dim=-1)
    gated = F.silu(gate)
    inner = gated * value
    dot: Tensor = torch.linalg.vecdot(grad_inner.to(weight_of_row.dtype), inner.to(weight_of_row.dtype))
    grad_inner *= weight_of_row.to(grad_inner.dtype)
    grad_hidden = torch.empty_like(hidden)
    grad_gate, grad_value = grad_hidden.chunk(2, dim=-1)
    torch.mul(grad_inner, gated, out=grad_value)
    torch.ops.aten.silu_backward.grad_input(grad_inner.mul_(value), gate, grad_input=grad_gate)
    return inner, grad_hidden, dot


# ---------------------------------------------------------------------------------------------- under torch.compile


def _forward(
    x: Tensor,
    combine_weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    selected: Tensor,
    executed: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output in float32 or more, and for the backward pass: rows, hidden, token of row, row of assignment, ends."""
    n_experts, n_rows = len(w_in), most_rows(selected.numel(), len(w_in))
    segments = lay_out(selected, executed, n_experts, n_rows)
    rows = compiled(row_passes.gather)(x, segments.token_of_row, w_in.dtype)
    hidden = rows.new_empty(n_rows, w_in.shape[1])
    _multiply(rows, w_in, b_in, segments.spans, out=hidden)
    hidden[segments.spans[-1][1] :] = 0  # rows of nobody are never read, but what an operator returns is defined
    inner = compiled(row_passes.activation)(hidden, activation)
    output = torch.empty_like(rows)
    _multiply(inner, w_out, b_out, segments.spans, out=output)
    y = compiled(row_passes.sum_choices)(output, segments.row_of_assignment, combine_weights)
    ends = torch.tensor([end for _, end in segments.spans])
    return y, rows, hidden, segments.token_of_row, segments.row_of_assignment, ends


def _backward(
    grad_y: Tensor,
    combine_weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    rows: Tensor,
    hidden: Tensor,
    token_of_row: Tensor,
    row_of_assignment: Tensor,
    ends: Tensor,
    activation: str,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the combine weights and of both matrices, and of both biases as if there were some."""
    spans = _spans(ends)
    n_rows, wide = rows.shape[0], combine_weights.dtype
    # The weight of each row, zero for rows between segments.
    weight_of_row = combine_weights.new_zeros(n_rows + 1)
    weight_of_row[row_of_assignment.flatten()] = combine_weights.flatten()
    weight_of_row = weight_of_row[:n_rows]

    grad_output = compiled(row_passes.gather)(grad_y, token_of_row, rows.dtype)
    grad_inner = hidden.new_empty(n_rows, w_out.shape[2])
    for expert, (start, end) in enumerate(spans):
        torch.mm(grad_output[start:end], w_out[expert], out=grad_inner[start:end])
    inner, grad_hidden, inner_dot = compiled(row_passes.activation_gradient)(
        hidden, grad_inner, weight_of_row, activation
    )
    if b_out is not None:
        for expert, (start, end) in enumerate(spans):
            inner_dot[start:end] += grad_output[start:end].to(wide) @ b_out[expert].to(wide)
    grad_combine = torch.cat([inner_dot, inner_dot.new_zeros(1)])[row_of_assignment]

    weighted = compiled(row_passes.weigh)(grad_output, weight_of_row)
    grad_rows = torch.empty_like(rows)
    grad_w_in, grad_w_out = _weight_gradients(w_in, w_out, spans, rows, inner, grad_hidden, weighted)
    for expert, (start, end) in enumerate(spans):
        torch.mm(grad_hidden[start:end], w_in[expert], out=grad_rows[start:end])
    grad_x = compiled(row_passes.sum_choices)(grad_rows, row_of_assignment, None)
    none = rows.new_empty(0)
    with_bias = b_out is not None
    grad_b_in = torch.stack([grad_hidden[start:end].sum(dim=0) for start, end in spans]) if with_bias else none
    grad_b_out = torch.stack([weighted[start:end].sum(dim=0) for start, end in spans]) if with_bias else none.clone()
    return grad_x.to(x_dtype), grad_combine, grad_w_in, grad_w_out, grad_b_in, grad_b_out


_operator = library.custom_op("moe::segment_experts", _forward, mutates_args=())
_backward_operator = library.custom_op("moe::segment_experts_backward", _backward, mutates_args=())


@_operator.register_fake
def _(
    x: Tensor,
    combine_weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    selected: Tensor,
    executed: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_rows = most_rows(selected.numel(), len(w_in))
    return (
        x.new_empty(x.shape, dtype=torch.promote_types(w_in.dtype, torch.float32)),
        w_in.new_empty(n_rows, w_in.shape[2]),
        w_in.new_empty(n_rows, w_in.shape[1]),
        selected.new_empty(n_rows),
        selected.new_empty(selected.shape),
        selected.new_empty(len(w_in)),
    )


@_backward_operator.register_fake
def _(
    grad_y: Tensor,
    combine_weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    rows: Tensor,
    hidden: Tensor,
    token_of_row: Tensor,
    row_of_assignment: Tensor,
    ends: Tensor,
    activation: str,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_experts, d_model = w_out.shape[:2]
    sizes = (0, 0) if b_out is None else ((n_experts, w_in.shape[1]), (n_experts, d_model))
    return (
        rows.new_empty(grad_y.shape, dtype=x_dtype),
        torch.empty_like(combine_weights),
        torch.empty_like(w_in),
        torch.empty_like(w_out),
        rows.new_empty(sizes[0]),
        rows.new_empty(sizes[1]),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, combine_weights, w_in, w_out, _, b_out, *_, activation = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # gradients of zeros for what is only kept would be as large
    ctx.save_for_backward(combine_weights, w_in, w_out, b_out, *output[1:])
    ctx.activation, ctx.x_dtype = activation, x.dtype


def _differentiate(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:  # what comes after the experts had no gradient for them
        return (None,) * 9
    combine_weights, w_in, w_out, b_out, *kept = ctx.saved_tensors
    *gradients, grad_b_in, grad_b_out = _backward_operator(
        grad_y, combine_weights, w_in, w_out, b_out, *kept, ctx.activation, ctx.x_dtype
    )
    biases = (None, None) if b_out is None else (grad_b_in, grad_b_out)
    return (*gradients, *biases, None, None, None)


_operator.register_autograd(_differentiate, setup_context=_remember)
