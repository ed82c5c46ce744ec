"""AdamW (Loshchilov & Hutter 2019, algorithm 2) for weights and moments in bfloat16.

Computed in float32. The weight and the second moment are rounded by chance (:mod:`.rounding`), the first moment, which
forgets a tenth in each step, to the nearest.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from moe.training.gpu import triton_is_installed
from moe.training.rounding import noise, round_by


@torch.no_grad()
def adamw_in_bf16(
    parameter: Float[Tensor, "*n"],
    gradient: Float[Tensor, "*n"],
    first: Float[Tensor, "*n"],
    second: Float[Tensor, "*n"],
    step: Float[Tensor, ""],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    salt: int,
    factor: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Move a parameter and its moments in place; ``step`` is the number of this step, from 1.

    ``salt`` tells tensors apart. The gradient counts times ``factor``, a tensor of one element (None: 1). Nothing
    happens where ``found_inf`` is not 0.
    """
    if use_kernels(parameter):
        from moe.training import optimizer_kernels as kernels

        kernels.adamw[kernels.grid(parameter.numel())](
            parameter,
            gradient.contiguous(),
            first,
            second,
            step,
            found_inf,
            factor,
            lr,
            *betas,
            eps,
            weight_decay,
            salt,
            parameter.numel(),
            BLOCK=kernels.BLOCK,
            num_warps=4,
        )
        return
    g = gradient.float() if factor is None else gradient.float() * factor
    m = first.float() + (1 - betas[0]) * (g - first.float())
    v = second.float() + (1 - betas[1]) * (g * g - second.float())
    correction1, correction2 = (1 - torch.exp(step * torch.tensor(beta, device=step.device).log()) for beta in betas)
    p = parameter.float()
    p = p - (lr * weight_decay * p + lr / correction1 * m / ((v / correction2).sqrt() + eps))
    bits = noise(step, salt, parameter.numel()).view(parameter.shape)
    put_unless_bad(parameter, round_by(bits, p), found_inf)
    put_unless_bad(first, m.to(first.dtype), found_inf)
    put_unless_bad(second, round_by(bits >> 16, v), found_inf)


@torch.no_grad()
def move_in_bf16(
    parameter: Float[Tensor, "*n"],
    direction: Float[Tensor, "*n"],
    step: Float[Tensor, ""],
    *,
    decay: float,
    rate: float,
    salt: int,
    found_inf: Tensor | None = None,
) -> None:
    """parameter · ``decay`` - ``rate`` · direction, rounded by chance, in place.

    The other arguments are those of :func:`adamw_in_bf16`.
    """
    if use_kernels(parameter):
        from moe.training import optimizer_kernels as kernels

        kernels.move[kernels.grid(parameter.numel())](
            parameter,
            direction.contiguous(),
            step,
            found_inf,
            decay,
            rate,
            salt,
            parameter.numel(),
            BLOCK=kernels.BLOCK,
            num_warps=4,
        )
        return
    bits = noise(step, salt, parameter.numel()).view(parameter.shape)
    put_unless_bad(parameter, round_by(bits, parameter.float() * decay - rate * direction.float()), found_inf)


def put_unless_bad(old: Tensor, new: Tensor, found_inf: Tensor | None) -> None:
    """Make ``old`` what ``new`` is, where ``found_inf`` is 0 or None; the host does not ask."""
    old.copy_(new if found_inf is None else torch.where(found_inf == 0, new, old))


def use_kernels(parameter: Tensor) -> bool:
    """Whether the Triton kernels move this tensor."""
    return parameter.is_cuda and parameter.is_contiguous() and triton_is_installed()
