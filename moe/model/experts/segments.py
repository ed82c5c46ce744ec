"""The experts on a CPU: one autograd function over segments of rows, one segment an expert.

A CPU gains nothing from one grouped product: its matrix library wants few, large, familiar shapes and little traffic
between them. So assignments are copied into one buffer in which each expert has a segment, and then expert follows
expert: its products, and what lies between them (:mod:`.row_passes`), meet the same few megabytes while they are in
the cache.

Segment lengths are rounded up to :data:`ROWS` because oneDNN compiles a kernel for each new length, which never fades
while lengths keep changing. The rows in between belong to no token: their gradients are zero.

Only the gathered input and the pre-activation are kept for the backward pass. With A the activation, the gradient of a
combine weight is ⟨dy W_out, A⟩, so the experts' outputs need not be kept (as in SonicMoE, Guo et al. 2025).

Lengths are read on the host, which torch.compile cannot trace: it is given one operator for each direction.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, library

from moe.config import Activation
from moe.model import native
from moe.model.experts import row_passes
from moe.model.experts.weights import ExpertWeights, compute_dtype
from moe.model.routing import Routing

ROWS = 32


def segment_experts(x: Float[Tensor, "T D"], routing: Routing, weights: ExpertWeights) -> Float[Tensor, "T D"]:
    """What :func:`~moe.model.experts.reference.reference_experts` computes, for tensors on a CPU."""
    dtype = compute_dtype(x)
    w_in, w_out = weights.w_in.to(dtype), weights.w_out.to(dtype)
    b_in, b_out = (None if bias is None else bias.to(dtype) for bias in (weights.b_in, weights.b_out))
    if x.shape[0] == 0:  # nothing to compute, but every gradient is there
        parameters = [tensor for tensor in (w_in, w_out, b_in, b_out, routing.weights) if tensor is not None]
        return x + 0 * torch.stack([tensor.sum().to(x.dtype) for tensor in parameters]).sum()
    # torch.compile is given one operator to call as it is; to call that without it takes longer than the function.
    compute: Callable[..., Any] = _operator if torch.compiler.is_compiling() else _SegmentExperts.apply
    y: Tensor
    y, *_ = compute(
        x, routing.weights, w_in, w_out, b_in, b_out, routing.selected, routing.executed, weights.activation
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

    @property
    def longest(self) -> int:
        """Rows of the longest segment."""
        return max(end - start for start, end in self.spans)

    def parts(self, rows: Shaped[Tensor, "R *n"]) -> tuple[Tensor, ...]:
        """Each expert's segment."""
        return rows[: self.spans[-1][1]].split_with_sizes([end - start for start, end in self.spans])


def most_rows(n_assignments: int, n_experts: int) -> int:
    """The rows that can be needed: each expert's last ROWS may hold a single assignment."""
    return (n_assignments + n_experts * (ROWS - 1)) // ROWS * ROWS


def lay_out(
    selected: Int[Tensor, "T K"], executed: Bool[Tensor, "T K"] | None, n_experts: int, n_rows: int | None = None
) -> Segments:
    """Give each expert a segment and each assignment a row, in the order of the tokens.

    ``executed``: which assignments an expert computes; None: all. An id that is none of the ``n_experts`` is computed
    by nobody. ``n_rows``: R, where it is to be larger than needed, and at least :func:`most_rows`.
    """
    if selected.device.type != "cpu" or selected.dtype != torch.int64 or native.kernels() is None:
        return lay_out_in_torch(selected, executed, n_experts, n_rows)
    if n_rows is None:
        segments = lay_out(selected, executed, n_experts, most_rows(selected.numel(), n_experts))
        end = segments.spans[-1][1]
        return Segments(segments.spans, segments.token_of_row[:end], segments.row_of_assignment.clamp(max=end))
    token_of_row, ends = selected.new_empty(n_rows), selected.new_empty(n_experts)
    row_of_assignment = torch.empty_like(selected, memory_format=torch.contiguous_format)
    native.call(
        "lay_out",
        selected.contiguous(),
        None if executed is None else executed.contiguous(),
        token_of_row,
        row_of_assignment,
        ends,
        *selected.shape,
        n_experts,
        n_rows,
        ROWS,
    )
    return Segments(_spans(ends), token_of_row, row_of_assignment)


