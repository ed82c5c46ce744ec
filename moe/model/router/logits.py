"""From hidden states to logits, and from logits to scores."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moe.config import Score

COLDEST = 0.01
"""The cosine router's temperature goes no lower: its logits stay within 100 (as in Tutel)."""


def linear_logits(x: Float[Tensor, "T n"], weight: Float[Tensor, "m n"]) -> Float[Tensor, "T m"]:
    """x Wᵀ in at least float32, outside autocast."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype))


def cosine_logits(
    x: Float[Tensor, "T W"], experts: Float[Tensor, "E W"], temperature: Float[Tensor, ""]
) -> Float[Tensor, "T E"]:
    """cos(x, e) / τ for each expert's vector e (Chi et al. 2022, X-MoE, eq. 6-7): bounded, whatever the norm of x."""
    unit = F.normalize(experts.to(x.dtype), dim=-1)
    return linear_logits(F.normalize(x, dim=-1), unit) / temperature.to(x.dtype).clamp(min=COLDEST)


def logit_norm(logits: Float[Tensor, "T E"], factor: float) -> Float[Tensor, "T E"]:
    """λ (z - mean z) / std z over the experts of a token (Wei et al. 2024, Skywork-MoE, section 4.1).

    The population's deviation; a token whose logits are all equal keeps zeros.
    """
    centred = logits - logits.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return factor * centred * torch.rsqrt(variance + torch.finfo(logits.dtype).eps)


def noise_std(noise_logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """softplus(x W_noise), the deviation of the noise on each logit (Shazeer et al. 2017, eq. 4).

    Not below the precision of the dtype: the load loss divides by it.
    """
    return F.softplus(noise_logits).clamp(min=torch.finfo(noise_logits.dtype).eps)


def score_function(logits: Float[Tensor, "T E"], score: Score) -> Float[Tensor, "T E"]:
    """Scores over all experts: probabilities (softmax), each expert on its own (sigmoid, √softplus), or ReLU."""
    if score == "softmax":
        return logits.softmax(dim=-1)
    if score == "sigmoid":
        return logits.sigmoid()
    if score == "sqrt_softplus":
        # The root has no finite slope at 0, which softplus becomes by underflow.
        return F.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt()
    return torch.relu(logits)
