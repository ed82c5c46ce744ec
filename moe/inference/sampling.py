"""From the logits of a position to its next token."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; raises ValueError for values out of range."""

    temperature: float = 1.0
    """divides the logits; 0 is greedy"""
    top_k: int | None = None
    """keep the k most likely tokens"""
    top_p: float | None = None
    """keep the smallest set of most likely tokens whose probability reaches p (Holtzman et al. 2020)"""

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 1e3:
            raise ValueError(f"temperature is {self.temperature}, and must be 0 (greedy) or from 0.001 to 1000")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, and must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, and must lie in (0, 1]")


def sample(logits: Float[Tensor, "B V"], sampling: Sampling, generators: list[torch.Generator]) -> Int[Tensor, " B"]:
    """Draw one token a row, row b with ``generators[b]``: what a row draws does not depend on the other rows.

    Raises ValueError for logits that are not finite.
    """
    # The smallest and the largest are finite only if all are: NaN is passed on.
    if not all(math.isfinite(extreme.item()) for extreme in logits.aminmax()):
        raise ValueError("the model's logits are not finite, so there is nothing to draw from")
    if sampling.temperature == 0:
        return logits.max(dim=-1).indices  # the same as argmax, in a third of its time on a CPU
    probabilities = (keep_likely(logits.float() / sampling.temperature, sampling)).softmax(dim=-1).cpu()
    drawn = [torch.multinomial(row, 1, generator=own) for row, own in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn).to(logits.device)


def keep_likely(logits: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """Logits with every token outside top-k, then outside top-p, at -inf; the most likely token always stays."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kept = logits.topk(sampling.top_k, dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
    if sampling.top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(dim=-1)
        before = probability.cumsum(dim=-1) - probability
        ordered = ordered.masked_fill(before >= sampling.top_p, float("-inf"))
        logits = logits.scatter(-1, order, ordered)
    return logits
