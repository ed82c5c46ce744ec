"""Experts without an MLP: zero, copy and constant (Jin et al. 2024, MoE++, eq. 3-5; LongCat-Flash's identities)."""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from moe.config import SpecialExpertsConfig
from moe.model.routing import Routing


class SpecialExperts(nn.Module):
    """The last experts of a layer's E, in the order zero, copy, constant: what they add to the MLPs' output."""

    def __init__(self, config: SpecialExpertsConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.constant = nn.Parameter(torch.empty(config.constant, d_model)) if config.constant else None
        self.mixing = nn.Parameter(torch.empty(config.constant, 2, d_model)) if config.constant else None

    def forward(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """Σ over a token's special experts of weight · output, in the dtype of the weights.

        zero: 0. copy: x. constant: α₁ x + α₂ v with (α₁, α₂) = softmax(W_c x), v and W_c learned.
        """
        weight = _weight_of_each(routing)
        n_zero, n_copy = self.config.zero, self.config.copy
        x = x.to(weight.dtype)
        y = x * weight[:, n_zero : n_zero + n_copy].sum(dim=1, keepdim=True)
        if self.constant is None or self.mixing is None:
            return y
        with torch.autocast(x.device.type, enabled=False):
            mixing = einsum(x, self.mixing.to(x.dtype), "t d, z two d -> t z two").softmax(dim=-1)
            share = mixing * weight[:, n_zero + n_copy :, None]
            y = y + x * share[..., 0].sum(dim=1, keepdim=True)
            return y + einsum(share[..., 1], self.constant.to(x.dtype), "t z, z d -> t d")


def _weight_of_each(routing: Routing) -> Float[Tensor, "T Z"]:
    """What each of the Z special experts is multiplied by, for each token: 0 where it was not chosen, or dropped."""
    carried_out = routing.carried_out
    weights = routing.weights if carried_out is None else routing.weights.masked_fill(~carried_out, 0.0)
    everyone = weights.new_zeros(routing.n_tokens, routing.n_experts).scatter_add(1, routing.selected, weights)
    return everyone[:, routing.n_mlps :]
