"""How the kernels of :mod:`.hopper` are started: what :mod:`.launch` calls where a GPU has them."""

import torch
from torch import Tensor
from triton.experimental.gluon.language import bfloat16, float16
from triton.experimental.gluon.language._layouts import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe.model.experts.fused import hopper
from moe.model.experts.fused.launch import Problem, descriptor, programs, ragged

BLOCK_M, BLOCK_N, BLOCK_K, PART = (size.value for size in (hopper.BLOCK_M, hopper.BLOCK_N, hopper.BLOCK_K, hopper.PART))
WARPS = 4
"""of the first group that multiplies; the kernels add the others"""


def hidden_and_activation(x: Tensor, problem: Problem, hidden: Tensor, inner: Tensor) -> None:
    """Write both; SwiGLU alone."""
    n_experts, width, d_model = problem.w_in.shape
    schedule = problem.schedule(BLOCK_M)
    hopper.hidden_and_activation[programs(x)](
        x,
        _in_gluon(descriptor(problem.w_in.view(n_experts * width, d_model), [BLOCK_N // 2, BLOCK_K])),
        _in_gluon(ragged(hidden, [BLOCK_M, PART])),
        inner,
        problem.assignments.assignment_of_row,
        *schedule[:2],
        problem.assignments.ends,
        schedule.n_tiles,
        d_model,
        width // 2,
        problem.n_rows - 1,
        K=problem.top_k,
        num_warps=WARPS,
    )


def inner_gradient(grad_y: Tensor, hidden: Tensor, problem: Problem, inner: Tensor, grad_hidden: Tensor) -> Tensor:
    """Write the weighted activation and the gradient of hidden; return that of the weights. SwiGLU alone."""
    n_experts, d_model, d_ff = problem.w_out.shape
    schedule = problem.schedule(BLOCK_M)
    dots = torch.zeros(*problem.weights.shape, d_ff // BLOCK_N, device=hidden.device)
    hopper.inner_gradient[programs(hidden)](
        grad_y,
        _in_gluon(descriptor(problem.w_out.view(n_experts * d_model, d_ff), [BLOCK_K, BLOCK_N])),
        hidden,
        problem.weights,
        grad_hidden,
        inner,
        dots,
        problem.assignments.assignment_of_row,
        *schedule[:2],
        problem.assignments.ends,
        schedule.n_tiles,
        d_model,
        d_ff,
        problem.n_rows - 1,
        K=problem.top_k,
        num_warps=WARPS,
    )
    return dots.sum(dim=-1)


def rows_by_weight(rows: Tensor, weight: Tensor, out: Tensor, problem: Problem, *, transposed: bool) -> None:
    """Write ``out``."""
    block = [BLOCK_K, BLOCK_N] if transposed else [BLOCK_N, BLOCK_K]
    schedule = problem.schedule(BLOCK_M)
    hopper.rows_by_weight[programs(rows)](
        _in_gluon(descriptor(rows, [BLOCK_M, BLOCK_K])),
        _in_gluon(descriptor(weight.view(-1, weight.shape[2]), block)),
        _in_gluon(ragged(out, [BLOCK_M, PART])),
        *schedule[:2],
        problem.assignments.ends,
        schedule.n_tiles,
        rows.shape[1],
        out.shape[1],
        TRANSPOSED=transposed,
        num_warps=WARPS,
    )


def weight_gradient(left: Tensor, right: Tensor, out: Tensor, problem: Problem) -> None:
    """Write ``out``."""
    hopper.weight_gradient[programs(left)](
        _in_gluon(ragged(left, [BLOCK_K, BLOCK_M])),
        _in_gluon(ragged(right, [BLOCK_K, BLOCK_N])),
        _in_gluon(descriptor(out, [1, BLOCK_M, PART])),
        problem.assignments.ends,
        problem.schedule(BLOCK_M).busiest,
        *out.shape,
        num_warps=WARPS,
    )


def weight_gradient_of_tokens(left: Tensor, right: Tensor, out: Tensor, problem: Problem) -> None:
    """Write ``out`` for a ``left`` with a row a token."""
    hopper.weight_gradient_of_tokens[programs(left)](
        left,
        _in_gluon(ragged(right, [BLOCK_K, BLOCK_N])),
        _in_gluon(descriptor(out, [1, BLOCK_M, PART])),
        problem.assignments.assignment_of_row,
        problem.assignments.ends,
        problem.schedule(BLOCK_M).busiest,
        *out.shape,
        problem.n_rows - 1,
        K=problem.top_k,
        num_warps=WARPS,
    )


def _in_gluon(descriptor: TensorDescriptor) -> GluonDescriptor:
    dtype = bfloat16 if descriptor.base.dtype == torch.bfloat16 else float16
    block = list(descriptor.block_shape)
    layout = NVMMASharedLayout.get_default_for(block, dtype)
    return GluonDescriptor(descriptor.base, list(descriptor.shape), list(descriptor.strides), block, layout)
