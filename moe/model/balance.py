"""Losses that keep experts evenly used and router logits small: pure functions of a routing.

Every loss is per layer, counts real tokens only, and returns its own published scale. :func:`common_scale` brings each
to one on which 1 is perfect balance. The load-balancing loss is on it already: E / K when all tokens go to the same K
experts. Other codebases scale it differently (T tokens, L MoE layers; c is the coefficient that reproduces their
coefficient a here, where the losses of the layers are added up):

    Switch, Megatron      a E/(K T²) Σ_e count_e Σ_t p_te, summed over layers         c = a
    MegaBlocks (OLMoE)    a E/(L K T) Σ_layers <count, mean p>, the mean over layers  c = a / L
    OLMo-core             a E/(K T) <count, mean p>, divided by the number of layers  c = a / L
    transformers          a E Σ_e (count_e / T) P_e, layers pooled before the product c = a K for one layer; no equal
                          (K at balance; one layer can hide another's imbalance)      for several
    DeepSeekMoE, V2       the same form as Switch                                     c = a
    DeepSeek-V3           the same over each sequence, P from normalised scores       c = a, per_sequence
    GShard                a/E Σ_e (first choices of e / T) P_e                        c = a / E², choices "first"
    Mesh, fairseq (2021)  a E² mean_e (first choices of e / T) P_e                    c = a, choices "first"
    top-p routing         a E Σ_e (count_e / T) P_e, with A assignments a token       c = a A, which varies
    MoE++                 a Σ_e η_e (count_e / T) P_e, summed over layers             c = a K / E, special_weight τ
    ReMoE (eq. 10)        a/(L T) Σ_layers Σ_t Σ_e f_e g_te, of sparsity_loss         c = a / L, and adapts
    SimBal                a ‖W Wᵀ - I‖₁ of each router, of orthogonality_loss         c = a, if added up over layers
"""

from collections.abc import Callable
from dataclasses import replace
from math import log

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.config import BalancedChoices
from moe.model.routing import Routing

# ----------------------------------------------------------------------------------------------------------- even loads


