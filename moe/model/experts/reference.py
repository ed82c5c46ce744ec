"""The experts as a loop that anyone can read: the definition that every faster back-end is tested against."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moe.model.experts.weights import ExpertWeights
from moe.model.feed_forward import activate
from moe.model.routing import Routing


def reference_experts(x: Float[Tensor, "T D"], routing: Routing, weights: ExpertWeights) -> Float[Tensor, "T D"]:
    """y_t = Σ_k weight_tk · expert_{selected_tk}(x_t), summed in float32 (float64 for float64 input).

    Any dtype and shape; under autocast the products run in the autocast dtype. An expert without tokens computes on
    zero rows, so that its gradient is zero and not None (a skipped expert would hang or desynchronise other ranks).
    """
    combined = torch.zeros_like(x, dtype=routing.weights.dtype)
    executed = routing.executed
    for expert in range(routing.n_mlps):
        chosen = routing.selected == expert
        token, choice = torch.where(chosen if executed is None else chosen & executed)
        output = one_expert(x[token], expert, weights)
        combined = combined.index_add(0, token, output.to(combined.dtype) * routing.weights[token, choice, None])
    return combined.to(x.dtype)


def one_expert(x: Float[Tensor, "n D"], expert: int, weights: ExpertWeights) -> Float[Tensor, "n D"]:
    """W_out · activation(W_in x) of one expert, biases included."""
    hidden = activate(F.linear(x, weights.w_in[expert], weights.bias_in(expert)), weights.activation)
    return F.linear(hidden, weights.w_out[expert], weights.bias_out(expert))
