"""The weights of all experts of a layer, stacked: what an expert back-end is given."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moe.config import Activation


class ExpertWeights(NamedTuple):
    """One slice an expert, each laid out as ``nn.Linear`` lays out a weight; H = 2 F for swiglu, else F."""

    w_in: Float[Tensor, "E H D"]
    w_out: Float[Tensor, "E D F"]
    b_in: Float[Tensor, "E H"] | None
    b_out: Float[Tensor, "E D"] | None
    activation: Activation

    def bias_in(self, expert: int) -> Float[Tensor, " H"] | None:
        """The input bias of one expert."""
        return None if self.b_in is None else self.b_in[expert]

    def bias_out(self, expert: int) -> Float[Tensor, " D"] | None:
        """The output bias of one expert; it is weighted like the rest of the expert's output."""
        return None if self.b_out is None else self.b_out[expert]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product on ``x`` runs here: that of autocast where it is on, else that of ``x``."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
