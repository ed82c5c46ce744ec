"""Which assignments an expert has no room for, and which second choices are kept at all."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.config import CapacityConfig
from moe.model.routing import Routing


def beyond_capacity(routing: Routing, top_k: int, config: CapacityConfig) -> Bool[Tensor, "T K"]:
    """True for assignments beyond their expert's capacity C = ceil(factor k T / E), special experts included.

    T counts the real tokens of the scope: of the micro-batch (GShard's group, Lepikhin et al. 2020, arXiv 2006.16668,
    algorithm 1; Switch, Fedus et al. 2021, arXiv 2101.03961, eq. 3), or of each sequence. ``config.order`` says who
    finds room first:

    - position: a token's choices, then the next token's. The only order in which no token can evict an earlier one;
      over the micro-batch, it makes a sequence depend on those before it.
    - choice: all first choices in token order, then all second choices, and so on (GShard). A later token's first
      choice may evict an earlier token's second.
    - score: the larger weight, ties in the order of position (batch-prioritised routing, Riquelme et al. 2021,
      arXiv 2106.05974, here for single assignments instead of whole tokens). Not causal either.

    Empty places and padding take no room and are never dropped. ``routing.weights`` are those before dropping;
    ``top_k`` is k, which K exceeds where the number of experts varies. No host synchronisation.
    """
    present = routing.present
    sequences = routing.n_sequences if config.scope == "sequence" else 1
    n_groups = sequences * routing.n_experts
    tokens = torch.arange(routing.n_tokens, device=routing.selected.device)
    sequence = tokens // (routing.n_tokens // sequences)
    group = routing.selected + (sequence * routing.n_experts)[:, None]
    if present is not None:
        group = group.masked_fill(~present, n_groups)

    priority = _priority(routing, config)
    order = priority[group.flatten()[priority].argsort(stable=True)]
    first = torch.searchsorted(group.flatten()[order], torch.arange(n_groups + 1, device=group.device))
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    place = rank.view_as(group) - first[group]

    assert config.factor is not None
    real_tokens = _real_tokens(routing, sequences)
    beyond = place >= capacity_of(real_tokens, top_k, routing.n_experts, config.factor)[sequence][:, None]
    return beyond if present is None else beyond & present


def capacity_of(real_tokens: Int[Tensor, "*B"], top_k: int, n_experts: int, factor: float) -> Int[Tensor, "*B"]:
    """C = ceil(factor k T / E), at least 1, for each number T of real tokens.

    1.1 x 100 is 110.00000000000001 in float64, and its ceiling 111: an excess of less than a millionth of a place comes
    from rounding and gets none. From a factor of E/k on nothing is dropped.
    """
    share = min(factor, n_experts) * top_k / n_experts
    return (real_tokens.double() * share - 1e-6).ceil().clamp(min=1.0).to(torch.int64)


def kept_second_choices(weights: Float[Tensor, "T K"], threshold: float) -> Bool[Tensor, "T K"]:
    """Which choices are kept: the first always, a later one with probability min(1, weight / ``threshold``).

    ``weights`` are normalised. GShard (Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1) keeps the second if
    2 g > U(0, 1), a threshold of 0.5; ST-MoE (Zoph et al. 2022, arXiv 2202.08906) has 0.2. A choice that is not kept
    takes no room under a capacity, as in the implementations known to us; algorithm 1 as printed lets it take some.
    Draws T K numbers from the default generator of the weights' device.
    """
    weights = weights.detach()
    kept = torch.rand_like(weights) < weights / threshold
    kept[:, 0] = True
    return kept


def _priority(routing: Routing, config: CapacityConfig) -> Int[Tensor, " TK"]:
    """The T K places, as positions in the flattened selection, in the order in which they find room."""
    n_places = routing.selected.numel()
    places = torch.arange(n_places, device=routing.selected.device)
    if config.order == "choice":
        return places.view_as(routing.selected).T.flatten()
    if config.order == "score":
        return routing.weights.detach().flatten().argsort(descending=True, stable=True)
    return places


def _real_tokens(routing: Routing, sequences: int) -> Int[Tensor, " B"]:
    if routing.mask is None:
        return torch.full((sequences,), routing.n_tokens // sequences, device=routing.selected.device)
    return routing.mask.view(sequences, -1).sum(dim=1)
