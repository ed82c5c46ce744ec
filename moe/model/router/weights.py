"""From scores to the weights of the selected experts, and to the gradient of those that were not selected."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def combine_weights(
    scores: Float[Tensor, "T K"],
    normalise: bool,
    scale: float,
    weighted: Bool[Tensor, "T K"] | None = None,
) -> Float[Tensor, "T K"]:
    """The selected experts' ``scores``, divided by their sum if ``normalise``, times ``scale`` (once, in both cases).

    Softmax over all experts, top-k and normalisation equal a softmax over the k selected logits (Jiang et al. 2024,
    Mixtral, section 2.1). Places that are not ``weighted`` get 0 and no part of the sum. A token whose selected scores
    are all as good as 0 keeps them, for dividing by their sum would give NaN, forward or backward: sigmoids of large
    negative logits, and probabilities of experts that something else than the logits has selected.
    """
    if weighted is not None:
        scores = scores.masked_fill(~weighted, 0.0)
    if normalise:
        scores = scores / _divisor(scores)
    return scores if scale == 1.0 else scores * scale


def equal_scores(selected: Int[Tensor, "T K"], n_experts: int, dtype: torch.dtype) -> Float[Tensor, "T E"]:
    """The scores of a rule that computes none: one over K for each of a token's K experts, 0 for the others."""
    n_tokens, top_k = selected.shape
    zeros = torch.zeros(n_tokens, n_experts, dtype=dtype, device=selected.device)
    return zeros.scatter_(-1, selected, 1.0 / top_k)


def straight_through_weights(
    scores: Float[Tensor, "T E"], selected: Int[Tensor, "T K"], normalise: bool, scale: float
) -> Float[Tensor, "T E"]:
    """Exact zeros with the gradient of the weights that the unselected experts would have had (DenseMixer).

    The selection counts as the identity in the backward pass: the score of every expert gets ⟨dL/dy, expert(x)⟩. With
    ``normalise`` the sum over the selected experts divides, as a constant for those that were not selected.
    """
    unselected = scores.scatter(-1, selected, 0.0)
    if normalise:
        unselected = unselected / _divisor(scores.detach().gather(-1, selected))
    return scale * (unselected - unselected.detach())


def _divisor(scores: Float[Tensor, "T K"]) -> Float[Tensor, "T 1"]:
    """Each token's sum of scores, or 1 where it is so small that a gradient divided by it could overflow."""
    limits = torch.finfo(scores.dtype)
    return torch.threshold(scores.sum(dim=-1, keepdim=True), limits.tiny / limits.eps, 1.0)
