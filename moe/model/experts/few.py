"""The experts for a few tokens on a CPU, without gradients: in decoding a weight is read for a row or two.

The time goes into reading weights, and into calls. So the host looks at which experts are hit, and only those are
computed, each in a product of its own with just its rows: nothing is padded, and no other weight is read.

Where there is a compiler, a kernel in C++ does that in one call (``native/few.cpp``): :func:`sum_of_selected`. Without
one, where most experts are hit, one product of all of them (``bmm``) can be faster all the same: it reads those that no
token wants, and gives each as many rows as the busiest, but it is one call. The two are weighed in bytes read.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moe.model import native
from moe.model.experts.weights import ExpertWeights, compute_dtype
from moe.model.feed_forward import activate
from moe.model.routing import Routing

MOST_ASSIGNMENTS = 64
"""beyond so many, what the host does for each of them costs more than it saves"""
NOBODY = -1
"""the expert of a place that none computes"""
CALL_IN_BYTES = {2: 1_500_000, 4: 300_000, 8: 300_000}
"""what could be read while the two products of one expert are called, by the bytes of a number

Two cores of a Xeon with AMX read 30 GB/s. Beside reading, a product through MKL took 5 us; one in bfloat16, through
oneDNN, 25 us."""
ROWS_AS_READING = 12
"""in a product of all experts, so many more rows of each took as long as reading the weights once more"""


def few_experts(x: Float[Tensor, "T D"], routing: Routing, weights: ExpertWeights) -> Float[Tensor, "T D"]:
    """What :func:`~moe.model.experts.reference.reference_experts` computes, for tensors on a CPU."""
    executed = routing.executed
    selected = routing.selected if executed is None else routing.selected.where(executed, NOBODY)
    return sum_of_selected(x, selected, routing.weights, weights).to(x.dtype)


def fits(x: Tensor, routing: Routing) -> bool:
    """Whether there are few enough tokens, on a CPU, and nobody wants a gradient."""
    return (
        routing.selected.numel() <= MOST_ASSIGNMENTS
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # which cannot trace what the host reads
    )


def sum_of_selected(
    x: Float[Tensor, "T D"],
    selected: Int[Tensor, "T K"],
    combine_weights: Float[Tensor, "T K"],
    weights: ExpertWeights,
    one_by_one: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> Float[Tensor, "T D"]:
    """:func:`sum_of_experts`, in one call where there are kernels for it."""
    same = x.dtype == compute_dtype(x) == weights.w_in.dtype
    if not (same and combine_weights.dtype == torch.float32 and native.computes(x, weights.w_in, weights.w_out)):
        return sum_of_experts(x, selected.tolist(), combine_weights, weights, one_by_one)
    y = x.new_empty(x.shape, dtype=torch.float32)
    matrices_and_biases = weights.w_in, weights.b_in, weights.w_out, weights.b_out
    read = (None if t is None else t.contiguous() for t in (x, selected, combine_weights, *matrices_and_biases))
    n_experts, d_model, d_ff = weights.w_out.shape
    name = f"few_experts_{weights.activation}_{native.DTYPES[x.dtype]}"
    native.call(name, *read, y, *selected.shape, n_experts, d_model, d_ff)
    return y


def sum_of_experts(
    x: Float[Tensor, "T D"],
    chosen: list[list[int]],
    combine_weights: Float[Tensor, "T K"],
    weights: ExpertWeights,
    one_by_one: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> Float[Tensor, "T D"]:
    """Σ_k weight_tk · expert_{chosen_tk}(x_t), in the dtype of the ``combine_weights``; :data:`NOBODY` adds nothing.

    ``one_by_one``: the matrices of ``weights`` as a sequence each, from who has them at hand.
    """
    w_in, w_out = one_by_one or (weights.w_in, weights.w_out)
    if len(chosen) == 1 and NOBODY not in chosen[0]:
        [experts] = chosen
        hidden = torch.cat([F.linear(x, w_in[expert], weights.bias_in(expert)) for expert in experts])
        inner = activate(hidden, weights.activation).split_with_sizes([1] * len(experts))
        outputs = torch.cat(
            [F.linear(row, w_out[e], weights.bias_out(e)) for row, e in zip(inner, experts, strict=True)]
        )
        return torch.mm(combine_weights, outputs.to(combine_weights.dtype))

    places = places_of_experts(chosen)
    if not places:
        return torch.zeros_like(x, dtype=combine_weights.dtype)
    top_k = combine_weights.shape[1]
    if compute_dtype(x) == weights.w_in.dtype and all_at_once_pays(places, weights):
        outputs, row_of_place = _all_at_once(x, weights, places, top_k)
    else:
        place_of_row = [place for of_expert in places.values() for place in of_expert]
        row_of_place = {place: row for row, place in enumerate(place_of_row)}
        sizes = [len(of_expert) for of_expert in places.values()]
        rows = x.index_select(0, torch.tensor([place // top_k for place in place_of_row]))
        parts = zip(places, rows.split_with_sizes(sizes), strict=True)
        hidden = torch.cat([F.linear(part, w_in[expert], weights.bias_in(expert)) for expert, part in parts])
        parts = zip(places, activate(hidden, weights.activation).split_with_sizes(sizes), strict=True)
        outputs = torch.cat([F.linear(part, w_out[expert], weights.bias_out(expert)) for expert, part in parts])

    n_places = len(chosen) * top_k
    if len(row_of_place) < n_places:
        outputs = F.pad(outputs, (0, 0, 0, 1))  # a row of zeros, the last, for places of nobody
    per_place = outputs.index_select(
        0, torch.tensor([row_of_place.get(place, len(outputs) - 1) for place in range(n_places)])
    )
    per_place = per_place.view(len(chosen), top_k, -1).to(combine_weights.dtype)
    return torch.bmm(combine_weights[:, None], per_place).squeeze(1)


def places_of_experts(chosen: list[list[int]]) -> dict[int, list[int]]:
    """The places t·K + k that each expert computes, in the order of the tokens; experts without one are left out."""
    places: dict[int, list[int]] = {}
    place = 0
    for of_token in chosen:
        for expert in of_token:
            if expert != NOBODY:
                places.setdefault(expert, []).append(place)
            place += 1
    return places


def all_at_once_pays(places: dict[int, list[int]], weights: ExpertWeights) -> bool:
    """Whether one product of all experts should take less time than one of each that is hit."""
    n_experts, d_model, d_ff = weights.w_out.shape
    itemsize = weights.w_in.itemsize
    size = (weights.w_in.shape[1] + d_ff) * d_model * itemsize
    busiest = max(map(len, places.values()))
    return n_experts * size * (1 + busiest / ROWS_AS_READING) < len(places) * (size + CALL_IN_BYTES[itemsize])


def _all_at_once(
    x: Float[Tensor, "T D"], weights: ExpertWeights, places: dict[int, list[int]], top_k: int
) -> tuple[Float[Tensor, "R D"], dict[int, int]]:
    """One product of all experts, each with as many rows as the busiest: the outputs, and the row of each place."""
    n_experts, most = weights.w_in.shape[0], max(map(len, places.values()))
    token_of_row = [0] * (n_experts * most)
    row_of_place = {}
    for expert, of_expert in places.items():
        for row, place in enumerate(of_expert, expert * most):
            token_of_row[row], row_of_place[place] = place // top_k, row
    rows = x.index_select(0, torch.tensor(token_of_row)).view(n_experts, most, -1)
    hidden = torch.bmm(rows, weights.w_in.transpose(1, 2))
    if weights.b_in is not None:
        hidden = hidden + weights.b_in[:, None]
    outputs = torch.bmm(activate(hidden, weights.activation), weights.w_out.transpose(1, 2))
    if weights.b_out is not None:
        outputs = outputs + weights.b_out[:, None]
    return outputs.flatten(0, 1), row_of_place
