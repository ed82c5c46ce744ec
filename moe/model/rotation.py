"""Rotary positions: queries and keys turned by angles that grow with the position (Su et al. 2021)."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.config import ModelConfig
from moe.model import rope_scaling


def rotation_of(positions: Int[Tensor, "#B S"], config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [B, 1, S, d / 2], of position · θ^(-2i/d), for the d dimensions of a head that turn."""
    attention, width = config.attention, config.attention.rotated_dim
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    frequencies = attention.rope_theta**-exponents
    if attention.rope.scaling != "none":
        frequencies = rope_scaling.scaled(frequencies, config)
    angles = positions[:, None, :, None].float() * frequencies
    cosine, sine = angles.cos(), angles.sin()
    factor = rope_scaling.rotation_factor(attention.rope)
    return (cosine, sine) if factor == 1 else (cosine * factor, sine * factor)


def rotate(x: Float[Tensor, "B H S d"], rotation: tuple[Tensor, Tensor]) -> Float[Tensor, "B H S d"]:
    """Turn the pairs (x_i, x_{i + r/2}) by their angle: the half-split layout of GPT-NeoX, Llama and Mixtral.

    r is the number of dimensions that ``rotation`` is for, the first of the d; the others stay as they are.
    """
    turning = 2 * rotation[0].shape[-1]
    if turning < x.shape[-1]:
        return torch.cat([rotate(x[..., :turning], rotation), x[..., turning:]], dim=-1)
    if x.is_cuda:
        return rotate_rows(x, rotation)
    rotated: Tensor = _Rotate.apply(x, *rotation)  # type: ignore[no-untyped-call]
    return rotated


def rotate_rows(x: Float[Tensor, "B H S d"], rotation: tuple[Tensor, Tensor]) -> Float[Tensor, "B H S d"]:
    """:func:`rotate`, with a token's heads side by side in memory, as the projections leave them and want them back.

    A GPU's attention answers in the layout that it is asked in, so neither it nor its gradient need be copied.
    """
    rows: Tensor = _Rotate.apply(  # type: ignore[no-untyped-call]
        x.transpose(1, 2), *(part.transpose(1, 2) for part in rotation)
    )
    return rows.transpose(1, 2)


class _Rotate(torch.autograd.Function):
    """A rotation, whose transpose, and so its backward, is the opposite rotation: half the work of autograd's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In at least float32, returned in the dtype of ``x``."""
    first, second = x.chunk(2, dim=-1)
    turned = [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)]
    return torch.cat(turned, dim=-1).to(x.dtype)
