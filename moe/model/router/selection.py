"""The selection rules: from scores to the experts of each token. A choice has no gradient.

Rules that look at one token at a time are here; those that compare tokens (expert choice, Sinkhorn, BASE) are in
:mod:`.assignment`. :func:`choose` is the axis itself: one line a rule.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.config import GroupScore, RouterConfig
from moe.model.router.assignment import balanced_assignment, expert_choice, sinkhorn_plan

SIXTEEN_BITS, THIRTY_TWO_BITS = 16, 0xFFFFFFFF


class Choice(NamedTuple):
    """The experts of each token, in K places."""

    selected: Int[Tensor, "T K"]
    """no expert twice for one token, best first"""
    assigned: Bool[Tensor, "T K"] | None = None
    """which places hold an assignment; None: all"""
    weights: Float[Tensor, "T K"] | None = None
    """what the rule itself weighs them with, with its gradient; None: their scores"""


def choose(
    config: RouterConfig,
    logits: Float[Tensor, "T E"],
    scores: Float[Tensor, "T E"],
    selection_bias: Float[Tensor, " E"] | None,
    mask: Bool[Tensor, " T"] | None,
    *,
    training: bool,
    layer: int,
    token_ids: Int[Tensor, " T"] | None,
    positions: Int[Tensor, " T"] | None,
) -> Choice:
    """The experts of each token by ``config.selection``.

    On a GPU top_k and group_limited are computed by :mod:`.fused`: a change here is one there, too.
    Raises ValueError where hash has no ``token_ids``, or random not both.
    """
    rule, top_k, n_experts = config.selection, config.top_k, logits.shape[1]
    if rule in ("hash", "random"):
        return Choice(hashed(_keys(rule, token_ids, positions), layer, n_experts, top_k))
    if rule == "sampled":
        return sampled(logits, top_k, config.margin, training, config.gradient == "heun")
    # Quantile balancing solves for a bias on the logits themselves; the others move the scores.
    preference = (logits if config.selection_bias == "quantile" else scores).detach()
    if selection_bias is not None:
        preference = preference + selection_bias
    if config.noise == "gumbel" and training:
        preference = logits.detach() + _gumbel(logits)
    if rule == "group_limited":
        assert config.n_groups is not None
        assert config.top_groups is not None
        preference = within_best_groups(preference, config.n_groups, config.top_groups, config.group_score)
    elif rule == "top_p":
        return smallest_set(preference, config.probability_mass)
    elif rule == "positive":
        return as_places(preference > 0, preference)
    elif rule == "expert_choice":
        return as_places(expert_choice(preference, top_k, mask), preference)
    elif rule == "sinkhorn" and training:
        preference = sinkhorn_plan(logits.detach(), mask)
    elif rule == "base" and training:
        return Choice(balanced_assignment(logits.detach(), mask)[:, None])
    return Choice(select_top_k(preference, n_experts if rule == "all" else top_k))


def select_top_k(preference: Float[Tensor, "T E"], top_k: int) -> Int[Tensor, "T K"]:
    """The K experts of largest preference, best first."""
    return preference.detach().topk(top_k, dim=-1).indices


def within_best_groups(
    preference: Float[Tensor, "T E"], n_groups: int, top_groups: int, group_score: GroupScore
) -> Float[Tensor, "T E"]:
    """``preference`` with -inf for experts outside a token's best groups, so that a top-k stays within them.

    A group is ranked by its best expert (DeepSeek-V2, section 2.1.2) or by the sum of its best two (DeepSeek-V3,
    section 2.1.2). The mask is -inf: a 0 would win over biased preferences below 0.
    """
    grouped = rearrange(preference, "t (g e) -> t g e", g=n_groups)
    rank = grouped.amax(dim=-1) if group_score == "max" else grouped.topk(2, dim=-1).values.sum(dim=-1)
    allowed = torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, rank.topk(top_groups, dim=-1).indices, True)
    return rearrange(grouped.masked_fill(~allowed[..., None], float("-inf")), "t g e -> t (g e)")


def smallest_set(probabilities: Float[Tensor, "T E"], threshold: float) -> Choice:
    """The fewest experts whose probabilities together exceed ``threshold`` (Huang et al. 2024, 2403.07652, eq. 4)."""
    sorted_probabilities, selected = probabilities.sort(dim=-1, descending=True, stable=True)
    before = sorted_probabilities.cumsum(dim=-1) - sorted_probabilities
    assigned = before <= threshold
    assigned[:, 0] = True
    return Choice(selected, assigned)


def as_places(chosen: Bool[Tensor, "T E"], preference: Float[Tensor, "T E"]) -> Choice:
    """A choice of any number of experts a token as K = E places, the chosen first and by preference, the rest empty."""
    ranked = preference.masked_fill(~chosen, float("-inf"))
    selected = ranked.argsort(dim=-1, descending=True, stable=True)
    return Choice(selected, chosen.gather(-1, selected))


def sampled(logits: Float[Tensor, "T E"], top_k: int, margin: float, training: bool, heun: bool) -> Choice:
    """SparseMixer-v2 (Liu et al. 2024, GRIN, section 2.2): experts drawn one after the other, and their weights.

    For each choice, experts whose logit lies further than 2·``margin`` below the best, relative to the larger size of
    the two, are masked; in training one is drawn from the softmax over the rest, in evaluation the best is taken. Its
    probability there is its weight; then it leaves the race.

    With ``heun``, the draw's gradient is estimated by Heun's third-order rule: an expert other than the best has its
    output scaled by 1/3 three times in four, and the gradient is that of the unscaled weight.
    """
    remaining, choices, weights = logits, [], []
    for _ in range(top_k):
        with torch.no_grad():
            best, argmax = remaining.max(dim=-1, keepdim=True)
            far = (best - remaining) / remaining.abs().maximum(best.expand_as(remaining)) > 2 * margin
        gates = remaining.masked_fill(far, float("-inf"))
        choice = (gates.detach() + _gumbel(gates)).argmax(dim=-1, keepdim=True) if training else argmax
        probability = gates.softmax(dim=-1)
        weight = probability.gather(-1, choice)
        if training and heun:
            full = (choice == argmax) | (torch.rand_like(weight) > 0.75)
            weight = weight - (weight.detach() * (2 / 3)).masked_fill(full, 0.0)
        choices.append(choice)
        weights.append(weight)
        remaining = remaining.scatter(-1, choice, float("-inf"))
    return Choice(torch.cat(choices, dim=-1), None, torch.cat(weights, dim=-1))


def hashed(keys: Int[Tensor, " T"], layer: int, n_experts: int, top_k: int) -> Int[Tensor, "T K"]:
    """K distinct experts for each key, pseudo-random and always the same (Roller et al. 2021, Hash Layers, section 3).

    Each (key, layer, expert) gets 32 mixed bits, and a key's experts are those of the largest; a table of the whole
    vocabulary would hold the same.
    """
    expert = torch.arange(1, n_experts + 1, device=keys.device) + (layer + 1) * n_experts
    return _mix(_mix(keys)[:, None] ^ _mix(expert)).topk(top_k, dim=-1).indices


def _keys(rule: str, token_ids: Int[Tensor, " T"] | None, positions: Int[Tensor, " T"] | None) -> Int[Tensor, " T"]:
    if token_ids is None:
        raise ValueError(f"selection {rule} needs token_ids: pass them to the layer")
    if rule == "hash":
        return token_ids
    if positions is None:
        raise ValueError("selection random needs positions: pass them to the layer")
    return _mix(token_ids) ^ _mix(positions + THIRTY_TWO_BITS // 2)


def _mix(value: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """An invertible scramble of 32 bits, by shifts and an odd factor small enough for int64 not to overflow."""
    value = value & THIRTY_TWO_BITS
    for _ in range(2):
        value = ((value ^ (value >> SIXTEEN_BITS)) * 0x45D9F3B) & THIRTY_TWO_BITS
    return value ^ (value >> SIXTEEN_BITS)


def _gumbel(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Standard Gumbel noise: the largest of logits + noise is a draw from their softmax, the K largest K draws
    without replacement (Kool et al. 2019, section 2.2)."""
    return -torch.empty_like(logits).exponential_().log()
