"""Losses that keep experts evenly used and router logits small: pure functions of a routing.

Every loss is per layer and counts real tokens only. The load-balancing loss here reads 1 at perfect balance and E / K
when all tokens go to the same K experts. Other codebases scale it differently (T tokens, L MoE layers; c is the
coefficient that reproduces a coefficient a of theirs here):

    Switch, Megatron      a E/(K T²) Σ_e count_e Σ_t p_te, summed over layers         c = a
    MegaBlocks (OLMoE)    a E/(L K T) Σ_layers <count, mean p>, the mean over layers  c = a / L
    OLMo-core             a E/(K T) <count, mean p>, divided by the number of layers  c = a / L
    transformers          a E Σ_e (count_e / T) P_e, layers pooled before the product c = a K for one layer; no equal
                          (K at balance; one layer can hide another's imbalance)      for several
    DeepSeekMoE, V2, V3   the same form over the tokens of each sequence              c = a, in another scope
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.model.routing import Routing


def load_balancing_loss(routing: Routing, counts: Int[Tensor, " E"] | None = None) -> Float[Tensor, ""]:
    """E Σ_e f_e P_e (Fedus et al. 2022, Switch Transformers, eq. 4-6), for K choices a token.

    f_e is the share of assignments that went to expert e, P_e the mean score of e over the tokens of ``routing``. Only
    P carries a gradient. ``counts`` replaces the counts of ``routing`` to take f over more tokens than it holds (Qiu
    et al. 2025, "Demons in the detail": f over the global batch, P local). Values below 1 are legal: for hard
    top-k the uniform load is not the minimum of this form.
    """
    counts = routing.counts() if counts is None else counts
    mean_score = _sum_over_tokens(routing.scores, routing) / routing.real_tokens().clamp(min=1)
    load = counts.to(mean_score.dtype) / counts.sum().clamp(min=1)
    return routing.n_experts * (load * mean_score).sum()


def z_loss(routing: Routing) -> Float[Tensor, ""]:
    """Mean over tokens of (log Σ_e exp z_e)² (Zoph et al. 2022, ST-MoE, eq. 5)."""
    squared = torch.logsumexp(routing.logits, dim=-1, keepdim=True).square()
    return _sum_over_tokens(squared, routing).squeeze(0) / routing.real_tokens().clamp(min=1)


def _sum_over_tokens(values: Float[Tensor, "T n"], routing: Routing) -> Float[Tensor, " n"]:
    if routing.mask is not None:
        values = values.masked_fill(~routing.mask[:, None], 0.0)
    return values.sum(dim=0)
