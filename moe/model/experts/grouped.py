"""The experts as two grouped matrix products of torch (``torch.nn.functional.grouped_mm``).

Assignments are sorted by expert, so that each expert's rows lie together; one grouped product computes W_in for all
experts, another W_out; the rows are put back in token order and summed with their weights.

What grouped_mm needs, and how it is met here:
- a row stride of whole 16 bytes, in bfloat16, float16 or float32: :func:`unsupported` says what does not fit, in words;
- rows beyond the last offset are left uninitialised, forward and backward: rows of padding and dropped assignments
  are sorted to the end and replaced by zeros on the way in and on the way out;
- it is unknown to autocast: inputs and weights are cast here;
- its backward refuses an expanded gradient, as ``out.sum().backward()`` would send: what follows each product here (an
  indexing, an activation) hands back a gradient of its own.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.model.experts.weights import ExpertWeights, compute_dtype
from moe.model.feed_forward import activate
from moe.model.routing import Routing


def grouped_experts(x: Float[Tensor, "T D"], routing: Routing, weights: ExpertWeights) -> Float[Tensor, "T D"]:
    """What :func:`~moe.model.experts.reference.reference_experts` computes; raises where :func:`unsupported` speaks."""
    dtype = compute_dtype(x)
    order, ends, expert_of_row, computed = sort_by_expert(routing)
    rows = x.to(dtype)[order // routing.top_k]
    if computed is not None:
        rows = rows.where(computed[:, None], 0)
    hidden = _grouped_linear(rows, weights.w_in.to(dtype), weights.b_in, ends, expert_of_row)
    if computed is not None:
        hidden = hidden.where(computed[:, None], 0)
    output = _grouped_linear(
        activate(hidden, weights.activation), weights.w_out.to(dtype), weights.b_out, ends, expert_of_row
    )
    if computed is not None:
        output = output.where(computed[:, None], 0)
    return combine(output[order.argsort()], routing).to(x.dtype)


def unsupported(x: Tensor, weights: ExpertWeights) -> str | None:
    """Why ``grouped_mm`` cannot run on this input, or None where it can."""
    dtype = compute_dtype(x)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"grouped_mm has no {dtype}"
    for name, size in (("d_model", weights.w_out.shape[1]), ("d_ff", weights.w_out.shape[2])):
        if size * dtype.itemsize % 16:
            return f"grouped_mm needs rows of whole 16 bytes, and {name} = {size} in {dtype} is {size * dtype.itemsize}"
    if torch.compiler.is_compiling() and dtype != torch.bfloat16:
        return f"grouped_mm under torch.compile takes bfloat16 alone, not {dtype}"
    return None


def sort_by_expert(
    routing: Routing,
) -> tuple[Int[Tensor, " N"], Int[Tensor, " E"], Int[Tensor, " N"], Bool[Tensor, " N"] | None]:
    """The N = T·K assignments in order of their expert, those that no expert computes last.

    Returns the order (assignment t·K + k at each row), the end of each expert's rows (int32, as grouped_mm wants),
    the expert of each row, and which rows are computed (None: all). Stable, so that the order within an expert is that
    of the tokens; no host synchronisation.
    """
    expert = routing.selected.flatten()
    executed = routing.executed
    key = expert if executed is None else expert.where(executed.flatten(), routing.n_mlps)
    sorted_key, order = key.sort(stable=True)
    experts = torch.arange(routing.n_mlps, device=key.device, dtype=key.dtype)
    ends = torch.searchsorted(sorted_key, experts, right=True).to(torch.int32)
    if executed is None:
        return order, ends, sorted_key, None
    computed = sorted_key < routing.n_mlps
    return order, ends, sorted_key.clamp(max=routing.n_mlps - 1), computed


def combine(output: Float[Tensor, "N D"], routing: Routing) -> Float[Tensor, "T D"]:
    """Σ_k weight_tk · output_{t·K+k}, in the dtype of the weights (float32); no atomics, so deterministic."""
    per_choice = output.view(routing.n_tokens, routing.top_k, output.shape[-1]).to(routing.weights.dtype)
    return (per_choice * routing.weights[..., None]).sum(dim=1)


def _grouped_linear(
    rows: Float[Tensor, "N I"],
    weight: Float[Tensor, "E O I"],
    bias: Float[Tensor, "E O"] | None,
    ends: Int[Tensor, " E"],
    expert_of_row: Int[Tensor, " N"],
) -> Float[Tensor, "N O"]:
    product: Tensor = F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    return product if bias is None else product + bias.to(product.dtype)[expert_of_row]
