"""What ranks that share a sequence or an expert send each other, forward and backward.

A sequence [B, S, D] is cut along S. Where every rank has a part of a matrix, what each computes from the whole sequence
is a part of a sum; so the gradient of a gathered sequence is a sum over the ranks too.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, autograd

SEQUENCE = 1
"""the dimension of a sequence"""
# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_sequence(x: Float[Tensor, "B s D"], group: dist.ProcessGroup) -> Float[Tensor, "B S D"]:
    """The whole sequence, of which each rank has a part; backward: the sum of the ranks' gradients, cut again."""
    whole: Tensor = _GatherSequence.apply(x, group)  # type: ignore[no-untyped-call]
    return whole


def sum_to_sequence(parts: Float[Tensor, "B S D"], group: dist.ProcessGroup) -> Float[Tensor, "B s D"]:
    """This rank's part of the sequence that is the sum of all ranks' ``parts``; backward: gathered."""
    mine: Tensor = _SumToSequence.apply(parts, group)  # type: ignore[no-untyped-call]
    return mine


def sum_gradients(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x``, whose gradient is the sum of what the ranks, each with a part of a matrix, make of it."""
    same: Tensor = _SumGradients.apply(x, group)  # type: ignore[no-untyped-call]
    return same


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x``, whose gradient counts ``factor`` times: 1 / ranks where each of them has all of it, and they are added."""
    same: Tensor = _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return same


def all_gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The ranks' tensors of one shape side by side along ``dim``; without a gradient."""
    parts = x.new_empty(group.size(), *x.shape)
    _all_gather(parts.flatten(0, 1), x.contiguous(), group=group)
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part along ``dim`` of the sum over the ranks; without a gradient."""
    parts = torch.stack(x.chunk(group.size(), dim))
    mine = torch.empty_like(parts[0])
    _reduce_scatter(mine, parts.flatten(0, 1), group=group)
    return mine


def all_reduce(x: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> Tensor:
    """Their sum, or another ``operation``, over the ranks; without a gradient."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, operation, group=group)
    return total


class _GatherSequence(autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, SEQUENCE, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, SEQUENCE, ctx.group), None


class _SumToSequence(autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(parts, SEQUENCE, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, SEQUENCE, ctx.group), None


class _SumGradients(autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, dist.ReduceOp.SUM, ctx.group), None


class _ScaleGradient(autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
