"""Gradients of parameters that several ranks have whole, added up."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BUCKET = 1 << 26
"""numbers that are sent at once"""


def add_over(group: dist.ProcessGroup | None, parameters: Sequence[nn.Parameter], factor: float) -> None:
    """Replace every gradient by the ranks' sum of it times ``factor``, many in one reduction; all have one."""
    for bucket in _buckets(parameters):
        gradients = [_required(parameter) for parameter in bucket]
        if group is None:
            if factor != 1:
                torch._foreach_mul_(gradients, factor)
            continue
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=group)
        flat *= factor
        start = 0
        for parameter in bucket:
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()


def gradient_of(parameter: nn.Parameter, like: Tensor) -> Tensor:
    """What is here of the gradient; zeros where there is none."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(like)
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters dtype by dtype, in their order, in lists of at most BUCKET numbers or one parameter."""
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for same in by_dtype.values():
        bucket: list[nn.Parameter] = []
        for parameter in same:
            if bucket and sum(other.numel() for other in bucket) + parameter.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append(parameter)
        yield bucket


def _required(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
