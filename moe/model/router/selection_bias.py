"""What moves the selection bias between two steps, so that loads even out without a loss.

Each function changes the bias in place, so that whoever holds it, a state dict too, sees the new values. They are
called once an optimizer step, with the counts or logits of all its micro-batches on all ranks, and never in evaluation.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


@torch.no_grad()
def sign_update(bias: Float[Tensor, " E"], counts: Int[Tensor, " E"], rate: float) -> None:
    """b_e += rate · sign(mean count - count_e) (Wang et al. 2024, loss-free balancing, algorithm 1; DeepSeek-V3).

    Σ count - E · count_e in whole numbers has that sign, and is 0 exactly where the load is fair.
    """
    bias.add_(torch.sign(counts.sum() - counts.numel() * counts).to(bias.dtype), alpha=rate)


@torch.no_grad()
def proportional_update(bias: Float[Tensor, " E"], counts: Int[Tensor, " E"], rate: float, n_special: int = 0) -> None:
    """b_e += rate · (1/E - count_e / Σ count) for experts with an MLP (LongCat-Flash, 2509.01322, eq. 2).

    1/E is what LongCat's target K_e / (K N) is when the K_e MLPs a token is meant to use are the fair share K N / E of
    its N MLPs (8 of 12 there). The last ``n_special`` experts keep their bias: their load follows from the others'.
    """
    n_experts = counts.numel()
    share = counts.to(bias.dtype) / counts.sum().clamp(min=1)
    error = torch.where(counts.sum() > 0, 1 / n_experts - share, 0.0)
    error[n_experts - n_special :] = 0.0
    bias.add_(error, alpha=rate)


@torch.no_grad()
def quantile_update(bias: Float[Tensor, " E"], logits: Float[Tensor, "T E"], top_k: int) -> None:
    """One step of quantile balancing (Megatron-LM, ``qb_dual_update``): b_e, solved for from the logits of T tokens.

    A token's threshold is its (K+1)-th largest logit + bias, which an expert must beat to be chosen. Expert e gets the
    b_e that puts the logit + b_e of ⌊T K / E⌋ tokens above their thresholds, and the next at its threshold; then the
    biases are centred, which changes no choice. The thresholds move with the biases, so that the load becomes even over
    several steps, not in one. Nothing to do where all experts are chosen, or there is no token.
    """
    n_tokens, n_experts = logits.shape
    if top_k >= n_experts or n_tokens == 0:
        return
    threshold = (logits + bias).topk(top_k + 1, dim=-1).values[:, -1:]
    margin = (logits - threshold).topk(n_tokens * top_k // n_experts + 1, dim=0).values[-1]
    bias.copy_(margin.mean() - margin)
