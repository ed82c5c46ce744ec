"""What ranks that share a sequence or an expert send each other, forward and backward.

A sequence [B, S, D] is cut along S. Where every rank has a part of a matrix, what each computes from the whole sequence
is a part of a sum; so the gradient of a gathered sequence is a sum over the ranks too.
"""

from typing import Any

import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, autograd
from torch.distributed import _functional_collectives as collectives

SEQUENCE = 1
"""the dimension of a sequence"""


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
    return _arrived(collectives.all_gather_tensor(x.contiguous(), dim, group))


def reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part along ``dim`` of the sum over the ranks; without a gradient."""
    return _arrived(collectives.reduce_scatter_tensor(x.contiguous(), "sum", dim, group))


def all_reduce(x: Tensor, operation: str, group: dist.ProcessGroup) -> Tensor:
    """``operation`` (sum, max) over the ranks; without a gradient."""
    return _arrived(collectives.all_reduce(x.contiguous(), operation, group))


def _arrived(x: Tensor) -> Tensor:
    arrived: Tensor = collectives.wait_tensor(x)  # type: ignore[no-untyped-call]
    return arrived


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
        return all_reduce(grad, "sum", ctx.group), None


class _ScaleGradient(autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
