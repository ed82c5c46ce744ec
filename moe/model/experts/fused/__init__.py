"""The experts on a GPU in Triton: forward and backward as two operators that torch.compile and CUDA graphs take whole.

``kernels`` has the kernels, ``launch`` their order, ``tiles`` the sizes of their tiles, ``sort`` which rows are whose;
``hopper`` and ``launch_hopper`` have what Hopper GPUs take instead.
"""

from functools import cache
from typing import Any, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, library

from moe.config import Activation
from moe.model.experts.fused.sort import SortedAssignments, sort_assignments
from moe.model.experts.weights import ExpertWeights, compute_dtype
from moe.model.routing import Routing

DTYPES = (torch.bfloat16, torch.float16)


def fused_experts(x: Float[Tensor, "T D"], routing: Routing, weights: ExpertWeights) -> Float[Tensor, "T D"]:
    """What :func:`~moe.model.experts.reference.reference_experts` computes, where :func:`unsupported` is silent.

    Deterministic, without host synchronisation. The products run in the dtype of ``x`` (that of autocast, where it is
    on) and accumulate in float32; the sum over choices is float32.
    """
    if weights.b_in is not None:
        raise ValueError("the fused kernels have no biases")
    dtype = compute_dtype(x)
    if x.shape[0] == 0:
        # Nothing to launch, but every gradient is there.
        return x + 0 * (weights.w_in.sum() + weights.w_out.sum() + routing.weights.sum()).to(x.dtype)
    assignments = sort_assignments(routing.selected, routing.executed, routing.n_mlps)
    y, _ = _forward(
        x.to(dtype).contiguous(),
        routing.weights.float().contiguous(),
        weights.w_in.to(dtype).contiguous(),
        weights.w_out.to(dtype).contiguous(),
        *assignments,
        weights.activation,
        x.dtype,
    )
    return cast(Tensor, y)


def unsupported(x: Tensor, weights: ExpertWeights) -> str | None:
    """Why the kernels cannot run on this input, or None where they can."""
    dtype = compute_dtype(x)
    if x.device.type != "cuda":
        return f"the fused kernels are for NVIDIA GPUs, and the input is on {x.device.type}"
    if dtype not in DTYPES:
        return f"the fused kernels compute in bfloat16 or float16, not {dtype}"
    if weights.b_in is not None:
        return "the fused kernels have no biases"
    for name, size in (("d_model", weights.w_out.shape[1]), ("d_ff", weights.w_out.shape[2])):
        if size % 8:
            return f"the fused kernels need rows of whole 16 bytes, and {name} = {size} is no multiple of 8"
    reason: str | None = _no_triton()
    return reason


# What torch.compile must not look into: it warns of a cache.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _no_triton() -> str | None:
    return _why_no_triton()


@cache
def _why_no_triton() -> str | None:
    try:
        import triton.tools.tensor_descriptor  # noqa: F401
    except ImportError:
        return "Triton is not installed, or older than 3.4"
    if torch.version.hip is not None:
        return "the fused kernels were written for NVIDIA GPUs"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the fused kernels need a GPU of compute capability 8.0 or more"
    return None


@library.custom_op("moe::fused_experts", mutates_args=())
def _forward(
    x: Tensor,
    combine_weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    assignment_of_row: Tensor,
    row_of_assignment: Tensor,
    ends: Tensor,
    activation: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from moe.model.experts.fused import launch

    problem = launch.Problem(
        w_in,
        w_out,
        combine_weights,
        SortedAssignments(assignment_of_row, row_of_assignment, ends),
        _activation(activation),
    )
    return launch.forward(x, problem, out_dtype)


@_forward.register_fake
def _(
    x: Tensor,
    combine_weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    assignment_of_row: Tensor,
    row_of_assignment: Tensor,
    ends: Tensor,
    activation: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(combine_weights.numel(), w_in.shape[1])


@library.custom_op("moe::fused_experts_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor,
    hidden: Tensor,
    combine_weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    assignment_of_row: Tensor,
    row_of_assignment: Tensor,
    ends: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from moe.model.experts.fused import launch

    problem = launch.Problem(
        w_in,
        w_out,
        combine_weights,
        SortedAssignments(assignment_of_row, row_of_assignment, ends),
        _activation(activation),
    )
    return launch.backward(grad_y.to(x.dtype).contiguous(), x, hidden, problem)


@_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    hidden: Tensor,
    combine_weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    assignment_of_row: Tensor,
    row_of_assignment: Tensor,
    ends: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(combine_weights), torch.empty_like(w_in), torch.empty_like(w_out)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, activation, _ = inputs
    x, combine_weights, w_in, w_out, *assignments = tensors
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # a gradient of zeros for hidden would be as large as hidden
    ctx.save_for_backward(x, output[1], combine_weights, w_in, w_out, *assignments)
    ctx.activation = activation


def _differentiate(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:  # what comes after the experts had no gradient for them
        return (None,) * 9
    return (*_backward(grad_y, *ctx.saved_tensors, ctx.activation), None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_keep)


def _activation(name: str) -> Activation:
    """Operators take strings; the kernels know the activations."""
    assert name in get_args(Activation)
    return cast(Activation, name)