def lay_out_in_torch(
    selected: Int[Tensor, "T K"], executed: Bool[Tensor, "T K"] | None, n_experts: int, n_rows: int | None = None
) -> Segments:
    """:func:`lay_out`, by a stable sort."""
    n_tokens, top_k = selected.shape
    expert, device = selected.flatten(), selected.device
    computed = (expert >= 0) & (expert < n_experts)
    if executed is not None:
        computed = computed & executed.flatten()
    expert = expert.where(computed, n_experts)
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
    n_experts, _, d_ff = w_out.shape
    segments = lay_out(selected, executed, n_experts, most_rows(selected.numel(), n_experts))
    rows = row_passes.gather(x, segments.token_of_row, w_in.dtype)
    hidden, output = rows.new_empty(len(rows), w_in.shape[1]), torch.empty_like(rows)
    inner = rows.new_empty(segments.longest, d_ff)
    of_expert = zip(*(segments.parts(tensor) for tensor in (rows, hidden, output)), w_in.mT, w_out.mT, strict=True)
    for expert, (read, into, written, first, second) in enumerate(of_expert):
        seen = inner[: len(read)]
        torch.mm(read, first, out=into)
        if b_in is not None:
            into += b_in[expert]
        row_passes.activation(into, _activation(activation), seen)
        torch.mm(seen, second, out=written)
        if b_out is not None:
            written += b_out[expert]
    hidden[segments.spans[-1][1] :] = 0  # rows of nobody are never read, but what an operator returns is defined
    wide = torch.promote_types(w_in.dtype, torch.float32)
    y = row_passes.sum_choices(output, segments.row_of_assignment, combine_weights, wide)
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
    segments = Segments(_spans(ends), token_of_row, row_of_assignment)
    d_ff, wide = w_out.shape[2], combine_weights.dtype
    # The weight of each row, zero for rows between segments.
    weight_of_row = combine_weights.new_zeros(len(rows) + 1)
    weight_of_row[row_of_assignment.flatten()] = combine_weights.flatten()
    dots = torch.zeros_like(weight_of_row)

    grad_output = row_passes.gather(grad_y, token_of_row, rows.dtype)
    grad_rows, grad_w_in, grad_w_out = torch.empty_like(rows), torch.empty_like(w_in), torch.empty_like(w_out)
    biases = 0 if b_out is None else 1
    grad_b_in, grad_b_out = (rows.new_empty(biases * len(w), w.shape[1]) for w in (w_in, w_out))
    # What only an expert's own products read stays in the cache, for the next expert's lies in the same place.
    scratch = [hidden.new_empty(segments.longest, width) for width in (d_ff, d_ff, hidden.shape[1])]
    by_row = (rows, hidden, grad_output, grad_rows, weight_of_row, dots)
    for expert, (read, before, grad, to_rows, weight, dot) in enumerate(
        zip(*(segments.parts(tensor) for tensor in by_row), strict=True)
    ):
        grad_inner, weighted, grad_hidden = (buffer[: len(read)] for buffer in scratch)
        torch.mm(grad, w_out[expert], out=grad_inner)
        row_passes.activation_gradient(
            before,
            grad_inner,
            weight,
            _activation(activation),
            weighted=weighted,
            grad_hidden=grad_hidden,
            dots=dot,
        )
        torch.mm(grad.t(), weighted, out=grad_w_out[expert])
        torch.mm(grad_hidden.t(), read, out=grad_w_in[expert])
        torch.mm(grad_hidden, w_in[expert], out=to_rows)
        if b_out is not None:
            dot += grad.to(wide) @ b_out[expert].to(wide)
            grad_b_out[expert] = weight @ grad.to(wide)
            grad_b_in[expert] = grad_hidden.sum(dim=0)
    grad_x = row_passes.sum_choices(grad_rows, row_of_assignment, None, x_dtype)
    return grad_x, dots[row_of_assignment], grad_w_in, grad_w_out, grad_b_in, grad_b_out


def _activation(name: str) -> Activation:
    """Operators take strings."""
    assert name in get_args(Activation)
    return cast(Activation, name)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, combine_weights, w_in, w_out, _, b_out, *_, activation = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # gradients of zeros for what is only kept would be as large
    ctx.save_for_backward(combine_weights, w_in, w_out, b_out, *output[1:])
    ctx.activation, ctx.x_dtype = activation, x.dtype


def _differentiate(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _gradients(_backward, ctx, grad_y)


def _differentiate_operator(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _gradients(_backward_operator, ctx, grad_y)


def _gradients(
    compute: Callable[..., tuple[Tensor, ...]], ctx: Any, grad_y: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_y is None:  # what comes after the experts had no gradient for them
        return (None,) * 9
    combine_weights, w_in, w_out, b_out, *kept = ctx.saved_tensors
    *gradients, grad_b_in, grad_b_out = compute(
        grad_y, combine_weights, w_in, w_out, b_out, *kept, ctx.activation, ctx.x_dtype
    )
    biases = (None, None) if b_out is None else (grad_b_in, grad_b_out)
    return (*gradients, *biases, None, None, None)


class _SegmentExperts(torch.autograd.Function):
    """The two directions as one function."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_remember)
    backward = staticmethod(_differentiate)


_operator = library.custom_op("moe::segment_experts", _forward, mutates_args=())
_backward_operator = library.custom_op("moe::segment_experts_backward", _backward, mutates_args=())
_operator.register_autograd(_differentiate_operator, setup_context=_remember)


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
