"""Activations and scores that give a number the same bits wherever it stands in a tensor.

On a CPU torch's sigmoid, SiLU, GELU and softplus round differently in the last elements of a tensor, which fill no
vector register, and so they tell a token in a small batch from one in a large one. ``exp``, ``tanh``, ``erf`` and
``log1p`` were found not to; these are made of them.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from moe.config import Activation, Score
from moe.model import feed_forward
from moe.model.feed_forward import CLAMP, CLAMPED_SLOPE
from moe.model.router import logits


def sigmoid(x: Float[Tensor, "*T n"]) -> Float[Tensor, "*T n"]:
    """1 / (1 + exp(-x)), in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (1 / (1 + torch.exp(-wide))).to(x.dtype)


def activate(hidden: Float[Tensor, "*T H"], activation: Activation) -> Float[Tensor, "*T F"]:
    """:func:`moe.model.feed_forward.activate`."""
    if activation == "relu":
        return feed_forward.activate(hidden, activation)
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if activation in ("gelu", "gelu_tanh"):
        inner = wide * math.sqrt(0.5)
        if activation == "gelu_tanh":
            inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
        curve = torch.tanh(inner) if activation == "gelu_tanh" else torch.erf(inner)
        return (0.5 * wide * (1 + curve)).to(hidden.dtype)
    gate, value = wide.chunk(2, dim=-1)
    if activation == "swiglu_clamped":
        gate, value = gate.clamp(max=CLAMP), value.clamp(-CLAMP, CLAMP) + 1
        return (gate * sigmoid(CLAMPED_SLOPE * gate) * value).to(hidden.dtype)
    return (gate * sigmoid(gate) * value).to(hidden.dtype)


def score_function(z: Float[Tensor, "T E"], score: Score) -> Float[Tensor, "T E"]:
    """:func:`moe.model.router.logits.score_function`."""
    if score == "sigmoid":
        return sigmoid(z)
    if score == "sqrt_softplus":
        softplus = z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))
        return softplus.clamp(min=torch.finfo(z.dtype).tiny).sqrt()
    return logits.score_function(z, score)