def load_balancing_loss(
    routing: Routing,
    counts: Int[Tensor, " E"] | None = None,
    *,
    per_sequence: bool = False,
    choices: BalancedChoices = "all",
    special_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """E Σ_e f_e P_e (Fedus et al. 2022, Switch Transformers, eq. 4-6), for K choices a token.

    f_e is the share of assignments that went to expert e, P_e the mean score of e over the tokens of ``routing``. Only
    P carries a gradient. Scores that are no probabilities are divided by their sum over the experts first (DeepSeek-V3,
    eq. 19-20); a token whose scores are all 0 has none to divide and is left out of P.

    ``counts`` replaces the counts of ``routing`` to take f over more tokens than it holds (Qiu et al. 2025, "Demons in
    the detail": f over the global batch, P local). ``per_sequence`` takes f and P over each sequence, and the mean over
    the sequences with a real token (DeepSeek-V3, eq. 17-20). ``choices`` "first" counts the first choice of each token
    alone (Lepikhin et al. 2021, GShard, algorithm 1). ``special_weight`` multiplies the terms of the experts without an
    MLP (Jin et al. 2025, MoE++, eq. 7), whose fair share is then 1 / special_weight times that of the others.

    Values below 1 are legal: for hard top-k the uniform load is not the minimum of this form.
    """
    counted = routing.first_choices() if choices == "first" else routing
    if per_sequence:
        if counts is not None:
            raise ValueError("counts are of more tokens than a sequence, so they do not go with per_sequence")
        return _over_sequences(routing, counted.sequence_counts(), special_weight)
    counts = counted.counts() if counts is None else counts
    mean_score = _mean_scores(routing)
    load = counts.to(mean_score.dtype) / counts.sum().clamp(min=1)
    if special_weight != 1:
        load = load * _expert_weights(routing, special_weight)
    return routing.n_experts * (load * mean_score).sum()


def device_loss(
    routing: Routing, n_devices: int, counts: Int[Tensor, " E"] | None = None, *, per_sequence: bool = False
) -> Float[Tensor, ""]:
    """Σ_g f'_g P'_g over D groups of consecutive experts (Dai et al. 2024, DeepSeekMoE, eq. 15-17; V2, eq. 26-28).

    f'_g is the mean of E f_e over the group and P'_g the sum of P_e, so that it is the load-balancing loss of D wide
    experts: 1 at balance, D where one group gets everything. ``counts`` and ``per_sequence`` as there.
    """
    per_device = routing.n_experts // n_devices
    scores = routing.scores.reshape(routing.n_tokens, n_devices, per_device).sum(dim=-1)
    if counts is not None:
        counts = counts.reshape(n_devices, -1).sum(dim=-1)
    device = routing.selected // per_device
    wide = replace(routing, logits=scores, scores=scores, selected=device, n_special=0)
    return load_balancing_loss(wide, counts, per_sequence=per_sequence)


def importance_loss(routing: Routing) -> Float[Tensor, ""]:
    """CV² of the experts' importance, Σ_t weight_te (Shazeer et al. 2017, eq. 6-7): variance over squared mean."""
    weights = routing.weights
    if (present := routing.present) is not None:
        weights = weights.masked_fill(~present, 0.0)
    # Through a table of all tokens: added straight into E sums, the order on a GPU would change from run to run.
    table = weights.new_zeros(routing.n_tokens, routing.n_experts).scatter_add(1, routing.selected, weights)
    return _squared_variation(table.sum(dim=0))


def noisy_load_loss(routing: Routing) -> Float[Tensor, ""]:
    """CV² of the experts' smooth load (Shazeer et al. 2017, eq. 8-11).

    The load of expert e is Σ_t Φ((clean logit_te - threshold_te) / std_te): the probability that e would be among the K
    best, were its own noise drawn again. The threshold is the K-th largest noisy logit of the other experts. With
    K = E every expert is certain. Raises ValueError for a routing whose logits had no learned noise.
    """
    noise, top_k = routing.noise, routing.top_k
    if noise is None:
        raise ValueError("the noisy load needs the learned noise of the logits, which this routing has none of")
    if top_k < routing.n_experts:
        best = routing.logits.topk(top_k + 1, dim=-1).values
        kth, next_best = best[:, top_k - 1 : top_k], best[:, top_k:]
        # Without an expert that is among the K best, the K-th of the others is the next best of all.
        threshold = torch.where(routing.logits > next_best, next_best, kth)
        probability = torch.special.ndtr((noise.clean_logits - threshold) / noise.std)
    else:
        probability = torch.ones_like(routing.logits)
    return _squared_variation(_sum_over_tokens(probability, routing))


def sparsity_loss(routing: Routing, top_k: int) -> Float[Tensor, ""]:
    """1/T Σ_t Σ_e f_e g_te, f_e = E/(k T) count_e (Wang et al. 2025, ReMoE, eq. 10-11): L1 on the gates g = ReLU.

    ``top_k`` is the number of experts a token shall have on average; f carries no gradient. The coefficient of this
    loss is steered by :func:`adapted_coefficient`.
    """
    tokens = routing.real_tokens().clamp(min=1)
    mean_gate = _sum_over_tokens(routing.scores, routing) / tokens
    load = routing.counts().to(mean_gate.dtype) * (routing.n_experts / top_k) / tokens
    return (load * mean_gate).sum()


def adapted_coefficient(coefficient: float, rate: float, gates_on: int, target: int) -> float:
    """coefficient · rate^sign(target sparsity - sparsity) (ReMoE, eq. 7-8): harder while more gates are on than wanted.

    ``gates_on`` of the L layers and T tokens of a step, and ``target`` = k T L of them: whole numbers, so that a step
    that hits the target exactly changes nothing.
    """
    return coefficient * rate if gates_on > target else coefficient / rate if gates_on < target else coefficient


# ------------------------------------------------------------------------------------------------------- router outputs


def z_loss(routing: Routing) -> Float[Tensor, ""]:
    """Mean over tokens of (log Σ_e exp z_e)² (Zoph et al. 2022, ST-MoE, eq. 5)."""
    squared = torch.logsumexp(routing.logits, dim=-1, keepdim=True).square()
    return _sum_over_tokens(squared, routing).squeeze(0) / routing.real_tokens().clamp(min=1)


def entropy_loss(routing: Routing) -> Float[Tensor, ""]:
    """Mean over tokens of -Σ_e p_e log p_e, p = softmax of the logits, in nats (Huang et al. 2024, top-p, Loss_d)."""
    log_probabilities = routing.logits.log_softmax(dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1, keepdim=True)
    return _sum_over_tokens(entropy, routing).squeeze(0) / routing.real_tokens().clamp(min=1)


def orthogonality_loss(weight: Float[Tensor, "E D"]) -> Float[Tensor, ""]:
    """‖W Wᵀ - I‖₁, the sum over all E² entries (Omi et al. 2025, SimBal, eq. 4): of the router's matrix, no token.

    0 for orthonormal rows, which need D ≥ E.
    """
    with torch.autocast(weight.device.type, enabled=False):
        rows = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return (rows @ rows.t() - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).abs().sum()


# ------------------------------------------------------------------------------------------------------- one scale


def common_scale(
    name: str, loss: Float[Tensor, ""], routing: Routing, special_weight: float = 1.0
) -> Float[Tensor, ""]:
    """The loss called ``name`` (a coefficient of BalanceConfig) of ``routing`` on the scale where 1 is perfect balance.

    load_balance, device   as they are: 1 at balance, E / K and D at collapse; with ``special_weight``, which moves the
                           fair shares, times Σ_e (1 / η_e) / E, so that it is 1 where f and P are those shares
    importance, noisy_load 1 + CV², which is E Σ_e f_e² for the shares f: 1 at balance, E when one expert has all
    sparsity               the load-balancing loss of the same routing, with each token's gates over their sum; ``loss``
                           itself grows with the gates, and with how many of them are on
    z_loss                 over (log E)², what logits of 0 have: 1 is a router that has learned nothing
    entropy                over log E: 1 is uniform, 0 certain
    orthogonality          1 + loss / E: 1 where rows are orthonormal, 2 for a router of zeros

    Raises KeyError for another name.
    """
    conversions: dict[str, Callable[[], Tensor]] = {
        "load_balance": lambda: loss * (fair_experts(routing, special_weight) / routing.n_experts),
        "device": lambda: loss,
        "importance": lambda: 1 + loss,
        "noisy_load": lambda: 1 + loss,
        "sparsity": lambda: load_balancing_loss(routing),
        "z_loss": lambda: loss / log(routing.n_experts) ** 2 if routing.n_experts > 1 else torch.ones_like(loss),
        "entropy": lambda: loss / log(routing.n_experts) if routing.n_experts > 1 else torch.ones_like(loss),
        "orthogonality": lambda: 1 + loss / routing.n_experts,
    }
    return conversions[name]()


def fair_experts(routing: Routing, special_weight: float) -> float:
    """Σ_e 1 / η_e: E, where a special expert counts 1 / ``special_weight``-fold, as its fair share does.

    Σ_e η_e f_e² over shares f is smallest, and 1 over this, at f_e proportional to 1 / η_e. With a weight of 0 there is
    no such share; the MLPs alone are counted then.
    """
    return routing.n_mlps + (routing.n_special / special_weight if special_weight else 0.0)


# -------------------------------------------------------------------------------------------------------------- helpers


def _over_sequences(routing: Routing, counts: Int[Tensor, "B E"], special_weight: float) -> Float[Tensor, ""]:
    shares, routed = _shares_of_scores(routing)
    tokens = routed.reshape(routing.n_sequences, -1, 1).sum(dim=1)
    mean_score = shares.reshape(routing.n_sequences, -1, routing.n_experts).sum(dim=1) / tokens.clamp(min=1)
    load = counts.to(mean_score.dtype) / counts.sum(dim=1, keepdim=True).clamp(min=1)
    if special_weight != 1:
        load = load * _expert_weights(routing, special_weight)
    total: Tensor = routing.n_experts * (load * mean_score).sum()
    return total / (tokens > 0).sum().clamp(min=1)


def _mean_scores(routing: Routing) -> Float[Tensor, " E"]:
    """P: the mean of the scores, as probabilities, over the real tokens that have any."""
    if (tally := routing.own_tally) is not None:
        return tally.share_sums / tally.n_scored.clamp(min=1)
    if routing.scores_are_probabilities:
        return _sum_over_tokens(routing.scores, routing) / routing.real_tokens().clamp(min=1)
    shares, routed = _shares_of_scores(routing)
    return shares.sum(dim=0) / routed.sum().clamp(min=1)


def _shares_of_scores(routing: Routing) -> tuple[Float[Tensor, "T E"], Int[Tensor, "T 1"]]:
    """Each token's scores as probabilities, 0 for padding, and 1 for the tokens that have such, else 0."""
    scores = routing.scores
    routed = torch.ones_like(scores[:, :1], dtype=torch.bool)
    if not routing.scores_are_probabilities:
        total = scores.sum(dim=-1, keepdim=True)
        # No epsilon beside the sum: small scores would count for less, and the router would learn to make them small.
        routed = total > 0
        scores = scores / total.masked_fill(~routed, 1.0)
    if routing.mask is not None:
        routed = routed & routing.mask[:, None]
    return scores.masked_fill(~routed, 0.0), routed.to(torch.int64)


def _expert_weights(routing: Routing, special_weight: float) -> Float[Tensor, " E"]:
    weights = routing.scores.new_ones(routing.n_experts)
    weights[routing.n_mlps :] = special_weight
    return weights


def _squared_variation(values: Float[Tensor, " E"]) -> Float[Tensor, ""]:
    """Variance over squared mean; 0 where nothing was routed."""
    mean = values.mean()
    return (values - mean).square().mean() / mean.square().masked_fill(mean == 0, 1.0)


def _sum_over_tokens(values: Float[Tensor, "T n"], routing: Routing) -> Float[Tensor, " n"]:
    if routing.mask is not None:
        values = values.masked_fill(~routing.mask[:, None], 0.0)
    return values.sum(dim=0)
