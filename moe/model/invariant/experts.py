"""The experts over tiles of each expert's rows."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moe.model.experts import fused
from moe.model.experts.fused import fused_experts
from moe.model.experts.segments import lay_out
from moe.model.experts.weights import ExpertWeights, compute_dtype
from moe.model.invariant.elementwise import activate
from moe.model.invariant.products import by_weights
from moe.model.routing import Routing


def invariant_experts(x: Float[Tensor, "T D"], routing: Routing, weights: ExpertWeights) -> Float[Tensor, "T D"]:
    """What :func:`~moe.model.experts.reference.reference_experts` computes; a token's sum does not know of the others.

    On a GPU that runs them the fused kernels are so already: all their tilings sum in one order.
    """
    if fused.unsupported(x, weights) is None:
        return fused_experts(x, routing, weights)
    segments = lay_out(routing.selected, routing.executed, routing.n_mlps)
    dtype = compute_dtype(x)
    rows = F.pad(x.to(dtype), (0, 0, 0, 1))[segments.token_of_row]
    lengths = torch.tensor([end - start for start, end in segments.spans], device=x.device)
    expert_of_row = torch.repeat_interleave(lengths, output_size=len(rows))
    hidden = by_weights(rows, weights.w_in.to(dtype), segments.spans)
    if weights.b_in is not None:
        hidden = hidden + weights.b_in.to(dtype)[expert_of_row]
    outputs = by_weights(activate(hidden, weights.activation), weights.w_out.to(dtype), segments.spans)
    if weights.b_out is not None:
        outputs = outputs + weights.b_out.to(dtype)[expert_of_row]
    outputs = F.pad(outputs, (0, 0, 0, 1)).to(routing.weights.dtype)
    y = torch.zeros_like(x, dtype=routing.weights.dtype)
    for choice, weight in enumerate(routing.weights.unbind(dim=1)):
        y = y + weight[:, None] * outputs[segments.row_of_assignment[:, choice]]
    return y.to(x.dtype)
