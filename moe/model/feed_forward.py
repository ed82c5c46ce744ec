"""The two- or three-matrix MLP that every feed-forward layer is made of: dense, expert and shared expert alike."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.config import Activation, FeedForwardConfig

Activate = Callable[[Tensor, Activation], Tensor]
"""the signature of :func:`activate`"""
GATED = ("swiglu", "swiglu_clamped")
CLAMP, CLAMPED_SLOPE = 7.0, 1.702
"""GPT-OSS: both halves within 7, a steeper gate (close to GELU), and a value that starts at 1 (its model card)."""


class FeedForward(nn.Module):
    """W_out · activation(W_in x): the dense layer, and the shared experts of a mixture.

    For SwiGLU (Shazeer 2020, eq. 6) W_in holds the gate in its first ``d_ff`` rows and the value in the rest.
    """

    def __init__(self, config: FeedForwardConfig, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.activation: Activation = config.activation
        self.activate: Activate = activate
        self.w_in = nn.Linear(d_model, input_width(config.activation, d_ff), bias=config.bias)
        self.w_out = nn.Linear(d_ff, d_model, bias=config.bias)

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        """Map each token on its own."""
        output: Tensor = self.w_out(self.activate(self.w_in(x), self.activation))
        return output


def input_width(activation: Activation, d_ff: int) -> int:
    """Rows of W_in: two for each hidden unit of a gated activation, else one."""
    return 2 * d_ff if activation in GATED else d_ff


def activate(hidden: Float[Tensor, "*T H"], activation: Activation) -> Float[Tensor, "*T F"]:
    """Apply the activation to W_in x, where H = 2 F for the gated ones (gate, then value) and H = F otherwise."""
    if activation == "swiglu_clamped":
        gate, value = hidden.chunk(2, dim=-1)
        gate, value = gate.clamp(max=CLAMP), value.clamp(-CLAMP, CLAMP)
        return gate * torch.sigmoid(CLAMPED_SLOPE * gate) * (value + 1)
    if activation == "swiglu":
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value
    if activation == "gelu":
        return F.gelu(hidden)
    if activation == "gelu_tanh":
        return F.gelu(hidden, approximate="tanh")
    return torch.relu(hidden)
