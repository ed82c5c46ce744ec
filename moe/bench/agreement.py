"""Does a contestant compute what the float32 reference computes? Checked before anything is timed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.errors import UserError

TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}
"""largest relative error of one layer's output and gradients; a product of bf16 numbers makes about 0.003, a sum of
many in bf16 ten times as much, which is poor but no mistake"""
MODEL_TOLERANCE = {"fp32": 2e-3, "bf16": 0.3}
"""of a whole model's gradients, where a token whose two experts are nearly equal may go the other way"""
SAMPLE = 1 << 16
"""numbers of one tensor that are kept to compare with"""


class UnfitError(UserError):
    """This contestant is not made for this device, precision or size: no failure, but no time either."""


@dataclass(frozen=True)
class Agreement:
    """What was compared, and how far apart it was."""

    errors: Mapping[str, float]
    """relative error of each quantity: root of the squared differences over that of the squared values"""
    tolerance: float
    note: str = ""
    """what could not be compared, in words"""

    @property
    def worst(self) -> float | None:
        """The largest error, None where nothing was compared."""
        return max(self.errors.values(), default=None)

    @property
    def holds(self) -> bool:
        """Whether every error is within the tolerance (a NaN is not)."""
        return all(error <= self.tolerance for error in self.errors.values())

    def failure(self) -> str:
        """What to say where it does not hold."""
        name, error = max(self.errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
        return f"its {name} is off by {error:.2g} of float32's (at most {self.tolerance:g})"


def relative_error(values: Tensor, wanted: Tensor) -> float:
    """‖values - wanted‖ / ‖wanted‖ (Frobenius), in float32; NaN where ``values`` has one."""
    values, wanted = values.detach().float(), wanted.detach().float()
    return float((values - wanted).norm() / wanted.norm().clamp(min=1e-30))


def sample(tensor: Tensor) -> Tensor:
    """At most :data:`SAMPLE` numbers of ``tensor``, evenly spaced, as float32 on the CPU."""
    flat = tensor.detach().flatten()
    stride = -(-flat.numel() // SAMPLE)
    return flat[::stride].float().cpu()


def pooled_error(values: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """:func:`relative_error` over all tensors that ``wanted`` names, together."""
    pairs = [(values[name], tensor) for name, tensor in wanted.items()]
    return relative_error(torch.cat([a.flatten() for a, _ in pairs]), torch.cat([b.flatten() for _, b in pairs]))
