"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): every direction of a matrix counts alike in a step.

The momentum of a matrix is replaced by the nearest matrix whose singular values are about 1, found by five steps of a
Newton-Schulz iteration: products alone, in bfloat16, which a GPU is made for. Stacked experts are as many matrices, and
a gated W_in is two, the gate and the value; all that have one shape go through the products together.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moe.config import StepSize

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the odd polynomial a x + b x³ + c x⁵, which is steep at 0 and wavers near 1"""
SMALLEST_NORM = 1e-7
LARGEST_BATCH = 1 << 28
"""elements that go through the iteration together: 512 MiB in bfloat16"""


def orthogonalise(matrices: Float[Tensor, "n rows columns"], iterations: int = 5) -> Float[Tensor, "n rows columns"]:
    """U S' Vᵀ for each matrix U S Vᵀ, with S' near 1: so many times X ← a X + (b X Xᵀ + c (X Xᵀ)²) X, in their dtype.

    After five, singular values above 0.0015 of the matrix's norm are between 0.68 and 1.21; 0 stays 0.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    # No singular value above 1, which the polynomial would send to infinity.
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(iterations):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def scale_of(step_size: StepSize, rows: int, columns: int) -> float:
    """What a step of a matrix [rows, columns] is multiplied by.

    ``adamw``: 0.2 √max(rows, columns), which makes the root mean square of its elements that of AdamW's steps, about
    0.2 (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4), so that both can use one learning rate.
    ``spectral``: √max(1, rows / columns), Jordan's own, for rates about a hundred times as high.
    """
    return 0.2 * math.sqrt(max(rows, columns)) if step_size == "adamw" else math.sqrt(max(1.0, rows / columns))


def matrices_of(parameter: Tensor, halves: int) -> Float[Tensor, "n rows columns"]:
    """The matrices of a parameter [D_out, D_in] or [E, D_out, D_in], each cut into so many, one above the other."""
    return parameter.reshape(-1, parameter.shape[-2] // halves, parameter.shape[-1])


def of_one_shape(parameters: list[Tensor]) -> list[list[Tensor]]:
    """The parameters by shape, device and dtype, in batches of at most LARGEST_BATCH elements, or of one parameter."""
    batches: dict[tuple[Any, ...], list[list[Tensor]]] = {}
    for parameter in parameters:
        alike = batches.setdefault((parameter.shape, parameter.device, parameter.dtype), [[]])
        if alike[-1] and (len(alike[-1]) + 1) * parameter.numel() > LARGEST_BATCH:
            alike.append([])
        alike[-1].append(parameter)
    return [batch for alike in batches.values() for batch in alike]
